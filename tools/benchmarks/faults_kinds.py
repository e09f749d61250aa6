"""Kinds of fault: how each disturbs a run until it must be restarted, and the immediate reaction it requires."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import faults_disk as disk
from faults_job import BLOCK, WORLD_SIZE, Job
from faults_trial import EVERY, PATIENCE, STEPS, TIMEOUT_MINUTES, WATCHED_STEP, Trial, ended, newest_whole, read_lines

Fault = Callable[[Trial], None]
REQUEUE, CHECKPOINT_ERROR, USAGE = 75, 4, 2
SHORT_TIMEOUT = 0.15
"""Timeout in minutes for runs in which a rank falls silent."""
SLACK = 120.0
"""Seconds in which a required exit must happen, even on a busy machine."""
ONE_STOPS = threading.Lock()
"""Lock for making the run that is copied."""


def killed_at_start(trial: Trial) -> None:
    """SIGKILL both ranks while Python starts and imports."""
    job = trial.start(is_forked=False)
    job.first_end(trial.random.uniform(0.0, 8.0))
    job.send(signal.SIGKILL)
    trial.end(job)


def killed(trial: Trial) -> None:
    """SIGKILL both ranks at random times, up to three times in a row."""
    for _ in range(trial.random.randint(1, 3)):
        job = trial.start()
        trial.some_time(job)
        job.send(signal.SIGKILL)
        trial.end(job)


def one_killed(trial: Trial) -> None:
    """SIGKILL one rank at a random time; the other must exit by itself."""
    job, victim = trial.start(), trial.random.randrange(WORLD_SIZE)
    trial.some_time(job)
    was_training = bool(read_lines(trial.run_dir / "metrics.jsonl"))
    job.send(signal.SIGKILL, victim)
    codes = trial.end(job, SLACK if was_training else PATIENCE)
    if was_training:
        require_survivors_end(trial, job, codes, victim)


def require_survivors_end(trial: Trial, job: Job, codes: list[int | None], victim: int) -> None:
    """Require of ranks that lost a peer: exit code 75, or 0 if the run was done, and the reason in one line."""
    for rank, code in enumerate(codes):
        if rank != victim:
            trial.expect(code in (REQUEUE, 0), f"rank {rank} ended with {code} after rank {victim} was lost")
            said = job.logs[rank].read_text()
            trial.expect(code != REQUEUE or f"rank {rank} lost its peers" in said, f"it said {said[-200:]!r}")


def killed_in_save(trial: Trial, rank: int, at: int, is_alone: bool = False) -> None:
    """SIGKILL both ranks, or one, after one of a rank's changes to the disk during a save."""
    job = trial.start({rank: trial.sabotage("kill", at)})
    job.first_end()
    if not is_alone:
        job.send(signal.SIGKILL)
    codes = trial.end(job, SLACK)
    trial.expect(codes[rank] == -signal.SIGKILL, f"the save was over before its change {at}: {codes}")
    if is_alone:
        require_survivors_end(trial, job, codes, rank)


def hung(trial: Trial, victim: int, at: int | None) -> None:
    """SIGSTOP a rank, during a save or not; the other must exit within the timeout."""
    trial.flags = (f"--run.timeout-minutes={SHORT_TIMEOUT}",)
    job = trial.start({victim: trial.sabotage("hang", at)} if at is not None else None)
    if at is None and trial.wait_for(job, trial.random.randrange(1, STEPS)):
        job.send(signal.SIGSTOP, victim)
    trial.expect(job.first_end(60 * SHORT_TIMEOUT + SLACK), "no rank detected that another hangs")
    job.send(signal.SIGKILL, victim)
    require_survivors_end(trial, job, trial.end(job, SLACK), victim)
    trial.flags = ()


def blocked(trial: Trial, is_alone: bool) -> None:
    """Block a rank's main thread in a call while its peer is killed or waits for it; all must exit."""
    trial.flags = (f"--run.timeout-minutes={SHORT_TIMEOUT}",)
    job, victim = trial.start(), trial.random.randrange(WORLD_SIZE)
    trial.wait_for(job, trial.random.randrange(1, STEPS))
    job.send(BLOCK, victim)
    if not is_alone:
        job.first_end(trial.random.uniform(0.0, 0.5))
        job.send(signal.SIGKILL, 1 - victim)
    require_all_end(trial, job, (REQUEUE, 0) if is_alone else (REQUEUE, 0, -signal.SIGKILL))
    trial.flags = ()


def cut_off(trial: Trial) -> None:
    """Take down the link of one of two hosts: all ranks must exit, and resume once the link is up."""
    trial.flags = (f"--run.timeout-minutes={SHORT_TIMEOUT}",)
    job, host = trial.start(), trial.random.choice(trial.hosts)
    trial.wait_for(job, trial.random.randrange(1, STEPS - 1))
    try:
        host.cut()
        require_all_end(trial, job, (REQUEUE, 0))
    finally:
        host.heal()
    trial.flags = ()


