"""Checks of this machine's hardware, libraries and environment. None joins other ranks or allocates GPU memory."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import requires
from pathlib import Path

import torch
from packaging.requirements import Requirement

from megaft.base.environment import environment, installed_version
from megaft.base.half_precision import NAMES, product_dtype
from megaft.base.hardware import GIB
from megaft.base.redaction import SECRET_NAME, without_secrets
from megaft.commands.doctor.floors import FLOORS
from megaft.commands.doctor.table import Check, exit_code, show

SECONDS = 120
"""Timeout in seconds of a subprocess."""


def run(as_json: bool) -> int:
    """Run all checks, print the table, and return the exit code."""
    checks = [
        *versions(),
        requirements(),
        *accelerators(),
        *(kernel.check() for kernel in KERNELS),
        slurm(),
        mpi(),
        compiler(),
        *disks(),
        *variables(),
    ]
    show("megaft doctor: this machine", checks, as_json, environment=environment())
    return exit_code(checks)


def versions() -> Iterator[Check]:
    """Compare installed packages with their minimum safe versions."""
    for floor in FLOORS:
        installed, fix = installed_version(floor.package), f"Run `pip install '{floor.package}>={floor.version}'`"
        if installed is None:
            yield Check(floor.package, "fail", "not installed", fix)
        elif floor.rejects(installed):
            found = f"{installed}, below the minimum safe version {floor.version}"
            yield Check(floor.package, "fail", found, f"{floor.reason}. {fix}")
        else:
            yield Check(floor.package, "pass", f"{installed} (safe since {floor.version})")


def requirements() -> Check:
    """Compare installed packages with megaft's requirements."""
    declared = [Requirement(line) for line in requires("megaft") or ()]
    required = [item for item in declared if item.marker is None or item.marker.evaluate({"extra": ""})]
    wrong = [line for item in required if (line := _difference(item))]
    if wrong:
        return Check("requirements", "fail", "; ".join(wrong), "Reinstall megaft with pip")
    return Check("requirements", "pass", f"{len(required)} packages satisfy megaft's requirements")


def _difference(requirement: Requirement) -> str | None:
    installed = installed_version(requirement.name)
    if installed is None:
        return f"{requirement.name} is not installed"
    if requirement.specifier.contains(installed, prereleases=True):
        return None
    return f"{requirement.name} is {installed}, not {requirement.specifier}"


def accelerators() -> Iterator[Check]:
    """Report every GPU, its memory and its bf16 support."""
    if not torch.cuda.is_available():
        built = torch.version.cuda
        reason = f"torch is built for CUDA {built} but finds no device: check nvidia-smi" if built else ""
        yield Check("accelerator", "warn", f"none: ranks compute on {os.cpu_count()} CPU cores", reason)
        yield cpu_precision()
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        with torch.cuda.device(number):
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        found = f"{device.name}, {device.total_memory / GIB:.0f} GiB, {'bf16' if has_bf16 else 'no bf16'}"
        fix = "" if has_bf16 else "Use an fp16 or fp32 configuration of ds_configs/"
        yield Check(f"cuda:{number}", "pass" if has_bf16 else "warn", found, fix)


def cpu_precision() -> Check:
    """Say in which precision half-precision matrices are multiplied on this CPU."""
    cpu = torch.device("cpu")
    found = ", ".join(
        f"{name} {'has fast instructions' if product_dtype(dtype, cpu) is dtype else 'is multiplied in fp32'}"
        for dtype, name in NAMES.items()
    )
    return Check("CPU precision", "pass", found)


@dataclass(frozen=True, slots=True)
class Kernel:
    """Optional package with faster kernels."""

    module: str
    imports: str
    """Modules whose import proves that it works."""
    gives: str
    part: str = ""
    """A submodule that tells it from another project of the same name."""

    def check(self) -> Check:
        """Check that it is installed, is the right project, and imports in a separate process."""
        spec = importlib.util.find_spec(self.module)
        if spec is None:
            missing = "warn" if torch.cuda.is_available() and self.gives.startswith("--") else "none"
            return Check(self.module, missing, f"not installed; would provide {self.gives}")
        folders = spec.submodule_search_locations or ()
        if self.part and not any((Path(folder) / self.part).exists() for folder in folders):
            fix = f"Uninstall it, and build {self.gives.split(': ')[-1]}"
            return Check(self.module, "warn", f"another project called {self.module}, not NVIDIA's", fix)
        error = _import_error(self.imports)
        if error:
            return Check(self.module, "warn", f"installed, but does not work: {error}", f"Would provide {self.gives}")
        return Check(self.module, "pass", f"works; provides {self.gives}")


