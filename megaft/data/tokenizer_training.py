"""Train byte-level BPE with `tokenizers`, and BPE or unigram with sentencepiece, losslessly."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from megaft.base.errors import DataError

if TYPE_CHECKING:
    import tokenizers


def train_bpe(
    texts: Iterator[str], vocab_size: int, added_tokens: Sequence[str], min_frequency: int
) -> tokenizers.Tokenizer:
    """Return a byte-level BPE like GPT-2's: bytes first, then merges, then `added_tokens`.

    Args:
        texts: Texts; no merge crosses from one to the next.
        vocab_size: Largest number of entries, with bytes and added tokens.
        added_tokens: Special tokens, which get the last ids.
        min_frequency: Smallest number of occurrences of a merged pair.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(added_tokens),
        min_frequency=min_frequency,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in added_tokens])
    return backend


def train_sentencepiece(
    texts: Iterator[str], algorithm: Literal["bpe", "unigram"], vocab_size: int, eos: str, codes: Sequence[str]
) -> bytes:
    """Return a sentencepiece model whose pieces spell any text exactly, except ▁ (U+2581), its mark for a space.

    sentencepiece's own defaults change text: they apply NFKC, remove spaces, and have no piece for rare characters.

    Args:
        texts: Lines of text.
        algorithm: How pieces are chosen.
        vocab_size: Number of pieces.
        eos: Name of the end-of-sequence piece.
        codes: Pieces that are matched as a whole wherever a text spells them.

    Raises:
        DataError: The text does not suffice for that many pieces, or has too many characters.
    """
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=texts,
            model_writer=model,
            model_type=algorithm,
            vocab_size=vocab_size,
            eos_piece=eos,
            user_defined_symbols=list(codes),
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            byte_fallback=True,
            allow_whitespace_only_pieces=True,
            max_sentence_length=2**30,  # longer ones are skipped without a word
            num_threads=1,  # several sum in another order
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise DataError(_refusal(str(error), vocab_size)) from error
    return model.getvalue()


def _refusal(reason: str, vocab_size: int) -> str:
    if found := re.search(r"value <= (\d+)", reason):
        return f"--vocab-size is {vocab_size}, but the text has pieces for {found[1]} only; use {found[1]} or less."
    if found := re.search(r"(\d+) vs (\d+)", reason):
        return (
            f"--vocab-size is {vocab_size}, but the characters of the text alone take {found[2]} pieces; use a larger "
            "one."
        )
    return f"sentencepiece cannot train on this text: {' '.join(reason.split())}; check the text and --vocab-size."
