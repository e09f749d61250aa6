"""Samples that a run skips, as ascending ranges [begin, end) of its full sequence of samples.

The run sees the sequence without them; its order depends only on the seed, the position and these ranges.
"""

from __future__ import annotations

from itertools import pairwise

Ranges = tuple[tuple[int, int], ...]


def full_position(position: int, left_out: Ranges) -> int:
    """Map a position in the sequence without the skipped samples to its position in the full sequence."""
    for begin, end in left_out:
        if position < begin:
            break
        position += end - begin
    return position


def full_ranges(begin: int, end: int, left_out: Ranges) -> Ranges:
    """Map positions [begin, end) of the sequence without the skipped samples to ranges of the full sequence."""
    return _ranges([full_position(position, left_out) for position in range(begin, end)])


def leave_out(left_out: Ranges, more: Ranges) -> Ranges:
    """Return the union of both, as ascending ranges that neither overlap nor touch."""
    return _ranges(sorted({position for ranges in (left_out, more) for span in ranges for position in range(*span)}))


def _ranges(positions: list[int]) -> Ranges:
    breaks = [index for index, (left, right) in enumerate(pairwise(positions), start=1) if right != left + 1]
    bounds = [0, *breaks, len(positions)]
    return tuple((positions[first], positions[last - 1] + 1) for first, last in pairwise(bounds) if first < last)
