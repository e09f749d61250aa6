"""Refusal of nats and logits that are not finite: one NaN among a million tokens leaves no figure of a text."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from megaft.base.dtypes import dtype_name
from megaft.base.errors import NumericsError
from megaft.base.plural import counted

ADVICE = (
    "Its weights may be damaged, or it overflows in this precision: check where they come from, or use float32; "
    "no figure was made of them."
)


def require_finite_nats(
    token_nats: Float[np.ndarray, " tokens"],
    document_offsets: Int64[np.ndarray, " num_offsets"],
    *,
    name: str,
    num_scored_tokens: int,
    is_counted: Bool[np.ndarray, " tokens"] | None = None,
) -> None:
    """Refuse nats that are NaN or infinite.

    Args:
        token_nats: Nats of each token of a text; 0.0 where a token is not scored.
        document_offsets: Where the text's documents begin, and its length.
        name: The text and the model, for the message.
        num_scored_tokens: Tokens that were scored.
        is_counted: The tokens that the figures are made of; by default all of them.

    Raises:
        NumericsError: With the number of such tokens, and the first one's document and place in it.
    """
    is_bad = ~np.isfinite(token_nats)
    if is_counted is not None:
        is_bad &= is_counted
    if not is_bad.any():
        return
    first = int(is_bad.argmax())
    document = int(np.searchsorted(document_offsets, first, side="right")) - 1
    place = f"token {first - int(document_offsets[document]):,} of document {document:,} (both counted from 0)"
    raise NumericsError(
        f"{name}: {int(is_bad.sum()):,} of {num_scored_tokens:,} scored tokens have nats that are not finite, first "
        f"{place}: {token_nats[first]}. {ADVICE}"
    )


def require_finite_logits(logits: Float[Tensor, " vocab"], num_read: int) -> None:
    """Refuse logits with NaN or infinity; -inf marks a token that the model rules out.

    Args:
        logits: In the dtype that the model computes in.
        num_read: Tokens that the model has read.

    Raises:
        NumericsError: With the first such token, and how many there are.
    """
    wrong = logits.isnan() | logits.isposinf()
    if not wrong.any() and not logits.isneginf().all():
        return
    token = int(wrong.int().argmax())
    fix = "check the model's weights" if logits.dtype == torch.float32 else "use --dtype float32"
    raise NumericsError(
        f"the model's logits after {counted(num_read, 'token')} are not finite: that of token {token} is "
        f"{float(logits[token])} ({int(wrong.sum()):,} of {len(logits):,} such); the model is damaged, or it overflows "
        f"in {dtype_name(logits.dtype)}: {fix}."
    )
