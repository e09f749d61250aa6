"""Checkpoints: published whole or not at all, read back at any ZeRO stage and world size.

    RUN/checkpoints/step-00000020/
        rank-00000.safetensors ...  each rank's pieces, keyed kind/name@offset, fp32
        manifest.json               size and SHA-256 of every file, shapes, the run's state, and its own SHA-256
    RUN/checkpoints/latest          the name of the newest

There is no pickle in it. A folder without a manifest whose sizes and hashes hold is not a checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import save_file

from megaft import engine_state, parallel
from megaft.errors import CheckpointError
from megaft.files import fsync, replacing, sha256_of, to_json, write_json_atomic
from megaft.pieces import Pieces
from megaft.run_state import Identity, RunState

FORMAT = 1
MANIFEST = "manifest.json"


def folder_of(run_dir: Path, step: int) -> Path:
    """Return where the checkpoint after `step` steps lies."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def save(engine, run_dir: Path, state: RunState, identity: Identity, keep_last: int) -> Path:
    """Publish a checkpoint; every rank calls this and writes its own pieces.

    The files are written beside, hashed, synced, and renamed into place in one step; only then does `latest` name
    them and are older ones removed, never the best.
    """
    final = folder_of(run_dir, state.step)
    temporary = final.with_name(final.name + ".tmp")
    if parallel.is_main():
        _sweep(final.parent)
        temporary.mkdir(parents=True)
    parallel.barrier()
    _write_shard(engine, temporary)
    parallel.barrier()
    if parallel.is_main():
        _write_manifest(engine, temporary, state, identity)
        shutil.rmtree(final, ignore_errors=True)  # the same step, saved again after a resume
        temporary.rename(final)
        fsync(final.parent)
        with replacing(final.parent / "latest") as file:
            file.write(final.name + "\n")
        _remove_old(run_dir, keep_last, state.best_step)
    parallel.barrier()
    return final


def _write_shard(engine, folder: Path) -> None:
    path = folder / f"rank-{parallel.data_parallel_rank():05d}.safetensors"
    pieces = {
        f"{kind}/{name}@{offset}": values.cpu().clone() for name, kind, offset, values in engine_state.collect(engine)
    }
    save_file(pieces, path)
    fsync(path)
    # Each rank hashes what it wrote; the main one reads the results from the folder, which all ranks share.
    write_json_atomic(path.with_suffix(".json"), {"bytes": path.stat().st_size, "sha256": sha256_of(path)})


def _write_manifest(engine, folder: Path, state: RunState, identity: Identity) -> None:
    files = {}
    for receipt in sorted(folder.glob("rank-*.json")):
        files[receipt.with_suffix(".safetensors").name] = json.loads(receipt.read_text())
        receipt.unlink()
    manifest = {
        "format": FORMAT,
        "state": asdict(state),
        "identity": asdict(identity),
        "loss_scale": engine_state.loss_scale_state(engine),
        "world_size": parallel.data_parallel_size(),
        "zero_stage": engine_state.stage(engine),
        "shapes": engine_state.shapes(engine),
        "files": files,
    }
    write_json_atomic(folder / MANIFEST, manifest | {"sha256": _manifest_sha256(manifest)})


def _sweep(folder: Path) -> None:
    """Remove what a killed save or removal left behind."""
    for leftover in (*folder.glob("*.tmp"), *folder.glob("*.old")):
        shutil.rmtree(leftover, ignore_errors=True)


def _remove_old(run_dir: Path, keep_last: int, best_step: int | None) -> None:
    steps = sorted(saved_steps(run_dir))
    for step in steps[:-keep_last]:
        if step != best_step:
            doomed = folder_of(run_dir, step)
            hidden = doomed.with_name(doomed.name + ".old")
            doomed.rename(hidden)
            shutil.rmtree(hidden)


