import gzip
import json
import os
import sys
import tracemalloc
from functools import partial

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megaft.base.errors import DataError
from megaft.data.chat import Renderer
from megaft.data.corpus import Document, TextLayout, chunks, count, documents, split_at_spaces, split_document
from megaft.data.input_files import expand
from megaft.data.records import Segment
from megaft.data.text_file import BLOCK_BYTES, TextFile
from megaft.data.tokenizer import load_tokenizer

TEXT = " = A = \n one two\n\nthree  é\n \n\nfour"


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def jsonl(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def texts(path, **layout):
    return ["".join(part.text for part in d.segments) for d in documents(TextFile(path), TextLayout(**layout))]


UNITS = [
    pytest.param("file", [TEXT], id="file"),
    pytest.param("line", [" = A = ", " one two", "three  é", "four"], id="line"),
    pytest.param("document", [" = A = \n one two", "three  é", "four"], id="document"),
]


@pytest.mark.parametrize("suffix", ["txt", "tokens", "txt.gz", "txt.zst"])
@pytest.mark.parametrize(("unit", "expected"), UNITS)
def test_text_files(tmp_path, suffix, unit, expected):
    pack = {"gz": gzip.compress, "zst": zstandard.compress}.get(suffix.partition(".")[2], bytes)
    assert texts(write(tmp_path / f"a.{suffix}", pack(TEXT.encode())), unit=unit) == expected


def test_several_compressed_streams_in_one_file(tmp_path):
    assert texts(write(tmp_path / "a.gz", gzip.compress(b"one\n") + gzip.compress(b"two\n"))) == ["one\ntwo\n"]


def test_counts_are_of_the_original(tmp_path):
    (document,) = documents(TextFile(write(tmp_path / "a", "a @-@ b é\n")), TextLayout(detokenize=lambda _: "x"))
    assert (document.num_words, document.num_bytes, document.segments) == (4, 11, (Segment("x"),))


RECORDS = [
    pytest.param({"text": "one", "id": {"text": "text"}}, {}, [Segment("one")], id="the key elsewhere too"),
    pytest.param({"text": "one"}, {}, [Segment("one")], id="text"),
    pytest.param({"body": "one"}, {"text_key": "body"}, [Segment("one")], id="another key"),
    pytest.param(
        {"q": "1+1=", "a": "2"},
        {"prompt_key": "q", "completion_key": "a"},
        [Segment("1+1=", False), Segment("2")],
        id="prompt and completion",
    ),
    pytest.param(
        {"chat": [{"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "yo"), ("user", "go"))]},
        {"messages_key": "chat"},
        [Segment("<user>hi\n<assistant>", False), Segment("yo\n"), Segment("<user>go\n", False)],
        id="chat",
    ),
]


def render(messages, add_generation_prompt=False):
    return "".join(f"<{m['role']}>{m['content']}\n" for m in messages) + "<assistant>" * add_generation_prompt


@pytest.mark.parametrize(("record", "layout", "expected"), RECORDS)
def test_jsonl(tmp_path, record, layout, expected):
    path = write(tmp_path / "a.jsonl", "\n" + jsonl(record) * 2)
    found = [
        list(document.segments) for document in documents(TextFile(path), TextLayout(render=Renderer(render), **layout))
    ]
    assert found == [expected] * 2


def count_turns(messages, **_):
    return f"{len(messages)} turns"


def think(messages, add_generation_prompt=False):
    """Render as templates of some reasoning models do, which open a thought for the answer and drop it afterwards."""
    return render(messages, add_generation_prompt) + "<think>" * add_generation_prompt


def number(messages, add_generation_prompt=False):
    """Render the answers as they are asked for, but mark the last turn."""
    return "".join(f"<{'last' if m is messages[-1] else ''}>{m['content']}" for m in messages)


@pytest.mark.parametrize(
    ("rewrite", "fault"),
    [
        pytest.param(
            count_turns,
            "begins an answer differently from its generation prompt, '1 turns' instead of '0 turns'",
            id="counts",
        ),
        pytest.param(
            think,
            "begins an answer differently from its generation prompt, 'x\\\\n' instead of '<think>'",
            id="thoughts",
        ),
        pytest.param(number, "rewrites earlier turns, '>x<last>y' instead of 'last>x'", id="the last turn"),
    ],
)
def test_a_template_that_rewrites_is_refused(tmp_path, rewrite, fault):
    turns = [("assistant", "x"), ("user", "y"), ("assistant", "")]
    path = write(tmp_path / "a.jsonl", jsonl({"m": [{"role": role, "content": text} for role, text in turns]}))
    layout = TextLayout(messages_key="m", render=Renderer(rewrite))
    with pytest.raises(DataError, match=rf"line 1: .*{fault}; .*prompt and completion"):
        list(documents(TextFile(path), layout))


BAD = [
    pytest.param("a.txt", b"", "a.txt is empty", id="empty"),
    pytest.param("a.gz", b"", "a.gz is empty", id="empty .gz"),
    pytest.param("a.txt", b"\xef\xbb\xbf", "only blank lines", id="only a byte order mark"),
    pytest.param("a.txt", b" \n\n\t\n", "only blank lines", id="blank"),
    pytest.param("a.jsonl", b"\n \n", "only blank lines", id="blank .jsonl"),
    pytest.param("a.txt", b"ab\ncd\n\xe9x", "line 3, byte offset 6, is 0xe9", id="latin-1"),
    pytest.param("a.txt", b"\xef\xbb\xbfab\ncd\n\xe9x", "line 3, byte offset 9, is 0xe9", id="after a byte order mark"),
    pytest.param("a.txt", b"a\r\n" * BLOCK_BYTES + b"\xc3", f"line {BLOCK_BYTES + 1}, byte offset 24576", id="far"),
    pytest.param("a.txt", "ab".encode("utf-16"), "is UTF-16", id="utf-16"),
    pytest.param("a.txt", "ab".encode("utf-16-be"), "byte offset 0, is a NUL byte", id="utf-16 without a mark"),
    pytest.param("a.txt", b"ab\nc\0", "line 2, byte offset 4, is a NUL byte", id="binary"),
    pytest.param("a.gz", gzip.compress(b"abc" * 99)[:-9], "in the middle of its compressed data", id="cut .gz"),
    pytest.param("a.zst", zstandard.compress(b"abc" * 99)[:-3], "in the middle of its compressed data", id="cut .zst"),
    pytest.param("a.gz", b"plain text", "damaged or not a .gz", id="no .gz"),
    pytest.param("a.zst", b"plain text", "damaged or not a .zst", id="no .zst"),
    pytest.param("a.jsonl", b'{"text": "a"}\n{"text": \n', r"line 2, column \d+: broken JSON", id="broken json"),
    pytest.param("a.jsonl", b'\n{"body": 1, "id": 2}', "line 2 has no key 'text'; .* 'body', 'id'", id="no key"),
    pytest.param("a.jsonl", b'{"turns": [{}]}', r"no key 'text'; .* 'turns'\. .* --messages-key turns\.", id="chats"),
    pytest.param("a.jsonl", b'{"text": 5}', "line 1: 'text' is a int", id="no string"),
    pytest.param("a.jsonl", b"[]", "line 1 is a JSON list", id="no object"),
    pytest.param("a.jsonl", b'{"text": "a", "n": 1' + b"0" * 5000 + b"}", "an integer has thousands", id="digits"),
    pytest.param("a.jsonl", b'\n{"text": "a", "n": ' + b"[" * 10**5, "line 2 .*nested too deeply", id="nesting"),
    pytest.param("a", b'{"text": "a", "n": ' + b"[" * 10**5, "line 1 cannot be read as JSON .lists", id="no name"),
    pytest.param("a.jsonl", b'{"text": NaN}', "line 1: 'text' is a float", id="NaN"),
    pytest.param("a.jsonl", b'{"text": "a\\u0000"}', "line 1: 'text' has a NUL character", id="NUL"),
    pytest.param("a.jsonl", b'{"text": "a\\udc00"}', "line 1 has an unpaired surrogate", id="half a surrogate"),
    pytest.param("a.jsonl", b'{"text": "a", "text": "b"}', "line 1 has the key 'text' 2 times", id="key twice"),
    pytest.param("a.json", b'[{"text": "a", "n": ' + b"[" * 10**5, "record 1 cannot be read", id="deep array"),
]  # fmt: skip


@pytest.mark.parametrize("can_split", [True, False])
@pytest.mark.parametrize(("name", "data", "message"), BAD)
def test_bad_files(tmp_path, name, data, message, can_split):
    with pytest.raises(DataError, match=message) as raised:
        list(chunks(TextFile(write(tmp_path / name, data)), TextLayout(), can_split=can_split))
    assert name in str(raised.value)


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(DataError, match="cannot be read: No such file"):
        list(TextFile(tmp_path / "gone").blocks())


def test_marks_and_line_ends(tmp_path):
    data = b"\xef\xbb\xbf" + b"a\r\n" * BLOCK_BYTES + b"lone\rend\r"
    source = TextFile(write(tmp_path / "a.txt", data))
    assert "".join(source.blocks()) == "a\n" * BLOCK_BYTES + "lone\rend\r"
    assert (source.byte_order_marks, source.crlfs, source.num_bytes) == (1, BLOCK_BYTES, len(data))


def test_expand(tmp_path):
    for name in ("d/b.txt", "d/a.txt", "d/sub/c.txt", "d/.hidden", "d/.git/x", "z.txt", "y.txt"):
        write(tmp_path / name, "x")
    names = [
        str(path.relative_to(tmp_path)) for path in expand([f"{tmp_path}/*.txt", tmp_path / "d", tmp_path / "z.txt"])
    ]
    assert names == ["y.txt", "z.txt", "d/a.txt", "d/b.txt", "d/sub/c.txt"]
    with pytest.raises(DataError, match="matches no file"):
        expand([tmp_path / "*.jsonl"])


def linked(path, target):
    path.symlink_to(target)
    return path


def test_links_are_followed_once(tmp_path):
    for name in ("tree/b.txt", "tree/sub/c.txt", "real/d.txt", "real/inner/e.txt", "other/f.txt"):
        write(tmp_path / name, "x")
    linked(tmp_path / "tree/a_link", tmp_path / "real")
    linked(tmp_path / "tree/again", tmp_path / "real/inner")
    linked(tmp_path / "tree/to_sub", "sub")
    linked(tmp_path / "real/inner/cycle", tmp_path / "tree")
    linked(tmp_path / "tree/g.txt", tmp_path / "other/f.txt")
    linked(tmp_path / "tree/.hidden", tmp_path / "other")
    names = [str(path.relative_to(tmp_path / "tree")) for path in expand([tmp_path / "tree"])]
    assert names == ["a_link/d.txt", "a_link/inner/e.txt", "b.txt", "g.txt", "sub/c.txt"]
    assert expand([linked(tmp_path / "whole", tmp_path / "real")]) == [
        *(tmp_path / "whole" / name for name in ("d.txt", "inner/cycle/b.txt", "inner/cycle/g.txt")),
        *(tmp_path / "whole" / name for name in ("inner/cycle/sub/c.txt", "inner/e.txt")),
    ]


@pytest.mark.parametrize("given", ["tree", "tree/*", "tree/gone", "**/g*"])
def test_a_link_that_leads_nowhere_is_refused(tmp_path, given):
    write(tmp_path / "tree/a.txt", "x")
    linked(tmp_path / "tree/gone", "nothing")
    with pytest.raises(DataError, match="tree/gone is a link to nothing"):
        expand([tmp_path / given])


def test_a_glob_reaches_into_folders_as_a_shells_would(tmp_path):
    for name in ("d/a.txt", "d/sub/b.txt", "d/sub/.c"):
        write(tmp_path / name, "x")
    assert expand([f"{tmp_path}/d/*"]) == expand([tmp_path / "d"]) == [tmp_path / "d/a.txt", tmp_path / "d/sub/b.txt"]


def test_empty_files_are_left_out_unless_named(tmp_path):
    write(tmp_path / "d/a.txt", "x")
    empty, said = write(tmp_path / "d/_SUCCESS", ""), []
    assert expand([tmp_path / "d"], said.append) == [tmp_path / "d/a.txt"]
    assert said == [f"note: skipped empty files of {tmp_path}/d: {empty}."]
    assert expand([empty]) == [empty]


def test_a_folder_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    write(tmp_path / "d/closed/a.txt", "x")

    def scandir(path, real=os.scandir):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"d/closed .*: Permission denied"):
        expand([tmp_path / "d"])


SPACES = [
    " ",
    "\n",
    "\t",
    "\r",
    "\x0b",
    "\x1c",
    "\x85",
    "\xa0",
    "\u1680",
    "\u180e",
    "\u2028",
    "\u200b",
    "\u3000",
    "\ufeff",
]
ODD = [*SPACES, *SPACES[:2] * 8, *"aZ9.'-é中́", "'s", "😀", "<|endoftext|>", "\u0345", "\u2167"]


@pytest.fixture(scope="module")
def gpt2(gpt2_bpe):
    return load_tokenizer(gpt2_bpe)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(parts=st.lists(st.sampled_from(ODD) | st.text(max_size=3), max_size=60), width=st.integers(1, 9))
def test_cutting_changes_no_token(gpt2, parts, width):
    text = "".join(parts)
    cuts = list(split_at_spaces(text[begin : begin + width] for begin in range(0, len(text), width)))
    assert "".join(cuts) == text
    assert [i for ids in gpt2.encode_batch(cuts) for i in ids] == gpt2.encode(text)
    assert sum(len(chunk.split()) for chunk in cuts) == len(text.split())


@pytest.mark.slow
def test_every_character_may_stand_before_a_cut(gpt2):
    characters = [chr(code) for code in range(0x3100) if code]
    pairs = [(f"a{c}", f"{space}b") for c in characters if not c.isspace() for space in " \n"]
    whole = gpt2.encode_batch([left + right for left, right in pairs])
    lefts, rights = (gpt2.encode_batch([pair[side] for pair in pairs]) for side in (0, 1))
    assert whole == [left + right for left, right in zip(lefts, rights, strict=True)]


@pytest.mark.parametrize("name", ["book.txt", "wikitext2/wiki.test.tokens"])
def test_streamed_file_equals_whole(corpora, gpt2, name):
    path = corpora / name
    read = partial(chunks, layout=TextLayout())
    streamed, (whole,) = list(read(TextFile(path), can_split=True)), read(TextFile(path), can_split=False)
    assert len(streamed) > 1
    assert "".join(chunk.text for chunk in streamed) == whole.text
    assert [chunk.ends_document for chunk in streamed] == [False] * (len(streamed) - 1) + [True]
    for name in ("num_words", "num_bytes"):
        assert sum(getattr(chunk, name) for chunk in streamed) == getattr(whole, name)
    ids = [i for ids in gpt2.encode_batch([chunk.text for chunk in streamed]) for i in ids]
    assert ids == gpt2.encode(whole.text)


def test_long_record_is_cut_too(tmp_path):
    record = {"q": "why? " * BLOCK_BYTES, "a": "so " * BLOCK_BYTES}
    layout = TextLayout(prompt_key="q", completion_key="a")
    found = list(chunks(TextFile(write(tmp_path / "a.jsonl", jsonl(record))), layout, can_split=True))
    for key, is_scored in (("q", False), ("a", True)):
        parts = [part for chunk in found for part in chunk.segments]
        assert "".join(part.text for part in parts if part.is_scored is is_scored) == record[key]
    assert max(len(chunk.text) for chunk in found) <= 2 * BLOCK_BYTES
    assert (found[-1].num_words, found[-1].num_bytes, found[-1].ends_document) == (
        BLOCK_BYTES,
        3 * BLOCK_BYTES,  # of the completion
        True,
    )


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=6), block=st.integers(4, 20))
def test_acut_document_keeps_its_segments(lengths, block):
    """Each character stays in its segment, and empty segments at the end stay there: they say what an end token is."""
    text = "ab cde f " * 9
    segments = [Segment(text[:length], index % 2 == 0) for index, length in enumerate([*lengths, 40])] + [
        Segment("", False)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megaft.data.corpus.BLOCK_BYTES", block)
        found = list(split_document(Document(tuple(segments), 1, 2, "a"), can_split=True))
    assert len(found) > 1
    characters = [(letter, part.is_scored) for part in segments for letter in part.text]
    assert [
        (letter, part.is_scored) for chunk in found for part in chunk.segments for letter in part.text
    ] == characters
    assert found[-1].segments[-1] == segments[-1]
    assert "".join(chunk.text for chunk in found) == "".join(part.text for part in segments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param("a.txt", TextLayout(), id="file"),
        pytest.param("a.txt", TextLayout(unit="line"), id="line"),
        pytest.param("a.txt", TextLayout(unit="document"), id="document"),
        pytest.param("a.jsonl", TextLayout(), id="jsonl"),
    ],
)
def test_memory_does_not_grow_with_the_file(tmp_path, name, layout):
    words = "some words " * 20
    line = jsonl({"text": words}) if name.endswith("jsonl") else f"{words}\n\n"
    path = write(tmp_path / name, line * 10_000)
    tracemalloc.start()
    num_words = sum(chunk.num_words for chunk in chunks(TextFile(path), layout, can_split=True))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert num_words == 400_000
    assert peak_bytes < 500_000 < path.stat().st_size


@given(
    st.text(
        alphabet=st.one_of(
            st.sampled_from(" \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u1680\u2003\u2028\u3000é\u2013a"),
            st.characters(codec="utf-8"),
        )
    )
)
def test_counts_are_those_of_split_and_encode(text):
    assert count(text) == (len(text.split()), len(text.encode()))


def test_every_space_python_splits_at_is_counted_so():
    """No code point above the table is white space."""
    assert not any(chr(code).isspace() for code in range(0x3001, sys.maxunicode + 1))
