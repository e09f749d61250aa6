"""Toy runs as SLURM jobs, and their outcomes."""

import json
import re
import sys
import time

import pytest

from megaft.base.parallel import free_port

CANARY = "canary-3f9a1c"
"""Secrets of the submitting user."""
STEPS = 400
PATIENCE = 600
"""Timeout for steps that take a few seconds on an idle machine."""


class Jobs:
    """Submits runs of the toy model and waits for their outcomes."""

    def __init__(self, cluster, folder, flags):
        self.cluster, self.folder, self._flags = cluster, folder, flags

    def submit(self, script, name, *options, flags=(), max_steps=STEPS):
        """Run `megaft submit`; return the job's number."""
        run = [f"--run.dir={self.folder / name}", f"--run.max-steps={max_steps}"]
        command = [sys.executable, "-m", "megaft.cli", "submit", script, "--cpus-per-task=1", "--time=30"]
        environment = {
            **{"DS_ACCELERATOR": "cpu", "WANDB_API_KEY": CANARY, "HF_TOKEN": CANARY},
            # The nodes' names lead nowhere; on a real cluster the first one is found by name.
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())},
        }
        command += [f"--job-name={name}", *options, "--", *flags, *self._flags, *run]
        return int(self.cluster.run(*command, cwd=self.folder, environment=environment).split()[-1])

    def wait(self, job, seconds=PATIENCE, **wanted):
        """Wait until the job has these fields; show its log if it never does."""
        return self._until(lambda: wanted.items() <= self.cluster.job(job).items(), job, seconds)

    def wait_for_restart(self, job, times=1, seconds=PATIENCE):
        """Wait until the job was requeued at least this often."""
        return self._until(lambda: int(self.cluster.job(job)["Restarts"]) >= times, job, seconds)

    def wait_for_step(self, job, step, name=None, seconds=PATIENCE):
        """Wait until the run in that folder, or in the job's, has trained this many steps."""
        name = name or self.cluster.job(job)["JobName"]
        return self._until(lambda: max(self.losses(name), default=0) >= step, job, seconds)

    def _until(self, is_so, job, seconds):
        deadline = time.monotonic() + seconds
        while not is_so():
            is_lost = self.cluster.job(job)["JobState"] in ("FAILED", "TIMEOUT")
            if is_lost or time.monotonic() > deadline:
                logs = [path.read_text() for path in self.folder.glob(f"*-{job}*.log")]
                pytest.fail(f"{self.cluster.job(job)}\n" + "\n".join(logs))
            time.sleep(0.1)

    def losses(self, name):
        path = self.folder / name / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return {row["step"]: row["loss"].hex() for row in rows if "loss" in row}

    def wait_for_end(self, job, name):
        """Return the run's ended.json."""
        path = self.folder / name / "ended.json"
        self._until(path.exists, job, PATIENCE)
        return json.loads(path.read_text())

    def continued_after(self, job, name):
        """Return the steps from which later attempts of the job resumed."""
        return [int(n) for n in re.findall(r"after (\d+) steps", (self.folder / f"{name}-{job}.log").read_text())]
