"""The weight files of a model's folder: whether they are there and whole."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from megaft.errors import DataError

_LFS_POINTER = b"version https://git-lfs"


def require_weights(folder: Path) -> None:
    """Look at the files before transformers does, whose messages do not name the one that is wrong.

    Raises:
        DataError: There is none, or one is a Git LFS pointer or a safetensors file that is cut short.
    """
    files = sorted(path for pattern in ("*.safetensors", "pytorch_model*.bin") for path in folder.glob(pattern))
    if not files:
        raise DataError(f"{folder} has no weights; copy its model.safetensors there, or give another model.")
    for path in files:
        with path.open("rb") as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise DataError(f"{path} is a Git LFS pointer, not weights; run git lfs pull in {folder}.")
        if path.suffix == ".safetensors":
            _require_whole(path)


def _require_whole(path: Path) -> None:
    try:
        with safe_open(path, "pt"):
            return
    except SafetensorError as error:
        raise DataError(f"{path} is cut short or damaged ({error}); copy it anew.") from error
