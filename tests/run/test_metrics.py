import itertools
import json
import math
import re
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megaft.base.errors import ConfigError, LostPeerError
from megaft.base.files import to_json, write_json_atomic
from megaft.config.train import MetricsConfig
from megaft.run import metrics as metrics_module
from megaft.run.metrics import Metrics, MetricsFile, PendingRows
from megaft.run.terminal import Terminal
from megaft.run.throughput import Meter
from megaft.run.trackers import Trackers, check_trackers, flat_numbers, open_trackers

CPU = torch.device("cpu")
METER = Meter(device=CPU, num_devices=1, flops_per_token=6e6, peak_flops=1e15, peak_source="")


def rows_of(path):
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def open_metrics(run_dir, *, first_step=0, is_main=True, meter=METER, **config):
    config = MetricsConfig(**config)
    return Metrics(
        run_dir, config, first_step=first_step, max_steps=9, is_main=is_main, meter=meter, settings={"seed": 1}
    )


def report(metrics, step, loss=2.5):
    return metrics.step(
        step, loss=torch.tensor(loss), grad_norm=None, learning_rate=1e-4, tokens_seen=90 * step, tokens=100
    )


def test_json_keeps_every_digit_and_stays_json(tmp_path):
    row = {"a": 0.1 + 0.2, "b": [math.nan, math.inf], "c": {"d": -math.inf}, "e": None, "path": Path("x/y")}
    write_json_atomic(tmp_path / "a.json", row)
    back = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert back == {"a": 0.1 + 0.2, "b": ["nan", "inf"], "c": {"d": "-inf"}, "e": None, "path": "x/y"}
    assert float(back["c"]["d"]) == -math.inf
    with pytest.raises(TypeError):
        to_json(torch.tensor(1.0))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    write_json_atomic(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json_atomic(path, {"a": torch.tensor(1.0)})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_named_and_nothing_else_is_raised(tmp_path, monkeypatch):
    def open_full(self, mode="r", **options):
        return opened(Path("/dev/full") if mode == "a" else self, mode, **options)

    opened = Path.open
    monkeypatch.setattr(Path, "open", open_full)
    metrics = open_metrics(tmp_path)
    with pytest.raises(ConfigError, match=r"metrics\.jsonl .*: No space left"):
        report(metrics, 1)
    with pytest.raises(ConfigError, match=r"No space left"):
        metrics.close()


def test_an_unwritable_run_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file/run cannot be written"):
        open_metrics(tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("first_step", "torn", "kept"),
    [
        pytest.param(0, "", [], id="a new run keeps nothing"),
        pytest.param(2, "", [1, 2, 2], id="back to step 2, its validation kept"),
        pytest.param(3, '{"step": 4, "lo', [1, 2, 2, 3], id="half a line"),
        pytest.param(9, "\0\0\0", [1, 2, 2, 3], id="zeros after a power cut"),
        pytest.param(9, '{"step": 4}', [1, 2, 2, 3, 4], id="a whole line without its end"),
    ],
)
def test_resuming_drops_what_came_after_the_checkpoint(first_step, torn, kept, tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 1}, {"step": 2, "loss": 0.1}, {"step": 2, "validation": {"nats": 1.0}}, {"step": 3}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)
    file = MetricsFile(path, first_step)
    file.log({"step": first_step + 1})
    assert [row["step"] for row in rows_of(path)] == [*kept, first_step + 1]  # readable before it is closed
    file.close()


def test_on_cpu_a_row_is_ready_at_once():
    pending = PendingRows(CPU)
    time.sleep(0.02)
    (row,) = pending.push({"step": 1, "loss": torch.tensor(2.5), "grad_norm": None})
    assert row["seconds"] >= 0.02
    assert row == {"step": 1, "loss": 2.5, "grad_norm": None, "seconds": row["seconds"]}
    assert pending.drain() == []


def test_on_a_gpu_a_row_is_one_step_late(monkeypatch):
    clock = itertools.count()

    class CountingMark(metrics_module.DeviceTimestamp):
        def __init__(self, device):
            self.time = next(clock)

        def seconds_since(self, earlier):
            return self.time - earlier.time

    monkeypatch.setattr(metrics_module, "DeviceTimestamp", CountingMark)
    pending = PendingRows(torch.device("cuda"))
    loss = torch.tensor(1.0)
    assert pending.push({"step": 1, "loss": loss}) == []
    loss.fill_(2.0)  # an accumulator used again
    assert pending.push({"step": 2, "loss": loss}) == [{"step": 1, "loss": 1.0, "seconds": 1}]
    assert pending.drain() == [{"step": 2, "loss": 2.0, "seconds": 1}]
    next(clock)  # time spent validating
    pending.start_clock()
    assert pending.push({"step": 3, "loss": loss}) == []
    assert pending.drain() == [{"step": 3, "loss": 2.0, "seconds": 1}]


