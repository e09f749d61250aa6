"""text8 holds a to z and single spaces; what its making lost cannot be told from what remains, so it stays as it is."""

from detokenizers.identity import LINES, detokenize, retokenize

SOURCE = "text8 holds only a-z and spaces: nothing to undo"

__all__ = ["LINES", "SOURCE", "detokenize", "retokenize"]
