import gc
import gzip
import hashlib
import json
import os
import warnings
from functools import cache
from itertools import pairwise

import detokenizers
import pytest
import zstandard
from tiny_tokenizers import make_byte_level, make_llama_model, make_sentencepiece
from transformers import GPT2TokenizerFast

from megaft.base.errors import ConfigError, DataError
from megaft.base.lock import locked
from megaft.commands.prepare import main
from megaft.data import tokenizer
from megaft.data.indexed import TokenFile
from megaft.data.prepare import PrepareConfig, ensure_prepared, prepare
from megaft.data.receipt import load_receipt

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
load_tokenizer = cache(tokenizer.load_tokenizer)  # loading takes longer than most of these tests


@pytest.fixture(autouse=True)
def _tokenizers_are_loaded_once(monkeypatch):
    monkeypatch.setattr("megaft.data.prepare.load_tokenizer", load_tokenizer)


@pytest.fixture(scope="module")
def source(gpt2_bpe):
    return str(gpt2_bpe)


@pytest.fixture
def run(source, tmp_path):
    """run(input, ..., option=...) prepares to tmp_path/out and returns the receipt and the tokens by document."""

    def prepared(*inputs, **options):
        options = {"tokenizer": source} | options
        config = PrepareConfig(inputs=tuple(map(str, inputs)), output=tmp_path / "out", **options)
        prepare(config)
        return load_receipt(tmp_path / "out"), read(tmp_path / "out")

    return prepared


