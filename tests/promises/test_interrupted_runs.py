"""Runs that are stopped, diverge or lose a rank: real DeepSpeed on two ranks, several runs per launch."""

import json
import os
import signal
from functools import partial

import pytest
from run_folders import losses, rows, shard_hashes

pytestmark = pytest.mark.slow

STEPS = 6


def settings_of(zero_stage=1, **more):
    return {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": zero_stage},
    } | more


def runs(folder, common, cases):
    """Run cases of (name, flags, event on this rank, DeepSpeed settings) in turn; return each exit code."""
    from deepspeed.accelerator import get_accelerator

    from megaft import train
    from megaft.base import parallel
    from megaft.base.exit_code import exit_code_of
    from megaft.run import stop

    topology = parallel.discover(os.environ)
    codes = []
    for number, (name, flags, happens, settings) in enumerate(cases):
        path = folder / f"{number}.json"
        if topology.is_main:
            path.write_text(json.dumps(settings))
        parallel.join(topology)
        parallel.barrier()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's `&` switches off
        stop.listen()
        arguments = [f"--deepspeed_config={path}", f"--run.dir={folder / name}", *common, *flags]
        with pytest.MonkeyPatch.context() as patch:
            if "fp16" in settings:  # refused on CPUs without its instructions, where torch computes it slowly
                patch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
            if happens:
                happens(topology.rank, patch, folder / name)
            codes.append(exit_code_of(partial(train.run, train.parse_train(arguments), topology)))
    parallel.leave()
    return codes


