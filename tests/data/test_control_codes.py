"""Control codes: a code and a space before each document's text, with the same tokens as in a prompt."""

from itertools import pairwise

import pytest
from tiny_tokenizers import make_byte_level, make_metaspace, make_sentencepiece

from megaft.base.errors import DataError
from megaft.data.indexed import TokenFile
from megaft.data.prepare import PrepareConfig, prepare
from megaft.data.tokenizer import load_tokenizer


def write(path, text):
    path.write_text(text)
    return path


def read(prefix):
    tokens = TokenFile(prefix)
    return [tokens.read(*ends).tolist() for ends in pairwise(tokens.document_offsets.tolist())]


def test_every_document_of_an_input_begins_with_its_control_code(tmp_path, toy_model):
    """The code is not scored: it is a condition, not a target."""
    texts = [write(tmp_path / "a.txt", "the one\nand two\n"), write(tmp_path / "b.txt", "a word\n")]
    config = PrepareConfig(
        inputs=tuple(map(str, texts)),
        output=tmp_path / "coded",
        tokenizer=str(toy_model),
        unit="line",
        control_codes=("A", "B"),
    )
    receipt = prepare(config)
    tokenizer = load_tokenizer(str(toy_model))
    tokens, scored = TokenFile(str(config.output)), TokenFile(f"{config.output}.scored")
    begins = tokens.document_offsets[:-1].tolist()
    assert [tokenizer.decode([int(tokens.read(at, at + 1)[0])]) for at in begins] == ["A", "A", "B"]
    whole = scored.read(0, scored.num_tokens)
    assert [position for position in range(len(whole)) if not whole[position]] == begins
    assert (receipt["documents"], receipt["words"], receipt["has_mask"]) == (3, 6, True)
    assert receipt["tokens"] - receipt["scored_tokens"] == 3
    assert read(config.output) == [tokenizer.encode(text) for text in ("A the one", "A and two", "B a word")]


@pytest.mark.slow
@pytest.mark.parametrize("make", [make_byte_level, make_metaspace, make_sentencepiece])
@pytest.mark.parametrize("unit", ["file", "line"])
def test_a_control_code_is_what_a_prompt_asks_for(tmp_path, make, unit):
    """`megaft generate --prompt "A Once upon"` encodes the code, a space and the text as one string."""
    tokenizer = load_tokenizer(make(tmp_path / "tokenizer"))
    text = write(tmp_path / "a.txt", "Once upon a time\nthere was\n" * 1000)  # longer than a piece of a file
    config = {"inputs": (str(text),), "output": tmp_path / "out", "tokenizer": str(tmp_path / "tokenizer")}
    prepare(PrepareConfig(**config, unit=unit, control_codes=("A",)))
    found = [document[len(tokenizer.opening_ids) :] for document in read(tmp_path / "out")]
    lines = text.read_text().splitlines() if unit == "line" else [text.read_text()]
    assert found == [tokenizer.encode(f"A {line}") for line in lines]
    unscored = len(tokenizer.opening_ids) + 1
    assert read(f"{tmp_path}/out.scored") == [[0] * unscored + [1] * (len(document) - 1) for document in found]


def test_a_code_that_merges_with_a_text_is_refused(tmp_path):
    """A sentencepiece model whose pieces may hold spaces, one of them `A a`."""
    make_sentencepiece(tmp_path / "tokenizer", split_by_whitespace=False, user_defined_symbols=["A\u2581a"])
    config = {
        "inputs": (str(write(tmp_path / "a", "a b")),),
        "output": tmp_path / "out",
        "tokenizer": str(tmp_path / "tokenizer"),
    }
    with pytest.raises(DataError, match="--control-codes has 'A'"):
        prepare(PrepareConfig(**config, control_codes=("A",)))
