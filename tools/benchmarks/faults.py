"""Fault injection: disturb small runs in every way, restart each until it finishes, and compare the results.

    python tools/benchmarks/faults.py [--runs 500] [--seed 0] [--output docs/reliability.md]

Real DeepSpeed on two CPU ranks. First each kind of fault once, then a fault after every change that a save makes to the
disk, then all kinds in turn. A run is lost if repeating its command does not finish it. It trained differently if any
step's loss, a shard of the last checkpoint or the exported weights differ from the undisturbed run in any bit.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random

import tyro

# Before starting the fork server, which imports torch once for all ranks.
os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}

from faults_disk import small_disk
from faults_hosts import Host, become_root, two_hosts, why_not
from faults_kinds import EVERY_CHANGE, KINDS, Fault, boundaries
from faults_trial import Reference, Setting, Trial, make_inputs, reference

FULL_DISK, CUT_HOST = "a full disk", "one host cut off"
SETTINGS = [(stage, is_background) for stage in range(4) for is_background in (False, True)]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Outcome of a disturbed run."""

    kind: str
    restarts: int
    is_lost: bool
    is_different: bool
    accepted_damaged: bool
    unkept: tuple[str, ...]
    seconds: float

    @property
    def is_good(self) -> bool:
        """Return whether the run kept every promise."""
        return not (self.is_lost or self.is_different or self.accepted_damaged or self.unkept)


class Campaign:
    """The undisturbed runs, and the comparison of disturbed runs with them."""

    def __init__(
        self,
        folder: Path,
        seed: int,
        settings: list[tuple[int, bool]],
        hosts: tuple[Host, ...],
        left_out: dict[str, str],
    ) -> None:
        """Train one undisturbed run per setting (ZeRO stage, synchronous or asynchronous saves).

        Args:
            folder: Folder of the runs; those on a small disk are in its `disk`.
            seed: Seed of all random choices.
            settings: The settings.
            hosts: Two hosts whose link can be cut.
            left_out: Kinds that cannot be tested here, and why.
        """
        self._folder, self._seed, self._number, self._hosts, self.left_out = folder, seed, count(), hosts, left_out
        self._turns = {
            kind: threading.Lock() for kind in (FULL_DISK, CUT_HOST)
        }  # the disk and the hosts are shared by all threads
        make_inputs(folder / "inputs")
        self.references: dict[tuple[int, bool], tuple[Setting, Reference]] = {}
        for stage, is_background in settings:
            setting = Setting(folder / "inputs", stage, is_background)
            self.references[stage, is_background] = (setting, reference(setting, folder / setting.name))

    def kinds(self) -> list[str]:
        """Return the kinds of fault that can be tested here."""
        return [kind for kind in KINDS if kind not in self.left_out]

    def plan(self, kinds: list[str], runs: int) -> list[tuple[str, int]]:
        """Return (kind, number) of each run: each kind once, then all changes of a save, then all kinds in turn."""
        kinds = [kind for kind in self.kinds() if kind in kinds]
        every = [
            (kind, number)
            for kind in kinds
            if kind in EVERY_CHANGE
            for number in range(1, len(boundaries(self.references[EVERY_CHANGE[kind]][1].changes)))
        ]
        others = [kind for kind in kinds if kind not in EVERY_CHANGE]
        in_turn = [(kind, number) for number in range(1, runs) for kind in others]
        return [*((kind, 0) for kind in kinds), *every, *in_turn][:runs]

    def run(self, kind: str, number: int) -> Outcome:
        """Make one disturbed run. Safe to call from several threads."""
        with self._turns.get(kind) or nullcontext():
            return self._run(kind, number)

    def _run(self, kind: str, number: int) -> Outcome:
        random = Random(f"{self._seed} {kind} {number}")
        chosen = EVERY_CHANGE.get(kind) or random.choice([*self.references])
        setting, undisturbed = self.references[chosen]
        fault: Fault = KINDS[kind](number, random, undisturbed.changes)
        folder = self._folder / f"run-{next(self._number):04d}"
        trial = Trial(kind, setting, folder, random, undisturbed.start_seconds)
        if kind == FULL_DISK:
            trial.run_dir = self._folder / "disk" / folder.name
        if kind == CUT_HOST:
            trial.hosts = self._hosts
        fault(trial)
        trial.go_on()
        outcome = Outcome(
            kind,
            trial.restarts,
            trial.is_lost,
            trial.differs(undisturbed.training),
            trial.accepted_damaged,
            tuple(trial.unkept),
            trial.seconds,
        )
        if outcome.is_good:
            shutil.rmtree(folder)
        else:
            print(f"{folder}: {setting.name}: {outcome}\n{fault}", flush=True)
        if kind == FULL_DISK:
            shutil.rmtree(trial.run_dir)
        return outcome


