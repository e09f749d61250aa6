"""Bad texts, prepared data and tokenizers: 1 to 25, and 49 and 50."""

import json

import numpy as np
from bad_inputs import Table

TABLE = Table()
refuse = TABLE.refuse


@refuse("1 empty file", 3, r"a\.txt is empty; give a file with text")
def _(workshop):
    return workshop.prepare(workshop.write("a.txt", ""))


@refuse("2 only blank lines", 3, r"a\.txt holds only blank lines; give a file with text")
def _(workshop):
    return workshop.prepare(workshop.write("a.txt", "\n \n\t\n"))


@refuse("2 only blank lines, evaluated", 3, r"a\.txt holds only blank lines; give a file with text")
def _(workshop):
    return workshop.evaluate(workshop.write("a.txt", "\n \n\t\n"))


@refuse(
    "4 a byte that is not UTF-8", 3, r"a\.txt, line 2, byte offset 7, is 0xe9, which is not UTF-8; .*iconv -f LATIN1"
)
def _(workshop):
    return workshop.prepare(workshop.write("a.txt", b"one\ncaf\xe9\n"))


@refuse("6 UTF-16", 3, r"a\.txt is UTF-16; convert it: iconv -f UTF-16")
def _(workshop):
    return workshop.prepare(workshop.write("a.txt", "text\n".encode("utf-16")))


@refuse(
    "6 UTF-16 without a mark", 3, r"a\.txt, line 1, byte offset 1, is a NUL byte: the file is binary or UTF-16; give"
)
def _(workshop):
    return workshop.prepare(workshop.write("a.txt", "text\n".encode("utf-16-le")))


@refuse("7 binary", 3, r"a\.txt, line 2, byte offset 4, is a NUL byte: the file is binary")
def _(workshop):
    return workshop.prepare(workshop.write("a.txt", b"ELF\n\0\1\2"))


@refuse(
    "9 JSONL broken at a line", 3, r"a\.jsonl, line 2, column 10: broken JSON .*; every record must be a JSON object"
)
def _(workshop):
    return workshop.prepare(workshop.write("a.jsonl", '{"text": "one"}\n{"text": two}\n'))


@refuse("10 JSONL without the text key", 3, r"a\.jsonl, line 1 has no key 'text'; its keys are 'title', 'body'")
def _(workshop):
    return workshop.prepare(workshop.write("a.jsonl", '{"title": "x", "body": "y"}\n'))


@refuse(
    "12 documents too short to predict anything",
    3,
    r"short has no document of two tokens or more; give --data\.train a longer text",
)
def _(workshop):
    return workshop.train("--data.sample=document", data=single_tokens(workshop))


@refuse("13 a window of one token", 3, r"one\.txt .*protocol megatron .*give a longer text")
def _(workshop):
    return workshop.evaluate(workshop.write("one.txt", "a"), "--protocol=megatron", "--context-length=64")


@refuse("13 a context of one token", 2, r"context-length is 1; set --context-length to 2 or more")
def _(workshop):
    return workshop.evaluate(
        workshop.write("a.txt", "some text"), "--protocol=hf-docs", "--context-length=1", "--stride=1"
    )


@refuse("14 zero validation windows", 3, r"short has no token to validate on; give --data\.valid a longer text")
def _(workshop):
    model = without_special_tokens(workshop)
    return workshop.train(model=model, data=workshop.toy.train, valid=single_tokens(workshop))


@refuse("14 no token is scored", 3, r"data\.train has .*none, of which no token is scored: .*role assistant")
def _(workshop):
    return workshop.train(data=nothing_scored(workshop))


@refuse("15 evaluation file missing", 3, r"--data .*nowhere\.txt does not exist; pass a UTF-8 text file")
def _(workshop):
    return workshop.evaluate(workshop.folder / "nowhere.txt")


@refuse("15 validation file missing", 3, r"--data\.valid is .*nowhere\.txt")
def _(workshop):
    return workshop.train(valid=workshop.folder / "nowhere.txt")


