import json

import large_models
import pytest
import torch
from large_models import configuration, markdown, write_model

from megaft.weights.loading.pretrained import load_language_model

TINY = configuration(3, 64, 4)


def test_a_streamed_model_is_one_that_transformers_loads(tmp_path):
    write_model(tmp_path / "model", TINY)
    model = load_language_model(str(tmp_path / "model"), torch.bfloat16)
    assert (model.config.n_layer, model.config.n_embd) == (3, 64)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 4
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(name for name, _ in model.named_parameters())


@pytest.mark.slow
def test_two_ranks_with_half_of_it_each_score_as_its_layers_in_turn(tmp_path, monkeypatch):
    monkeypatch.setattr(large_models, "configuration", lambda *_: TINY)
    measured = large_models.measure_forward(tmp_path / "forward")
    said = measured.said
    assert said["nats_per_token"] == pytest.approx(said["nats_per_token_layer_by_layer"], rel=1e-3)
    assert said["weight_bytes_of_a_rank"] == pytest.approx(said["parameters"], rel=0.01)  # half of two bytes each
    assert sum(measured.rank_bytes) >= measured.anonymous_bytes > max(measured.rank_bytes) > 0
    assert not (tmp_path / "forward").exists()


def test_a_page_has_the_peaks_in_gigabytes():
    case = {"seconds": 8.4, "anonymous_bytes": 3_000_000_000, "rank_bytes": [2_000_000_000, 1_500_000_000]}
    case |= {"machine_bytes": 4_000_000_000, "said": {"loss": 11.2}}
    where = {"git": None, "command": ["x"], "num_cores": 2, "packages": {"torch": "2"}}
    text = markdown({"environment": where, "processor": "p", "cases": {"train": case}})
    assert "| train | 3.00 | 2.00, 1.50 | 4.00 | 8 |" in text
    assert '`{"loss": 11.2}`' in text