def read(prefix):
    tokens = TokenFile(prefix)
    offsets = tokens.document_offsets.tolist()
    return [tokens.read(begin, end).tolist() for begin, end in pairwise(offsets)]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def jsonl(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


# GPT-2's BPE over whole files, counted with transformers and Megatron-LM's own rules. Megatron-LM publishes 245,566
# words by split(" ") and 270,329 predicted tokens of WikiText-103.
PUBLISHED = [
    pytest.param("wikitext103/wiki.test.tokens", "wikitext_megatron", 270_330, 241_211, id="WikiText-103"),
    pytest.param("wikitext103/wiki.test.tokens", "identity", 285_234, 241_211, id="WikiText-103 as it is"),
    pytest.param("wikitext2/wiki.test.tokens", "wikitext_megatron", 278_365, 241_211, id="WikiText-2"),
    pytest.param("wikitext2/wiki.test.tokens", "identity", 295_877, 241_211, id="WikiText-2 as it is"),
    pytest.param("wikitext2_raw/wiki.test.raw", "wikitext_megatron", 272_045, 241_211, id="raw"),
    pytest.param("wikitext2_raw/wiki.test.raw", "identity", 286_221, 241_211, id="raw as it is"),
    pytest.param("ptb/ptb.test.txt", "ptb_megatron", 100_650, 78_669, id="PTB"),
    pytest.param("ptb/ptb.test.txt", "identity", 105_243, 78_669, id="PTB as it is"),
    pytest.param("wikitext2/wiki.train.tokens", "wikitext_megatron", 2_313_324, 2_051_910, id="train"),
    pytest.param("wikitext2/wiki.train.tokens", "identity", 2_448_382, 2_051_910, id="train as it is"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "detokenizer", "num_tokens", "num_words"), PUBLISHED)
def test_published_counts(run, shared, tmp_path, name, detokenizer, num_tokens, num_words):
    path, vocabulary = shared / "data" / name, str(shared / "data/gpt2_bpe")
    require_counts(run(path, detokenizer=detokenizer, tokenizer=vocabulary), path, tmp_path, num_tokens, num_words)


@pytest.mark.parametrize(
    ("name", "detokenizer"),
    [
        ("wikitext103/wiki.test.tokens", "wikitext_megatron"),
        ("wikitext2_raw/wiki.test.raw", "identity"),
        ("ptb/ptb.test.txt", "ptb_megatron"),
        ("text8/text8", "text8"),
    ],
)
def test_counts_are_those_of_the_whole_text(run, corpora, source, tmp_path, name, detokenizer):
    path = corpora / name
    text = path.read_text(encoding="utf-8")
    expected = GPT2TokenizerFast.from_pretrained(source)(detokenizers.get(detokenizer)(text), verbose=False)[
        "input_ids"
    ]
    receipt, documents = run(path, detokenizer=detokenizer)
    assert documents == [expected]
    require_counts((receipt, documents), path, tmp_path, len(expected), len(text.split()))


def require_counts(prepared, path, tmp_path, num_tokens, num_words):
    receipt, (tokens,) = prepared
    data = path.read_bytes()
    assert (receipt["tokens"], receipt["words"], receipt["bytes"]) == (num_tokens, num_words, len(data))
    assert len(tokens) == receipt["scored_tokens"] == num_tokens
    digest = hashlib.sha256(data).hexdigest()
    assert receipt["sources"] == [{"path": str(path), "sha256": digest, "bytes": len(data), "format": "text"}]
    assert receipt["bin_sha256"] == hashlib.sha256((tmp_path / "out.bin").read_bytes()).hexdigest()
    assert (receipt["dtype"], receipt["tokenizer"]["round_trip"]) == ("uint16", True)


def test_lines_are_documents(run, corpora):
    path = corpora / "wikitext2/wiki.test.tokens"
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    receipt, documents = run(path, unit="line")
    assert receipt["words"] == sum(len(line.split()) for line in lines)
    assert receipt["documents"] == len(documents) == len(lines)


@pytest.mark.slow
def test_published_lines_are_documents(run, shared):
    receipt, documents = run(shared / "data/wikitext2/wiki.test.tokens", unit="line")
    assert receipt["words"] == 241_211
    assert receipt["documents"] == len(documents) == 2_891  # of 4,358 lines, those that are not blank


def test_megatron_reads_what_is_written(run, source, tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    _, documents = run(write(tmp_path / "a.txt", "one two\nthree\n\nfour\n"), unit="document")
    theirs = IndexedDataset(str(tmp_path / "out"))  # unmaps its file when it goes
    assert [sequence.tolist() for sequence in theirs[:]] == documents
    assert documents == [load_tokenizer(source).encode(text) for text in ("one two\nthree", "four")]


def test_every_kind_of_file_in_one_run(run, source, tmp_path):
    folder = tmp_path / "corpus"
    write(folder / "a.txt", "plain")
    (folder / "b.txt.gz").write_bytes(gzip.compress(b"gzip\r\n"))
    (folder / "c.txt.zst").write_bytes(zstandard.compress(b"\xef\xbb\xbfzstd"))
    write(folder / "d.jsonl", jsonl({"text": "first"}, {"text": "second"}))
    (folder / "e.jsonl.gz").write_bytes(gzip.compress(jsonl({"text": "third"}).encode()))
    write(folder / "f" / "g.tokens", "globbed")
    receipt, documents = run(folder / "f" / "*.tok*", folder)
    expected = ["globbed", "plain", "gzip\n", "zstd", "first", "second", "third"]
    assert documents == [load_tokenizer(source).encode(text) for text in expected]
    assert (receipt["byte_order_marks"], receipt["crlfs"]) == (1, 1)
    assert [entry["path"].rpartition("/")[2] for entry in receipt["sources"]] == [
        *("g.tokens", "a.txt", "b.txt.gz", "c.txt.zst", "d.jsonl", "e.jsonl.gz")
    ]


def test_prompts_are_marked(run, source, tmp_path):
    path = write(tmp_path / "a.jsonl", jsonl({"q": "1 + 1 =", "a": " 2"}, {"q": "", "a": "yes"}))
    receipt, documents = run(path, prompt_key="q", completion_key="a", append_eod=True)
    encode = load_tokenizer(source).encode
    prompt, completion, yes = encode("1 + 1 ="), encode(" 2"), encode("yes")
    assert documents == [[*prompt, *completion, 2000], [*yes, 2000]]
    assert read(f"{tmp_path}/out.scored") == [[0] * len(prompt) + [1] * (len(completion) + 1), [1] * (len(yes) + 1)]
    assert (receipt["eod_id"], receipt["scored_tokens"]) == (2000, len(completion) + len(yes) + 2)
    run(write(tmp_path / "b.txt", "text"))
    assert not (tmp_path / "out.scored.idx").exists()  # one left over would be taken for the new text's


def test_chats_are_rendered_by_the_tokenizers_template(run, source, tmp_path, monkeypatch):
    folder = tmp_path / "chat"
    load_tokenizer(source).save(folder)
    write(
        folder / "chat_template.jinja",
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|endoftext|>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}",
    )
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello there"}]
    path = write(tmp_path / "a.jsonl", jsonl({"messages": messages}))
    prepare(PrepareConfig(inputs=(str(path),), output=tmp_path / "out", tokenizer=str(folder), messages_key="messages"))
    (ids,), (mask,) = read(tmp_path / "out"), read(f"{tmp_path}/out.scored")
    scored = [token for token, is_scored in zip(ids, mask, strict=True) if is_scored]
    assert load_tokenizer(source).decode(ids) == "<user>hi<|endoftext|><assistant>hello there<|endoftext|>"
    assert load_tokenizer(source).decode(scored) == "hello there<|endoftext|>"


def test_short_documents_are_left_out_and_counted(run, tmp_path):
    receipt, documents = run(write(tmp_path / "a", "a b c\nd\n\ne f\n"), unit="line", min_tokens=2, append_eod=True)
    assert [len(document) for document in documents] == [4, 3]
    assert [receipt[name] for name in ("documents", "documents_skipped", "words", "bytes")] == [2, 1, 5, 8]
    with pytest.raises(DataError, match=r"has 9 tokens or more; lower --min-tokens"):
        run(tmp_path / "a", unit="line", min_tokens=9)


def test_completions_of_a_sentencepiece_model_get_no_space_of_their_own(tmp_path):
    tokenizer = load_tokenizer(make_sentencepiece(tmp_path / "tokenizer"))
    pairs = [("Question: 2+2?\nAnswer: ", "four"), ("Q", " yes")]
    path = write(tmp_path / "a.jsonl", jsonl(*({"p": prompt, "c": completion} for prompt, completion in pairs)))
    options = {"tokenizer": str(tmp_path / "tokenizer"), "prompt_key": "p", "completion_key": "c"}
    prepare(PrepareConfig(inputs=(str(path),), output=tmp_path / "out", **options))
    assert read(tmp_path / "out") == [tokenizer.encode(prompt + completion) for prompt, completion in pairs]
    scored = read(f"{tmp_path}/out.scored")
    assert [sum(row) for row in scored] == [len(tokenizer.encode("four")), len(tokenizer.encode("yes"))]


@pytest.mark.slow
def test_the_round_trip_of_the_last_document_counts(tmp_path, capsys):
    """A million characters in the vocabulary, in many batches, followed by some outside it."""
    make_sentencepiece(tmp_path / "tokenizer", byte_fallback=False)
    path = write(tmp_path / "a.txt", "the same line again\n" * 60_000 + "日本語\n")
    options = {"tokenizer": str(tmp_path / "tokenizer"), "unit": "line"}
    receipt = prepare(PrepareConfig(inputs=(str(path),), output=tmp_path / "out", **options))
    assert (receipt["tokenizer"]["round_trip"], receipt["documents"]) == (False, 60_001)
    assert capsys.readouterr().err.count("is lossy") == 1


def chat(*roles):
    return {"m": [{"role": role, "content": f"says {role}"} for role in roles]}


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory):
    return str(make_byte_level(tmp_path_factory.mktemp("chat") / "tokenizer", template=TEMPLATE))