@contextmanager
def campaign_in(folder: Path, seed: int, settings: list[tuple[int, bool]] = SETTINGS) -> Iterator[Campaign]:
    """Yield a campaign, with a small disk and two hosts if this machine allows them."""
    folder.mkdir(parents=True, exist_ok=True)
    no_hosts = why_not()
    with small_disk(folder / "disk") as no_disk, nullcontext(()) if no_hosts else two_hosts(folder) as hosts:
        reasons = {FULL_DISK: no_disk, CUT_HOST: no_hosts}
        left_out = {kind: reason for kind, reason in reasons.items() if reason}
        yield Campaign(folder, seed, settings, hosts, left_out)


def table(outcomes: list[Outcome]) -> str:
    """Return the results as Markdown."""
    columns = ("kind of fault", "runs", "starts", "lost", "different", "damage accepted", "broken promises", "seconds")
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    for kind in dict.fromkeys(outcome.kind for outcome in outcomes):
        lines.append(row(kind, [outcome for outcome in outcomes if outcome.kind == kind]))
    return "\n".join([*lines, row("all", outcomes)])


def row(name: str, outcomes: list[Outcome]) -> str:
    """Return a line of the table; seconds are the median of finished runs."""
    seconds = statistics.median([outcome.seconds for outcome in outcomes if not outcome.is_lost] or [float("nan")])
    numbers = (
        len(outcomes),
        sum(1 + outcome.restarts for outcome in outcomes),
        sum(outcome.is_lost for outcome in outcomes),
        sum(outcome.is_different for outcome in outcomes),
        sum(outcome.accepted_damaged for outcome in outcomes),
        sum(bool(outcome.unkept) for outcome in outcomes),
    )
    return f"| {name} | {' | '.join(map(str, numbers))} | {seconds:.1f} |"


def write_between_marks(page: Path, content: str) -> None:
    """Replace the text between the page's `<!-- faults -->` and `<!-- end faults -->`."""
    before, begin, rest = page.read_text().partition("<!-- faults -->\n")
    _, end, after = rest.partition("<!-- end faults -->")
    if not (begin and end):
        raise SystemExit(f"{page} has no <!-- faults --> and <!-- end faults -->")
    page.write_text(f"{before}{begin}{content}\n{end}{after}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """Disturb small runs in every way, restart each until it finishes, and compare with undisturbed runs."""

    runs: int = 500
    """Disturbed runs."""
    at_once: int = 2
    """Number of concurrent runs; most of the time they wait."""
    seed: int = 0
    """Seed of kinds of damage, settings, and times of faults."""
    kinds: tuple[str, ...] = ()
    """Only kinds of fault whose name contains one of these."""
    output: Path | None = None
    """Write the table here, between the page's two comment lines."""
    folder: Path | None = None
    """Folder for runs that broke a promise, with their output. By default nothing is kept."""

    def chosen(self) -> list[str]:
        """Return the selected kinds of fault."""
        return [kind for kind in KINDS if not self.kinds or any(part in kind for part in self.kinds)]


def outcomes_of(campaign: Campaign, plan: list[tuple[str, int]], at_once: int) -> list[Outcome]:
    """Make the runs and report progress."""
    done = count(1)

    def made(kind: str, number: int) -> Outcome:
        outcome = campaign.run(kind, number)
        print(
            f"{next(done)}/{len(plan)} {kind}, {number}: {outcome.restarts} restarts, {outcome.seconds:.1f} s",
            flush=True,
        )
        return outcome

    with ThreadPoolExecutor(at_once) as threads:
        return [*threads.map(lambda run: made(*run), plan)]


def main(arguments: Arguments) -> int:
    """Train undisturbed, then disturb, count, print."""
    become_root()
    with (
        tempfile.TemporaryDirectory() as temporary,
        campaign_in(arguments.folder or Path(temporary), arguments.seed) as campaign,
    ):
        outcomes = outcomes_of(campaign, campaign.plan(arguments.chosen(), arguments.runs), arguments.at_once)
    print(table(outcomes))
    for kind, reason in campaign.left_out.items():
        print(f"left out: {kind}, as {reason}")
    if arguments.output:
        write_between_marks(arguments.output, table(outcomes))
    return 0 if all(outcome.is_good for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
