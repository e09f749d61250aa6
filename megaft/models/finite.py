"""Refusal of non-finite nats and logits: one NaN among a million tokens invalidates every result on a text."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from megaft.base.dtypes import dtype_name
from megaft.base.errors import NumericsError
from megaft.base.plural import counted

ADVICE = (
    "The weights may be damaged, or the model overflows in this precision; verify the weights, or use float32. "
    "No results were computed."
)


def require_finite_nats(
    token_nats: Float[np.ndarray, " tokens"],
    document_offsets: Int64[np.ndarray, " num_offsets"],
    *,
    name: str,
    num_scored_tokens: int,
    is_included: Bool[np.ndarray, " tokens"] | None = None,
) -> None:
    """Refuse nats that are NaN or infinite.

    Args:
        token_nats: Nats of each token of a text; 0.0 where a token is not scored.
        document_offsets: Begin of each document, then the length of the text.
        name: The text and the model, for the message.
        num_scored_tokens: Tokens that were scored.
        is_included: Mask of the tokens that the results include; by default all.

    Raises:
        NumericsError: Some nats are not finite; the message counts them and locates the first.
    """
    is_bad = ~np.isfinite(token_nats)
    if is_included is not None:
        is_bad &= is_included
    if not is_bad.any():
        return
    first = int(is_bad.argmax())
    document = int(np.searchsorted(document_offsets, first, side="right")) - 1
    location = f"token {first - int(document_offsets[document]):,} of document {document:,} (both counted from 0)"
    raise NumericsError(
        f"{name}: {int(is_bad.sum()):,} of {num_scored_tokens:,} scored tokens have non-finite nats; the first is "
        f"{location}: {token_nats[first]}. {ADVICE}"
    )


def require_finite_logits(logits: Float[Tensor, " vocab"], num_tokens: int) -> None:
    """Refuse logits that contain NaN or +inf, or only -inf; a single -inf marks a token that the model rules out.

    Args:
        logits: In the dtype that the model computes in.
        num_tokens: Tokens of the text so far.

    Raises:
        NumericsError: Some logits are not finite; the message names the first and counts them.
    """
    is_bad = logits.isnan() | logits.isposinf()
    if not is_bad.any() and not logits.isneginf().all():
        return
    token = int(is_bad.int().argmax())
    fix = "check the model's weights" if logits.dtype == torch.float32 else "use --dtype float32"
    raise NumericsError(
        f"the model's logits after {counted(num_tokens, 'token')} are not finite: token {token} has "
        f"{float(logits[token])} ({int(is_bad.sum()):,} of {len(logits):,} logits are NaN or +inf); the model is "
        f"damaged, or it overflows in {dtype_name(logits.dtype)}: {fix}."
    )
