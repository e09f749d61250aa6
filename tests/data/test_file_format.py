import bz2
import gzip
import io
import json
import lzma
import pickle
import sqlite3
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import zstandard

from megaft.base.errors import DataError
from megaft.data.corpus import TextLayout, chunks, documents
from megaft.data.text_file import BLOCK_BYTES, TextFile

LINES = '{"text": "To be"}\n{"text": "or not"}\n'
TEXTS = ["To be", "or not"]
ARRAY = '[\n  {"text": "To be"},\n  {"id": [1, {}],\n   "text": "or not"} ]\n'


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def texts(path, read_as="auto", **layout):
    found = documents(TextFile(path, read_as), TextLayout(**layout))
    return ["".join(segment.text for segment in document.segments) for document in found]


NAMES = ["x.json", "x.ndjson", "x.jsonlines", "x.txt", "x", "x.JSONL", "x.data.tokens"]
PACKERS = {"gz": gzip.compress, "zst": zstandard.compress, "xz": lzma.compress, "bz2": bz2.compress}
PACKED = [
    pytest.param(name, pack, id=f"{name} of {suffix}")
    for suffix, pack in PACKERS.items()
    for name in (f"x.jsonl.{suffix}", f"x.{suffix}", "x.txt", "x")
]


@pytest.mark.parametrize("content", [LINES, "\ufeff\n \n" + LINES, LINES.replace("\n", "\r\n")])
@pytest.mark.parametrize("name", NAMES)
def test_json_lines_by_any_name(tmp_path, name, content):
    assert texts(write(tmp_path / name, content)) == TEXTS


@pytest.mark.parametrize(("name", "pack"), PACKED)
def test_compressed_by_any_name(tmp_path, name, pack):
    data = LINES.encode()
    assert texts(write(tmp_path / name, pack(data[:18]) + pack(data[18:]))) == TEXTS
    assert texts(write(tmp_path / name, pack(b"plain"))) == ["plain"] if "jsonl" not in name else True


ARRAYS = [
    pytest.param(ARRAY, TEXTS, id="over lines"),
    pytest.param(json.dumps([{"text": text} for text in TEXTS]), TEXTS, id="one line"),
    pytest.param("\ufeff" + " " * BLOCK_BYTES + ARRAY + "\n" * BLOCK_BYTES, TEXTS, id="white space for blocks"),
    pytest.param(
        json.dumps([{"id": 1, "text": "é]}\\" * BLOCK_BYTES}, {"text": "b"}]),
        ["é]}\\" * BLOCK_BYTES, "b"],
        id="a record of blocks",
    ),
]


@pytest.mark.parametrize("name", ["x.json", "x.txt", "x"])
@pytest.mark.parametrize(("content", "expected"), ARRAYS)
def test_an_array_of_records(tmp_path, name, content, expected):
    assert texts(write(tmp_path / name, content)) == expected


PLAIN = [
    pytest.param("{\\bf Title} and {more}\n", id="LaTeX"),
    pytest.param("{} {}\n", id="braces"),
    pytest.param('{"quoted"} and on\n', id="a quotation in braces"),
    pytest.param("{{Infobox|name=x}}\n", id="template"),
    pytest.param("[[Category:Music]] is\n", id="wiki"),
    pytest.param('["a", "b"] is a list\n', id="list"),
    pytest.param("[1] Knuth, D.\n[2] Turing, A.\n", id="references"),
    pytest.param('["one"]\n["two"]\n', id="lines of lists"),
    pytest.param("a,b,c\n1,2,3\n", id="commas"),
    pytest.param("ORCHARD\n", id="ORC is also a word"),
    pytest.param("PAR1 and GGUF and PK\n", id="PAR1"),
    pytest.param("BZh91 is no bzip2\n", id="BZh9"),
    pytest.param("<mediawiki>\n", id="XML"),
    pytest.param('"a": {"text": 1}\n', id="a colon first"),
]


@pytest.mark.parametrize("content", PLAIN)
def test_text_is_text(tmp_path, content):
    assert texts(write(tmp_path / "x.txt", content)) == [content]


