"""Provenance of a run: commit, library versions and hardware, written beside its output."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import megaft
from megaft.base.files import write_json_atomic
from megaft.base.redaction import redacted
from megaft.base.torch_flags import current_flags

PACKAGES = (
    *("torch", "deepspeed", "transformers", "tokenizers", "megatron-core", "sentencepiece", "safetensors", "numpy"),
    *("peft", "accelerate", "gguf", "apex", "mpi4py", "wandb", "tensorboard"),
)


def write_config(run_dir: Path, settings: dict[str, Any]) -> None:
    """Write RUN/config.json: the resolved settings and the environment, without secrets.

    Raises:
        ConfigError: The file cannot be written.
    """
    write_json_atomic(run_dir / "config.json", {"settings": redacted(settings), "environment": environment()})


def environment() -> dict[str, Any]:
    """Return versions, commit, hardware and the command line as JSON values; no host or user name and no secret."""
    return {
        "megaft": megaft.__version__,
        "git": git_state(Path(__file__).parents[2]),
        "python": platform.python_version(),
        "packages": {name: installed for name in PACKAGES if (installed := installed_version(name)) is not None},
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "num_cores": os.cpu_count(),
        **current_flags(),
        "command": redacted(sys.argv),
    }


def installed_version(package: str) -> str | None:
    """Return a package's version; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return commit and dirty flag of the git checkout at `folder`; None if `folder` is not its root.

    An installed package may be inside an unrelated repository.
    """
    top_and_commit = _git(folder, "rev-parse", "--show-toplevel", "HEAD")
    if top_and_commit is None or Path(top_and_commit.split("\n")[0]) != folder.resolve():
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": top_and_commit.split("\n")[1], "is_dirty": bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, no repository, or no commit yet
        return None
    return done.stdout.strip()


def job() -> dict[str, str | int]:
    """Return host, process ID and SLURM job, for messages about a locked folder."""
    environment = {"job": "SLURM_JOB_ID", "restarts": "SLURM_RESTART_COUNT"}
    named = {key: os.environ[name] for key, name in environment.items() if name in os.environ}
    return {"host": socket.gethostname(), "pid": os.getpid(), **named}
