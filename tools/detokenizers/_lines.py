"""Invertible detokenization of lines: a word is changed only if retokenizing it restores the same tokens.

A corpus supplies three functions. `mark_joints` replaces the spaces of a line that look superfluous by `JOINT`, `spell`
returns a token as it is spelled inside a word, and `split` retokenizes one word: it returns the tokens with spaces
between them. The first two may be wrong anywhere: each word they propose is passed to `split`, and if that does not
restore the tokens, they stay apart, or the word gets an escape mark. So the inverse is exact for every string, and the
rules decide only how natural the text reads.
"""

import re
from collections.abc import Callable, Iterable, Iterator

MARK = "\u2060"
"""The escape mark (word joiner): the word after it is one unchanged token."""
VERBATIM = MARK * 2
"""At the start of a line: the line is unchanged."""
UNFRAMED = f"{MARK} "
"""At the start of a text: the corpus has no space at either end of its lines."""
JOINT = "\n"
"""Replacement of a space that `mark_joints` would remove; no line contains one."""

_MAX_JOINED_TOKENS = 6  # tokens tried as one word, once the whole run failed; keeps time linear
_SPECIAL = re.compile(r"(?<![^ ])\w*+[^ \w][^ ]*+")  # a word of anything but letters and digits, which all stay


class LineDetokenizer:
    """Detokenizer and retokenizer of a corpus, line by line, in constant memory.

    Args:
        mark_joints: A line without its newline -> the same line with `JOINT` for some of its spaces.
        spell: A token -> its spelling in the text.
        split: A word of the text, without spaces -> its tokens with a space between them. It is not called for
            words of letters, digits and underscores alone: those are one token.
        framed: True if the corpus has a space at both ends of each line, which the text omits.
    """

    longest_line = 2**20
    """Characters; a longer line is left unchanged, so that memory stays constant."""

    def __init__(
        self,
        mark_joints: Callable[[str], str],
        spell: Callable[[str], str],
        split: Callable[[str], str],
        *,
        framed: bool,
    ) -> None:
        self._mark_joints = mark_joints
        self._spell = spell
        self._split = split
        self._framed = framed

    def detokenize(self, chunks: Iterable[str]) -> Iterator[str]:
        """Yield the natural text of a corpus, which comes in pieces of any length."""
        framed = None
        for line, newline, part in _lines(chunks, self.longest_line):
            if framed is None:
                framed = self._framed and not (part == "whole" and newline and not _has_frame(line))
                if self._framed and not framed:
                    yield UNFRAMED
            if part == "whole":
                yield self._natural(line, framed and newline != "")
            else:
                yield VERBATIM + line if part == "start" else line
            yield newline

    def retokenize(self, chunks: Iterable[str]) -> Iterator[str]:
        """Yield the corpus; the exact inverse of `detokenize`. Any other text gives a corpus too."""
        framed = None
        for line, newline, part in _lines(chunks, 2 * self.longest_line + 4):  # at most a mark per word, and a flag
            if framed is None:
                framed = self._framed and not line.startswith(UNFRAMED)
                line = line.removeprefix(UNFRAMED) if self._framed else line
            if part == "whole" and not line.startswith(VERBATIM):
                yield self._corpus(line, framed and newline != "")
            else:
                yield line if part == "rest" else line.removeprefix(VERBATIM)
            yield newline

    def _natural(self, line: str, framed: bool) -> str:
        if framed and not _has_frame(line):
            return VERBATIM + line
        natural = _SPECIAL.sub(self._words, self._mark_joints(line[1:-1] if framed else line))
        return VERBATIM + line if natural.startswith(VERBATIM) else natural

    def _corpus(self, line: str, framed: bool) -> str:
        if not framed:
            return self._tokens(line)
        return f" {self._tokens(line)} " if line else " "

    def _tokens(self, line: str) -> str:
        return _SPECIAL.sub(lambda word: word[0][1:] if word[0][0] == MARK else self._split(word[0]), line)

    def _words(self, run: re.Match[str]) -> str:
        """Join a run of tokens into as few words as the retokenizer can take apart again."""
        tokens = run[0].split(JOINT)
        if (word := self._word(tokens)) is not None:
            return word
        words, start = [], 0
        while start < len(tokens):
            for end in range(min(len(tokens), start + _MAX_JOINED_TOKENS), start, -1):
                if (word := self._word(tokens[start:end])) is not None:
                    break
            else:
                end, word = start + 1, tokens[start]
                word = word if self._tokens(word) == word else MARK + word
            words.append(word)
            start = end
        return " ".join(words)

    def _word(self, tokens: list[str]) -> str | None:
        word = "".join(map(self._spell, tokens))
        return word if self._tokens(word) == " ".join(tokens) else None


def _has_frame(line: str) -> bool:
    """Return True if a line is blank or has a space at both ends, which may then be omitted."""
    return line == " " or (len(line) > 2 and line[0] == " " == line[-1])


def _lines(chunks: Iterable[str], longest: int) -> Iterator[tuple[str, str, str]]:
    """Yield (line, newline, part): part is "whole", or "start" and "rest" for the pieces of a line too long."""
    rest, inside = "", False
    for chunk in chunks:
        *lines, rest = (rest + chunk).split("\n")
        for line in lines:
            yield line, "\n", "rest" if inside else "start" if len(line) > longest else "whole"
            inside = False
        if inside or len(rest) > longest:
            yield rest, "", "rest" if inside else "start"
            rest, inside = "", True
    yield rest, "", "rest" if inside else "whole"