@pytest.mark.parametrize("content", [LINES, ARRAY, "<!DOCTYPE html>\n<p>x", '{\n "a": 1\n}'])
def test_the_user_may_want_braces(tmp_path, content):
    path = write(tmp_path / "x.json", content)
    assert texts(path, "text") == [content]
    assert "".join(chunk.text for chunk in chunks(TextFile(path, "text"), TextLayout(), can_split=True)) == content


def packed(**members):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return data.getvalue()


def tar():
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    return data.getvalue()


def saved(value):
    data = io.BytesIO()
    np.save(data, value)
    return data.getvalue()


def database(path):
    with sqlite3.connect(path) as connection:
        connection.execute("create table t (text)")
    connection.close()
    return path.read_bytes()


FOREIGN = [
    pytest.param("x", b"PAR1\x15\x04\x15\x00" + b"PAR1", "is a Parquet file; convert it: python -c", id="Parquet"),
    pytest.param("x", b"ARROW1\0\0\xff\xff\xff\xff", "is an Arrow .* pyarrow.feather", id="Arrow"),
    pytest.param("x", b"\xff\xff\xff\xff\xf8\x01\0\0\x10\0\0\0", "is an Arrow stream", id="Arrow stream"),
    pytest.param("x", b"ORC\x11\0\0", "is an ORC file", id="ORC"),
    pytest.param("x", b"Obj\x01\x04", "is an Avro file", id="Avro"),
    pytest.param("x.txt", packed(a="To be"), "is a zip archive .*; unpack it", id="zip"),
    pytest.param("x.docx", packed(word="<w/>"), "Office document", id="Office"),
    pytest.param("x", tar(), "is a tar archive; unpack it", id="tar"),
    pytest.param("x.tar.gz", gzip.compress(tar()), "is a tar archive", id="tar.gz"),
    pytest.param("x.txt", lzma.compress(tar()), "is a tar archive", id="tar.xz by another name"),
    pytest.param("x", b"7z\xbc\xaf\x27\x1c\0\x04", "is a 7z archive", id="7z"),
    pytest.param("x", b"Rar!\x1a\x07\0", "is a rar archive", id="rar"),
    pytest.param("x", b"\x04\x22\x4d\x18", "is an lz4 file", id="lz4"),
    pytest.param("x", pickle.dumps(["a"]), "is a pickle", id="pickle"),
    pytest.param("x", pickle.dumps(["a"], 0), "is a pickle", id="pickle in ASCII"),
    pytest.param("x", saved(np.arange(3)), "is a NumPy array", id="npy"),
    pytest.param("x", b"\x89HDF\r\n\x1a\n\0", "is an HDF5 file", id="HDF5"),
    pytest.param("x", b"%PDF-1.7\n%", "is a PDF; convert it: pdftotext", id="PDF"),
    pytest.param("x", "{\\rtf1\\ansi Hello}", "is an RTF document", id="RTF"),
    pytest.param("x", "\n<!doctype HTML>\n<html>", "is an HTML page", id="HTML"),
    pytest.param("x", '<?xml version="1.0"?>\n<html xmlns="x">', "is an HTML page", id="XHTML"),
    pytest.param("x", b"GGUF\x03\0\0\0", "is a GGUF model", id="GGUF"),
    pytest.param("x", b"\x40\0\0\0\0\0\0\0{\"a\":", "is a safetensors file", id="safetensors"),
    pytest.param("x.idx", b"MMIDIDX\0\0\x01", "is the index of a prepared dataset; give its prefix", id=".idx"),
    pytest.param("x.csv", "text\nTo be\n", r"is a table \(\.csv\); convert it", id="CSV"),
    pytest.param("x.tsv.gz", gzip.compress(b"text\n"), r"is a table \(\.tsv\); convert it", id="TSV"),
    pytest.param("x.tfrecord", b"abc", "is a TFRecord file", id="TFRecord"),
    pytest.param("x.txt", '{\n  "text": "To be"\n}\n', "JSON object .*lines; .* jq", id="JSON object"),
    pytest.param("x.json", '{"a":\n 1}', "JSON object .*lines", id=".json object"),
    pytest.param("x.json", '["a", "b"]', "is JSON without records", id="JSON of strings"),
    pytest.param("x.json", "{'text': 'a'}", "is named .json, but not JSON", id="no JSON"),
]  # fmt: skip


