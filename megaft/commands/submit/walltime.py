"""Time limits of SLURM jobs."""

import re

_SIXTY = r"[0-5]?\d"
WALLTIME = re.compile(
    rf"\d+ | \d+:{_SIXTY} | \d+:{_SIXTY}:{_SIXTY} | \d+-(?:[01]?\d|2[0-3])(?::{_SIXTY}){{0,2}}", re.VERBOSE
)


def seconds_of(limit: str) -> int:
    """Return the seconds of a walltime, which SLURM reads as M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    days, _, clock = limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    parts = parts if days or len(parts) == 3 else [0, *parts]
    return 86_400 * int(days or 0) + sum(part * unit for part, unit in zip(parts, (3600, 60, 1), strict=False))