def test_a_run_that_fails_does_not_wait_for_a_device_that_waits_for_lost_ranks(tmp_path, monkeypatch):
    class StuckMark(metrics_module.DeviceTimestamp):
        def __init__(self, device):
            pass

        def seconds_since(self, earlier):
            pytest.fail("it would wait for ever")

    monkeypatch.setattr(metrics_module, "DeviceTimestamp", StuckMark)
    on_gpu = replace(METER, device=torch.device("cuda"))
    with suppress(LostPeerError), open_metrics(tmp_path, meter=on_gpu) as metrics:
        report(metrics, 1)
        raise LostPeerError("rank 1 lost its peers")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_pushing_does_not_wait_for_the_gpu():
    device = torch.device("cuda")
    pending = PendingRows(device)
    torch.cuda._sleep(10**6)
    pending.push({"loss": torch.ones((), device=device)})
    torch.cuda._sleep(2 * 10**9)  # about a second
    begin = time.perf_counter()
    (first,) = pending.push({"loss": torch.ones((), device=device) * 2})
    assert time.perf_counter() - begin < 0.2
    (second,) = pending.drain()
    assert (first["loss"], second["loss"]) == (1.0, 2.0)
    assert second["seconds"] > 0.3 > first["seconds"]


def test_a_run_is_written_row_by_row(tmp_path, capsys):
    begin = time.perf_counter()
    with open_metrics(tmp_path / "run") as metrics:
        with metrics.pause():
            metrics.validation(0, {"nats": 4.0})
            time.sleep(0.3)
        report(metrics, 1)
        passed = time.perf_counter() - begin
        (row,) = report(metrics, 2, loss=math.nan)
    assert math.isnan(row["loss"])
    validation, first, second = rows_of(tmp_path / "run" / "metrics.jsonl")
    assert validation == {"step": 0, "validation": {"nats": 4.0}}
    assert first["seconds"] <= passed - 0.3  # the pause is not in it
    assert first["tokens_per_second"] == pytest.approx(100 / first["seconds"])
    assert first["mfu"] == pytest.approx(6e6 * 100 / first["seconds"] / 1e15)
    assert second["loss"] == "nan"
    assert second["tokens_seen"] == 180
    assert set(first) == {
        *("step", "loss", "tokens_seen", "learning_rate", "grad_norm", "seconds", "peak_memory_bytes"),
        *("tokens_per_second", "tokens_per_second_per_device", "mfu", "skipped_steps"),
    }


def test_readme_lists_the_fields_of_a_row(tmp_path):
    with open_metrics(tmp_path) as metrics:
        metrics.step(1, loss=2.5, grad_norm=None, learning_rate=1e-4, tokens_seen=9, tokens=9, loss_scale=1.0)
    (row,) = rows_of(tmp_path / "metrics.jsonl")
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (line,) = (line for line in readme.splitlines() if line.startswith("| `metrics.jsonl`"))
    assert set(re.findall(r"[a-z_]+", ",".join(re.findall(r"`([^`]+)`", line)[1:]))) == row.keys()


def test_going_back_to_a_checkpoint_takes_later_rows_away(tmp_path, capsys):
    with open_metrics(tmp_path) as metrics:
        for step in (1, 2, 3):
            report(metrics, step)
        metrics.rewind(1)
        report(metrics, 2, loss=7.0)
    assert [(row["step"], row["loss"]) for row in rows_of(tmp_path / "metrics.jsonl")] == [(1, 2.5), (2, 7.0)]


def test_other_ranks_write_nothing(tmp_path, capsys):
    with open_metrics(tmp_path / "run", is_main=False, tensorboard=True) as metrics:
        assert report(metrics, 1)[0]["loss"] == 2.5
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_what_was_reported_survives_a_crash_of_the_loop(tmp_path):
    with suppress(ZeroDivisionError), open_metrics(tmp_path) as metrics:
        report(metrics, 1)
        raise ZeroDivisionError
    assert [row["step"] for row in rows_of(tmp_path / "metrics.jsonl")] == [1]


@pytest.mark.parametrize("line", ['{"loss": 1.0}', '{"step": "1"}', '{"step": null}', '{"step": 1, "lo'])
def test_a_line_that_is_no_row_is_dropped_on_resuming(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n' + line + "\n")
    MetricsFile(tmp_path / "metrics.jsonl", first_step=1).close()
    assert rows_of(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.5}]


