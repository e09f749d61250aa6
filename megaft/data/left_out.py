"""Samples that a run leaves out, as ascending ranges [begin, end) of its whole sequence of samples.

The run sees the sequence without them; its order stays a function of the seed, the position and these ranges.
"""

from __future__ import annotations

from itertools import pairwise

Ranges = tuple[tuple[int, int], ...]


def whole_position(position: int, left_out: Ranges) -> int:
    """Return the place in the whole sequence of the sample at `position` of the sequence without those left out."""
    for begin, end in left_out:
        if position < begin:
            break
        position += end - begin
    return position


def whole_ranges(begin: int, end: int, left_out: Ranges) -> Ranges:
    """Return the places in the whole sequence of the samples at `begin` to `end` - 1."""
    return _ranges([whole_position(position, left_out) for position in range(begin, end)])


def leave_out(left_out: Ranges, more: Ranges) -> Ranges:
    """Return both, as rising ranges that do not touch."""
    return _ranges(sorted({position for ranges in (left_out, more) for span in ranges for position in range(*span)}))


def _ranges(positions: list[int]) -> Ranges:
    breaks = [place for place, (one, two) in enumerate(pairwise(positions), start=1) if two != one + 1]
    bounds = [0, *breaks, len(positions)]
    return tuple((positions[first], positions[last - 1] + 1) for first, last in pairwise(bounds) if first < last)