def flapping(trial: Trial) -> None:
    """Take down the link of one host briefly, up to three times: training must continue, or all ranks exit."""
    trial.flags = (f"--run.timeout-minutes={TIMEOUT_MINUTES}",)
    job, host = trial.start(), trial.random.choice(trial.hosts)
    for _ in range(trial.random.randint(1, 3)):
        trial.some_time(job)
        try:
            host.cut()
            job.first_end(trial.random.uniform(0.1, 1.5))
        finally:
            host.heal()
    require_all_end(trial, job, (REQUEUE, 0))


def require_all_end(trial: Trial, job: Job, allowed: tuple[int, ...]) -> None:
    """Require of a run that lost a rank: every rank exits in time, and the reason is recorded."""
    codes = trial.end(job, patience=60 * SHORT_TIMEOUT + SLACK)
    trial.expect({*allowed}.issuperset(codes), f"ended with {codes}: {job.said()[-300:]!r}")
    if 0 not in codes:
        trial.expect(ended(trial.run_dir) == REQUEUE, f"ended.json has {ended(trial.run_dir)} after {codes}")


def signalled(trial: Trial, number: signal.Signals) -> None:
    """Signal one rank at a random time: both must save and exit with 75."""
    job, target = trial.start(), trial.random.randrange(WORLD_SIZE)
    trial.some_time(job)
    was_training = bool(read_lines(trial.run_dir / "metrics.jsonl"))
    job.send(number, target)
    codes = trial.end(job, SLACK if was_training else PATIENCE)
    if was_training:
        trial.expect(codes in ([REQUEUE] * WORLD_SIZE, [0] * WORLD_SIZE), f"{number.name}: {codes}")
        trial.expect(ended(trial.run_dir) == codes[0], "ended.json tells another code")


def damaged(trial: Trial, file: str, damage: Callable[[Path, Random], None]) -> None:
    """Damage a file of the newest checkpoint of a killed run, or `latest`."""
    stop_half_way(trial)
    newest = WATCHED_STEP - EVERY
    folder = trial.checkpoints if file == "latest" else trial.checkpoints / f"step-{newest:08d}"
    damage(folder / file, trial.random)
    job = trial.start()
    trial.end(job)
    named = "latest" if file == "latest" else f"step-{newest:08d}"
    trial.expect(f"{named} is not used: " in job.said(), f"the damage was not named: {job.said()[-300:]!r}")
    expected = newest if file == "latest" else newest - EVERY
    trial.accepted_damaged |= trial.starts()[-1:] != [expected]


def stop_half_way(trial: Trial) -> None:
    """Leave a run killed before the watched save: made once per setting, then copied."""
    stopped = trial.setting.inputs.with_name(f"{trial.setting.name}-half-way")
    with ONE_STOPS:
        if not stopped.exists():
            job = trial.start({0: trial.sabotage("kill", 0)})
            job.first_end()
            job.send(signal.SIGKILL)
            trial.end(job)
            shutil.move(trial.run_dir, stopped)
    shutil.copytree(stopped, trial.run_dir)


def all_damaged(trial: Trial) -> None:
    """Damage every checkpoint: the run must refuse to start over until one is restored."""
    stop_half_way(trial)
    files = sorted(trial.checkpoints.glob("step-????????/*.safetensors"))
    whole = {file: file.read_bytes() for file in files}
    for file in files:
        disk.flip_bit(file, trial.random)
    job = trial.start()
    codes = trial.end(job, SLACK)
    trial.accepted_damaged |= codes[0] != CHECKPOINT_ERROR
    trial.expect("no checkpoint in" in job.said() and "--run.fresh" in job.said(), f"it said {job.said()[-300:]!r}")
    for file, data in whole.items():
        file.write_bytes(data)


def disk_full(trial: Trial, at: int | None) -> None:
    """Fill the disk before a save or during it: exit code 4, and the last checkpoint must stay."""
    filler = trial.run_dir / "filler"
    if at is None:
        stop_half_way(trial)
        disk.fill(filler, spare_bytes=1 << 20)
        job = trial.start()
    else:
        job = trial.start({0: trial.sabotage("fill", at, filler)})
    codes = trial.end(job, SLACK)
    trial.expect(codes[0] == CHECKPOINT_ERROR, f"ended with {codes}: {job.said()[-300:]!r}")
    trial.expect(ended(trial.run_dir) in (CHECKPOINT_ERROR, None), "ended.json tells another code")
    trial.expect(newest_whole(trial.run_dir) >= WATCHED_STEP - EVERY, "the last checkpoint is gone")
    filler.unlink()


