"""Short form of the fault injection in docs/reliability.md: every kind once, and proof that it detects violations."""

import os
from dataclasses import replace
from random import Random

import faults_disk as disk
import pytest
from faults import Outcome, campaign_in, table, write_between_marks
from faults_kinds import EVERY_CHANGE, KINDS, boundaries
from faults_trial import Training, Trial, is_whole, newest_whole
from plain_engine import save

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def campaign(memory_folder):
    with campaign_in(memory_folder / "faults", seed=0, settings=[*EVERY_CHANGE.values()]) as campaign:
        yield campaign


@pytest.mark.parametrize("kind", KINDS)
def test_a_disturbed_run_is_not_lost_and_is_the_undisturbed_one(campaign, kind):
    if kind in campaign.left_out:
        pytest.skip(campaign.left_out[kind])
    outcome = campaign.run(kind, number=0)
    assert outcome.restarts > 0
    assert outcome == Outcome(kind, outcome.restarts, False, False, False, (), outcome.seconds)


def test_every_kind_comes_once_then_every_change_of_a_save(campaign):
    plan = campaign.plan([*KINDS], 1000)
    assert len({*plan}) == 1000
    assert [kind for kind, _ in plan[: len(campaign.kinds())]] == campaign.kinds()
    for kind, key in EVERY_CHANGE.items():
        changes = campaign.references[key][1].changes
        assert {number for name, number in plan[:300] if name == kind} == {*range(len(boundaries(changes)))}
        made = {change.split()[0] for rank in changes for change in rank}
        assert made == {"open", "write", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir"}


@pytest.mark.parametrize("damage", [disk.flip_bit, disk.truncate, disk.empty, disk.remove])
@pytest.mark.parametrize("file", ["rank-00000.safetensors", "manifest.json"])
def test_damage_is_seen_without_megaft(tmp_path, damage, file):
    for step in (1, 2):
        save(tmp_path, step, 0.5)
    folder = tmp_path / "checkpoints" / "step-00000002"
    assert (is_whole(folder), newest_whole(tmp_path)) == (True, 2)
    damage(folder / file, Random(0))
    assert (is_whole(folder), newest_whole(tmp_path)) == (False, 1)


def test_a_run_that_trains_otherwise_is_seen(campaign, tmp_path):
    setting, undisturbed = campaign.references[2, False]
    trial = Trial("none", setting, tmp_path / "trial", Random(0), 0.0, run_dir=undisturbed.run_dir)
    assert not trial.differs(undisturbed.training)
    losses = undisturbed.training.losses
    assert len(losses) == 8
    assert trial.differs(replace(undisturbed.training, losses=losses | {8: (0.5).hex()}))
    assert trial.differs(Training(losses, dict.fromkeys(undisturbed.training.files, "0")))


def waits_of_groups():
    from datetime import timedelta

    import deepspeed
    import torch
    import torch.distributed as dist

    from megaft.base import parallel

    parallel.join(parallel.discover(os.environ), timedelta(seconds=7))
    groups = (dist.group.WORLD, deepspeed.comm.new_group([0, 1]))
    waits = [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]
    parallel.leave()
    return waits


def test_groups_that_deepspeed_makes_wait_no_longer_either(run_ranks):
    assert run_ranks(2, waits_of_groups) == [[7, 7], [7, 7]]


def test_the_table_counts_every_broken_promise(tmp_path):
    good = Outcome("a", 1, False, False, False, (), 2.0)
    bad = Outcome("b", 6, True, True, True, ("a traceback",), 9.0)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- faults -->\nold\n<!-- end faults -->\nafter\n")
    write_between_marks(page, table([good, bad]))
    rows = page.read_text().splitlines()
    assert rows[-3:] == ["| all | 2 | 9 | 1 | 1 | 1 | 1 | 2.0 |", "<!-- end faults -->", "after"]
    assert "| a | 1 | 2 | 0 | 0 | 0 | 0 | 2.0 |" in rows
    assert "old" not in rows
    assert (good.is_good, bad.is_good) == (True, False)
