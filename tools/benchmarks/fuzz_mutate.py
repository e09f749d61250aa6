"""Mutations of files: bytes, JSON values, links. Each depends only on a random generator."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

NASTY = (
    *(None, True, False, 0, -1, 1.5, 2**31, 2**63, 2**64, -(2**63), 10**40, 1e308, float("nan"), float("inf")),
    *("", "a", "../../outside", "/tmp/outside", "\x00", "\ud800", "😀" * 50, "nan", "1e999", "{{", "a" * 5000),
    *([], {}, [[]], [None], {"": None}, [1, "a"], {"a": {"b": []}}),
)
NUMBERS = (0, -1, 1, 2, 7, 10**9, 2**31, 2**63, 10**40)
TOKENS = (
    b"\x00",
    b"\xff",
    b"\xed\xa0\x80",
    b"\r\n",
    b"\n",
    b'"',
    b"\\",
    b"{",
    b"[",
    b"NaN",
    b"1e999",
    b"../",
    b"\xef\xbb\xbf",
)
DEEP = 20_000


def mutate(path: Path, rng: random.Random) -> None:
    """Change one file in place."""
    if rng.random() < 0.03:
        return _mutate_name(path, rng)
    data = path.read_bytes()
    changed = _mutate_json(data, rng) if rng.random() < 0.6 else None
    for _ in range(1 if changed else rng.choice((1, 1, 1, 2, 5))):
        changed = rng.choice(BYTES)(data, rng) if changed is None else changed
        data, changed = changed, None
    path.write_bytes(data)


def _mutate_name(path: Path, rng: random.Random) -> None:
    path.unlink()
    kind = rng.randrange(4)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        path.symlink_to(path.name)  # a loop
    elif kind == 2:
        path.symlink_to("../outside.txt")


def _flip(data: bytes, rng: random.Random) -> bytes:
    copy = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if copy:
            copy[rng.randrange(min(len(copy), rng.choice((16, 1024, len(copy)))))] = rng.randrange(256)
    return bytes(copy)


def _truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _insert(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data) + 1)
    return data[:place] + rng.choice(TOKENS) * rng.choice((1, 1, 3, 100)) + data[place:]


def _duplicate(data: bytes, rng: random.Random) -> bytes:
    begin = rng.randrange(len(data) + 1)
    part = data[begin : begin + rng.choice((1, 10, 1000))]
    return data[:begin] + part * rng.choice((2, 2, 50)) + data[begin + len(part) * rng.randrange(2) :]


def _number(data: bytes, rng: random.Random) -> bytes:
    """Overwrite bytes with a 32- or 64-bit number, as in sizes and offsets of binary headers."""
    size = rng.choice((4, 8))
    value = (rng.choice(NUMBERS) % 2 ** (8 * size)).to_bytes(size, "little")
    place = rng.randrange(max(1, min(len(data), 128)))
    return data[:place] + value + data[place + size :]


def _nest(data: bytes, rng: random.Random) -> bytes:
    return rng.choice((b"[", b'{"a":')) * DEEP + (data if rng.random() < 0.5 else b"")


BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _flip,
    _flip,
    _truncate,
    _insert,
    _duplicate,
    _number,
    _nest,
)


def _mutate_json(data: bytes, rng: random.Random) -> bytes | None:
    """Return JSON or JSON lines with one value changed; None if the file is not JSON."""
    lines = data.split(b"\n")
    place = rng.randrange(len(lines))
    for whole, head, tail in ((data, [], []), (lines[place], lines[:place], lines[place + 1 :])):
        try:
            value = json.loads(whole)
        except (ValueError, RecursionError):
            continue
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            value = _changed(value, rng)
        text = json.dumps(value, ensure_ascii=rng.random() < 0.7)
        if rng.random() < 0.05 and text.startswith("{") and len(text) > 2:  # a duplicate key
            text = text[:-1] + ", " + text[1:]
        return b"\n".join([*head, text.encode("utf-8", "surrogatepass"), *tail])
    return None


def _changed(value: Any, rng: random.Random) -> Any:
    """Return a JSON value with one item replaced, removed, renamed, repeated or wrapped."""
    if isinstance(value, dict | list) and value and rng.random() < 0.85:
        copy = value.copy()
        key = rng.choice(list(copy)) if isinstance(copy, dict) else rng.randrange(len(copy))
        kind = rng.random()
        if kind < 0.12:
            del copy[key]
        elif kind < 0.2 and isinstance(copy, dict):
            copy[rng.choice(("", "a", "../b", str(key).upper()))] = copy.pop(key)
        elif kind < 0.25 and isinstance(copy, list):
            copy += [copy[key]] * rng.choice((1, 100))
        else:
            copy[key] = _changed(copy[key], rng)
        return copy
    if isinstance(value, str) and value and rng.random() < 0.3:
        place = rng.randrange(len(value))
        return value[:place] + rng.choice(("../", "/", "\x00", "é", "")) + value[place + 1 :]
    if isinstance(value, int) and rng.random() < 0.4:
        return value + rng.choice((-1, 1, 10**6))
    return [value] if rng.random() < 0.1 else rng.choice(NASTY)


def fresh_copy(seed: Path, folder: Path) -> Path:
    """Replace the last case's folder by a fresh copy of the valid files, and return it."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(seed, folder, symlinks=True)
    return folder
