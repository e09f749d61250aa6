"""Checkpoint folders and their manifests, against which checkpoints are verified.

    RUN/checkpoints/step-00000020/
        rank-00000.safetensors ...  each rank's slices, keyed kind/name@offset, fp32
        manifest.json               size and SHA-256 of every file, shapes, the run's state, and its own SHA-256
    RUN/checkpoints/latest          the name of the newest; only a hint

A checkpoint contains no pickle. It is valid only if its files match the sizes and hashes of its manifest.
"""

from __future__ import annotations

import re
from hashlib import sha256
from pathlib import Path
from typing import Any

from megaft.base.errors import CheckpointError
from megaft.base.files import is_file_name, parse_json, sha256_of, to_json

FORMAT = 3
MANIFEST = "manifest.json"
RECOPY = "copy the checkpoint again"
"""Fix for a damaged checkpoint, in messages."""

# step-N.replaced-T is the old checkpoint of step N, valid until the new one of that step is in place.
NAME = re.compile(r"step-(\d{8})(\.replaced-\d+)?")


def is_checkpoint(folder: Path) -> bool:
    """Return True if a folder is a checkpoint of a run."""
    return (folder / MANIFEST).is_file()


def folder_of(run_dir: Path, step: int) -> Path:
    """Return the folder of the checkpoint saved after `step` steps."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def published(folder: Path) -> list[Path]:
    """Return the checkpoint folders in RUN/checkpoints, oldest first, without verifying them."""
    names = {path: match for path in folder.glob("step-*") if (match := NAME.fullmatch(path.name))}
    return sorted(names, key=lambda path: (names[path][1], names[path][2] is None, path.name))


def saved_steps(run_dir: Path) -> list[int]:
    """Return the ascending steps of all published checkpoints, without verifying them."""
    return [step_of(path) for path in published(run_dir / "checkpoints")]


def step_of(folder: Path) -> int:
    """Return the step after which a checkpoint was saved."""
    return int(folder.name[len("step-") :][:8])


def newest_manifest(run_dir: Path) -> dict[str, Any] | None:
    """Return the newest readable manifest without hashing the checkpoint's files.

    Uses no collectives, so it can be called before the ranks have joined.
    """
    for folder in reversed(published(run_dir / "checkpoints")):
        try:
            return read_manifest(folder)
        except CheckpointError:
            continue  # `find` reports the error
    return None


def verify(folder: Path, share: int = 0, num_shares: int = 1) -> dict[str, Any]:
    """Check that a checkpoint's files have the sizes and hashes of its manifest, and return the manifest.

    Args:
        folder: The checkpoint's folder.
        share: Hash only every `num_shares`-th file, starting with this one.
        num_shares: By default every file is hashed.

    Raises:
        CheckpointError: A file is missing or differs; the message names it.
    """
    manifest = read_manifest(folder)
    for number, (name, expected) in enumerate(sorted(manifest["files"].items())):
        path = folder / name
        if not is_file_name(name) or path.is_symlink():
            raise CheckpointError(f"{folder / MANIFEST} names {name[:80]}, which is outside the checkpoint; {RECOPY}.")
        require_size(path, expected["bytes"])
        if number % num_shares == share and _sha256_of(path) != expected["sha256"]:
            raise CheckpointError(f"{path} is damaged: its SHA-256 differs from the manifest's; {RECOPY}.")
    return manifest


def require_size(path: Path, num_bytes: int, fix: str = RECOPY) -> None:
    """Raise CheckpointError, with a fix, unless a file exists and has `num_bytes` bytes."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; {fix}.")
    if path.stat().st_size != num_bytes:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes, but the manifest says {num_bytes}; {fix}.")


def _sha256_of(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}; check its permissions and the disk."
        ) from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest.

    Raises:
        CheckpointError: The manifest is missing, unreadable, damaged, or of an unsupported format.
    """
    path = folder / MANIFEST
    if folder.is_symlink() or path.is_symlink():
        raise CheckpointError(f"{folder} is or contains a symbolic link; replace it with the checkpoint itself.")
    try:
        manifest = parse_json(path.read_text())
        is_supported = manifest["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is missing or unreadable: the checkpoint is incomplete; {RECOPY}.") from error
    if not is_supported:
        raise CheckpointError(
            f"{path} has format {manifest['format']}; this version of megaft reads format {FORMAT}. "
            "Use the version that wrote it."
        )
    if manifest.pop("sha256", None) != _manifest_sha256(manifest):
        raise CheckpointError(f"{path} is damaged: its content does not match its SHA-256; {RECOPY}.")
    if not _is_complete(manifest):
        raise CheckpointError(f"{path} has an invalid identity or file list; megaft did not write it; {RECOPY}.")
    return manifest


def _is_complete(manifest: dict[str, Any]) -> bool:
    files = manifest.get("files")
    return (
        isinstance(manifest.get("identity", {}), dict)
        and isinstance(files, dict)
        and all(isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys() for entry in files.values())
    )


def manifest_text(manifest: dict[str, Any]) -> str:
    """Return the text of manifest.json, including its own SHA-256."""
    return to_json(manifest | {"sha256": _manifest_sha256(manifest)}, indent=2) + "\n"


def _manifest_sha256(manifest: dict[str, Any]) -> str:
    return sha256(to_json(manifest).encode()).hexdigest()