def signalled(number, step, rank, patch, run_dir):
    """Send rank 1 a signal during a step, and another during the save."""
    from megaft.checkpoint.saver import Saver
    from megaft.run.metrics import Metrics

    if rank != 1:
        return
    report, save = Metrics.step, Saver.save

    def report_and_signal(self, done, **values):
        if done == step:
            os.kill(os.getpid(), number)
        return report(self, done, **values)

    def save_and_signal(self, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        save(self, *arguments)

    patch.setattr(Metrics, "step", report_and_signal)
    patch.setattr(Saver, "save", save_and_signal)


def file_put(name, step, rank, patch, run_dir):
    """Create a file in the run's folder during a step."""
    from megaft.run.metrics import Metrics

    report = Metrics.step

    def report_and_put(self, done, **values):
        if done == step and rank == 0:
            (run_dir / name).touch()
        return report(self, done, **values)

    patch.setattr(Metrics, "step", report_and_put)


def poisoned(positions, spoil, rank, patch, run_dir):
    """Corrupt the loss of some samples, given by their position in the whole sequence."""
    from megaft import train
    from megaft.models.hugging_face import NatsModel
    from megaft.run import guard

    patch.setattr(guard, "min_steps", lambda window: 2)  # these runs are short
    forward, seed = NatsModel.forward, train.dropout_seed
    here = []
    patch.setattr(train, "dropout_seed", lambda run_seed, position: here.append(position) or seed(run_seed, position))

    def forward_and_poison(self, *arguments):
        nats = forward(self, *arguments)
        return spoil(nats) if self.training and here[-1] in positions else nats

    patch.setattr(NatsModel, "forward", forward_and_poison)


def not_a_number(nats):
    return nats * float("nan")


def huge(nats):
    return nats * 300.0


def steep(nats):
    """Return the same loss with a gradient whose squared norm overflows."""
    return nats + (nats - nats.detach()) * 1e38


def limit(steps):
    return f"--run.max-steps={steps}"


BAD_STEP = 4
BAD = (12, 13)  # two samples of the fourth step, one a rank
PENDING = ["--checkpoint.every=3", "--checkpoint.async"]
CHANGED = ["--guard.non-finite=rewind", "--model.dropout=0.2", "--checkpoint.allow-changed=dropout"]
CASES = [
    ("whole", [limit(STEPS)], None, settings_of()),
    ("usr1", [limit(STEPS)], partial(signalled, signal.SIGUSR1, 3), settings_of()),
    ("usr1", [limit(STEPS)], None, settings_of()),
    ("term", [limit(STEPS), "--checkpoint.async"], partial(signalled, signal.SIGTERM, 2), settings_of()),
    ("term", [limit(STEPS), "--checkpoint.async"], None, settings_of()),
    ("int", [limit(STEPS)], partial(signalled, signal.SIGINT, 3), settings_of()),
    ("int", [limit(STEPS)], None, settings_of()),
    ("minutes", [limit(STEPS), "--run.max-minutes=1e-9"], None, settings_of()),
    ("stopped", [limit(STEPS)], partial(file_put, "STOP", 4), settings_of()),
    ("stopped", [limit(STEPS)], None, settings_of()),
    ("saved", [limit(STEPS)], partial(file_put, "SAVE", 2), settings_of()),
    ("pending", [limit(STEPS), *PENDING], partial(poisoned, BAD, not_a_number), settings_of()),
    ("changed", [limit(2)], None, settings_of()),
    ("changed", [limit(STEPS), *CHANGED], partial(poisoned, BAD, not_a_number), settings_of()),
]
CODES = [0, 75, 0, 75, 0, 130, 0, 75, 93, 0, 0, 5, 0, 0]
SPIKE = ["--guard.spike-deviations=50", limit(STEPS), "--checkpoint.every=2"]


def guarded(name, spoil, *flags, zero_stage=1, positions=BAD, **more):
    return (name, [*SPIKE, *flags], partial(poisoned, positions, spoil), settings_of(zero_stage, **more))


def fp16(**scaler):
    return {"enabled": True, "initial_scale_power": 8, "hysteresis": 1, **scaler}


NAN, HUGE = not_a_number, huge
ALWAYS = range(12, 99)
GUARDED = [
    guarded("nan-stop", NAN),
    *(guarded(f"nan-skip-{stage}", NAN, "--guard.non-finite=skip", zero_stage=stage) for stage in range(4)),
    guarded("huge-skip", HUGE, "--guard.spike=skip", zero_stage=2),
    *(guarded(f"nan-rewind-{stage}", NAN, "--guard.non-finite=rewind", zero_stage=stage) for stage in range(4)),
    guarded("huge-rewind", HUGE, "--guard.spike=rewind"),
    guarded("huge-stop", HUGE, "--guard.spike=stop"),
    *(guarded(f"steep-skip-{stage}", steep, "--guard.non-finite=skip", zero_stage=stage) for stage in range(4)),
    guarded("nan-skip-bf16", NAN, "--guard.non-finite=skip", bf16={"enabled": True}),
]

OVERFLOWING = [
    guarded("streak", steep, "--guard.max-overflows=2", positions=ALWAYS, fp16=fp16()),
    guarded("floor", steep, positions=ALWAYS, fp16=fp16(initial_scale_power=1, min_loss_scale=1)),
    guarded("once", steep, fp16=fp16()),
]


@pytest.fixture(scope="module")
def common(toy_model, toy_texts):
    return [
        f"--model.path={toy_model}",
        f"--data.train={toy_texts[0]}",
        "--data.context-length=32",
        "--optim.schedule=constant",
        "--model.dropout=0.1",
        "--run.export=none",
    ]


@pytest.fixture(scope="module")
def interrupted(run_ranks, common, memory_folder):
    folder = memory_folder / "interrupted"
    folder.mkdir()
    return folder, run_ranks(2, runs, folder, common, CASES)


@pytest.fixture(scope="module")
def watched(run_ranks, common, memory_folder):
    folder = memory_folder / "watched"
    folder.mkdir()
    return folder, run_ranks(2, runs, folder, common, [*GUARDED, *OVERFLOWING])


def events(run_dir, *wanted):
    lines = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] in wanted]


def ended(run_dir):
    return json.loads((run_dir / "ended.json").read_text())


def test_one_ranks_signal_ends_all_ranks_with_the_code_to_requeue(interrupted):
    _, codes = interrupted
    assert codes == [CODES, CODES]


@pytest.mark.parametrize("name", ["usr1", "term", "int", "stopped"])
def test_what_was_stopped_goes_on_as_the_undisturbed_run(interrupted, name):
    folder, _ = interrupted
    assert losses(folder / name) == losses(folder / "whole")
    assert shard_hashes(folder / name, STEPS) == shard_hashes(folder / "whole", STEPS)


@pytest.mark.parametrize(
    ("name", "step", "exit_code", "reason"),
    [
        ("usr1", 3, 75, "SIGUSR1"),
        ("term", 2, 75, "SIGTERM"),
        ("minutes", 1, 75, "--run.max-minutes has elapsed"),
        ("stopped", 4, 93, "the file STOP"),
    ],
)
def test_why_a_run_ended_is_in_its_folder(interrupted, name, step, exit_code, reason):
    folder, _ = interrupted
    end = events(folder / name, "end")[0]
    assert (end["step"], end["exit_code"]) == (step, exit_code)
    assert reason in end["reason"]
    assert ended(folder / "whole")["exit_code"] == 0
    assert ended(folder / "minutes") == {"exit_code": 75, "reason": "--run.max-minutes has elapsed after step 1; saved"}