KERNELS = (
    Kernel(
        "apex",
        "torch, amp_C, apex.optimizers",
        "--optim.name apex-adamw, a fused AdamW: github.com/NVIDIA/apex with --cuda_ext",
        part="optimizers",
    ),
    Kernel("transformer_engine", "transformer_engine.pytorch", "fused layers, which megaft does not use"),
    Kernel("flash_attn", "flash_attn", "attention that megaft does not need: torch has the same kernel"),
)


def _import_error(modules: str) -> str | None:
    works, lines = _run(sys.executable, "-c", f"import {modules}")
    return None if works else lines[-1]  # the exception


def slurm() -> Check:
    """Report SLURM's partitions and the current job."""
    result = _first_line("sinfo", "--noheader", "--format=%P: %D nodes %T")
    if result is None:
        return Check("SLURM", "none", "not found")
    works, text = result
    if not works:
        return Check("SLURM", "warn", f"installed, but no cluster responds: {text}", "Submit from a login node")
    job = os.environ.get("SLURM_JOB_ID")
    return Check("SLURM", "pass", f"{text}; {f'in job {job}' if job else 'not in a job'}")


def mpi() -> Check:
    """Report mpirun, and mpi4py, which its ranks need."""
    result = _first_line("mpirun", "--version")
    if result is None:
        return Check("MPI", "none", "not found")
    error = _import_error("mpi4py.MPI") if importlib.util.find_spec("mpi4py") else "not installed"
    if error:
        return Check("MPI", "warn", f"{result[1]}; mpi4py: {error}", "For mpirun, install megaft[mpi]")
    return Check("MPI", "pass", f"{result[1]}, mpi4py {installed_version('mpi4py')}")


def compiler() -> Check:
    """Report the C++ compiler that builds torch's and DeepSpeed's extensions."""
    name = os.environ.get("CXX", "c++")
    works, text = _first_line(name, "--version") or (False, f"no {name}")
    if not works:
        return Check("C++ compiler", "warn", text, "torch.compile and DeepSpeed's own kernels need one: g++")
    return Check("C++ compiler", "pass", text)


def _first_line(*command: str) -> tuple[bool, str] | None:
    """Return True and a program's first line of output, or False and its last line of error; None if not installed."""
    if shutil.which(command[0]) is None:
        return None
    works, lines = _run(*command)
    return works, lines[0 if works else -1]


def _run(*command: str) -> tuple[bool, list[str]]:
    """Return True and a program's lines of output, or False and its lines of error."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return False, [f"no result after {SECONDS} s"]
    works = done.returncode == 0
    return works, (done.stdout if works else done.stderr).strip().splitlines() or [f"exit code {done.returncode}"]


def disks() -> Iterator[Check]:
    """Check the free space of the disks that files are written to."""
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    folders = {"this folder": Path.cwd(), "temporary": Path(tempfile.gettempdir()), "models": cache}
    folders["shared memory"] = Path("/dev/shm")
    for name, path in folders.items():
        existing = next(folder for folder in (path, *path.parents) if folder.exists())
        free, wanted = shutil.disk_usage(existing).free, 1 if name == "shared memory" else 10
        found = f"{free / GIB:.1f} GiB free in {path}"
        if not os.access(existing, os.W_OK):
            yield Check(f"disk: {name}", "warn", f"{path} cannot be written", "Work in another folder")
        elif free < wanted * GIB:
            yield Check(f"disk: {name}", "warn", found, f"Delete files there: {wanted} GiB or more are recommended")
        else:
            yield Check(f"disk: {name}", "pass", found)


VARIABLES = re.compile(
    r"(CUDA|NCCL|GLOO|HF|HUGGING_FACE|TORCH|PYTORCH|DS|WANDB|MASTER|OMP|MKL|TOKENIZERS|TRITON|UCX|FI|MEGAFT)_"
    r"|(PYTHONPATH|LD_LIBRARY_PATH|LD_PRELOAD|TMPDIR|CXX|RANK|LOCAL_RANK|WORLD_SIZE)$"
    r"|SLURM_(JOB_ID|(JOB|STEP)_NODELIST|STEP_ID|STEP_NUM_TASKS|NTASKS|PROCID|RESTART_COUNT)$|(https?|no)_proxy$",
    re.IGNORECASE,
)
UNSAFE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def variables() -> Iterator[Check]:
    """Report the environment variables that configure torch, DeepSpeed and the launchers, with secrets redacted."""
    for name, value in sorted(os.environ.items()):
        if not VARIABLES.match(name):
            continue
        shown = "***" if SECRET_NAME.search(name) else without_secrets(value)
        if name == UNSAFE and value in ("1", "y", "yes", "true"):
            yield Check(name, "fail", shown, "It lets torch.load run code from a checkpoint; unset it")
        else:
            yield Check(name, "none", shown)
