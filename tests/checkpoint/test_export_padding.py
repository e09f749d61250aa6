"""Exports of families with special treatment of padding tokens: transformers loads the trained model."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families_models import tiny_config, tiny_model
from transformers import AutoModelForCausalLM, GenerationConfig

from megaft.checkpoint import export_formats
from megaft.checkpoint.export_formats import HuggingFaceExport
from megaft.config.train import LoraConfig, ModelConfig

PADDING = 2
FAMILIES = {
    "youtu": ("youtu", {"pad_token_id": PADDING}),
    "untied youtu": ("youtu", {"pad_token_id": PADDING, "tie_word_embeddings": False}),
    "xlm": ("xlm", {"causal": True, "pad_index": PADDING}),
    "llama": ("llama", {"pad_token_id": PADDING}),
}
ROWS = [[5, 6, 7, PADDING, 9, PADDING, 11, 12], [1, PADDING, 3, 4, 5, 6, 7, 8]]


def nats_of(model):
    ids = torch.tensor(ROWS)
    with torch.no_grad():
        logits = model(ids, attention_mask=torch.ones_like(ids)).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "has_room"),
    [
        *((family, True) for family in FAMILIES),
        pytest.param("youtu", False, id="youtu, block by block"),
        pytest.param("llama", False, id="llama, block by block"),
    ],
)
def test_the_export_is_the_trained_model(family, has_room, tmp_path, monkeypatch):
    if not has_room:
        monkeypatch.setattr(export_formats, "available_memory", lambda: 0)
    trained: Any = tiny_model(tiny_config(*FAMILIES[family]))  # with a row of its own for the padding token
    assert trained.get_input_embeddings().weight[PADDING].abs().min() > 0
    source, folder = tmp_path / "source", tmp_path / "export"
    trained.save_pretrained(source)
    config: Any = SimpleNamespace(
        model=ModelConfig(path=str(source)), lora=LoraConfig(), run=SimpleNamespace(seed=0, export="best")
    )
    saved: Any = SimpleNamespace(read=lambda name, _: trained.get_parameter(name))
    tokenizer: Any = None  # that of a new model alone matters
    form = HuggingFaceExport(config, lambda _: saved, torch.float32, tokenizer)
    form.write(folder)
    assert "14 held-out tokens" in form.verify(folder, ROWS)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert nats_of(loaded) == pytest.approx(nats_of(trained), rel=1e-5)
    assert torch.equal(loaded.get_input_embeddings().weight, trained.get_input_embeddings().weight)
    expected = GenerationConfig.from_pretrained(source).pad_token_id
    assert GenerationConfig.from_pretrained(folder).pad_token_id == expected
