import json
import shutil
import warnings

import pytest
import smollm2
from sentencepiece import SentencePieceProcessor
from tiny_tokenizers import (
    LLAMA,
    make_byte_level,
    make_llama,
    make_llama_chat,
    make_llama_model,
    make_metaspace,
    make_sentencepiece,
)
from tokenizers import AddedToken, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from megaft.base.errors import DataError
from megaft.data.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer

TEXT = "Hello  world's 2024 — naïve 日本語 <unk> \n\n\t x<|endoftext|>"


@pytest.fixture(scope="module")
def bpe(gpt2_bpe):
    return gpt2_bpe


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_llama_model(tmp_path_factory.mktemp("llama") / "llama.model")


@pytest.mark.slow
def test_same_tokenizer_same_hash(trained_gpt2, bpe, tmp_path):
    from_vocabulary = load_tokenizer(str(bpe))
    from_vocabulary.save(tmp_path / "saved")
    others = [load_tokenizer(trained_gpt2), load_tokenizer(tmp_path / "saved")]
    assert {other.sha256 for other in others} == {from_vocabulary.sha256}
    assert all(other.encode(TEXT) == from_vocabulary.encode(TEXT) for other in others)


def test_another_tokenizer_another_hash(bpe, tmp_path):
    shutil.copytree(bpe, tmp_path / "bpe")
    merges = (bpe / "merges.txt").read_text(encoding="utf-8").splitlines()
    (tmp_path / "bpe" / "merges.txt").write_text("\n".join(merges[:-1]) + "\n", encoding="utf-8")
    assert load_tokenizer(tmp_path / "bpe").sha256 != load_tokenizer(bpe).sha256


def test_ids_are_those_of_transformers(trained_gpt2, bpe):
    tokenizer = load_tokenizer(bpe)
    reference = AutoTokenizer.from_pretrained(trained_gpt2)
    ids = reference(TEXT, add_special_tokens=False)["input_ids"]
    assert tokenizer.encode(TEXT) == ids
    assert tokenizer.encode_batch([TEXT, "a"]) == [ids, tokenizer.encode("a")]
    assert tokenizer.decode(ids) == TEXT
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.prefix_id) == (2001, *[2000] * 3)


def test_long_text_does_not_warn(bpe, caplog):
    with warnings.catch_warnings(action="error"):
        assert len(load_tokenizer(bpe).encode("a b " * 5000)) > 10_000
    assert not caplog.records


def test_truncation_in_the_file_is_off(trained_gpt2, tmp_path):
    folder = shutil.copytree(trained_gpt2, tmp_path / "model")
    path = folder / "tokenizer.json"
    path.chmod(0o644)
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"truncation": truncation}))
    assert len(load_tokenizer(folder).encode("a b " * 10)) > 4


def test_sentencepiece_is_the_library(llama, tmp_path):
    tokenizer, reference = load_tokenizer(llama), SentencePieceProcessor(model_file=str(llama))
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert tokenizer.encode(TEXT) == reference.encode(TEXT)
    assert tokenizer.encode_batch([TEXT, "a"]) == [reference.encode(TEXT), reference.encode("a")]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.prefix_id) == (804, 1, 2, 1)
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").sha256 == tokenizer.sha256
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").eos_token_id == 2


def with_added(backend, **options):
    backend.add_tokens([AddedToken("<extra>", **options)])


def with_steps(backend, *steps):
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(steps))


CUTS = [
    pytest.param(lambda backend: None, True, id="GPT-2"),
    pytest.param(
        lambda b: with_steps(b, pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)), True, id="digits"
    ),
    pytest.param(
        lambda b: with_steps(b, pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)), False, id="other"
    ),
    pytest.param(lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.ByteLevel(True)), False, id="prefix space"),
    pytest.param(lambda b: setattr(b, "normalizer", normalizers.NFC()), False, id="normalizer"),
    pytest.param(lambda b: with_added(b, lstrip=True), True, id="lstrip keeps to its piece"),
    pytest.param(lambda b: with_added(b, rstrip=True), False, id="rstrip reaches into the next"),
]


