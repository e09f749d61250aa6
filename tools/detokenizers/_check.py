"""Round-trip check of a file: invertible rules must restore it; published rules are searched for collisions."""

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice, zip_longest

import detokenizers
from detokenizers._lines import MARK
from detokenizers._text import decode, encode, read

_MAX_SHOWN = 10
_TOUCHED = re.compile(r"[^\w ]|\b[N1]\b")  # no published rule changes words without one of these


def report(name: str, path: str) -> bool:
    """Print whether the file round-trips, and collisions of the published rules for its corpus.

    Args:
        name: Detokenizer; for an invertible one the published rules of the same corpus are reported too.
        path: File, read in constant memory by invertible rules and whole by published ones.

    Returns:
        True if the inverse restores the file from its text.
    """
    if not detokenizers.is_invertible(name):
        return _report_published(name, path)
    is_same, num_marks, num_words = round_trip(name, path)
    per_thousand = 1000 * num_marks / max(num_words, 1)
    print(
        f"{name}: {'round-trips' if is_same else 'DOES NOT ROUND-TRIP'}; {num_words:,} words, "
        f"{num_marks:,} escape marks ({per_thousand:.2f} per 1,000 words)",
        flush=True,
    )
    for published in detokenizers.names():
        if published.startswith(f"{name}_"):
            _report_published(published, path)
    return is_same


def round_trip(name: str, path: str) -> tuple[bool, int, int]:
    """Return True if the file's bytes are restored, and the numbers of escape marks and words in its text."""
    num_marks = num_words = 0
    is_inside = False

    def natural() -> Iterator[bytes]:
        nonlocal num_marks
        for text in detokenizers.stream(name)(decode(read(source))):
            num_marks += text.count(MARK)
            yield encode(text)

    with open(path, "rb") as source, open(path, "rb") as original:
        for text in detokenizers.stream(name, invert=True)(decode(natural())):
            num_marks -= text.count(MARK)
            num_words += len(text.split()) - (is_inside and not text[:1].isspace())
            is_inside = not text[-1:].isspace() if text else is_inside
            if original.read(len(expected := encode(text))) != expected:
                return False, num_marks, num_words
        return not original.read(1), num_marks, num_words


def collisions(detokenize: Callable[[str], str], lines: Iterable[str]) -> Iterator[tuple[str, int, str, int, str]]:
    """Yield collisions of one to three words: (words, line, other words, line, the text that both become)."""
    first: dict[str, tuple[str, int]] = {}
    tried = set()
    for number, line in enumerate(lines, 1):
        for words in _windows(line):
            if words in tried:
                continue
            tried.add(words)
            text = detokenize(words)
            known, where = first.setdefault(text, (words, number))
            if known != words:
                yield known, where, words, number, text


def _windows(line: str) -> Iterator[str]:
    words = [word for word in line.split(" ") if word]
    for start in range(len(words)):
        for size in range(1, min(3, len(words) - start) + 1):
            window = " ".join(words[start : start + size])
            if _TOUCHED.search(window):
                yield window


def _report_published(name: str, path: str) -> bool:
    with open(path, "rb") as file:
        text = "".join(decode(read(file)))
    detokenize, retokenize = detokenizers.get(name), detokenizers.inverse(name.partition("_")[0])
    assert retokenize is not None, "every published set of rules has an invertible one beside it"
    natural = detokenize(text).removeprefix(" ")  # Megatron-LM's rules miss the space before the first line
    lines, again = text.split("\n"), retokenize(natural).split("\n")
    lost = next((number for number, pair in enumerate(zip_longest(lines, again), 1) if pair[0] != pair[1]), None)
    if lost is None:
        print(f"{name}: lossy rules, but this file is restored", flush=True)
        return True
    print(f"{name}: DOES NOT ROUND-TRIP; lossy rules, from line {lost} on: {_difference(lines, again, lost)}")
    shown = list(islice(collisions(detokenize, lines), _MAX_SHOWN + 1))
    for words, line, other_words, other_line, result in shown[:_MAX_SHOWN]:
        print(f"  line {line}: {words!r} and line {other_line}: {other_words!r} both become {result!r}")
    print("  and more" if len(shown) > _MAX_SHOWN else f"  {len(shown)} collisions of up to three words", flush=True)
    return False


def _difference(lines: list[str], again: list[str], number: int) -> str:
    """Return an excerpt of line `number` of both texts, from shortly before the first difference."""
    before, after = ("".join(text[number - 1 : number]) for text in (lines, again))
    same = next((place for place, pair in enumerate(zip_longest(before, after)) if pair[0] != pair[1]), 0)
    start = max(0, same - 10)
    return f"{before[start : start + 30]!r} comes back as {after[start : start + 30]!r}"