def saved_steps(run_dir: Path) -> list[int]:
    """Return the steps of all published checkpoints, whether or not they still hold."""
    folders = (run_dir / "checkpoints").glob("step-" + "[0-9]" * 8)
    return [int(folder.name.removeprefix("step-")) for folder in folders]


def find(run_dir: Path) -> Path | None:
    """Return the newest checkpoint that holds, the same one on every rank; say why newer ones do not.

    Raises:
        CheckpointError: There are checkpoints, and none holds.
    """
    step = _newest_valid_step(run_dir) if parallel.is_main() else 0
    step = int(parallel.from_main(torch.tensor(step)))
    if step == DAMAGED:
        raise CheckpointError(
            f"no checkpoint in {run_dir / 'checkpoints'} holds; put one back, or start over with --run.fresh."
        )
    return None if step == NONE else folder_of(run_dir, step)


NONE, DAMAGED = -1, -2


def _newest_valid_step(run_dir: Path) -> int:
    steps = sorted(saved_steps(run_dir), reverse=True)
    for step in steps:
        folder = folder_of(run_dir, step)
        try:
            verify(folder)
            return step
        except CheckpointError as error:
            print(f"skipped {folder.name}: {error}", flush=True)
    return DAMAGED if steps else NONE


def verify(folder: Path) -> dict:
    """Return the manifest of a checkpoint whose files all have the size and hash it names.

    Raises:
        CheckpointError: One is missing or different; the message names it.
    """
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        path = folder / name
        if path.parent != folder:
            raise CheckpointError(f"{folder / MANIFEST} names {name}, which is outside the checkpoint.")
        if not path.is_file():
            raise CheckpointError(f"{path} is missing.")
        if path.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes; the manifest says {expected['bytes']}.")
        if sha256_of(path) != expected["sha256"]:
            raise CheckpointError(f"{path} is damaged: its SHA-256 is not the manifest's.")
    return manifest


def read_manifest(folder: Path) -> dict:
    """Return a checkpoint's manifest.

    Raises:
        CheckpointError: It is missing, unreadable, damaged, or of a format this version does not know.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        known = manifest["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / MANIFEST} is missing or unreadable; the checkpoint was never finished."
        ) from error
    if not known:
        raise CheckpointError(f"{folder / MANIFEST} has format {manifest['format']}; this megaft reads {FORMAT}.")
    if manifest.pop("sha256", None) != _manifest_sha256(manifest):
        raise CheckpointError(f"{folder / MANIFEST} is damaged: its SHA-256 is not the one it names.")
    return manifest


def _manifest_sha256(manifest: dict) -> str:
    return sha256(to_json(manifest).encode()).hexdigest()


def load(engine, folder: Path, identity: Identity) -> RunState:
    """Put a verified checkpoint into a fresh engine and return the run's state.

    Raises:
        CheckpointError: It belongs to another run; the message names every difference.
    """
    manifest = read_manifest(folder)
    _require_same_run(folder, manifest["identity"], asdict(identity))
    state = RunState.from_json(manifest["state"])
    pieces = Pieces(folder, manifest)
    engine_state.restore(engine, pieces.read, state.step - state.skipped_steps)
    engine_state.set_loss_scale_state(engine, manifest["loss_scale"])
    engine.global_steps, engine.skipped_steps = state.step, state.skipped_steps
    return state


def _require_same_run(folder: Path, saved: dict, now: dict) -> None:
    differences = [
        f"{name}: {saved.get(name)} then, {value} now" for name, value in now.items() if saved.get(name) != value
    ]
    if differences:
        raise CheckpointError(
            f"{folder} belongs to another run ({'; '.join(differences)}). "
            "Use the settings it was made with, another --run.dir, or --run.fresh to start over."
        )


def remove_all(run_dir: Path) -> None:
    """Forget every checkpoint of a run that starts over."""
    folder = run_dir / "checkpoints"
    if folder.exists():
        hidden = folder.with_name(f"checkpoints.{os.getpid()}.old")
        folder.rename(hidden)
        shutil.rmtree(hidden)
