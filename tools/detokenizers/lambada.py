"""LAMBADA in OpenAI's release (lambada_test.jsonl), which is the books' own text again: it stays as it is.

Some passages have curly quotes and some straight ones. To make them alike, as `lambada_openai` does, loses which; to
mark which would be less natural than either. The first release, lower case and split into words, is another corpus.
"""

from detokenizers.identity import LINES, detokenize, retokenize

SOURCE = "LAMBADA as OpenAI released it is natural text: nothing to undo"

__all__ = ["LINES", "SOURCE", "detokenize", "retokenize"]