NOTHING_SCORED = [
    pytest.param(
        [{"p": "a", "c": ""}] * 2, {"prompt_key": "p", "completion_key": "c"}, "completion-key c is empty", id="empty"
    ),
    pytest.param(
        [chat("user", "narrator"), chat("human", "cat")],
        {"messages_key": "m"},
        "'assistant' are, but --messages-key m has the roles 'cat', 'human', 'narrator', 'user'",
        id="other roles",
    ),
    pytest.param(
        [{"m": [*chat("user")["m"], *({**turn, "weight": 0} for turn in chat("assistant")["m"])]}],
        {"messages_key": "m"},
        "every turn of role 'assistant' has weight 0, or neither text",
        id="weight 0",
    ),
]


@pytest.mark.parametrize("append_eod", [False, True])
@pytest.mark.parametrize(("records", "options", "message"), NOTHING_SCORED)
def test_data_without_a_scored_token_are_refused(tmp_path, chat_tokenizer, records, options, message, append_eod):
    path = write(tmp_path / "a.jsonl", jsonl(*records))
    config = {"inputs": (str(path),), "output": tmp_path / "out", "tokenizer": chat_tokenizer}
    with pytest.raises(DataError, match=f"a.jsonl .*scored: .*{message}"):
        prepare(PrepareConfig(**config, **options, append_eod=append_eod))
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def test_the_end_of_a_chat_is_scored_after_the_assistant_alone(tmp_path, chat_tokenizer):
    """The end token is scored only if the last segment is; after a user's turn the model should not end the text."""
    path = write(tmp_path / "a.jsonl", jsonl(chat("user", "assistant"), chat("user", "assistant", "user")))
    config = {"inputs": (str(path),), "output": tmp_path / "out", "tokenizer": chat_tokenizer}
    prepare(PrepareConfig(**config, messages_key="m", append_eod=True))
    assert [row[-1] for row in read(f"{tmp_path}/out.scored")] == [1, 0]
    eos_id = load_tokenizer(chat_tokenizer).eos_id
    assert [row[-1] for row in read(tmp_path / "out")] == [eos_id, eos_id]