def test_a_file_saves_at_once_and_is_taken_away(interrupted):
    folder, _ = interrupted
    assert [event["step"] for event in events(folder / "saved", "checkpoint")] == [2, STEPS]
    assert not (folder / "saved" / "SAVE").exists()
    assert not (folder / "stopped" / "STOP").exists()


def test_a_checkpoint_in_the_making_is_published_before_the_guard_ends_the_run(interrupted):
    folder, _ = interrupted
    assert (folder / "pending" / "checkpoints" / "latest").read_text() == "step-00000003\n"
    assert "the last checkpoint before it is step 3" in ended(folder / "pending")["reason"]


def test_a_run_goes_back_to_before_a_change_that_was_allowed(interrupted):
    folder, _ = interrupted
    assert [event["step"] for event in events(folder / "changed", "rewind")] == [2]
    assert [row["step"] for row in rows(folder / "changed")] == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    ("seen", "arriving", "exit_code", "left"),
    [
        pytest.param([0, 0, 0, 0], ["STOP", "SAVE"], 0, ["SAVE", "STOP"], id="come after they were looked for"),
        pytest.param([0, 0, 0, 1], ["STOP", "SAVE"], None, ["STOP"], id="one of them was seen"),
        pytest.param([signal.SIGUSR1, 0, 1, 0], ["STOP"], 93, [], id="STOP goes before a signal"),
        pytest.param([signal.SIGUSR1, 1, 0, 0], [], 75, [], id="a signal"),
    ],
)
def test_what_is_asked_for_is_done_and_only_that_is_taken_away(tmp_path, seen, arriving, exit_code, left):
    from megaft.run.stop import StopRequests

    stops = StopRequests(tmp_path, None, is_main=True)
    for name in arriving:
        (tmp_path / name).touch()
    request = stops.request(*seen)
    assert (request.exit_code if request else 0) == exit_code
    assert sorted(path.name for path in tmp_path.iterdir()) == left


def test_policies_of_the_guard(watched):
    folder, codes = watched
    expected = [5 if name.endswith("stop") else 0 for name, *_ in GUARDED]
    assert [ours[: len(expected)] for ours in codes] == [expected, expected]
    for name, *_ in GUARDED:
        (event,) = events(folder / name, "non-finite loss", "non-finite gradient", "loss spike", "gradient norm spike")
        assert event["step"] == BAD_STEP
        assert event["samples"] == [[12, 16]]
        assert event["decision"] in name


@pytest.mark.parametrize("name", [name for name, *_ in GUARDED if "skip" in name])
def test_a_skipped_step_changes_no_weight(watched, name):
    """With a constant learning rate the run is the one that never took the step, dropout included."""
    folder, _ = watched
    good = [row for row in rows(folder / name) if row["step"] != BAD_STEP]
    assert all(float(row["loss"]) < 10 for row in good)
    assert [row["skipped_steps"] for row in good] == [0, 0, 0, 1, 1]
    assert events(folder / name, "checkpoint")[-1]["step"] == STEPS


@pytest.mark.parametrize("name", [name for name, *_ in GUARDED if "rewind" in name])
def test_after_a_rewind_the_samples_are_left_out_and_the_steps_before_are_the_same(watched, name):
    folder, _ = watched
    (back,) = events(folder / name, "rewind")
    assert (back["step"], back["left_out"]) == (2, [[12, 16]])
    assert [row["step"] for row in rows(folder / name)] == list(range(1, STEPS + 1))
    if name == "nan-rewind-1":
        undisturbed, rewound = (
            [row["loss"] for row in rows(folder / run) if row["step"] < BAD_STEP] for run in ("nan-stop", name)
        )
        assert rewound == undisturbed


def test_a_rewound_run_is_the_same_at_every_stage(watched):
    folder, _ = watched
    first, *others = ([row["loss"] for row in rows(folder / f"nan-rewind-{stage}")] for stage in range(4))
    for other in others:
        assert other == pytest.approx(first, abs=1e-5)


def test_fp16_stops_after_a_streak_of_overflows_or_at_the_smallest_scale(watched):
    folder, codes = watched
    assert [ours[len(GUARDED) :] for ours in codes] == [[5, 5, 0]] * 2
    (streak,) = events(folder / "streak", "overflow streak")
    (floor,) = events(folder / "floor", "overflow at the smallest loss scale")
    assert (streak["step"], floor["step"]) == (BAD_STEP + 1, BAD_STEP + 1)
    assert [row["skipped_steps"] for row in rows(folder / "once")] == [0, 0, 0, 1, 1, 1]
    assert "overflow streak at step 5" in ended(folder / "streak")["reason"]
