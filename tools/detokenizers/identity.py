"""For text that was never tokenized into words."""


def detokenize(text: str) -> str:
    """Return the text as it is."""
    return text
