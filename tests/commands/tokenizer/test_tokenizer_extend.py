"""`megaft tokenizer extend`: the model keeps what it knew, and new tokens begin as an average one."""

import json

import pytest
import torch
from tiny_models import VOCAB, make_model
from tiny_tokenizers import make_byte_level, make_sentencepiece
from transformers import AutoModelForCausalLM, AutoTokenizer

from megaft import cli
from megaft.data.tokenizer import load_tokenizer

CODES = ("<|books|>", "<|news|>")


def save(folder, family="gpt2", rows=600, **changes):
    make_model(family, vocab_size=rows, **changes).save_pretrained(folder)
    return make_byte_level(folder)


def extend(model, output, *flags, codes=CODES):
    return cli.main(["tokenizer", "extend", *codes, "--model", str(model), "--output", str(output), *flags])


@pytest.mark.parametrize(("family", "is_tied"), [("gpt2", True), ("llama", False), ("llama", True)])
@pytest.mark.parametrize(
    ("rows", "flags", "expected"), [(600, (), 602), (640, (), 640), (600, ("--pad-vocab-to", "128"), 640)]
)
def test_old_rows_stay_and_new_ones_are_the_mean(tmp_path, family, is_tied, rows, flags, expected):
    source = save(tmp_path / "old", family, rows, tie_word_embeddings=is_tied)
    assert extend(source, tmp_path / "new", *flags) == 0
    old, new = (AutoModelForCausalLM.from_pretrained(folder) for folder in (source, tmp_path / "new"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert [
        tokenizer(f"a{code} b", add_special_tokens=False)["input_ids"].count(600 + at) for at, code in enumerate(CODES)
    ] == [1, 1]
    assert (new.get_input_embeddings().weight is new.get_output_embeddings().weight) == is_tied
    for name in ("get_input_embeddings", "get_output_embeddings"):
        before, after = getattr(old, name)().weight[:600], getattr(new, name)().weight
        assert after.shape == (expected, before.shape[1])
        assert torch.equal(after[:600], before)
        difference = after[600:] - before.mean(0)
        assert 0 < difference.abs().max() < 1e-4
        assert len(after[600:].unique(dim=0)) == expected - 600
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(new(ids).logits[..., :600], old(ids).logits[..., :600])


def test_it_writes_the_same_bytes_again_and_others_with_another_seed(tmp_path):
    source = save(tmp_path / "old")
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert extend(source, tmp_path / name, "--seed", seed) == 0
    first, again, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert first == again != other


@pytest.mark.parametrize(
    ("codes", "flags", "code", "said"),
    [
        (("a b",), (), 2, "TOKENS is 'a b'; use a name without white space"),
        (("x", "x"), (), 2, "TOKENS has 'x' more than once"),
        (("</s>",), (), 2, "'</s>' is already token"),
        (CODES, ("--pad-vocab-to", "0"), 2, "--pad-vocab-to is 0"),
    ],
)
def test_refused(tmp_path, capsys, codes, flags, code, said):
    source = save(tmp_path / "old")
    assert extend(source, tmp_path / "new", *flags, codes=codes) == code
    assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_extended_is_refused(tmp_path, capsys):
    make_model("gpt2").save_pretrained(tmp_path / "model")
    make_sentencepiece(tmp_path / "model")
    assert extend(tmp_path / "model", tmp_path / "new") == 3
    assert "takes no more tokens; train it with --control-codes" in capsys.readouterr().err
    source = save(tmp_path / "small", rows=VOCAB)
    assert extend(source, tmp_path / "new") == 2
    assert f"whose vocabulary has {VOCAB:,}; give a model with its own tokenizer" in capsys.readouterr().err


def test_extended_tokenizers_can_be_prepared_with_their_codes(tmp_path, capsys):
    source = save(tmp_path / "old")
    assert extend(source, tmp_path / "new") == 0
    (tmp_path / "a.txt").write_text("a text")
    flags = ("--tokenizer", str(tmp_path / "new"), "--output", str(tmp_path / "out"), "--control-codes", CODES[1])
    assert cli.main(["prepare", str(tmp_path / "a.txt"), *flags, "--json"]) == 0
    receipt = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert receipt["tokenizer"]["sha256"] == load_tokenizer(tmp_path / "new").sha256
    assert (receipt["tokens"] - receipt["scored_tokens"]) == 1
