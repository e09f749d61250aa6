"""Published detokenizer of WikiText: the rules behind Megatron-LM's perplexities (tasks/zeroshot_gpt/detokenizer.py).

They lose information: `a @-@ b` and `a-b` both become `a-b`. Their order matters, and quotes are paired across lines,
so that one unpaired quote changes the rest of the file: pass the whole file, not its lines.
"""

import re

SOURCE = "WikiText as Megatron-LM, lm-eval and lighteval read it; needs the whole file, its quotes pair across lines"

KNOWN_COLLISIONS = (
    *(("a @-@ b", "a-b"), ("1 @,@ 000", "1,000"), ("a , b", "a, b"), ("boys ' x", "boys' x"), ("( a )", "(a)")),
    *(("x 's y", "x's y"), ("a \nb", "a\nb"), ("5 N 7", "5 1 7"), ("5 ° C", "5°C"), ("= = a", "== a")),
    *(('x " a\n" y', 'x "a" y'), ("' a '", "'a'")),
)

_BEFORE_BRACKETS = (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), *((f" {mark} ", f"{mark} ") for mark in ":;.!?,")
_BRACKETS = tuple(
    (re.compile(rf"{opening}\s*([^{closing}]*?)\s*{closing}"), rf"{left}\1{right}")
    for opening, closing, left, right in (
        *((r"\(", r"\)", "(", ")"), (r"\[", r"\]", "[", "]"), ("{", "}", "{", "}")),
        *(('"', '"', '"', '"'), ("'", "'", "'", "'")),
    )
)
_AFTER_BRACKETS = (
    *(("= = = =", "===="), ("= = =", "==="), ("= =", "==")),
    *((" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")),
)


def detokenize(text: str) -> str:
    """Undo WikiText's tokenization by the rules of Megatron-LM, with their defects.

    Args:
        text: A whole WikiText file.

    Returns:
        Its text with the rules applied in the published order.
    """
    text = text.replace("s '", "s'")
    # Meant for "' 90s", but the slashes are literal: it all but never matches, and would insert "[0-9]" if it did.
    text = re.sub(r"/' [0-9]/", "/'[0-9]/", text)
    for old, new in _BEFORE_BRACKETS:
        text = text.replace(old, new)
    for pattern, new in _BRACKETS:
        text = pattern.sub(new, text)
    for old, new in _AFTER_BRACKETS:
        text = text.replace(old, new)
    return text
