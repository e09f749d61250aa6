"""Settings of `megaft prepare`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import detokenizers
import tyro

from megaft.base.checks import at_least, require, require_ranges

DEFAULT_KEY = "text"
"""The key of a JSON record that holds its text where no other is named."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """Tokenize text once, into OUTPUT.bin and OUTPUT.idx (Megatron's format) and a receipt, OUTPUT.json."""

    inputs: tyro.conf.Positional[tuple[str, ...]]
    """Text files and JSON records, each also compressed (gzip, zstd, xz, bzip2); folders; quoted globs."""
    output: Path
    """Prefix of the files to write."""
    tokenizer: str
    """Hub name, folder, GGUF file or sentencepiece .model."""
    format: ReadAs = "auto"
    """`auto` looks into each file for JSON records; `text` takes braces for text; `jsonl` wants a record a line."""
    unit: Literal["file", "line", "document"] = "file"
    """Unit of a document in a text file: the whole file, a line, or lines up to a blank one."""
    json_key: str | None = None
    """JSON records: the key that holds the text, `text` by default."""
    prompt_key: str | None = None
    """JSON records: the key of a prompt, which is not scored; needs --completion-key."""
    completion_key: str | None = None
    """JSON records: the key of the completion, which is scored."""
    messages_key: str | None = None
    """JSON records: the key of a chat, rendered by the tokenizer's template; only what the assistant says is scored."""
    detokenizer: str = "identity"
    """Undoes a corpus's word tokenization first: wikitext, ptb, 1bw or another of `python -m detokenizers --list`."""
    control_codes: tuple[str, ...] = ()
    """One an input: the token, not scored, put with a space before its documents (Keskar et al. 2019, section 3)."""
    min_tokens: int = 1
    """Documents with fewer tokens of their own text are left out (and counted)."""
    append_eod: bool = False
    """End every document with the tokenizer's end-of-sequence token."""
    workers: int | None = None
    """Threads that tokenize; by default one a core."""
    json: bool = False
    """Print the receipt as one line of JSON, the last on stdout."""

    def __post_init__(self) -> None:
        names = detokenizers.names()
        require(len(self.inputs) > 0, "inputs is empty; name a text or .jsonl file, a folder or a glob.")
        require(self.detokenizer in names, f"--detokenizer is {self.detokenizer!r}; use one of {', '.join(names)}.")
        require_ranges(self, min_tokens=at_least(1), workers=at_least(1))
        require(
            len(self.control_codes) in (0, len(self.inputs)),
            f"--control-codes are {len(self.control_codes)} ({' '.join(self.control_codes)}) for {len(self.inputs)} "
            f"inputs ({' '.join(self.inputs)}); give each input one.",
        )
        require(
            (self.prompt_key is None) == (self.completion_key is None),
            f"--prompt-key is {self.prompt_key} and --completion-key is {self.completion_key}; give both or neither.",
        )
        other_key = self.prompt_key or self.messages_key
        require(
            self.json_key is None or other_key is None,
            f"--json-key is {self.json_key}, which means nothing beside the key {other_key}; drop one.",
        )
        require(
            self.format != "text" or (self.json_key or other_key) is None,
            f"--format is text, in which the key {self.json_key or other_key} means nothing; drop one.",
        )
        require(
            self.messages_key is None or (self.prompt_key is None and self.detokenizer == "identity"),
            f"--messages-key is {self.messages_key}; it goes with neither --prompt-key nor --detokenizer. Drop one.",
        )

    @property
    def has_mask(self) -> bool:
        """True if a record may hold tokens that are not scored."""
        return self.prompt_key is not None or self.messages_key is not None or bool(self.control_codes)


ReadAs = Literal["auto", "text", "jsonl"]
"""By its content, as a plain text whatever it looks like, or as one JSON record a line."""