@refuse(
    "17 a token id beyond the vocabulary",
    3,
    r"copy\.bin, token [\d,]+ is 600, but the vocabulary has 512; run megaft prepare again",
)
def _(workshop):
    prefix = workshop.copy(workshop.toy.train)
    tokens = np.memmap(f"{prefix}.bin", np.uint16, mode="r+")
    tokens[:] = 600
    tokens.flush()
    return workshop.train(data=prefix)


@refuse(
    "18 tokenizer larger than the embedding", 3, r"the tokenizer has 512 tokens, but the model embeds 500; use the tok"
)
def _(workshop):
    return workshop.train(
        "--model.from-scratch", str(workshop.model(vocab_size=500)), "--data.tokenizer", str(workshop.toy.model)
    )


@refuse("20 zero-length .model", 3, r"a\.model is empty; give a sentencepiece model")
def _(workshop):
    return workshop.prepare(workshop.toy.sentencepiece, tokenizer=workshop.write("a.model", b""))


@refuse("21 truncated .model", 3, r"a\.model is not a complete sentencepiece model \([\d,]+ bytes\); copy it again")
def _(workshop):
    whole = workshop.toy.sentencepiece.read_bytes()
    return workshop.prepare(
        workshop.write("a.txt", "text"), tokenizer=workshop.write("a.model", whole[: len(whole) // 2])
    )


@refuse("22 vocab.json without merges.txt", 3, r"bpe has no merges\.txt; a BPE needs both vocab\.json and merges\.txt")
def _(workshop):
    folder = workshop.write("bpe/vocab.json", '{"a": 0}').parent
    return workshop.prepare(workshop.write("a.txt", "text"), tokenizer=folder)


@refuse("24 control codes for other inputs", 2, r"--control-codes are Books \(1\), but the inputs are .* \(2\)")
def _(workshop):
    texts = workshop.write("a.txt", "one two\n"), workshop.write("b.txt", "three\n")
    return workshop.prepare(*texts, flags=["--control-codes", "Books"])


@refuse(
    "25 a control code of several tokens",
    3,
    r"--control-codes has 'Wikipedia', which is \d tokens \('W.*\) in ",
)
def _(workshop):
    return workshop.prepare(workshop.write("a.txt", "one two\n"), flags=["--control-codes", "Wikipedia"])


@refuse("49 bad .idx", 3, r"copy\.idx is not a version 1 Megatron index; run megaft prepare again")
def _(workshop):
    prefix = workshop.copy(workshop.toy.train)
    index = workshop.folder / "copy.idx"
    index.write_bytes(b"NOTANIDX" + index.read_bytes()[8:])
    return workshop.train(data=prefix)


@refuse("49 .idx cut short", 3, r"copy\.idx has 10 bytes; its receipt says [\d,]+ bytes. Run megaft prepare again")
def _(workshop):
    prefix = workshop.copy(workshop.toy.train)
    index = workshop.folder / "copy.idx"
    index.write_bytes(index.read_bytes()[:10])
    return workshop.train(data=prefix)


@refuse(
    "50 .bin shorter than .idx says",
    3,
    r"copy\.bin has [\d,]+ bytes; its receipt says [\d,]+ bytes. Run megaft prep",
)
def _(workshop):
    prefix = workshop.copy(workshop.toy.train)
    data = workshop.folder / "copy.bin"
    data.write_bytes(data.read_bytes()[:-2])
    return workshop.train(data=prefix)


def single_tokens(workshop):
    """A prepared dataset whose documents have one token each."""
    return workshop.prepared("short", workshop.write("short.txt", "a\nb\nc\n"), "--unit=line")


def nothing_scored(workshop):
    """A prepared dataset of prompts and completions without a scored token."""
    records = workshop.write("none.jsonl", json.dumps({"p": "one two three", "c": " four five"}) + "\n")
    prefix = workshop.prepared("none", records, "--prompt-key=p", "--completion-key=c")
    scored = np.memmap(f"{prefix}.scored.bin", np.uint8, mode="r+")
    scored[:] = 0
    scored.flush()
    return prefix


def without_special_tokens(workshop):
    folder = workshop.model()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("bos_token", "eos_token")}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