@pytest.mark.parametrize("can_split", [True, False])
@pytest.mark.parametrize(("name", "data", "message"), FOREIGN)
def test_other_formats_are_named(tmp_path, name, data, message, can_split):
    with pytest.raises(DataError, match=message) as raised:
        list(chunks(TextFile(write(tmp_path / name, data)), TextLayout(), can_split=can_split))
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_database_and_tokens_are_named(tmp_path):
    database(tmp_path / "x")
    with pytest.raises(DataError, match="is an SQLite database"):
        texts(tmp_path / "x")
    write(tmp_path / "x.idx", b"MMIDIDX\0\0")
    with pytest.raises(DataError, match=r"prepared dataset; .*prefix"):
        texts(write(tmp_path / "x.bin", b"abc"))


TABLES = [
    pytest.param("x.csv", 'id,text\n1,"To, ""be"""\n2,or\n', ['To, "be"', "or"], id="CSV"),
    pytest.param("x.tsv", "id\ttext\n1\tTo, be\n2\tor\n", ["To, be", "or"], id="TSV"),
]


@pytest.mark.parametrize(("name", "content", "expected"), TABLES)
def test_the_command_for_tables_converts(tmp_path, name, content, expected):
    with pytest.raises(DataError) as raised:
        texts(write(tmp_path / name, content))
    command = str(raised.value).partition("convert it: ")[2].removesuffix(".").replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True)
    assert texts(tmp_path / f"{name}.jsonl") == expected


BROKEN = [
    pytest.param("x.txt", '{"text": "a"}\n{"text": \n', r"x\.txt, line 2, column \d+: broken JSON", id="second line"),
    pytest.param("x.txt", '{"text": "a\n', r"x\.txt, line 1, column \d+: broken JSON", id="first line"),
    pytest.param("x.txt", '{"text": "a"}\nprose\n', "line 2, column 1: broken JSON", id="prose after it"),
    pytest.param(
        "x.json", '[{"text": "a"} {"text": "b"}]', "record 1 of the array is not followed by a comma", id="no comma"
    ),
    pytest.param("x.json", '[{"text": "a"}, {"text"', "record 2: broken JSON", id="cut array"),
    pytest.param(
        "x.json", '[{"text": "a"}', "record 1 of the array is not followed by a comma", id="array without an end"
    ),
    pytest.param("x.json", '[{"text": "a"}, 3]', "record 2 is a JSON int", id="a number"),
    pytest.param("x.json", '[{"text": "a"}] x', "continues after its JSON array", id="text after an array"),
    pytest.param("x.json", '[{"txt": "a"}]', "record 1 has no key 'text'", id="no key"),
    pytest.param("x.xz", lzma.compress(b"abc" * 99)[:-9], "in the middle of its compressed data", id="cut .xz"),
    pytest.param("x.bz2", bz2.compress(b"abc" * 99)[:-9], "in the middle of its compressed data", id="cut .bz2"),
    pytest.param("x.xz", b"plain text", "damaged or not a .xz", id="no .xz"),
    pytest.param("x.bz2", b"plain text", "damaged or not a .bz2", id="no .bz2"),
]


@pytest.mark.parametrize(("name", "data", "message"), BROKEN)
def test_broken_records(tmp_path, name, data, message):
    with pytest.raises(DataError, match=message):
        texts(write(tmp_path / name, data))


def test_long_first_lines_are_recognized(tmp_path):
    """The bytes read for detection end inside the first record."""
    long = "word " * 50_000
    assert texts(write(tmp_path / "x", json.dumps({"text": long, "id": 1}) + '\n{"text": "b"}\n')) == [long, "b"]
    with pytest.raises(DataError, match=r"JSON object .*lines"):
        texts(write(tmp_path / "x", json.dumps({"data": [{"text": long}]}, indent=1)))