STEP = {"loss": 2.5, "learning_rate": 1e-4, "tokens_per_second": 12345.6, "mfu": None}


def test_a_log_shows_first_last_validations_and_little_else(capsys):
    terminal = Terminal(first_step=0, max_steps=100)
    for step in range(1, 101):
        terminal.log({"step": step, **STEP})
    terminal.log({"step": 100, "validation": {"perplexity": 12.3456789, "name": "x"}})
    first, last, validation = capsys.readouterr().err.splitlines()
    assert first.startswith("step 1/100  loss 2.5000  lr 1.00e-04  12,346 tok/s  ETA")
    assert last.startswith("step 100/100  ")
    assert validation == "step 100/100  validation: perplexity 12.3457"


def test_a_terminal_shows_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    terminal = Terminal(first_step=2, max_steps=4)
    terminal.log({"step": 3, **STEP})
    terminal.log({"step": 3, "validation": {"nats": 1.5}})
    terminal.close()
    shown = capsys.readouterr().err
    assert "3/4" in shown
    assert "validation: nats 1.5" in shown


def test_numbers_of_nested_rows():
    row = {"step": 3, "mfu": None, "validation": {"nats": 2.0, "name": "x", "by": {"a": 1}}}
    assert flat_numbers(row) == {"step": 3, "validation/nats": 2.0, "validation/by/a": 1}


class Broken:
    def log(self, step: int, numbers: dict[str, float]) -> None:
        raise OSError("network is gone")

    def close(self, failed: bool) -> None:
        pytest.fail("it was switched off")


class Unopened(Broken):
    def __init__(self) -> None:
        raise KeyError("login")


def test_a_tracker_that_fails_is_switched_off(capsys):
    trackers, seen = Trackers(), []

    class Good(Broken):
        def log(self, step, numbers):
            seen.append((step, numbers))

        def close(self, failed):
            seen.append(failed)

    trackers.open("broken", Broken)
    trackers.open("worse", Unopened)
    trackers.open("good", Good)
    for step in (1, 2):
        trackers.log({"step": step, "loss": 0.5})
    trackers.close(failed=True)
    assert seen == [(1, {"loss": 0.5}), (2, {"loss": 0.5}), True]
    first, second = capsys.readouterr().err.splitlines()
    assert "worse failed" in first
    assert "broken failed" in second
    assert "OSError: network is gone" in second


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_missing_package_is_found_at_the_start(name, monkeypatch, tmp_path):
    (tmp_path / name).mkdir()  # wandb leaves a folder of its name, which is no package
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, name, raising=False)
    sys.path_importer_cache.clear()
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if "editable" not in repr(finder)])
    with pytest.raises(ConfigError, match=rf"--metrics\.{name} is .*pip install {name}"):
        check_trackers(MetricsConfig(wandb=name == "wandb", tensorboard=name == "tensorboard"))


def test_tensorboard_after_going_back_to_a_checkpoint(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first_step, loss in ((0, 1.0), (2, 3.0)):
        trackers = open_trackers(MetricsConfig(tensorboard=True), tmp_path, {}, first_step)
        for step in range(first_step + 1, first_step + 4):
            trackers.log({"step": step, "loss": loss, "validation": {"nats": 0.5}})
        trackers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "validation/nats"}
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        *((1, 1.0), (2, 1.0)),
        *((3, 3.0), (4, 3.0), (5, 3.0)),
    ]


@pytest.mark.slow
def test_wandb_offline_goes_on_under_the_same_id_and_writes_no_secret(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB__SERVICE_WAIT", "300")  # seconds for the service to start
    monkeypatch.setenv("WANDB_API_KEY", "CANARY" + "0" * 34)
    ids = []
    for first_step in (0, 2, 0):
        trackers = open_trackers(MetricsConfig(wandb=True), tmp_path, {"seed": 1}, first_step)
        trackers.log({"step": first_step + 1, "loss": 0.123456789})
        trackers.close()
        ids.append((tmp_path / "wandb_id").read_text())
    assert ids[0] == ids[1] != ids[2]
    wandb.teardown()  # its service may still be writing what a finished run logged
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if b"CANARY" in path.read_bytes()]
    runs = [path for path in files if path.suffix == ".wandb"]
    assert sorted(path.stem for path in runs) == sorted(f"run-{name}" for name in ids)
    assert all(b"0.123456789" in path.read_bytes() for path in runs)
