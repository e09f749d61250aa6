"""`megaft tokenizer extend`: add special tokens to a model's tokenizer, and rows to its embedding and output layer."""

from __future__ import annotations

import shutil

from megaft.base.checks import require
from megaft.base.errors import DataError
from megaft.base.new_folder import publishing_folder, require_new
from megaft.base.plural import counted
from megaft.commands.tokenizer.config import ExtendConfig
from megaft.data.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer
from megaft.data.tokenizer_check import require_same_ids


def main(config: ExtendConfig) -> int:
    """Write the model and tokenizer with the new tokens, print a summary, and return 0.

    Raises:
        ConfigError: The folder exists or cannot be written, or a token is already in the vocabulary.
        DataError: The model or its tokenizer cannot be read.
    """
    from megaft.weights import writing
    from megaft.weights.folder import model_folder
    from megaft.weights.more_entries import with_entries
    from megaft.weights.reading import file_of, open_weights

    require_new("--output", config.output)
    source = model_folder(config.model, "--model")
    tokenizer = _extensible(config, load_tokenizer(source))
    num_old = tokenizer.vocab_size
    weights = open_weights(source)
    num_rows = weights.config.vocab_size
    require(
        num_old <= num_rows,
        f"--model is {config.model}, whose tokenizer has {num_old:,} entries, but whose vocabulary has {num_rows:,}; "
        "give a model with its own tokenizer.",
    )
    needed = max(num_old + len(config.tokens), num_rows)
    vocab_size = -(-needed // config.pad_vocab_to) * config.pad_vocab_to
    with publishing_folder("--output", config.output, weights.num_parameters * weights.dtype.itemsize) as folder:
        writing.write_hugging_face(with_entries(weights, num_old, vocab_size, config.seed), folder, weights.dtype)
        if path := file_of(source, "generation_config.json"):
            shutil.copyfile(path, folder / path.name)
        tokenizer.add_special_tokens(config.tokens)
        tokenizer.save(folder)
        saved = load_tokenizer(folder)
        require_same_ids(saved, folder)
        open_weights(str(folder))  # checks names, shapes and ties of the result
    ids = ", ".join(f"{token} is {saved.encode(token)[0]}" for token in config.tokens)
    print(
        f"wrote {config.output}: {counted(len(config.tokens), 'new token')} ({ids}), vocabulary of {vocab_size:,} rows"
    )
    return 0


def _extensible(config: ExtendConfig, tokenizer: Tokenizer | SentencePieceTokenizer) -> Tokenizer:
    if isinstance(tokenizer, SentencePieceTokenizer):
        raise DataError(
            f"--model is {config.model}, whose tokenizer is a sentencepiece model, which takes no more tokens; train "
            "it with --control-codes, or give a folder with a tokenizer.json."
        )
    for token in config.tokens:
        require(
            tokenizer.id_of(token) is None,
            f"{token!r} is already token {tokenizer.id_of(token)} of {config.model}; use it as it is.",
        )
    return tokenizer