@pytest.mark.parametrize("holds", [True, False])
def test_a_lossy_tokenizer_is_reported(corpora, tmp_path, capsys, holds):
    path = corpora / "book.txt"
    tokenizer = make_llama_model(tmp_path / "llama.model") if holds else make_sentencepiece(tmp_path / "normalizing")
    receipt = prepare(PrepareConfig(inputs=(str(path),), output=tmp_path / "out", tokenizer=str(tokenizer)))
    assert receipt["tokenizer"]["round_trip"] is holds
    assert ("is lossy" in capsys.readouterr().err) is not holds
    assert read(tmp_path / "out") == [load_tokenizer(tokenizer).encode(path.read_text(encoding="utf-8-sig"))]


def test_text_is_prepared_once(source, tmp_path, monkeypatch):
    path, prefix = write(tmp_path / "a.txt", "one two"), tmp_path / "cache" / "a"
    runs = []
    monkeypatch.setattr("megaft.data.prepare.prepare", lambda *given: (runs.append(given), prepare(*given)))
    own = load_tokenizer(source)
    for _ in range(2):
        assert ensure_prepared(path, prefix, source, own).prefix == str(prefix)
    assert len(runs) == 1
    write(path, "one six")
    ensure_prepared(path, prefix, source, own)
    ensure_prepared(path, prefix, source, own, "ptb_megatron")
    assert len(runs) == 3


def test_command_prints_the_receipt_last(source, tmp_path, capsys):
    path = write(tmp_path / "a.txt", "one two")
    assert main(PrepareConfig(inputs=(str(path),), output=tmp_path / "out", tokenizer=source, json=True)) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == load_receipt(tmp_path / "out")


BAD_SETTINGS = [
    pytest.param({"inputs": ()}, "no input; .*`megaft prepare corpus", id="no input"),
    pytest.param({"detokenizer": "ptb3"}, "detokenizer is 'ptb3'; use one of identity, wikitext", id="detokenizer"),
    pytest.param({"min_tokens": 0}, "min-tokens is 0; use 1 or more", id="min tokens"),
    pytest.param({"workers": 0}, "workers is 0; use 1 or more", id="workers"),
    pytest.param({"prompt_key": "q"}, "--prompt-key is q", id="prompt alone"),
    pytest.param(
        {"messages_key": "m", "detokenizer": "ptb_megatron"}, "--messages-key is m", id="chat and detokenizer"
    ),
]


@pytest.mark.parametrize(("options", "message"), BAD_SETTINGS)
def test_bad_settings(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        PrepareConfig(**{"inputs": ("a",), "output": tmp_path, "tokenizer": "t"} | options)


def test_bad_input_leaves_nothing_behind(run, tmp_path):
    good, bad = write(tmp_path / "a.jsonl", jsonl({"text": "x"})), tmp_path / "a.txt"
    bad.write_bytes(b"\xffx")
    with pytest.raises(DataError, match=r"a\.txt, line 1, byte offset 0, is 0xff"):
        run(good, bad)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "a.txt"]
    with pytest.raises(DataError, match=r"JSON records, .*key 'm'"):
        run(bad, messages_key="m")


def test_two_at_once_are_refused(run, tmp_path):
    told = rf"out is in use by host .*, pid {os.getpid()}, since .*; wait"
    with locked(tmp_path / "out", file=tmp_path / "out.lock"), pytest.raises(ConfigError, match=told):
        run(write(tmp_path / "a.txt", "one"))


@pytest.mark.parametrize("options", [{}, {"prompt_key": "p", "completion_key": "c"}], ids=["text", "mask"])
def test_a_refused_record_leaves_no_open_or_temporary_file(run, tmp_path, options):
    lines = [{"text": "x", "p": "y", "c": "z"}, {}]
    path = write(tmp_path / "a.jsonl", jsonl(*lines))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(DataError, match=r"a\.jsonl, line 2"):
            run(path, **options)
        gc.collect()
    assert [str(warning.message) for warning in caught if warning.category is ResourceWarning] == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.jsonl"]


DAMAGE = [
    pytest.param(".bin", lambda old: old[:-1], "has 3 bytes; its receipt says 4 bytes", id="short .bin"),
    pytest.param(".idx", lambda old: old + b"x", "has 63 bytes; its receipt says 62 bytes", id="long .idx"),
    pytest.param(".json", lambda old: old[:-9], "is damaged", id="cut receipt"),
    pytest.param(".json", lambda old: b"[]", "is not a receipt of format version 1", id="no receipt"),
    pytest.param(".json", lambda old: b'{"format_version": 0}', "is not a receipt of format", id="another version"),
]


@pytest.mark.parametrize(("suffix", "damage", "message"), DAMAGE)
def test_damage_is_refused(run, tmp_path, suffix, damage, message):
    run(write(tmp_path / "a.txt", "one two"))
    path = tmp_path / f"out{suffix}"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message):
        load_receipt(tmp_path / "out")
