"""Training under a real SLURM: whatever ends a job's turn, the run goes on and its losses are the undisturbed run's."""

import json
from pathlib import Path

import pytest
from slurm_jobs import CANARY, STEPS, Jobs

from megaft import checkpoint

pytestmark = pytest.mark.slow
pytest_plugins = ["slurm_cluster"]

SLURM = Path(__file__).parents[1] / "slurm"
SAVE_EVERY, SIGNAL_AT = 50, 60
TWO_NODES = ("--nodes=2", "--gpus-per-node=1")


@pytest.fixture(scope="module")
def jobs(cluster, toy_model, toy_texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs")
    settings = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}
    (folder / "zero1.json").write_text(json.dumps(settings))
    flags = [
        *(f"--deepspeed_config={folder}/zero1.json", f"--model.path={toy_model}", f"--data.train={toy_texts[0]}"),
        *("--data.context-length=32", "--model.dropout=0.1", "--optim.schedule=constant", "--run.export=none"),
        f"--checkpoint.every={SAVE_EVERY}",
    ]
    return Jobs(cluster, folder, flags)


@pytest.fixture(scope="module")
def limited(jobs):
    """A run longer than its job's time limit. SLURM looks at its clock every half minute."""
    script = jobs.folder / "limited.sbatch"
    script.write_text((SLURM / "finetune_multinode.sbatch").read_text().replace("B:USR1@300", "B:USR1@60"))
    return jobs.submit(str(script), "limited", *TWO_NODES, "--time=2", max_steps=1_000_000)


@pytest.fixture(scope="module")
def sweep(jobs, limited):
    """An array of two runs, one after the other, each of two ranks on one node."""
    (jobs.folder / "sweep.txt").write_text("--run.seed 0\n--run.seed=1 --run.max-steps '2'\n")
    return jobs.submit("finetune_sweep", "sweep", "--gpus-per-node=2", "--array=1-2%1", flags=["sweep.txt"])


@pytest.fixture(scope="module")
def undisturbed(jobs, sweep):
    """The losses of the array's first run, on one node."""
    jobs.wait(f"{sweep}_1", JobState="COMPLETED")
    losses = jobs.losses("sweep/1")
    assert list(losses) == list(range(1, STEPS + 1))
    return losses


def test_a_signal_saves_requeues_and_continues(jobs, undisturbed):
    job = jobs.submit("finetune_multinode", "signalled", *TWO_NODES, flags=["--run.fresh"])
    jobs.wait_for_step(job, SIGNAL_AT)
    jobs.cluster.run("scancel", "--batch", "--signal=USR1", str(job))
    jobs.wait(job, JobState="COMPLETED", Restarts="1")
    assert jobs.losses("signalled") == undisturbed
    [turn] = jobs.continued_after(job, "signalled")
    assert SIGNAL_AT <= turn < STEPS


def test_an_array_trains_each_line_in_its_own_folder(jobs, sweep, undisturbed):
    jobs.wait(f"{sweep}_2", JobState="COMPLETED")
    other = jobs.losses("sweep/2")
    assert list(other) == [1, 2]
    assert other[1] != undisturbed[1]


def test_the_time_limit_does_not_come_unannounced(jobs, limited, undisturbed):
    jobs.wait_for_restart(limited)
    reached = list(jobs.losses("limited").items())
    assert reached
    assert reached[:STEPS] == list(undisturbed.items())[: len(reached)]


def test_a_cancelled_job_saves_and_stays_cancelled(jobs, limited):
    first = max(jobs.losses("limited"))
    jobs.wait_for_step(limited, first + 10)
    jobs.cluster.run("scancel", str(limited))
    jobs.wait(limited, JobState="CANCELLED")
    ended, last = jobs.wait_for_end(limited, "limited"), max(jobs.losses("limited"))
    assert ended == {"exit_code": 75, "reason": f"SIGTERM after step {last}; saved"}
    checkpoint.verify(checkpoint.folder_of(jobs.folder / "limited", last))


def test_a_lost_node_costs_no_loss(jobs, undisturbed):
    job = jobs.submit("finetune_multinode", "lost", *TWO_NODES, "--partition=spare")
    jobs.wait_for_step(job, SAVE_EVERY + 10)
    jobs.cluster.run("scontrol", "update", "nodename=n3", "state=down", "reason=lost")
    jobs.wait_for_restart(job)
    jobs.cluster.run("scontrol", "update", "nodename=n3", "state=resume")
    jobs.cluster.run("scontrol", "update", f"jobid={job}", "StartTime=now")  # else two minutes later
    jobs.wait(job, JobState="COMPLETED", Restarts="1")
    assert jobs.losses("lost") == undisturbed
    assert jobs.continued_after(job, "lost")[0] >= SAVE_EVERY


def test_no_secret_is_kept_with_a_job(jobs, undisturbed):
    kept = b"".join(path.read_bytes() for path in (jobs.cluster.folder / "state").rglob("*") if path.is_file())
    assert b"MASTER_PORT=" in kept
    assert CANARY.encode() not in kept
