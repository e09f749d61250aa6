"""Published detokenizer of lm1b: the rules of SEDD (louaaron/Score-Entropy-Discrete-Diffusion, data.py).

No other published rules are known; the GPT-2 paper does not print its own. They lose information.
"""

import re

SOURCE = "One Billion Words as SEDD and later diffusion language models read it, sentence by sentence"

KNOWN_COLLISIONS = (
    *(
        ("a , b", "a, b"),
        ("it 's so", "it's so"),
        ("Don 't !", "Don't!"),
        ("a / b", "a/b"),
        ("$ 5", "$5"),
        ("( a )", "(a)"),
    ),
    *(('" a "', '"a"'), ("http : / / a", "http://a")),
)

_RULES = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        *((r"http : / / ", "http://"), (r"https : / / ", "https://"), (r" '(\w+)", r"'\1")),
        *((r" (\w+) \. ", r" \1. "), (r" (\w+) \.$", r" \1."), (r" \? ", "? "), (r" \?$", "?")),
        *((r" ! ", "! "), (r" !$", "!"), (r" , ", ", "), (r" : ", ": "), (r" ; ", "; "), (r" / ", "/")),
        *((r'" ([^"]+) "', r'"\1"'), (r"' ([^']+) '", r"'\1'"), (r"\( ([^()]+) \)", r"(\1)")),
        *((r"\[ ([^\[\]]+) \]", r"[\1]"), (r"\$ ", "$"), (r"£ ", "£")),
    )
)


def detokenize(text: str) -> str:
    """Undo the tokenization of the One Billion Words by the rules of SEDD, line by line.

    Args:
        text: Sentences, one per line.

    Returns:
        The sentences with the rules applied in the published order.
    """
    return "\n".join(map(_sentence, text.split("\n")))


def _sentence(text: str) -> str:
    for pattern, new in _RULES:
        text = pattern.sub(new, text)
    return text
