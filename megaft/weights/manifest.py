"""Checkpoints on disk: where they are, and the manifest that makes one valid.

    RUN/checkpoints/step-00000020/
        rank-00000.safetensors ...  each rank's pieces, keyed kind/name@offset, fp32
        manifest.json               size and SHA-256 of every file, shapes, the run's state, and its own SHA-256
    RUN/checkpoints/latest          the name of the newest; only a hint

There is no pickle in it. A folder without a manifest whose sizes and hashes hold is not a checkpoint.
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

# A checkpoint that the same step, saved again, is about to replace is one as well, until it has.
NAME = re.compile(r"step-(\d{8})(\.replaced-\d+)?")


def is_checkpoint(folder: Path) -> bool:
    """Return True if a folder is a checkpoint of a run."""
    return (folder / MANIFEST).is_file()


def folder_of(run_dir: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` steps."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def published(folder: Path) -> list[Path]:
    """Return the checkpoints in RUN/checkpoints, oldest first, whether or not they still hold."""
    found = {path: match for path in folder.glob("step-*") if (match := NAME.fullmatch(path.name))}
    return sorted(found, key=lambda path: (found[path][1], found[path][2] is None, path.name))


def saved_steps(run_dir: Path) -> list[int]:
    """Return the steps of all published checkpoints, rising, whether or not they still hold."""
    return [step_of(path) for path in published(run_dir / "checkpoints")]


def step_of(folder: Path) -> int:
    """Return the step after which a checkpoint was saved."""
    return int(folder.name[len("step-") :][:8])


def newest_manifest(run_dir: Path) -> dict[str, Any] | None:
    """Return the manifest of the newest checkpoint that has a readable one, hashing no other file.

    It asks no other rank, so it can be called before they have joined.
    """
    for folder in reversed(published(run_dir / "checkpoints")):
        try:
            return read_manifest(folder)
        except CheckpointError:
            continue  # `find` says why
    return None


def verify(folder: Path, share: int = 0, num_shares: int = 1) -> dict[str, Any]:
    """Return the manifest of a checkpoint whose files all have the size and hash it names.

    Args:
        folder: The checkpoint's.
        share: Only every `num_shares`-th file is hashed, from this one.
        num_shares: By default every file is.

    Raises:
        CheckpointError: One is missing or different; the message names it.
    """
    manifest = read_manifest(folder)
    for number, (name, expected) in enumerate(sorted(manifest["files"].items())):
        path = folder / name
        if not is_file_name(name) or path.is_symlink():
            raise CheckpointError(f"{folder / MANIFEST} names {name[:80]}, which is outside the checkpoint.")
        require_size(path, expected["bytes"])
        if number % num_shares == share and _sha256_of(path) != expected["sha256"]:
            raise CheckpointError(f"{path} is damaged: its SHA-256 is not the manifest's.")
    return manifest


def require_size(path: Path, num_bytes: int) -> None:
    """Raise CheckpointError unless a file is there and has so many bytes."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing.")
    if path.stat().st_size != num_bytes:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes; the manifest says {num_bytes}.")


def _sha256_of(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest.

    Raises:
        CheckpointError: It is missing, unreadable, damaged, or of a format this version does not know.
    """
    path = folder / MANIFEST
    if folder.is_symlink() or path.is_symlink():
        raise CheckpointError(f"{folder} is or holds a symbolic link; move the checkpoint itself there.")
    try:
        manifest = parse_json(path.read_text())
        known = manifest["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is missing or unreadable; the checkpoint was never finished.") from error
    if not known:
        raise CheckpointError(f"{path} has format {manifest['format']}; this megaft reads {FORMAT}.")
    if manifest.pop("sha256", None) != _manifest_sha256(manifest):
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one it names.")
    if not _is_complete(manifest):
        raise CheckpointError(f"{path} has an identity or files of another form; megaft did not write it.")
    return manifest


def _is_complete(manifest: dict[str, Any]) -> bool:
    files = manifest.get("files")
    return (
        isinstance(manifest.get("identity", {}), dict)
        and isinstance(files, dict)
        and all(isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys() for entry in files.values())
    )


def manifest_text(manifest: dict[str, Any]) -> str:
    """Return the contents of manifest.json, which names its own SHA-256."""
    return to_json(manifest | {"sha256": _manifest_sha256(manifest)}, indent=2) + "\n"


def _manifest_sha256(manifest: dict[str, Any]) -> str:
    return sha256(to_json(manifest).encode()).hexdigest()
