"""Published detokenizer of the Penn Treebank: the rules of Megatron-LM (its tasks/zeroshot_gpt/detokenizer.py).

They lose information, and the rule for N removes the space before it: `october N with` becomes `october1 with`.
"""

SOURCE = "Penn Treebank as Megatron-LM reads it"

KNOWN_COLLISIONS = (
    *(("do n't", "don't"), ("it 's", "it's"), ("october N with", "october1 with"), ("$ N with", "$1 with")),
    *(("a \nb", "a\nb"), ("# 1", "#1")),
)

_RULES = (
    *((" '", "'"), (" \n", "\n"), ("\n ", "\n"), (" n't", "n't")),
    *((" N ", "1 "), ("$ 1", "$1"), ("# 1", "#1")),
)


def detokenize(text: str) -> str:
    """Undo Mikolov's Penn Treebank tokenization by the rules of Megatron-LM, with their defects.

    Args:
        text: A whole file.

    Returns:
        Its text with the rules applied in the published order.
    """
    for old, new in _RULES:
        text = text.replace(old, new)
    return text
