"""`megaft tokenizer check`: measure a tokenizer on text, beside a second one if given."""

from __future__ import annotations

import sys
from itertools import chain
from typing import Any

from rich.console import Console
from rich.table import Table

from megaft.base.files import to_json
from megaft.base.plural import counted
from megaft.commands.tokenizer.config import CheckConfig
from megaft.data.corpus import TextLayout, chunks
from megaft.data.input_files import expand
from megaft.data.text_file import TextFile
from megaft.data.tokenizer import load_tokenizer
from megaft.data.tokenizer_measures import Measures

ROWS = {
    "vocabulary entries": ("vocab_size", ",d"),
    "texts": ("texts", ",d"),
    "texts that do not come back": ("changed_texts", ",d"),
    "bytes": ("bytes", ",d"),
    "words": ("words", ",d"),
    "tokens": ("tokens", ",d"),
    "bytes per token": ("bytes_per_token", ".3f"),
    "tokens per word": ("tokens_per_word", ".3f"),
    "words that are one token": ("whole_words_share", ".1%"),
    "unknown tokens per 1,000": ("unknown_per_1000", ".3f"),
    "tokens of a single byte": ("single_byte_share", ".2%"),
    "entries that the text does not use": ("unused_entries", ",d"),
}
"""Rows of the table: key and format of each."""


def main(config: CheckConfig) -> int:
    """Measure, print a table or JSON, and return 0.

    Raises:
        DataError: A tokenizer or an input cannot be read.
    """
    names = [config.tokenizer] if config.beside is None else [config.tokenizer, config.beside]
    results = {name: measure(config, name) for name in names}
    if config.json:
        print(to_json(results))
        return 0
    table = Table("measure", *names)
    for title, (key, form) in ROWS.items():
        table.add_row(title, *(format(result[key], form) for result in results.values()))
    Console().print(table)
    for name, result in results.items():
        if mismatch := result["first_mismatch"]:
            print(
                f"{name} changes {counted(result['changed_texts'], 'text')}, first in {mismatch['where']}: "
                f"{mismatch['text']!r} comes back as {mismatch['decoded']!r}"
            )
    return 0


def measure(config: CheckConfig, name: str) -> dict[str, Any]:
    """Return the measures of one tokenizer on all inputs."""
    tokenizer = load_tokenizer(name)
    measures, layout = Measures(tokenizer), TextLayout(text_key=config.json_key)
    sources = [TextFile(path, config.format) for path in expand(config.inputs, tell=_warn)]
    texts = (chunks(source, layout, can_split=tokenizer.splits_at_spaces) for source in sources)
    measures.measure(chain.from_iterable(texts))
    return measures.results()


def _warn(message: str) -> None:
    print(message, file=sys.stderr)
