"""`megaft prepare`: tokenize text files once, to disk."""

from __future__ import annotations

from megaft.base.files import to_json
from megaft.config.prepare import PrepareConfig
from megaft.data import prepare_report
from megaft.data.prepare import prepare


def main(config: PrepareConfig) -> int:
    """Tokenize, print a summary, and return 0.

    Raises:
        UserError: An input, the tokenizer or the output cannot be used.
    """
    receipt = prepare(config)
    print(prepare_report.summary(config.output, receipt))
    if config.json:
        print(to_json(receipt))
    return 0
