"""Verification of an export larger than host memory: the same nats, one block of the model at a time."""

from contextlib import contextmanager

import accelerate.hooks
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import MODELS, VOCAB, make_model

from megaft.base.errors import NumericsError
from megaft.checkpoint import export_check
from megaft.checkpoint.export_check import ROWS_FROM_DISK, check_nats, check_nats_from_disk
from megaft.models.hugging_face import NatsModel
from megaft.models.offload import from_disk, offloaded_model

ROWS = torch.randint(0, VOCAB, (ROWS_FROM_DISK + 1, 41), generator=torch.Generator().manual_seed(1)).tolist()


def fetch_from(model):
    return lambda name: model.get_parameter(name).detach().clone()


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MODELS, "tied llama"])
def test_nats_equal_those_of_the_whole_model(tmp_path, name):
    model = make_model("llama", tie_word_embeddings=True) if name == "tied llama" else make_model(name)
    model.save_pretrained(tmp_path / "export")
    found = check_nats_from_disk(model.config, fetch_from(model), tmp_path / "export", ROWS)
    whole = check_nats(lambda: NatsModel(model), tmp_path / "export", ROWS[:ROWS_FROM_DISK])
    assert found.num_tokens == whole.num_tokens == ROWS_FROM_DISK * 40
    assert found.trained == pytest.approx(whole.trained, rel=1e-5)
    assert found.exported == pytest.approx(whole.exported, rel=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


@pytest.mark.slow
@pytest.mark.parametrize("size", ["5MB", "20KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_changed_weight_does_not_pass(tmp_path, dtype, size):
    """Both models read the 16-bit values, the export also from shards."""
    model = make_model("llama").to(dtype)
    model.save_pretrained(tmp_path / "export", max_shard_size=size)
    weights = fetch_from(model.float())
    check_nats_from_disk(model.config, weights, tmp_path / "export", ROWS)

    def changed(name):
        return weights(name) * (1.02 if name == "model.layers.1.mlp.down_proj.weight" else 1)

    with pytest.raises(NumericsError, match=r"export .*not published: .* 320 "):
        check_nats_from_disk(model.config, changed, tmp_path / "export", ROWS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_block_at_a_time_is_in_memory(tmp_path, monkeypatch, name):
    model = make_model(name, **{"n_layer" if name == "gpt2" else "num_hidden_layers": 10})
    model.save_pretrained(tmp_path / "export")
    weights = load_file(tmp_path / "export" / "model.safetensors")
    watched, resident, place = [], {}, accelerate.hooks.set_module_tensor_to_device

    def offloaded(*args):
        watched.append(offloaded_model(*args))
        return watched[-1]

    @contextmanager
    def exported(folder):
        with from_disk(folder) as opened:
            watched.append(opened)
            yield opened

    def count(*args, **options):
        place(*args, **options)
        for number, other in enumerate(watched):
            numel = sum(p.numel() for p in other.parameters() if p.device.type != "meta")
            resident[number] = max(resident.get(number, 0), numel)

    monkeypatch.setattr(export_check, "offloaded_model", offloaded)
    monkeypatch.setattr(export_check, "from_disk", exported)
    monkeypatch.setattr(accelerate.hooks, "set_module_tensor_to_device", count)
    check_nats_from_disk(model.config, weights.__getitem__, tmp_path / "export", ROWS[:2])
    assert len(resident) == 2
    assert all(0 < numel < model.num_parameters() / 5 for numel in resident.values())
