"""The One Billion Word Benchmark (Chelba et al. 2013), invertibly: Moses's tokens, one sentence a line."""

from detokenizers import _moses
from detokenizers._lines import Lines

SOURCE = "One Billion Word Benchmark (lm1b), one sentence a line"

LINES = Lines(_moses.mark_joints, str, _moses.split, framed=False)


def detokenize(text: str) -> str:
    """Return the benchmark as ordinary text: `Don 't`, `( 5 / 7 )`, `$ 5` and ` , ` lose their extra spaces.

    Args:
        text: Any string; lines are taken one by one.

    Returns:
        The text; a word or line that the rules would not give back carries U+2060 before it.
    """
    return "".join(LINES.detokenize([text]))


def retokenize(text: str) -> str:
    """Return x for detokenize(x), whatever x is."""
    return "".join(LINES.retokenize([text]))
