"""The fault campaign of docs/reliability.md in a short form: every kind once; and that it sees what it looks for."""

from dataclasses import replace
from random import Random

import faults_disk as disk
import pytest
from faults import Campaign, Outcome, table, write_between_marks
from faults_kinds import EVERY_CHANGE, KINDS, boundaries
from faults_trial import Training, Trial, is_whole, newest_whole
from plain_engine import save

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    campaign = Campaign(tmp_path_factory.mktemp("faults") / "runs", seed=0, settings=[*EVERY_CHANGE.values()])
    yield campaign
    campaign.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_disturbed_run_is_not_lost_and_is_the_undisturbed_one(campaign, kind):
    if kind not in campaign.kinds():
        pytest.skip(campaign.no_disk)
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
