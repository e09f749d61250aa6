"""Training under a real SLURM: after any interruption the run resumes with the losses of the uninterrupted run."""

import json

import pytest
from slurm_jobs import CANARY, STEPS, Jobs

from megaft.weights import manifest

pytestmark = pytest.mark.slow
pytest_plugins = ["slurm_cluster"]

SAVE_EVERY, SIGNAL_AT, LOST_AT = 50, 60, 250
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
def sweep(jobs):
    """A job array of two sequential runs, each of two ranks on one node; the second never ends."""
    (jobs.folder / "sweep.txt").write_text("--run.seed 0\n--run.seed=1 --run.max-steps '1000000'\n")
    return jobs.submit("finetune_sweep", "sweep", "--gpus-per-node=2", "--array=1-2%1", flags=["sweep.txt"])


@pytest.fixture(scope="module")
def undisturbed(jobs, sweep):
    """Losses of the array's first run, on one node."""
    jobs.wait(f"{sweep}_1", JobState="COMPLETED")
    losses = jobs.losses("sweep/1")
    assert list(losses) == list(range(1, STEPS + 1))
    return losses


def test_a_signalled_job_and_one_that_lost_a_node_go_on(jobs, undisturbed):
    job = jobs.submit("finetune_multinode", "disturbed", *TWO_NODES, "--partition=spare", flags=["--run.fresh"])
    jobs.wait_for_step(job, SIGNAL_AT)
    jobs.cluster.run("scancel", "--batch", "--signal=USR1", str(job))
    jobs.wait_for_step(job, LOST_AT)
    jobs.cluster.run("scontrol", "update", "nodename=n3", "state=down", "reason=lost")
    try:
        jobs.wait_for_restart(job, 2)
    finally:
        jobs.cluster.run("scontrol", "update", "nodename=n3", "state=resume")
    jobs.cluster.run("scontrol", "update", f"jobid={job}", "StartTime=now")  # else two minutes later
    jobs.wait(job, JobState="COMPLETED", Restarts="2")
    assert jobs.losses("disturbed") == undisturbed
    signalled, lost = jobs.continued_after(job, "disturbed")
    assert SIGNAL_AT <= signalled < LOST_AT - SAVE_EVERY <= lost < STEPS


def test_an_array_trains_each_line_in_its_own_folder_until_it_is_cancelled(jobs, sweep, undisturbed):
    """A job that is cancelled saves, and is not requeued."""
    job, run_dir = f"{sweep}_2", jobs.folder / "sweep" / "2"
    jobs.wait_for_step(job, 10, name="sweep/2")
    jobs.cluster.run("scancel", job)
    jobs.wait(job, JobState="CANCELLED")
    ended, losses = jobs.wait_for_end(job, "sweep/2"), jobs.losses("sweep/2")
    last = max(losses)
    assert list(losses) == list(range(1, last + 1))
    assert losses[1] != undisturbed[1]
    assert ended == {"exit_code": 75, "reason": f"SIGTERM after step {last}; saved"}
    manifest.verify(manifest.folder_of(run_dir, last))


def test_no_secret_is_kept_with_a_job(jobs, undisturbed):
    kept = b"".join(path.read_bytes() for path in (jobs.cluster.folder / "state").rglob("*") if path.is_file())
    assert b"MASTER_PORT=" in kept
    assert CANARY.encode() not in kept