@pytest.mark.parametrize(("change", "expected"), CUTS)
def test_cuts_at_spaces(trained_gpt2, change, expected):
    hugging_face = AutoTokenizer.from_pretrained(trained_gpt2)
    change(hugging_face.backend_tokenizer)
    assert Tokenizer(hugging_face).splits_at_spaces is expected


def write(path, data=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


BAD = [
    pytest.param(lambda t, llama: t / "nothing", "there is no tokenizer at .*nothing", id="missing folder"),
    pytest.param(lambda t, llama: t / "no.model", "there is no tokenizer at .*no.model", id="missing model"),
    pytest.param(lambda t, llama: write(t / "empty.model"), "empty.model is empty", id="zero-length .model"),
    pytest.param(
        lambda t, llama: write(t / "cut.model", llama.read_bytes()[:-1000]),
        "cut.model is not a complete sentencepiece model",
        id="truncated .model",
    ),
    pytest.param(lambda t, llama: write(t / "a" / "vocab.json").parent, "has no merges.txt", id="no merges"),
    pytest.param(lambda t, llama: write(t / "a" / "merges.txt").parent, "has no vocab.json", id="no vocabulary"),
    pytest.param(lambda t, llama: write(t / "a" / "x").parent, "has no tokenizer.json", id="nothing in the folder"),
    pytest.param(lambda t, llama: write(t / "a" / "tokenizer.json", b'{"a').parent, "is damaged", id="broken json"),
    pytest.param(
        lambda t, llama: write(t / "a" / "tokenizer.json", b"{}").parent, "no tokenizer could be", id="empty json"
    ),
    pytest.param(lambda t, llama: write(t / "a.gguf", b"GGUF"), "a.gguf is not a GGUF file", id="truncated GGUF"),
    pytest.param(lambda t, llama: write(t / "a.txt"), "is not a tokenizer", id="another file"),
    pytest.param(
        lambda t, llama: "nobody/has-this-one", "nobody/has-this-one is neither a folder here nor in", id="no network"
    ),
]


@pytest.mark.parametrize(("source", "message"), BAD)
def test_bad_source(llama, tmp_path, source, message):
    with pytest.raises(DataError, match=message):
        load_tokenizer(source(tmp_path, llama))


def test_no_chat_template(bpe, llama):
    for source in (bpe, llama):
        with pytest.raises(DataError, match="no chat template"):
            load_tokenizer(source).apply_chat_template([{"role": "user", "content": "hi"}])


@pytest.mark.slow
def test_gguf(tmp_path):
    tokenizer = load_tokenizer(smollm2.published_file())
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (49152, 1, 2)
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True).endswith("<|im_start|>assistant\n")
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).sha256 == tokenizer.sha256


@pytest.mark.parametrize("make", [make_byte_level, make_metaspace])
@pytest.mark.parametrize("bos", [None, "<s>"])
def test_opening_ids_are_what_transformers_puts_before_a_text(tmp_path, make, bos):
    folder = make(tmp_path / "tokenizer", bos=bos)
    tokenizer = load_tokenizer(folder)
    expected = AutoTokenizer.from_pretrained(folder)("To be")["input_ids"]
    assert [*tokenizer.opening_ids, *tokenizer.encode("To be")] == expected
    assert len(tokenizer.opening_ids) == (bos is not None)


CHAT = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Yes, and  more"}]


@pytest.mark.parametrize("legacy", [True, False, None])
@pytest.mark.parametrize("add_bos", [True, False, None])
def test_files_beside_a_model_count_as_in_transformers(tmp_path, legacy, add_bos):
    given = {name: value for name, value in (("legacy", legacy), ("add_bos_token", add_bos)) if value is not None}
    folder = make_llama_chat(tmp_path / "chat", **given)
    tokenizer, reference = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.vocab_size) == (801, reference.bos_token_id, 802)
    for text in (
        "<|im_start|>user\nHi<|im_end|>\n",
        "To be</s>or",
        "naïve 日本語",
        tokenizer.apply_chat_template(CHAT[:1]),
    ):
        assert tokenizer.encode(text) == reference(text, add_special_tokens=False)["input_ids"]
        assert [*tokenizer.opening_ids, *tokenizer.encode(text)] == reference(text)["input_ids"]
    assert tokenizer.apply_chat_template(CHAT) == reference.apply_chat_template(CHAT, tokenize=False)


