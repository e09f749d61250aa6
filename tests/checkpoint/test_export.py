"""Exports of three toy models trained on one rank, compared with plain torch and transformers."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from export_runs import (
    CLIP,
    EPSILON,
    EVERY,
    RATES,
    STEPS,
    TOPOLOGY,
    WEIGHT_DECAY,
    copy_of,
    export_again,
    exported,
    logits_of,
    of,
    rows_of,
    saved_model,
    state_of,
)

from megaft.base.files import sha256_of
from megaft.base.plural import counted
from megaft.checkpoint.model_card import model_card
from megaft.config.train import parse_train
from megaft.data.samples import IGNORE_INDEX
from megaft.data.tokenizer import load_tokenizer
from megaft.run.sources import open_samples, prepare_sources
from megaft.run.validation import NUM_TOKENS
from megaft.weights import manifest
from megaft.weights.checkpoint_reader import CheckpointReader
from megaft.weights.loading import pretrained
from megaft.weights.manifest import folder_of
from megaft.weights.provenance import sha256_of_model

pytestmark = pytest.mark.slow


@pytest.fixture
def config(export_runs, request):
    return parse_train(export_runs[request.param])


# Training is plain torch


@of("full")
def test_three_steps_are_those_of_plain_torch(config):
    """The loss is all nats of the global batch over all its scored tokens: one batch, no padding, torch's own AdamW.

    Epsilon is 1e-5: the key bias of attention has a gradient of zero but for rounding, which AdamW's usual 1e-8 would
    turn into steps of any size.
    """
    source = config.tokenizer_source
    sources = prepare_sources(config.data, source, load_tokenizer(source), config.run.dir, TOPOLOGY)
    samples = open_samples(sources, config.data, config.run.seed)
    model = pretrained.load_language_model(str(config.model.path)).train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.999), eps=EPSILON)
    for step in range(STEPS):
        nats, num_scored = torch.zeros(()), 0
        for position in range(step * 6, step * 6 + 6):
            labels = torch.from_numpy(samples[position].labels)
            logits = model(input_ids=torch.from_numpy(samples[position].input_ids)[None]).logits[0]
            nats = nats + F.cross_entropy(logits, labels, reduction="sum")
            num_scored += int((labels != IGNORE_INDEX).sum())
        optimizer.zero_grad()
        (nats / num_scored).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = RATES[step]
        optimizer.step()

        assert rows_of(config, "loss")[step + 1] == pytest.approx(nats.item() / num_scored, rel=1e-6)
        assert rows_of(config, "grad_norm")[step + 1] == pytest.approx(norm.item(), rel=1e-5)
        assert norm > CLIP, "clipping is tried"
        ours = dict(saved_model(config, step + 1).named_parameters())
        for name, theirs in model.named_parameters():
            torch.testing.assert_close(ours[name], theirs, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


# What is exported


@EVERY
def test_the_export_is_the_trained_model(config):
    from transformers import AutoModelForCausalLM

    folder = config.run.dir / "export"
    model, tokenizer = exported(folder)
    state = state_of(config)
    trained = saved_model(config, STEPS if config.run.export == "last" else state.best_step)
    dtype = torch.bfloat16 if config.run.dir.name == "half" else torch.float32
    assert model.dtype == dtype
    for parameter in trained.parameters():  # not buffers: frequencies of rotary positions stay in fp32
        parameter.data = parameter.data.to(dtype)
    torch.testing.assert_close(logits_of(model), logits_of(trained), rtol=1e-5, atol=1e-5)
    own = load_tokenizer(config.tokenizer_source)
    assert tokenizer.encode("The cat sat.", add_special_tokens=False) == own.encode("The cat sat.")
    assert load_tokenizer(folder).sha256 == own.sha256
    if config.model.path:
        untrained = AutoModelForCausalLM.from_pretrained(config.model.path)
        assert not torch.allclose(logits_of(model).float(), logits_of(untrained), atol=1e-3)


@of("half")
def test_what_was_untied_stays_untied(config):
    weights = exported(config.run.dir / "export")[0].state_dict()
    assert not torch.equal(weights["model.embed_tokens.weight"], weights["lm_head.weight"])


@of("full")
def test_what_was_tied_stays_tied(config):
    weights = exported(config.run.dir / "export")[0].state_dict()
    assert weights["transformer.wte.weight"].data_ptr() == weights["lm_head.weight"].data_ptr()


@of("full")
@pytest.mark.parametrize(
    ("wanted", "best", "expected"), [("best", 1, 1), ("best", 2, 2), ("best", None, 3), ("last", 1, 3)]
)
def test_best_and_last(config, wanted, best, expected, tmp_path):
    config = copy_of(config, tmp_path)
    config = replace(config, run=replace(config.run, export=wanted))
    state = replace(state_of(config), best_step=best)
    folder = export_again(config, state)
    model, _ = exported(folder)
    pieces = CheckpointReader(folder_of(config.run.dir, expected), manifest.verify(folder_of(config.run.dir, expected)))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, pieces.whole(f"language_model.{name}", "weight")), name
    assert f"finetuned for {counted(expected, 'step')} with" in (folder / "README.md").read_text()
    assert not (config.run.dir / "export.tmp").exists()


@of("full")
def test_the_state_remembers_the_best_validation(config):
    nats = {step: validation["nats_per_token"] for step, validation in rows_of(config, "validation").items() if step}
    assert set(nats) == {1, 2, 3}
    assert state_of(config).best_step == min(nats, key=lambda step: nats[step])
    assert state_of(config).best_nats_per_token == min(nats.values())


@of("adapters", "ends")
def test_adapters_are_merged_and_also_there_alone(config):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(config.model.path)
    merged, _ = exported(config.run.dir / "export")
    assert merged.state_dict().keys() == base.state_dict().keys()
    alone = PeftModel.from_pretrained(base, config.run.dir / "export" / "adapter")
    torch.testing.assert_close(logits_of(merged), logits_of(alone), rtol=1e-5, atol=1e-5)
    shapes = manifest.read_manifest(folder_of(config.run.dir, STEPS))["shapes"]
    assert all("lora_" in name for name in shapes), "a checkpoint holds what trains"


@of("full")
def test_the_card_has_what_was_measured(config):
    card = model_card(config, "ab" * 32, step=2, verified="It was checked.")
    measured = rows_of(config, "validation")
    assert "| validation | before | step 2 |" in card
    assert {"perplexity", "word_perplexity", "bits_per_byte"} <= measured[0].keys() == measured[2].keys()
    for quantity in measured[0].keys() - {"num_scored_tokens"}:
        assert f"| {quantity} | {measured[0][quantity]:.6g} | {measured[2][quantity]:.6g} |" in card
    assert f"| num_scored_tokens | {measured[0]['num_scored_tokens']} |" in card
    assert "windows of 32 tokens, stride 16" in card
    assert f"{Path(config.model.path).name}, finetuned for 2 steps with megaft on train.jsonl; seed 0" in card
    for kind, path in (("training", config.data.train[0]), ("validation", config.data.valid)):
        assert f"| {kind} data | {Path(path).name} | {sha256_of(Path(path))} |" in card
    assert f"| model | {Path(config.model.path).name} | {sha256_of_model(config.model.path)} (all files) |" in card
    assert f"| tokenizer | {Path(config.tokenizer_source).name} | {'ab' * 32} (vocabulary" in card


@EVERY
def test_neither_export_nor_events_name_a_folder_of_this_machine(config):
    assert config.run.dir.is_absolute()
    folders = {
        str(config.run.dir.parent),
        *(str(Path(name).parent) for name in (config.model.path or config.model.from_scratch, config.tokenizer_source)),
    }
    files = [path for path in (config.run.dir / "export").rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in [*files, config.run.dir / "events.jsonl"]:
        assert not [folder for folder in folders if folder.encode() in path.read_bytes()], path


@of("full")
def test_a_card_shows_counts_in_full_and_what_is_not_finite(config, tmp_path):
    values = {"num_scored_tokens": 12_345_678, "perplexity": "inf", "nats_per_token": 1234.56789}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0, "validation": values}) + "\n")
    card = model_card(replace(config, run=replace(config.run, dir=tmp_path)), "ab" * 32, step=2, verified="")
    for row in ("| num_scored_tokens | 12345678 |", "| perplexity | inf |", "| nats_per_token | 1234.57 |"):
        assert row in card


@of("full", "ends")
def test_the_exported_model_scores_what_was_measured(config, tmp_path):
    """Score every token once with plain transformers, in windows of 32 tokens and stride 16."""
    folder = export_again(copy_of(config, tmp_path))
    model, tokenizer = exported(folder)
    text = Path(str(config.data.valid)).read_text()
    ids = torch.tensor([tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)])
    nats, scored_until = 0.0, 0
    while scored_until < len(ids) - 1:
        end = min(max(32, scored_until + 16), len(ids) - 1)
        window = ids[max(0, end - 32) : end + 1]
        with torch.no_grad():
            logits = model(input_ids=window[None, :-1]).logits[0, scored_until - end :]
        nats += F.cross_entropy(logits, window[scored_until - end :], reduction="sum").item()
        scored_until = end
    measured = rows_of(config, "validation")[STEPS if config.run.export == "last" else state_of(config).best_step]
    assert measured["num_scored_tokens"] == len(ids) - 1
    assert measured["nats"] == pytest.approx(nats, rel=1e-6)
    assert measured["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-6)
    assert measured["word_perplexity"] == pytest.approx(math.exp(nats / len(text.split())), rel=1e-5)


@EVERY
def test_the_card_has_the_nats_of_the_loaded_export(config):
    card = (config.run.dir / "export" / "README.md").read_text()
    found = re.search(r"scored (\d+) held-out tokens at (\S+) nats per token; the trained model had (\S+)\.\n", card)
    assert found[1] == str(NUM_TOKENS)
    assert float(found[2]) == pytest.approx(float(found[3]), rel=1e-5)


@of("half")
def test_a_new_model_ends_texts_as_its_tokenizer_and_its_card_says_that_it_is_new(config):
    assert "(from scratch), finetuned for 3 steps" in (config.run.dir / "export" / "README.md").read_text()
    model, tokenizer = exported(config.run.dir / "export")
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id == 2
    assert model.generation_config.bos_token_id == tokenizer.bos_token_id == 1
