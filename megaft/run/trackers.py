"""Weights & Biases and TensorBoard behind one interface. A tracker that fails is disabled, and training continues."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megaft.base.errors import ConfigError
from megaft.base.nested import leaves
from megaft.base.redaction import redacted
from megaft.config.train import MetricsConfig


class WandbTracker:
    """Weights & Biases run, which a resumed training run continues under the same ID."""

    def __init__(self, project: str, run_dir: Path, settings: dict[str, Any], first_step: int) -> None:
        import wandb

        self._run = wandb.init(
            project=project,
            id=_run_id(run_dir / "wandb_id", first_step),
            resume="allow",
            name=run_dir.resolve().name,
            dir=run_dir,
            config=redacted(settings),
            # Only metrics and settings are sent: no console output, code, command, host or user.
            settings=wandb.Settings(console="off", save_code=False, x_disable_meta=True),
        )
        # W&B's own step can only grow, but a rewind lowers ours.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Send the numbers of a step."""
        self._run.log({"step": step, **numbers})

    def close(self, failed: bool) -> None:
        """Wait for the upload and mark the run finished or failed."""
        self._run.finish(exit_code=int(failed))


def _run_id(path: Path, first_step: int) -> str:
    """Return the run's ID: a new one at step 0, otherwise the one in the file."""
    if first_step == 0 or not path.exists():
        path.write_text(secrets.token_hex(4), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


class TensorBoardTracker:
    """Event files in RUN/tensorboard."""

    def __init__(self, run_dir: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Hide events that an earlier attempt wrote after the checkpoint.
        purge_step = first_step + 1 if first_step > 0 else 0
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step, flush_secs=10)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Add a scalar for each number."""
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)

    def close(self, failed: bool) -> None:
        """Flush the event file."""
        self._writer.close()


class Trackers:
    """Enabled trackers."""

    def __init__(self) -> None:
        self._trackers: dict[str, Any] = {}

    def open(self, name: str, make: Callable[..., Any], *arguments: Any) -> None:
        """Add the tracker that `make` returns, unless it fails."""
        self._try(name, lambda: self._trackers.__setitem__(name, make(*arguments)))

    def log(self, row: dict[str, Any]) -> None:
        """Send the numbers of a row to every tracker; nested names are joined as outer/inner."""
        numbers = flat_numbers(row)
        step = numbers.pop("step")
        for name, tracker in list(self._trackers.items()):
            self._try(name, tracker.log, int(step), numbers)

    def close(self, failed: bool = False) -> None:
        """Close every tracker."""
        for name, tracker in list(self._trackers.items()):
            self._try(name, tracker.close, failed)

    def _try(self, name: str, call: Callable[..., Any], *arguments: Any) -> None:
        try:
            call(*arguments)
        # No tracker failure (network, login, quota, a bug) may end the training.
        except Exception as error:
            self._trackers.pop(name, None)
            reason = f"{type(error).__name__}: {error}"
            print(f"warning: {name} failed and is switched off; training goes on ({reason})", file=sys.stderr)


def flat_numbers(row: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a row under names such as validation/nats; what is not a number is left out."""
    return {name: value for name, value in leaves(row, "/") if isinstance(value, int | float)}


def check_trackers(config: MetricsConfig) -> None:
    """Raise ConfigError if the package of a requested tracker is not installed."""
    for package, is_requested in (("wandb", config.wandb), ("tensorboard", config.tensorboard)):
        # find_spec also finds a folder of that name (wandb creates one), but without an origin.
        if is_requested and ((spec := find_spec(package)) is None or spec.origin is None):
            raise ConfigError(
                f"--metrics.{package} is set, but the package {package} is not installed; "
                f"run `pip install {package}` or drop --metrics.{package}."
            )


def open_trackers(config: MetricsConfig, run_dir: Path, settings: dict[str, Any], first_step: int) -> Trackers:
    """Return the requested trackers after `first_step` steps. A failure is a warning."""
    trackers = Trackers()
    if config.wandb:
        trackers.open("wandb", WandbTracker, config.wandb_project, run_dir, settings, first_step)
    if config.tensorboard:
        trackers.open("tensorboard", TensorBoardTracker, run_dir, first_step)
    return trackers
