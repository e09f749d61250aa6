"""OpenAI's preprocessing of LAMBADA before it scored GPT-2 (its authors in github.com/openai/gpt-2, issue 131)."""

SOURCE = "LAMBADA as OpenAI scored it with GPT-2"

KNOWN_COLLISIONS = (("“a” b", '"a" b'), (" a b\n", "a b"))


def detokenize(text: str) -> str:
    """Return a newline and the stripped passage, with straight double quotes.

    Args:
        text: One passage, not a file of them.
    """
    return "\n" + text.replace("“", '"').replace("”", '"').strip()
