"""`megaft tokenizer train`: what it writes is read by transformers and old readers, and spells every text."""

import json
import shutil

import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from megaft import cli
from megaft.data.tokenizer import load_tokenizer

CODES = ("<|books|>", "<|news|>")
KINDS = {"bpe": 700, "sentencepiece-bpe": 700, "sentencepiece-unigram": 700}
HARD = "a  b\n\n\tc \r é日😀ﬁ <unk> <s> x\u00a0 \n"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text(toy.text()[:60_000], encoding="utf-8")
    return path


def train(text, output, *flags):
    return cli.main(["tokenizer", "train", str(text), "--output", str(output), *flags])


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    """Folders of tokenizers with codes and a model's shape, by kind."""
    parent = tmp_path_factory.mktemp("trained")
    for kind, size in KINDS.items():
        flags = ("--kind", kind, "--vocab-size", str(size), "--control-codes", *CODES)
        assert train(text, parent / kind, *flags, "--model", "GPT2-medium", "--pad-vocab-to", "128") == 0
    return parent


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50, deadline=None)
@given(drawn=st.text(alphabet=st.sampled_from(HARD) | st.characters(codec="utf-8"), max_size=20))
def test_every_text_comes_back(trained, kind, drawn):
    # sentencepiece ends a text at NUL, which megaft's readers refuse, and takes ▁ for a space.
    drawn = drawn.replace("\0", "").replace("▁", "")
    tokenizer = load_tokenizer(trained / kind)
    for spelled in (drawn, HARD, f"{CODES[0]} {drawn}"):
        assert tokenizer.decode(tokenizer.encode(spelled)) == spelled


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_it(trained, kind):
    folder = trained / kind
    plain, own = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    assert plain("A  text.\n", add_special_tokens=False)["input_ids"] == own.encode("A  text.\n")
    assert plain.eos_token == "<|endoftext|>"
    config = AutoConfig.from_pretrained(folder)
    assert config.vocab_size == 768  # 700 rounded up to a multiple of 128
    assert (config.n_layer, config.eos_token_id) == (24, own.eos_id)
    assert len(own.encode(f"{CODES[1]} a")) == 1 + len(own.encode(" a"))


def test_the_config_makes_a_model(text, tmp_path):
    assert train(text, tmp_path / "small", "--vocab-size", "300", "--model", "smollm2-135m") == 0
    config = AutoConfig.from_pretrained(tmp_path / "small", num_hidden_layers=1)
    model = AutoModelForCausalLM.from_config(config)
    assert model.get_input_embeddings().weight.shape == (300, 576)
    assert config.architectures == ["LlamaForCausalLM"]


def test_added_tokens_come_last_as_in_gpt2(trained):
    vocabulary = json.loads((trained / "bpe/vocab.json").read_text())
    assert [vocabulary[name] for name in ("<|endoftext|>", *CODES)] == [697, 698, 699]
    assert sorted(vocabulary.values()) == list(range(700))


