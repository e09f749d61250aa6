"""Detect the format of a data file from its content: plain text, JSON records, compressed or unsupported."""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from typing import Literal

Format = Literal["text", "lines", "array"]
"""Plain text; JSON records, one per line; or one JSON array of records."""

HEAD_BYTES = 1 << 16
LINES_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines")
COMPRESSION_MAGIC = {
    ".gz": re.compile(rb"\x1f\x8b\x08"),
    ".zst": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
    ".xz": re.compile(rb"\xfd7zXZ\0"),
    ".bz2": re.compile(rb"BZh[1-9](\x31\x41\x59\x26\x53\x59|\x17\x72\x45\x38\x50\x90)"),
}
_ROWS = (
    "convert it: python -c 'import json, sys, pyarrow.{kind} as p; [print(json.dumps(r, default=str)) for r in "
    "p.{read}.to_pylist()]' FILE > FILE.jsonl"
)
_UNPACK = "unpack it and give the folder"
_EXPORT = 'write its texts as JSON lines, one {"text": ...} per line'
_MODEL = "give texts; a model belongs to --model.path or --model"
_PLAIN = "convert it to plain text"
_CONTROL = rb"[\0-\x08\x0e-\x1f]"
_MAGIC = (
    (rb"PAR1" + _CONTROL, "a Parquet file", _ROWS.format(kind="parquet", read="read_table(sys.argv[1])")),
    (rb"(ARROW1|FEA1)\0\0", "an Arrow (Feather) file", _ROWS.format(kind="feather", read="read_table(sys.argv[1])")),
    (
        rb"\xff\xff\xff\xff.{2}\0\0",
        "an Arrow stream, as `datasets` saves",
        "convert it: python -c 'import datasets, sys; datasets.Dataset.from_file(sys.argv[1]).to_json(sys.argv[2])' "
        "FILE FILE.jsonl",
    ),
    (rb"ORC" + _CONTROL, "an ORC file", _ROWS.format(kind="orc", read="read_table(sys.argv[1])")),
    (rb"Obj\x01", "an Avro file", _EXPORT),
    (rb"PK(\x03\x04|\x05\x06|\x07\x08)", "a zip archive (or an Office document, EPUB, .npz or .pt file)", _UNPACK),
    (rb".{257}ustar(\0|  \0)", "a tar archive", _UNPACK),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (rb"Rar!\x1a\x07", "a rar archive", _UNPACK),
    (rb"\x04\x22\x4d\x18", "an lz4 file", "decompress it first: lz4 -d"),
    (rb"\xff\x06\0\0sNaPpY", "a snappy file", "decompress it first"),
    (rb"\x1f[\x9d\xa0]", "a file made by compress (.Z)", "decompress it first: gzip -d"),
    (rb"\x93NUMPY", "a NumPy array", _EXPORT),
    (rb"\x89HDF\r\n\x1a\n", "an HDF5 file", _EXPORT),
    (rb"\x80[\x02-\x05]|\([dli]p?[01]\n", "a pickle, which may run code when it is read", _EXPORT),
    (rb"SQLite format 3\0", "an SQLite database", _EXPORT),
    (rb"%PDF-", "a PDF", "convert it: pdftotext"),
    (rb"%!PS", "a PostScript file", "convert it: ps2ascii"),
    (rb"\{\\rtf", "an RTF document", _PLAIN),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Office document", _PLAIN),
    (rb"(?i:\s*(<\?xml[^>]*>\s*)?(<!doctype html|<html[\s>]))", "an HTML page", f"{_PLAIN}, without its tags"),
    (rb"GGUF[\x01-\x09]\0", "a GGUF model", _MODEL),
    (rb".{4}\0\0\0\0\{\"", "a safetensors file", _MODEL),
    (
        rb"MMIDIDX\0\0",
        "the index of a prepared dataset",
        "give its prefix, without .idx, to --data.train or --data.valid",
    ),
    (rb"\x89PNG|\xff\xd8\xff|GIF8[79]a|RIFF.{4}|OggS\0|\x7fELF", "an image, sound or program, not text", _EXPORT),
)
_SUFFIXES = {
    **dict.fromkeys((".tfrecord", ".tfrecords"), ("a TFRecord file", _EXPORT)),
    **dict.fromkeys((".br", ".lzma", ".lz", ".lzo"), ("a compressed file of an unsupported kind", "unpack it")),
}
_RECORD = re.compile(r'\{\s*"(?:[^"\\]|\\.)*"\s*:')
_TABLES = {".csv": "excel", ".tsv": "excel-tab"}


def compression_of(begin: bytes) -> str | None:
    """Return the suffix of the compression that these first bytes show, or None."""
    return next((suffix for suffix, magic in COMPRESSION_MAGIC.items() if magic.match(begin)), None)


def unsupported_format(path: Path, head: bytes) -> tuple[str, str] | None:
    """Return a description of an unsupported format and how to convert it; None for a file that may be text or JSON.

    Args:
        path: The file. Only its suffix tells a table (.csv, .tsv) from prose with commas.
        head: Its first bytes, decompressed.
    """
    for magic, description, fix in _MAGIC:
        if re.match(magic, head, re.DOTALL):
            return description, fix.replace("FILE", str(path))
    suffix = plain_suffix(path)
    if suffix == ".bin" and path.with_suffix(".idx").is_file():
        return "the tokens of a prepared dataset", "give its prefix, without .bin, to --data.train or --data.valid"
    if dialect := _TABLES.get(suffix):
        return f"a table ({suffix})", (
            "convert it: python -c 'import csv, json, sys; [print(json.dumps(r)) for r in csv.DictReader(sys.stdin, "
            f'dialect="{dialect}")]\' < {path} > {path}.jsonl'
        )
    return _SUFFIXES.get(suffix)


def plain_suffix(path: Path) -> str:
    """Return the lower-case suffix before any compression suffix: `.jsonl` for books.jsonl.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in COMPRESSION_MAGIC), "")


def format_of(path: Path, head: bytes) -> Format | str:
    """Return the format of a text file, or a description of it if it is JSON without records.

    JSON lines: the suffix says so, or the file begins with `{`, a quoted string and a colon. Array: `[` comes before
    these. Other files, such as LaTeX, wiki markup and lists, are text unless named .json. An object that spans several
    lines is neither.
    """
    if plain_suffix(path) in LINES_SUFFIXES:
        return "lines"
    text = head.removeprefix(codecs.BOM_UTF8).decode("utf-8", "replace").lstrip()
    is_truncated = len(head) >= HEAD_BYTES
    if _RECORD.match(text):
        first, newline, _ = text.partition("\n")
        if not _is_json(first, is_truncated=is_truncated and not newline) and _is_json(text, is_truncated=is_truncated):
            return "a JSON object over several lines"
        return "lines"
    if text.startswith("[") and _RECORD.match(text[1:].lstrip()):
        return "array"
    if plain_suffix(path) == ".json" and text:
        return "JSON without records" if _is_json(text, is_truncated=is_truncated) else "named .json, but not JSON"
    return "text"


def _is_json(text: str, *, is_truncated: bool) -> bool:
    """Return True if a text is one or more JSON values; if it is truncated, the start of one is enough."""
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError as error:
        return is_truncated and is_unfinished(error)
    except (RecursionError, ValueError):  # nested too deeply, or a number of thousands of digits
        return True
    return text[end:].lstrip()[:1] in ("", "{", "[")


def is_unfinished(error: json.JSONDecodeError) -> bool:
    """Return True if the only fault of the JSON is that it ends too early."""
    return error.msg.startswith("Unterminated string") or error.pos >= len(error.doc) - len("false")
