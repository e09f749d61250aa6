"""Invertible detokenizer of the One Billion Word Benchmark (Chelba et al. 2013): Moses tokens, a sentence per line."""

from detokenizers import _moses
from detokenizers._lines import LineDetokenizer

SOURCE = "One Billion Word Benchmark (lm1b), one sentence per line"

LINES = LineDetokenizer(_moses.mark_joints, str, _moses.split, framed=False)


def detokenize(text: str) -> str:
    """Return the benchmark as ordinary text: `Don 't`, `( 5 / 7 )`, `$ 5` and ` , ` lose their extra spaces.

    Args:
        text: Any string; each line is treated separately.

    Returns:
        The text; U+2060 precedes a word or line that the rules alone could not restore.
    """
    return "".join(LINES.detokenize([text]))


def retokenize(text: str) -> str:
    """Return the exact inverse of detokenize: retokenize(detokenize(x)) == x for every string x."""
    return "".join(LINES.retokenize([text]))
