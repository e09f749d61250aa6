"""Counts with singular or plural nouns, for messages."""


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return the number with its noun, such as "1 document" or "1,200 documents"; `plural` defaults to noun + s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
