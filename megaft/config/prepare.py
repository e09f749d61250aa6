"""Settings of `megaft prepare`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from megaft.base.checks import at_least, require, require_ranges
from megaft.config.detokenizer import require_detokenizer

DEFAULT_KEY = "text"
"""Default key of the text in a JSON record."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """Tokenize text once, into OUTPUT.bin and OUTPUT.idx (Megatron's format) and a receipt, OUTPUT.json."""

    inputs: tyro.conf.Positional[tuple[str, ...]]
    """Text or JSON Lines files (plain, gzip, zstd, xz or bzip2), folders, or quoted globs."""
    output: Path
    """Prefix of the output files."""
    tokenizer: str
    """Hub name, folder, GGUF file or sentencepiece .model."""
    format: ReadAs = "auto"
    """Input format: plain text, one JSON record per line, or detected from each file's content."""
    unit: Literal["file", "line", "document"] = "file"
    """Documents of a text file: the whole file, each line, or (document) blocks separated by blank lines."""
    json_key: str | None = None
    """JSON records: key of the text, `text` by default."""
    prompt_key: str | None = None
    """JSON records: key of the prompt, which is not scored. Requires --completion-key."""
    completion_key: str | None = None
    """JSON records: key of the completion, which is scored."""
    messages_key: str | None = None
    """JSON records: key of a chat, rendered by the tokenizer's chat template. Only assistant messages are scored."""
    detokenizer: str = "identity"
    """Undo word tokenization first: wikitext, ptb, 1bw or another from `python -m detokenizers --list`."""
    control_codes: tuple[str, ...] = ()
    """One control code per input, prepended to its documents and not scored (Keskar et al. 2019, section 3)."""
    min_tokens: int = 1
    """Drop documents whose text has fewer tokens; the receipt counts them."""
    append_eod: bool = False
    """End every document with the tokenizer's EOS token (Megatron's --append-eod)."""
    workers: int | None = None
    """Tokenizer threads; by default one per core."""
    json: bool = False
    """Print the receipt as the last line of stdout, in JSON."""

    def __post_init__(self) -> None:
        require(
            len(self.inputs) > 0,
            "megaft prepare got no input; give text or JSON Lines files, folders or globs, for example "
            "`megaft prepare corpus.txt --tokenizer gpt2 --output data/corpus`.",
        )
        require_detokenizer("--detokenizer", self.detokenizer)
        require_ranges(self, min_tokens=at_least(1), workers=at_least(1))
        require(
            len(self.control_codes) in (0, len(self.inputs)),
            f"--control-codes are {' '.join(self.control_codes)} ({len(self.control_codes)}), but the inputs are "
            f"{' '.join(self.inputs)} ({len(self.inputs)}). Give one code for each input.",
        )
        require(
            (self.prompt_key is None) == (self.completion_key is None),
            f"--prompt-key is {self.prompt_key} and --completion-key is {self.completion_key}; set both or neither.",
        )
        other_key = self.prompt_key or self.messages_key
        require(
            self.json_key is None or other_key is None,
            f"--json-key is {self.json_key}, but another flag names the key {other_key}. Remove one of them.",
        )
        require(
            self.format != "text" or (self.json_key or other_key) is None,
            f"--format is text, but the key {self.json_key or other_key} applies to JSON records. Remove one of them.",
        )
        require(
            self.messages_key is None or (self.prompt_key is None and self.detokenizer == "identity"),
            f"--messages-key is {self.messages_key}; a chat has no prompt key and no detokenizer. Remove "
            f"{f'--prompt-key {self.prompt_key}' if self.prompt_key else f'--detokenizer {self.detokenizer}'}, or "
            "--messages-key.",
        )

    @property
    def has_mask(self) -> bool:
        """True if a record may hold tokens that are not scored."""
        return self.prompt_key is not None or self.messages_key is not None or bool(self.control_codes)


ReadAs = Literal["auto", "text", "jsonl"]
"""Input format: detected from the content, plain text, or one JSON record per line."""