def test_text_beside_added_tokens_is_as_sentencepiece_has_it(tmp_path, corpora, llama):
    """transformers merges Llama's runs of spaces first; the model was trained on sentencepiece's order."""
    folder = make_llama(tmp_path / "llama", chat_template="x")
    shutil.copyfile(llama, folder / "tokenizer.model")
    tokenizer, reference = load_tokenizer(folder), SentencePieceProcessor(model_file=str(llama))
    assert isinstance(tokenizer, Tokenizer)
    text = (corpora / "plain.txt").read_text(encoding="utf-8")[:50_000] + TEXT.replace("<unk>", "") + "\n    x = 1"
    assert tokenizer.encode(text) == reference.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_files_that_repeat_the_model_add_nothing(tmp_path):
    folder = make_sentencepiece(tmp_path / "sp")
    special = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>"}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_text(json.dumps(special))
    assert isinstance(load_tokenizer(folder), SentencePieceTokenizer)
    assert load_tokenizer(folder / "tokenizer.model").sha256 == load_tokenizer(folder).sha256


BESIDE = [
    pytest.param("added_tokens.json", {"<x>": 800}, id="added tokens"),
    pytest.param("special_tokens_map.json", {"eos_token": "<unk>"}, id="another EOS"),
    pytest.param("tokenizer_config.json", {"add_bos_token": True, "bos_token": "<s>"}, id="a BOS"),
    pytest.param("tokenizer_config.json", {"chat_template": "x"}, id="a template"),
    pytest.param("chat_template.jinja", "x", id="a template of its own"),
]


@pytest.mark.parametrize(("name", "content"), BESIDE)
def test_a_model_is_not_taken_without_what_adds_to_it(tmp_path, name, content):
    folder = make_sentencepiece(tmp_path / "sp")
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"tokenizer\.model .*: {name} .*folder"):
        load_tokenizer(folder / "tokenizer.model")
    shutil.copyfile(folder / "tokenizer.model", tmp_path / "bare.model")
    assert isinstance(load_tokenizer(tmp_path / "bare.model"), SentencePieceTokenizer)


REFUSED = [
    pytest.param({"added_tokens.json": {"<x>": 900}}, "give '<x>' the id 900, but it gets 800", id="a gap in ids"),
    pytest.param({"added_tokens.json": ["<x>"]}, "no tokenizer could be loaded", id="added tokens that are a list"),
    pytest.param({"tokenizer_config.json": []}, "no tokenizer could be loaded", id="settings that are a list"),
    pytest.param({"tokenizer_config.json": {"legacy": False}}, "with .* the ids of", id="no prefix after a strip"),
]


@pytest.mark.parametrize(("beside", "message"), REFUSED)
def test_files_beside_a_model_that_it_cannot_follow_are_refused(tmp_path, beside, message):
    folder = make_sentencepiece(tmp_path / "sp")
    for name, content in beside.items():
        content = LLAMA | content if isinstance(content, dict) and name == "tokenizer_config.json" else content
        (folder / name).write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["tekken.json", "qwen.tiktoken", "tiktoken.model", "vocab.txt", "spiece.model"])
def test_other_kinds_of_tokenizers_are_named(tmp_path, name):
    with pytest.raises(DataError, match=f"; .*{name} .*tokenizer.json"):
        load_tokenizer(write(tmp_path / "t" / name, b"x").parent)


def test_tiktoken_under_sentencepieces_name(tmp_path):
    content = b"".join(b"%s %d\n" % (piece, id_) for id_, piece in enumerate([b"IQ==", b"Ig==", b"Iw=="]))
    with pytest.raises(DataError, match="tiktoken"):
        load_tokenizer(write(tmp_path / "t" / "tokenizer.model", content).parent)


@pytest.mark.parametrize("id_", [-1, 800, 10**6])
def test_an_id_beyond_a_sentencepiece_model_is_named(tmp_path, id_):
    tokenizer = load_tokenizer(make_sentencepiece(tmp_path / "sp"))
    with pytest.raises(DataError, match=f"token {id_} .*800 pieces"):
        tokenizer.decode([5, id_])
