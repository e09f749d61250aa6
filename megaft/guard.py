"""What stops a run that has gone wrong."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megaft.errors import NumericsError


def require_finite(rows: Iterable[dict[str, Any]], run_dir: Path) -> None:
    """Raise NumericsError for a step whose loss is not finite; no later step is worth its time.

    An fp16 overflow is not one: its loss is finite, and the engine skips the step.
    """
    for row in rows:
        if not math.isfinite(row["loss"]):
            raise NumericsError(
                f"the loss of step {row['step']} is {row['loss']} (learning rate {row['learning_rate']:.3g}, "
                f"gradient norm {row['grad_norm']}). Checkpoints in {run_dir}/checkpoints are from before it; "
                "lower optim.learning-rate, or look at that step's samples."
            )
