"""Exports that verification refuses to publish; an earlier export stays."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from export_runs import copy_of, export_again, of, state_of
from safetensors import SafetensorError
from tiny_models import change_tensors
from transformers import PreTrainedModel

from megaft.base.errors import CheckpointError, ConfigError, DataError, NumericsError
from megaft.checkpoint import export_formats
from megaft.checkpoint.export_check import ROWS_FROM_DISK
from megaft.checkpoint.export_formats import HuggingFaceExport, MegatronExport
from megaft.config.train import parse_train
from megaft.data.tokenizer import Tokenizer
from megaft.run.validation import NUM_TOKENS
from megaft.weights.loading.pretrained import load_language_model
from megaft.weights.manifest import folder_of

pytestmark = pytest.mark.slow


@pytest.fixture
def config(export_runs, request, tmp_path):
    return copy_of(parse_train(export_runs[request.param]), tmp_path)


@of("full")
@pytest.mark.parametrize("has_room", [True, False])
def test_an_export_of_the_megatron_backend_is_checked_too(config, has_room, monkeypatch):
    """Both backends, with and without host memory for the whole model."""
    monkeypatch.setattr(export_formats, "available_memory", lambda: 1 << 40 if has_room else 0)
    monkeypatch.setattr(export_formats, "check_nats_from_disk" if has_room else "check_nats", None)
    folder = export_again(replace(config, model=replace(config.model, backend="megatron")))
    num_tokens = NUM_TOKENS if has_room else ROWS_FROM_DISK * config.longest_input
    said = rf"{num_tokens} held-out tokens at (\d\.\d+) nats per token; the trained model had (\d\.\d+)\."
    (nats,) = re.findall(said, (folder / "README.md").read_text())
    assert float(nats[0]) == pytest.approx(float(nats[1]), rel=1e-5)


@of("full", "half")
def test_an_export_without_room_for_the_model_has_the_same_files(config, monkeypatch):
    """Loaded and from scratch, in fp32 and bf16: nothing builds the whole model."""
    state = replace(state_of(config), best_step=None)
    dtype = "bfloat16" if config.model.from_scratch else "float32"
    before = contents(export_again(config, state, dtype))
    monkeypatch.setattr(export_formats, "available_memory", lambda: 0)
    monkeypatch.setattr(export_formats.hugging_face, "build", None)
    folder = export_again(config, state, dtype)
    assert f"{ROWS_FROM_DISK * config.longest_input} held-out tokens" in (folder / "README.md").read_text()
    assert contents(folder) == before


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "README.md"}


@of("full")
def test_an_export_of_another_tokenizer_is_not_published(config, monkeypatch):
    """The tokenizer has other merges, but equal tokens and vocabulary size."""

    def save_another(self, folder):
        save(self, folder)
        path = Path(folder, "tokenizer.json")
        state = json.loads(path.read_text())
        state["model"]["merges"] = state["model"]["merges"][::-1]
        path.write_text(json.dumps(state))

    card = (config.run.dir / "export" / "README.md").read_bytes()
    save = Tokenizer.save
    monkeypatch.setattr(Tokenizer, "save", save_another)
    with pytest.raises(DataError, match=r"^the tokenizer in \S+ .*: ids of "):
        export_again(config)
    assert (config.run.dir / "export" / "README.md").read_bytes() == card
    assert not (config.run.dir / "export.tmp").exists()


@of("full")
@pytest.mark.parametrize("backend", ["hugging-face", "megatron", "megatron without room"])
def test_an_export_of_another_model_is_not_published(config, backend, monkeypatch):
    def write_another(self, folder):
        write(self, folder)
        change_tensors(folder, lambda tensors: tensors["transformer.h.1.mlp.c_proj.weight"].mul_(0.5))

    folder = config.run.dir / "export"
    before = {path: path.read_bytes() for path in folder.iterdir()}
    form = HuggingFaceExport if backend == "hugging-face" else MegatronExport
    write = form.write
    monkeypatch.setattr(form, "write", write_another)
    monkeypatch.setattr(export_formats, "available_memory", lambda: 0 if "without" in backend else 1 << 40)
    with pytest.raises(NumericsError, match=r"full/export\S* .*not published: .*intact") as error:
        export_again(replace(config, model=replace(config.model, backend=backend.split()[0])))
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert not (config.run.dir / "export.tmp").exists()


@of("full")
def test_a_full_disk_is_named_and_the_export_before_stays(config, monkeypatch):
    def refuse(*_, **__):
        raise SafetensorError("Error while serializing: No space left on device (os error 28)")

    folder = config.run.dir / "export"
    before = {path: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", refuse)
    with pytest.raises(ConfigError, match=r"full/export .*: .*No space left"):
        export_again(config)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@of("adapters")
def test_an_export_with_adapters_needs_memory_for_the_model(config, monkeypatch):
    before = contents(export_again(config))
    parameters = sum(weight.numel() for weight in load_language_model(config.model.path).parameters())
    monkeypatch.setattr(export_formats, "available_memory", lambda: 4 * parameters - 1)
    with pytest.raises(ConfigError, match=f"run.export is best.* {4 * parameters:,} bytes"):
        export_again(config)
    assert contents(config.run.dir / "export") == before
    monkeypatch.setattr(export_formats, "available_memory", lambda: 4 * parameters)
    assert contents(export_again(config)) == before


@of("full")
def test_a_damaged_checkpoint_is_not_exported(config):
    path = folder_of(config.run.dir, 1) / "rank-00000.safetensors"
    whole = path.read_bytes()
    before = (config.run.dir / "export" / "README.md").read_text()
    try:
        path.write_bytes(whole[:-1])
        with pytest.raises(CheckpointError, match=r"rank-00000.safetensors has"):
            export_again(config, replace(state_of(config), best_step=1))
    finally:
        path.write_bytes(whole)
    assert (config.run.dir / "export" / "README.md").read_text() == before
