"""Perplexity, accuracy, confidence interval and plot data of a score, by a protocol's rules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from evaluate_zero_shot.evaluation.interval import ratio_interval, share_interval
from evaluate_zero_shot.evaluation.prepared import PreparedTask
from evaluate_zero_shot.protocols import Protocol, Words
from megaft.scoring.score import Row, Score, exp

NUM_BINS = 32
NUM_SEGMENTS = 200
NUM_BLOCKS = 100
MIN_DOCUMENTS = 10
"""Fewest documents for a confidence interval."""


def metrics(score: Score, prepared: PreparedTask, protocol: Protocol) -> dict[str, Any]:
    """Return the fields `nats` to `accuracy` of results.json."""
    if prepared.num_options:
        score = _correct_options(score, prepared)
    assert math.isfinite(score.nats), "scoring refuses nats that are not finite"
    limit = protocol.exponent_limit or math.inf
    per_token = _mean_nats(score, prepared.rows, protocol)
    per_word = _nats_per_word(score, prepared, protocol)
    return {
        "nats": score.nats,
        "num_scored_tokens": score.num_scored_tokens,
        "perplexity": exp(min(limit, per_token)),
        "word_perplexity": None if per_word is None else exp(min(limit, per_word)),
        "byte_perplexity": score.byte_perplexity,
        "bits_per_byte": score.bits_per_byte,
        "accuracy": float(np.mean(is_correct)) if len(is_correct := correctness(score, prepared)) else None,
    }


def _correct_options(score: Score, prepared: PreparedTask) -> Score:
    """Return the score of the correct options alone."""
    assert score.token_nats is not None
    begins = np.cumsum([0, *prepared.num_options[:-1]])
    is_answer = np.zeros(len(score.token_nats), bool)
    for row in begins + prepared.answers:
        is_answer[prepared.rows[row].target_positions] = True
    correct = score.of(is_answer)
    return Score(correct.nats, correct.num_scored_tokens, None, None, score.token_nats, score.is_greedy)


def _mean_nats(score: Score, rows: Sequence[Row], protocol: Protocol) -> float:
    """Return nats per token: the mean over tokens, or over windows, each weighted by its number of labels minus one."""
    if protocol.weighting == "tokens":
        return score.nats_per_token
    assert score.token_nats is not None
    means = [score.token_nats[row.target_positions].mean() for row in rows]
    # transformers averages over shifted labels. A label on the window's first token is lost by the shift, so such a
    # window weighs its number of targets; other windows weigh one less, as the original subtracts one label from each.
    weights = [row.num_targets - (row.window.scored_from > row.window.begin + 1) for row in rows]
    return float(np.dot(means, weights) / sum(weights)) if sum(weights) else score.nats_per_token


def _nats_per_word(score: Score, prepared: PreparedTask, protocol: Protocol) -> float | None:
    if not prepared.num_words:
        return None
    if protocol.words == Words.ADJUSTED and not prepared.is_prompted:
        # The mean over scored tokens, times (T - 1) / (T_o - 1) with T tokens and T_o original ones.
        return score.nats_per_token * (len(prepared.tokens.tokens) - 1) / prepared.num_words
    return score.nats / prepared.num_words


def correctness(score: Score, prepared: PreparedTask) -> np.ndarray:
    """Return a flag for each question or prompt: True if the model is correct; empty for a text."""
    if not prepared.is_prompted:
        return np.zeros(0, bool)
    assert score.token_nats is not None
    assert score.is_greedy is not None
    if not prepared.num_options:
        return np.array([score.is_greedy[row.target_positions].all() for row in prepared.rows])
    nats = np.array([score.token_nats[row.target_positions].sum() for row in prepared.rows])
    by_question = np.split(nats, np.cumsum(prepared.num_options[:-1]))
    return np.array([options.argmin() for options in by_question]) == prepared.answers


def interval(
    headline: str, value: float | None, score: Score, prepared: PreparedTask, is_capped: bool = False
) -> dict[str, Any] | None:
    """Return the 95 % interval of the headline metric; None if it is undefined, or no unit of text varies.

    Documents, or a hundred blocks if there are few documents, are taken as independent samples of such text.
    """
    if headline == "accuracy":
        is_correct = correctness(score, prepared)
        low, high = share_interval(int(is_correct.sum()), len(is_correct))
        return {"quantity": headline, "low": low, "high": high, "method": f"Wilson, {len(is_correct)} examples"}
    nats, weights, unit = units(score, prepared, NUM_BLOCKS, MIN_DOCUMENTS)
    if unit == "document" and prepared.document_words is not None:
        weights = np.array(prepared.document_words)
    bounds = ratio_interval(nats, weights)
    if value is None or not math.isfinite(value) or is_capped or bounds is None or not score.nats:
        return None
    shares = [bound / (nats.sum() / weights.sum()) for bound in bounds]
    is_exponential = headline != "bits_per_byte"
    low, high = (exp(math.log(value) * share) if is_exponential else value * share for share in shares)
    return {"quantity": headline, "low": low, "high": high, "method": f"ratio estimate over {len(nats)} {unit}s"}


def units(
    score: Score, prepared: PreparedTask, num_blocks: int, min_documents: int = 2
) -> tuple[np.ndarray, np.ndarray, str]:
    """Return nats and scored tokens of each document (or of equal blocks if documents are few), and the unit."""
    offsets, unit = prepared.tokens.document_offsets, "document"
    if len(offsets) - 1 < min_documents:
        offsets, unit = np.linspace(0, offsets[-1], min(num_blocks, int(offsets[-1])) + 1).astype(int), "block"
    is_scored = np.zeros(int(offsets[-1]))
    for row in prepared.rows:
        is_scored[row.target_positions] = 1
    return _sums(score.token_nats, offsets), _sums(is_scored, offsets), unit


def _sums(values: np.ndarray | None, offsets: np.ndarray) -> np.ndarray:
    assert values is not None
    return np.diff(np.concatenate([[0.0], np.cumsum(values)])[offsets])


def segments(score: Score, prepared: PreparedTask) -> dict[str, Any]:
    """Return scored tokens and nats along the text, in at most NUM_SEGMENTS segments."""
    nats, tokens, unit = units(score, prepared, NUM_SEGMENTS)
    if len(nats) > NUM_SEGMENTS:
        unit = f"{unit}s"
        begins = np.linspace(0, len(nats), NUM_SEGMENTS, endpoint=False).astype(int)
        nats, tokens = np.add.reduceat(nats, begins), np.add.reduceat(tokens, begins)
    return {"segments": [(int(n), x) for n, x in zip(tokens, nats.tolist(), strict=True)], "segment_unit": unit}


def positions(score: Score, rows: Sequence[Row], num_inputs: int) -> list[tuple[int, int, float]]:
    """Return first position, scored tokens and nats of at most NUM_BINS bins of positions in the window."""
    assert score.token_nats is not None
    width = math.ceil(num_inputs / NUM_BINS)
    columns = np.concatenate([np.arange(row.window.columns.start, row.window.columns.stop) for row in rows])
    nats = np.concatenate([score.token_nats[row.target_positions] for row in rows])
    tokens = np.bincount(columns // width)
    sums = np.bincount(columns // width, nats)
    return [(i * width, int(n), x) for i, (n, x) in enumerate(zip(tokens, sums.tolist(), strict=True)) if n]
