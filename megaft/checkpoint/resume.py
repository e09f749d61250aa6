"""Resume a run from its newest valid checkpoint, at any ZeRO stage, world size and tensor-parallel size.

weights.manifest describes the format; saver.py writes checkpoints.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megaft.base import parallel
from megaft.base.agreement import agreed, together
from megaft.base.errors import CheckpointError
from megaft.base.files import naming_disk_errors, to_json
from megaft.checkpoint import engine_state
from megaft.checkpoint.run_state import ADDED_LATER, Identity, RunState
from megaft.config.identity import CHANGEABLE, setting_of
from megaft.weights.canonical import ReshardedReader, TransformersView
from megaft.weights.checkpoint_reader import CheckpointReader
from megaft.weights.layout import layout_of
from megaft.weights.manifest import MANIFEST, RECOPY, published, read_manifest, verify


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """The checkpoint to resume from, and the damaged ones that were passed over."""

    folder: Path | None
    """None for a new run."""
    damaged: tuple[tuple[str, str], ...]
    """Name and defect of every damaged checkpoint, and of a wrong `latest` pointer."""


def find(run_dir: Path) -> ResumePoint:
    """Return the newest valid checkpoint, the same on every rank, and print the defects of newer ones.

    Every rank hashes its share of the files.

    Raises:
        CheckpointError: There are checkpoints, or a `latest` pointer, but no checkpoint is valid.
    """
    folder, damaged = run_dir / "checkpoints", []
    candidates = published(folder) if parallel.is_main() else []
    while name := agreed(candidates.pop().name if candidates else ""):
        reason = agreed(_damage(folder / name))
        if not reason:
            break
        damaged.append((name, reason))
    if defect := agreed(_defect_of_latest(folder, name)):
        damaged.append(("latest", defect))
    if parallel.is_main():
        for damaged_name, reason in damaged:
            print(f"warning: {folder / damaged_name} is not used: {reason}", flush=True)
    if damaged and not name:
        newest = ": ".join(damaged[0])
        raise CheckpointError(
            f"no checkpoint in {folder} is valid; {newest} Restore one, or start over with --run.fresh."
        )
    return ResumePoint(folder / name if name else None, tuple(damaged))


def _damage(folder: Path) -> str:
    """Return the first defect in this rank's share of a checkpoint."""
    try:
        verify(folder, parallel.rank(), parallel.world_size())
    except CheckpointError as error:
        return str(error)
    return ""


def _defect_of_latest(folder: Path, used: str) -> str:
    """Return the defect of the `latest` pointer on the main rank; "" if it names the checkpoint in use."""
    if not parallel.is_main() or not folder.is_dir():
        return ""
    try:
        named = (folder / "latest").read_text(errors="replace").strip()[:80]
    except OSError:
        named = None
    if named == (used or None):
        return ""
    available = ", ".join(path.name for path in published(folder)) or "no checkpoints"
    defect = "it is missing" if named is None else f"it names {named!r}"
    return f"{defect}; using {used or 'none'} (found: {available})."


def load(engine: Any, folder: Path, identity: Identity, allow_changed: Collection[str] = ()) -> RunState:
    """Load a verified checkpoint into an engine, fresh or in the middle of a run, and return the run's state.

    Each rank reads only its own slices.

    Raises:
        CheckpointError: It belongs to another run (the message names every difference), or it cannot be read.
    """
    state, loss_scale = together(_load, engine, folder, identity, allow_changed)
    engine_state.refresh(engine)
    engine_state.set_loss_scale_state(engine, loss_scale)
    engine_state.set_steps(engine, state.step, state.skipped_steps)
    return state


def _load(engine, folder: Path, identity: Identity, allow_changed: Collection[str]) -> tuple[RunState, dict]:
    manifest = read_manifest(folder)
    require_same_run(folder, manifest["identity"], asdict(identity), allow_changed)
    state = _state_of(folder, manifest)
    engine_state.restore(engine, _reader(engine, folder, manifest), state.step - state.skipped_steps)
    engine_state.check_settings(engine, identity.optim["weight_decay"])
    return state, manifest["loss_scale"]


def _state_of(folder: Path, manifest: dict[str, Any]) -> RunState:
    try:
        return RunState.from_json(manifest["state"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / MANIFEST} has an invalid state; megaft did not write it; {RECOPY}, or remove it to resume from "
            "an earlier one."
        ) from error


def _reader(engine: Any, folder: Path, manifest: dict[str, Any]) -> Callable[[str, str, int, int], Tensor]:
    """Return a reader of this rank's slices; it converts them if the backend or tensor-parallel size has changed."""
    reader, sharding = CheckpointReader(folder, manifest), engine_state.sharding(engine)
    if all(manifest[name] == value for name, value in sharding.items()):
        return reader.read
    model = engine.module.language_model
    layout = layout_of(model.config) if sharding["backend"] == "megatron" else None
    return ReshardedReader(TransformersView(reader, manifest, model.config), layout).read


def require_same_run(folder: Path, saved: dict[str, Any], now: dict[str, Any], allowed: Collection[str]) -> None:
    """Compare the identity in a manifest with this run's; print the allowed differences.

    Raises:
        CheckpointError: Other settings differ; the message names each.
    """
    now = json.loads(to_json(now))
    changed = {name: text for name in now if name != "names" and (text := _difference(name, saved, now))}
    refused = [name for name in changed if name not in allowed]
    if refused:
        changeable = [name for name in refused if name in CHANGEABLE]
        allow = f"--checkpoint.allow-changed {' '.join([*allowed, *changeable])}, " if changeable else ""
        raise CheckpointError(
            f"{folder} belongs to another run ({'; '.join(changed[name] for name in refused)}). "
            f"Use the settings it was saved with, {allow}another --run.dir, or --run.fresh to start over."
        )
    if changed and parallel.is_main():
        print(f"resuming {folder} with changed settings: {'; '.join(changed.values())}", flush=True)


def _difference(name: str, saved: dict[str, Any], now: dict[str, Any]) -> str:
    """Return the settings of an identity field that differ, with both values; "" if none does."""
    if name not in saved and name in ADDED_LATER:
        return ""
    then, value = saved.get(name), now[name]
    if isinstance(then, dict) and isinstance(value, dict):
        keys = [key for key in value if key in then and then[key] != value[key]]
        return "; ".join(_change(setting_of(name, key), then[key], value[key]) for key in keys)
    names = [(identity.get("names") or {}).get(name) for identity in (saved, now)]
    return "" if then == value else _change(setting_of(name), _named(then, names[0]), _named(value, names[1]))


def _change(setting: str, then: Any, now: Any) -> str:
    return f"{setting}: {then} in the checkpoint, {now} in this run"


def _named(value: Any, name: str | None) -> str:
    return f"{value} ({name})" if name else str(value)


def remove_all(run_dir: Path) -> None:
    """Remove every checkpoint of a run that starts over."""
    folder, hidden = run_dir / "checkpoints", run_dir / "checkpoints.old"
    with naming_disk_errors(folder):
        if hidden.exists():  # left by a run that was killed here
            shutil.rmtree(hidden)
        if folder.exists():
            folder.rename(hidden)
            shutil.rmtree(hidden)
