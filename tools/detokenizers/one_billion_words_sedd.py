"""The lm1b rules of the diffusion language models (louaaron/Score-Entropy-Discrete-Diffusion, data.py).

They are the only published ones found; the GPT-2 paper does not give its own. They lose information.
"""

import re

SOURCE = "One Billion Words as SEDD and later diffusion language models read it, sentence by sentence"

QUIRKS = (
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
    """Undo the tokenization of the One Billion Words as SEDD does, each line by itself.

    Args:
        text: Sentences, one a line.

    Returns:
        The sentences with the rules applied in the published order.
    """
    return "\n".join(map(_sentence, text.split("\n")))


def _sentence(text: str) -> str:
    for pattern, new in _RULES:
        text = pattern.sub(new, text)
    return text
