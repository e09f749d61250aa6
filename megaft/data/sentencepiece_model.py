"""Convert a sentencepiece model to the `tokenizers` library, with merges in the order of the model's scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import tokenizers
    from tokenizers import normalizers

ModelProto = Any  # a class that protobuf builds at run time
Prefix = Literal["always", "first", "never"]
"""Space prefix of text: before every span between special tokens, only at the start, or never."""

_UNIGRAM, _BPE = 1, 2
_NORMAL, UNKNOWN, CONTROL, _USER_DEFINED = 1, 2, 3, 4
_SPACE = "▁"
_EXTRA_SPACES = ((rf"\A +|[ {_SPACE}]+\z", ""), (" {2,}", " "))


def parse(data: bytes) -> ModelProto:
    """Parse a model file; raises google.protobuf's DecodeError if it is not one."""
    from sentencepiece import sentencepiece_model_pb2

    generated: Any = sentencepiece_model_pb2
    return generated.ModelProto.FromString(data)


def prefix_of(model: ModelProto) -> Prefix:
    """Return sentencepiece's own placement of the space prefix, from `add_dummy_prefix`."""
    return "always" if model.normalizer_spec.add_dummy_prefix else "never"


def convert(model: ModelProto, prefix: Prefix) -> tokenizers.Tokenizer:
    """Return a tokenizer with the ids of a sentencepiece model (BPE or unigram).

    transformers 5 orders merges by vocabulary id. Llama's runs of spaces have the lowest ids, but also the lowest
    scores: "a  b" is `▁a ▁ ▁b` to sentencepiece, and `▁a ▁▁ b` in that order.

    Raises:
        NotImplementedError: The model is a word or char model, or marks the ends of words.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers

    if model.trainer_spec.model_type not in (_UNIGRAM, _BPE) or model.trainer_spec.treat_whitespace_as_suffix:
        raise NotImplementedError("it is neither a BPE nor a unigram model that marks the beginnings of words")
    converted = Tokenizer(_bpe(model) if model.trainer_spec.model_type == _BPE else _unigram(model))
    converted.normalizer = _normalizer(model, prefix)
    if prefix == "first":
        converted.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="first", split=False)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    converted.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * (prefix != "never"))
    converted.add_special_tokens(
        [AddedToken(piece.piece, normalized=False, special=True) for piece in model.pieces if piece.type == CONTROL]
    )
    converted.add_tokens(
        [AddedToken(piece.piece, normalized=False) for piece in model.pieces if piece.type == _USER_DEFINED]
    )
    return converted


def _bpe(model: ModelProto) -> tokenizers.models.BPE:
    from tokenizers import models

    scores = {piece.piece: piece.score for piece in model.pieces if piece.type in (_NORMAL, _USER_DEFINED)}
    splits = ((piece[:at], piece[at:], score) for piece, score in scores.items() for at in range(1, len(piece)))
    merges = [(left, right, score) for left, right, score in splits if left in scores and right in scores]
    # Among pairs with equal scores sentencepiece merges the leftmost first, so runs grow from their start. Putting the
    # pair with the longest left side first has the same effect.
    merges.sort(key=lambda merge: (merge[2], len(merge[0]), len(merge[1])), reverse=True)
    return models.BPE(
        {piece.piece: id_ for id_, piece in enumerate(model.pieces)},
        [(left, right) for left, right, _ in merges],
        unk_token=model.trainer_spec.unk_piece,
        fuse_unk=True,
        byte_fallback=model.trainer_spec.byte_fallback,
    )


def _unigram(model: ModelProto) -> tokenizers.models.Unigram:
    from tokenizers import models

    # Pieces that stand for no text (<s>, <unk>, bytes) must not match text that spells them.
    unlikely = min(piece.score for piece in model.pieces) - 100
    return models.Unigram(
        [(piece.piece, piece.score if piece.type in (_NORMAL, _USER_DEFINED) else unlikely) for piece in model.pieces],
        unk_id=model.trainer_spec.unk_id,
        byte_fallback=model.trainer_spec.byte_fallback,
    )


def _normalizer(model: ModelProto, prefix: Prefix) -> normalizers.Sequence:
    from tokenizers import Regex, normalizers

    spec = model.normalizer_spec
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(pattern), text) for pattern, text in _EXTRA_SPACES]
    if prefix == "always":
        steps.append(normalizers.Prepend(_SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