def test_old_readers_get_the_same_ids(trained, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(trained / "bpe" / name, tmp_path)
    assert load_tokenizer(tmp_path).encode(HARD) == load_tokenizer(trained / "bpe").encode(HARD)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_training_again_writes_the_same_bytes(trained, text, tmp_path, kind):
    flags = ("--kind", kind, "--vocab-size", str(KINDS[kind]), "--control-codes", *CODES)
    assert train(text, tmp_path / kind, *flags, "--model", "gpt2-medium", "--pad-vocab-to", "128") == 0
    written = {path.name: path.read_bytes() for path in (tmp_path / kind).iterdir()}
    assert written == {path.name: path.read_bytes() for path in (trained / kind).iterdir()}


@pytest.mark.parametrize("feed", ["lines", "documents"])
def test_merges_are_those_of_the_library(text, tmp_path, feed):
    assert train(text, tmp_path / "own", "--vocab-size", "900", "--feed", feed) == 0
    whole = text.read_text(encoding="utf-8")
    library = ByteLevelBPETokenizer()
    texts = whole.splitlines(keepends=True) if feed == "lines" else [whole]
    library.train_from_iterator(texts, 899, min_frequency=2, show_progress=False)
    library.save_model(str(tmp_path))
    assert (tmp_path / "own/merges.txt").read_text() == (tmp_path / "merges.txt").read_text()


def test_lines_of_records_and_of_long_documents(tmp_path):
    lines = [f"line {number} of a document\n" for number in range(2000)]  # several blocks
    whole = "".join(lines)
    (tmp_path / "a.txt").write_text(whole)
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": whole}) + "\n")
    for name, flags in {"a.txt": (), "a.jsonl": ("--json-key", "body")}.items():
        assert train(tmp_path / name, tmp_path / f"of {name}", "--vocab-size", "300", "--feed", "lines", *flags) == 0
    receipts = [json.loads((tmp_path / f"of {name}/training.json").read_text()) for name in ("a.txt", "a.jsonl")]
    assert [receipt["texts"] for receipt in receipts] == [2000, 2000]
    assert len({(tmp_path / f"of {name}/merges.txt").read_text() for name in ("a.txt", "a.jsonl")}) == 1


def test_a_sample_is_taken_evenly(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"text {number:05}"}) + "\n" for number in range(5000))
    )
    assert train(tmp_path / "a.jsonl", tmp_path / "out", "--vocab-size", "300", "--max-bytes", "10000") == 0
    assert "--max-bytes is 10,000, so the tokenizer was trained on a sample" in capsys.readouterr().out
    receipt = json.loads((tmp_path / "out/training.json").read_text())
    assert receipt["is_sample"] is True
    assert 400 < receipt["texts"] <= 1000
    assert receipt["bytes"] == 10 * receipt["texts"] <= 10_000


def test_a_size_that_the_text_does_not_reach_is_said(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("abc abc\n")
    assert train(tmp_path / "a.txt", tmp_path / "out", "--vocab-size", "1000", "--model", "gpt2") == 0
    assert "wrote" in (said := capsys.readouterr().out)
    assert "--vocab-size is 1,000, but no other pair occurs 2 times or more" in said
    # 256 bytes; ab, abc and the end of text (Ġabc occurs once only)
    assert AutoConfig.from_pretrained(tmp_path / "out").vocab_size == 259


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (("--vocab-size", "200"), 2, "--vocab-size is 200; use 257 to 1000000"),
        (("--control-codes", "a b"), 2, "--control-codes is 'a b'; use a name without white space"),
        (("--control-codes", "x", "x"), 2, "--control-codes has 'x' more than once"),
        (("--pad-vocab-to", "8"), 2, "add --model"),
        (("--kind", "sentencepiece-bpe", "--feed", "lines"), 2, "sentencepiece always takes lines"),
        (("--model", "gpt9"), 2, "--model is gpt9"),
        (("--kind", "sentencepiece-unigram", "--vocab-size", "90000"), 3, "the text has pieces for"),
        (("--kind", "sentencepiece-bpe", "--vocab-size", "280"), 3, "the characters of the text alone take"),
    ],
)
def test_refused(text, tmp_path, capsys, flags, code, said):
    assert train(text, tmp_path / "out", *flags) == code
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_kept(text, tmp_path, capsys):
    assert train(text, tmp_path) == 2
    assert "already exists; give a new folder" in capsys.readouterr().err


def test_unknown_actions_are_named(capsys):
    assert cli.main(["tokenizer", "learn"]) == 2
    assert "megaft tokenizer has no action 'learn'; use train, check, extend" in capsys.readouterr().err


@pytest.mark.slow
def test_published_counts_of_wikitext2(shared, tmp_path):
    """The notes' 8,723 and 956 sequences of 255 tokens (bkkaggle/lm-finetuning), with a tokenizer fed by lines."""
    folder = shared / "data/wikitext2"
    assert train(folder / "wiki.train.tokens", tmp_path / "out", "--feed", "lines") == 0
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.vocab_size == 47_609
    counts = {
        name: len(tokenizer.encode((folder / f"wiki.{name}.tokens").read_text())) for name in ("train", "valid", "test")
    }
    assert counts == {"train": 2_224_605, "valid": 243_978, "test": 278_615}
    assert (counts["train"] // 255, counts["valid"] // 255) == (8_723, 956)