def second_job(trial: Trial) -> None:
    """Start the same command twice: the second must be refused with the owner of the folder, and the first finish."""
    first = trial.start({0: trial.sabotage("hang", trial.random.randrange(8))})
    while not is_stopped(first.ranks[0].pid) and not first.first_end(0.05):
        pass
    second = trial.start()
    codes = second.codes(patience=1.0)
    said = second.said()
    trial.expect(codes[0] == USAGE, f"the second job ended with {codes}")
    holder = f"is in use by host {os.uname().nodename}, pid {first.ranks[0].pid}"
    trial.expect(holder in said and "Traceback" not in said, f"it said {said[-300:]!r}")
    first.send(signal.SIGCONT)
    trial.restarts = 0
    codes = trial.end(first)
    trial.expect(codes == [0] * WORLD_SIZE, f"the first job ended with {codes}")


def is_stopped(pid: int | None) -> bool:
    """Return whether a process is stopped by a signal, from /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def boundaries(changes: tuple[list[str], ...]) -> list[tuple[int, int]]:
    """Return (rank, number) of every change to the disk in a save."""
    return [(rank, at) for rank, made in enumerate(changes) for at in range(len(made))]


def at_boundary(number: int, random: Random, changes: tuple[list[str], ...], **how: bool) -> Fault:
    """Kill after the `number`-th change, counted over all ranks."""
    rank, at = boundaries(changes)[number % len(boundaries(changes))]
    return partial(killed_in_save, rank=rank, at=at, **how)


def at_random_boundary(number: int, random: Random, changes: tuple[list[str], ...], **how: bool) -> Fault:
    """Kill after a random change."""
    return at_boundary(random.randrange(len(boundaries(changes))), random, changes, **how)


def hanging(number: int, random: Random, changes: tuple[list[str], ...]) -> Fault:
    """Hang at a random time or during a save, alternating."""
    rank, at = random.choice(boundaries(changes))
    return partial(hung, victim=rank, at=at if number % 2 else None)


def filling(number: int, random: Random, changes: tuple[list[str], ...]) -> Fault:
    """Fill the disk before a save, or after one of its changes that is followed by another file, alternating."""
    last = changes[0].index("open latest.tmp")
    return partial(disk_full, at=random.randrange(last + 1) if number % 2 else None)


def one_of(*faults: Fault) -> Callable[..., Fault]:
    """Choose among these in turn."""
    return lambda number, random, changes: faults[number % len(faults)]


SHARD, MANIFEST = "rank-00001.safetensors", "manifest.json"
KINDS: dict[str, Callable[[int, Random, tuple[list[str], ...]], Fault]] = {
    "both ranks killed at random times": one_of(killed),
    "both ranks killed while Python starts": one_of(killed_at_start),
    "one rank killed at a random time": one_of(one_killed),
    "both ranks killed at every change to the disk in a save": at_boundary,
    "both ranks killed at every change to the disk in a save (async)": at_boundary,
    "one rank killed in a save": partial(at_random_boundary, is_alone=True),
    "one rank hangs": hanging,
    "one rank blocked in a call": one_of(partial(blocked, is_alone=False), partial(blocked, is_alone=True)),
    "one host cut off": one_of(cut_off, cut_off, flapping),
    "SIGUSR1 or SIGTERM to one rank at a random time": one_of(
        partial(signalled, number=signal.SIGUSR1), partial(signalled, number=signal.SIGTERM)
    ),
    "a flipped bit in the newest checkpoint": one_of(
        partial(damaged, file=SHARD, damage=disk.flip_bit), partial(damaged, file=MANIFEST, damage=disk.flip_bit)
    ),
    "a truncated or empty shard": one_of(
        partial(damaged, file=SHARD, damage=disk.truncate), partial(damaged, file=SHARD, damage=disk.empty)
    ),
    "a missing shard or manifest": one_of(
        partial(damaged, file=SHARD, damage=disk.remove), partial(damaged, file=MANIFEST, damage=disk.remove)
    ),
    "a damaged or missing `latest`": one_of(
        partial(damaged, file="latest", damage=disk.scribble),
        partial(damaged, file="latest", damage=disk.remove),
        partial(damaged, file="latest", damage=disk.misname),
        partial(damaged, file="latest", damage=disk.empty),
    ),
    "every checkpoint damaged": one_of(all_damaged),
    "a full disk": filling,
    "two jobs on one folder": one_of(second_job),
}
"""Row of the table, and the function of its n-th fault."""
EVERY_CHANGE = {
    "both ranks killed at every change to the disk in a save": (2, False),
    "both ranks killed at every change to the disk in a save (async)": (3, True),
}
"""ZeRO stage, and whether saves are asynchronous, of the kinds that cover every change of a save."""
