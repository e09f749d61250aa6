"""One disturbed run: restarted until it finishes, and compared with the undisturbed run."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Literal

import toy
from faults_disk import Sabotage
from faults_hosts import Host
from faults_job import WORLD_SIZE, Job

STEPS, EVERY, KEPT = 8, 2, 2
WATCHED_STEP = 6
"""Step of the watched save: earlier checkpoints exist, and the oldest is deleted."""
TIMEOUT_MINUTES = 0.5
RESTARTS = 6
"""Number of starts after which a run counts as lost."""
PATIENCE = 5.0
"""Seconds that a launcher waits before it kills ranks whose peer failed."""
RETRIED = {0, 75, None, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGUSR1}
"""Exit codes after which a batch system restarts the job; None means killed by the launcher."""


@dataclass(frozen=True, slots=True)
class Setting:
    """ZeRO stage and kind of save of a run, and the folder of its inputs."""

    inputs: Path
    zero_stage: int
    is_background: bool

    @property
    def name(self) -> str:
        """A folder's name."""
        return f"zero{self.zero_stage}-{'async' if self.is_background else 'sync'}"

    def command(self, run_dir: Path) -> list[str]:
        """Return the flags of a run."""
        return [
            f"--deepspeed_config={self.inputs / f'zero{self.zero_stage}.json'}",
            f"--model.path={self.inputs / 'model'}",
            f"--data.train={self.inputs / 'train.txt'}",
            f"--run.dir={run_dir}",
            "--data.context-length=32",
            "--model.dropout=0.1",
            f"--run.max-steps={STEPS}",
            f"--run.timeout-minutes={TIMEOUT_MINUTES}",
            "--run.export=last",
            f"--checkpoint.every={EVERY}",
            f"--checkpoint.keep-last={KEPT}",
            *(["--checkpoint.async"] if self.is_background else []),
        ]


def make_inputs(folder: Path) -> None:
    """Write the model, the text and a DeepSpeed JSON for each ZeRO stage."""
    toy.make_model(folder / "model")
    toy.make_texts(folder, train_bytes=20_000)
    for stage in range(4):
        zero = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}
        settings = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
        (folder / f"zero{stage}.json").write_text(json.dumps(settings))


@dataclass(frozen=True, slots=True)
class Training:
    """Losses and weights of a finished run."""

    losses: dict[int, str]
    """Loss of every step, in hexadecimal."""
    files: dict[str, str]
    """SHA-256 of the last checkpoint's shards and of the exported weights."""


def training_of(run_dir: Path) -> Training:
    """Return the losses and file hashes of a run, without trusting its manifests."""
    rows = [row for row in read_lines(run_dir / "metrics.jsonl") if "loss" in row]
    losses = {row["step"]: float(row["loss"]).hex() for row in rows}
    assert [*losses] == [row["step"] for row in rows], "each step once"
    last = run_dir / "checkpoints" / f"step-{STEPS:08d}"
    files = [*last.glob("*.safetensors"), *(run_dir / "export").glob("*.safetensors")]
    return Training(losses, {str(path.relative_to(run_dir)): sha256(path) for path in sorted(files)})


def read_lines(path: Path) -> list[dict]:
    """Return the rows of a JSON lines file whose last line a crash may have truncated."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def is_whole(folder: Path) -> bool:
    """Return whether a checkpoint matches its manifest, by a check independent of megaft."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        claimed = manifest.pop("sha256")
        holds = hashlib.sha256(json.dumps(manifest).encode()).hexdigest() == claimed
        return holds and all(sha256(folder / name) == file["sha256"] for name, file in manifest["files"].items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def newest_whole(run_dir: Path) -> int:
    """Return the step of the newest whole checkpoint, or 0."""
    folders = (run_dir / "checkpoints").glob("step-????????*")
    steps = [int(folder.name[5:13]) for folder in folders if folder.suffix not in (".tmp", ".old") and is_whole(folder)]
    return max(steps, default=0)


@dataclass
class Trial:
    """A disturbed run and its history."""

    kind: str
    setting: Setting
    folder: Path
    random: Random
    start_seconds: float
    """Seconds from the start of the undisturbed run to its first step."""
    hosts: tuple[Host, ...] = ()
    """Hosts of its ranks; empty for this machine."""
    flags: tuple[str, ...] = ()
    run_dir: Path = Path()
    restarts: int = -1
    is_lost: bool = False
    accepted_damaged: bool = False
    unkept: list[str] = field(default_factory=list)
    """Broken promises: exit codes, messages, tracebacks."""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        self.run_dir = self.run_dir if self.run_dir.name else self.folder / "run"
        self._began = time.monotonic()

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.run_dir / "checkpoints"

    def sabotage(self, deed: Literal["list", "kill", "hang", "fill"], at: int = 0, notes: Path = Path()) -> Sabotage:
        """Return the fault that a rank of this run injects into the watched save."""
        return Sabotage(deed, self.checkpoints, WATCHED_STEP, at, notes)

    def start(self, sabotage: Mapping[int, Sabotage] | None = None, *, is_forked: bool = True) -> Job:
        """Start or restart the command."""
        self.restarts += 1
        self._expected_step = newest_whole(self.run_dir)
        self._starts = len(self.starts())
        command = [*self.setting.command(self.run_dir), *self.flags]
        logs = self.folder / f"log-{self.restarts}"
        return Job(command, logs, sabotage, self.hosts, is_forked=is_forked)

    def starts(self) -> list[int]:
        """Return the steps from which the run resumed."""
        return [row["step"] for row in read_lines(self.run_dir / "events.jsonl") if row["event"] == "start"]

    def end(self, job: Job, patience: float = PATIENCE, limit: float = 240.0) -> list[int | None]:
        """Wait for a job to end, check its output and resume step, and return the ranks' exit codes."""
        codes = job.codes(patience, limit)
        if "Traceback" in (said := job.said()):
            self.unkept.append(f"a traceback: {said[said.index('Traceback') :][-400:]}")
        for step in self.starts()[self._starts :]:
            self.accepted_damaged |= step > self._expected_step
            self.expect(step == self._expected_step, f"resumed from {step} instead of {self._expected_step}")
        return codes

    def expect(self, holds: bool, what: str) -> None:
        """Record a broken promise unless `holds`."""
        if not holds:
            self.unkept.append(what)

    def wait_for(self, job: Job, step: int) -> bool:
        """Wait until the run has done this many steps; return False if it ended before."""
        while not any(row["step"] >= step for row in read_lines(self.run_dir / "metrics.jsonl")):
            if job.first_end(0.01):
                return False
        return True

    def some_time(self, job: Job) -> int:
        """Wait until a random moment of the run; return the number of steps certainly done."""
        step = max(0, self.random.randrange(-STEPS // 2, STEPS + 1))  # a third of all moments are during the start
        if step == 0:
            job.first_end(self.random.uniform(0.0, self.start_seconds))
        elif self.wait_for(job, step):
            job.first_end(self.random.uniform(0.0, 0.1))
        return step

    def go_on(self) -> None:
        """Restart the command until all ranks exit with 0, as a batch system does."""
        while (codes := self.end(self.start())) != [0] * WORLD_SIZE:
            if self.restarts >= RESTARTS or not RETRIED.issuperset(codes):
                self.is_lost = True
                self.unkept.append(f"lost with {codes}")
                return
        self.seconds = time.monotonic() - self._began

    def differs(self, undisturbed: Training) -> bool:
        """Return whether the run trained differently from the undisturbed one."""
        return not self.is_lost and training_of(self.run_dir) != undisturbed


@dataclass(frozen=True, slots=True)
class Reference:
    """An undisturbed run."""

    run_dir: Path
    training: Training
    changes: tuple[list[str], ...]
    """Disk operations of each rank in the watched save."""
    start_seconds: float
    """Seconds until the first step was done."""


def reference(setting: Setting, folder: Path) -> Reference:
    """Train without disturbance."""
    trial = Trial("undisturbed", setting, folder, Random(0), 0.0)
    lists = [folder / f"changes-{rank}.txt" for rank in range(WORLD_SIZE)]
    began = time.monotonic()
    job = trial.start({rank: trial.sabotage("list", notes=path) for rank, path in enumerate(lists)})
    trial.wait_for(job, 1)
    start_seconds = time.monotonic() - began
    codes = trial.end(job)
    if codes != [0] * WORLD_SIZE:
        raise SystemExit(f"the undisturbed run ended with {codes}:\n{job.said()}")
    return Reference(
        trial.run_dir, training_of(trial.run_dir), tuple(path.read_text().splitlines() for path in lists), start_seconds
    )


def ended(run_dir: Path) -> int | None:
    """Return the exit code in RUN/ended.json."""
    path = run_dir / "ended.json"
    return json.loads(path.read_text())["exit_code"] if os.path.exists(path) else None
