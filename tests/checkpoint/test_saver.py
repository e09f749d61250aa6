"""Checkpoint publishing: files on disk at every moment, retention, and disk errors."""

import errno
import os
import re
import shutil
import signal
import subprocess
from itertools import count

import pytest
import torch
from plain_engine import IDENTITY, PlainEngine, save, save_killed
from safetensors.torch import load_file

from megaft.base import parallel
from megaft.base.errors import CheckpointError
from megaft.base.files import sha256_of
from megaft.checkpoint import saver
from megaft.checkpoint.resume import find, load
from megaft.checkpoint.run_state import RunState
from megaft.config.train import CheckpointConfig
from megaft.weights import manifest as manifest_module
from megaft.weights.manifest import folder_of, manifest_text, read_manifest, saved_steps, verify
from megaft.weights.tensor_file import write_shard

MODES = [pytest.param(False, id="sync"), pytest.param(True, id="async")]


def fill_of(folder):
    engine = PlainEngine(fill=-1.0)
    load(engine, folder, IDENTITY)
    return engine.fill


def names(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


# One file


@pytest.mark.parametrize("lengths", [[], [1], [3, 0, 5], [1 << 20, 7]])
def test_a_shard_is_what_safetensors_reads(tmp_path, lengths):
    tensors = {f"weight/a.{i}@{i}": torch.randn(numel) for i, numel in enumerate(lengths)}
    path = tmp_path / "shard"
    num_bytes, digest = write_shard(path, list(tensors.items()))
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert (num_bytes, digest.hex()) == (path.stat().st_size, sha256_of(path))
    with pytest.raises(FileExistsError):
        write_shard(path, [])
    assert path.stat().st_size == num_bytes


# A whole checkpoint


@pytest.mark.parametrize("is_background", MODES)
def test_a_saved_state_is_found_and_loaded(tmp_path, is_background):
    state = RunState(7, 1, 900, 28, ((3, 5),), 7, 2.5, 0, {"rewinds": 1})
    engine = PlainEngine(fill=0.5)
    mine = saver.Saver(tmp_path, IDENTITY, CheckpointConfig(in_background=is_background))
    mine.save(engine, state)
    assert mine.is_pending == is_background
    if not is_background:
        assert mine.is_written
    with torch.no_grad():
        engine.module.weight.fill_(9.0)  # training goes on
    mine.publish()
    assert (mine.is_pending, mine.is_written) == (False, True)
    assert (mine.written_bytes, mine.blocking_seconds > 0) == (4 * 3 * 42, True)
    found = find(tmp_path)
    assert (found.folder, found.damaged) == (folder_of(tmp_path, 7), ())
    fresh = PlainEngine()
    assert load(fresh, found.folder, IDENTITY) == state
    assert (fresh.fill, fresh.global_steps, fresh.skipped_steps) == (0.5, 7, 1)
    assert [s["step"].item() for s in fresh.optimizer.state.values()] == [6.0, 6.0]
    manifest = verify(found.folder)
    assert (manifest["world_size"], manifest["zero_stage"]) == (1, 0)
    assert manifest["versions"].keys() == {"megaft", "torch", "deepspeed"}
    assert names(tmp_path) == ["latest", "step-00000007"]


@pytest.mark.parametrize("change", [{"left_out": None}, {"left_out": [3]}, {"unknown": 1}])
def test_a_state_that_megaft_did_not_write_is_refused(tmp_path, change):
    save(tmp_path, 7, 0.5).publish()
    path = folder_of(tmp_path, 7) / "manifest.json"
    manifest = read_manifest(path.parent)
    manifest["state"] |= change
    path.write_text(manifest_text(manifest))
    with pytest.raises(CheckpointError, match=r"step-00000007/manifest\.json has an invalid state"):
        load(PlainEngine(), path.parent, IDENTITY)


def test_in_the_background_the_same_bytes_are_written(tmp_path):
    for name, is_background in (("sync", False), ("async", True)):
        save(tmp_path / name, 3, 0.25, in_background=is_background).publish()
    one, other = (folder_of(tmp_path / name, 3) for name in ("sync", "async"))
    for file in one.iterdir():
        assert file.read_bytes() == (other / file.name).read_bytes()


@pytest.mark.parametrize("is_background", MODES)
@pytest.mark.parametrize(("num_bytes", "num_files"), [(4 * 126, 1), (4 * 63, 2), (4 * 20, 4), (1, 4)])
def test_a_large_part_is_cut_into_files(tmp_path, monkeypatch, num_bytes, num_files, is_background):
    monkeypatch.setattr(saver, "MIN_FILE_BYTES", num_bytes)
    save(tmp_path, 3, 0.25, in_background=is_background).publish()
    files = verify(folder_of(tmp_path, 3))["files"]
    assert list(files)[:2] == ["rank-00000.safetensors", "rank-00000-1.safetensors"][:num_files]
    assert len(files) == num_files
    assert len(list(folder_of(tmp_path, 3).iterdir())) == num_files + 1
    assert fill_of(folder_of(tmp_path, 3)) == 0.25


def test_without_memory_for_a_copy_training_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(saver, "available_memory", lambda: 10)
    mine = save(tmp_path, 1, 0.5, in_background=True)
    assert (mine.is_pending, mine.is_written) == (True, True)
    mine.publish()
    assert fill_of(find(tmp_path).folder) == 0.5


def test_a_save_publishes_the_one_before(tmp_path):
    mine = save(tmp_path, 1, 0.5, in_background=True)
    assert saved_steps(tmp_path) == []
    assert "step 1\n" in (tmp_path / "checkpoints" / "SAVING").read_text()
    mine.save(PlainEngine(0.75), RunState(step=2))
    assert saved_steps(tmp_path) == [1]
    mine.publish()
    mine.publish()
    assert [fill_of(folder_of(tmp_path, step)) for step in saved_steps(tmp_path)] == [0.5, 0.75]


# Killed at every boundary


@pytest.mark.slow
@pytest.mark.parametrize("is_background", MODES)
@pytest.mark.parametrize("step", [pytest.param(2, id="a new step"), pytest.param(1, id="the same step again")])
def test_a_killed_save_leaves_the_old_or_the_new(memory_folder, step, is_background):
    folder = memory_folder / f"{step}-{is_background}"
    settings = {"keep_last": 1, "in_background": is_background}
    save(folder / "before", 1, 0.5).publish()
    outcomes = []
    for at in count(1):
        run_dir = folder / str(at)
        shutil.copytree(folder / "before", run_dir)
        exit_code = save_killed(run_dir, step, 0.75, at, settings)
        found = find(run_dir).folder
        assert (manifest_module.newest_manifest(run_dir) or {})["state"]["step"] == manifest_module.step_of(found)
        outcomes.append(fill_of(found))
        assert manifest_module.step_of(found) == (step if outcomes[-1] == 0.75 else 1)
        save(run_dir, 3, 1.0, keep_last=1)  # the run goes on
        assert (names(run_dir), fill_of(find(run_dir).folder)) == (["latest", "step-00000003"], 1.0)
        if exit_code == 0:
            break
        assert exit_code == -signal.SIGKILL
    assert len(outcomes) > 20
    assert outcomes == sorted(outcomes)  # first the old one, then the new one
    assert {*outcomes} == {0.5, 0.75}


# Keeping


@pytest.mark.parametrize(
    ("settings", "best", "kept"),
    [
        ({"keep_last": 1}, None, [5]),
        ({"keep_last": 2}, None, [4, 5]),
        ({"keep_last": 9}, None, [0, 1, 2, 3, 4, 5]),
        ({"keep_last": 1}, 2, [2, 5]),
        ({"keep_last": 2}, 4, [4, 5]),
        ({"keep_last": 2}, 1, [1, 4, 5]),
        ({"keep_last": 1, "keep_every": 2}, None, [0, 2, 4, 5]),
        ({"keep_last": 1, "keep_every": 3}, 1, [0, 1, 3, 5]),
    ],
)
def test_old_checkpoints_go_but_never_the_best(tmp_path, settings, best, kept):
    mine = saver.Saver(tmp_path, IDENTITY, CheckpointConfig(**settings))
    for step in range(6):
        mine.save(PlainEngine(step), RunState(step=step, best_step=best if best is not None and best <= step else None))
    assert saved_steps(tmp_path) == kept
    assert names(tmp_path) == ["latest", *(f"step-{step:08d}" for step in kept)]
    assert [fill_of(folder_of(tmp_path, step)) for step in kept] == kept


def test_a_run_that_went_back_forgets_what_came_after_and_keeps_what_it_has(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, step, keep_last=3)
    (folder_of(tmp_path, 3) / "manifest.json").unlink()
    assert find(tmp_path).folder == folder_of(tmp_path, 2)
    save(tmp_path, 2, 0.5, keep_last=1)
    assert saved_steps(tmp_path) == [2]
    assert fill_of(folder_of(tmp_path, 2)) == 0.5


# The disk refuses


def test_too_little_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    save(tmp_path, 1, 0.5)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"step-00000002.tmp .* needs .*1,000"):
        save(tmp_path, 2, 0.75)
    assert names(tmp_path) == ["latest", "step-00000001"]
    assert fill_of(find(tmp_path).folder) == 0.5


@pytest.mark.parametrize("is_background", MODES)
@pytest.mark.parametrize("number", range(1, 7))
def test_an_input_output_error_leaves_the_last_checkpoint(tmp_path, monkeypatch, number, is_background):
    save(tmp_path, 1, 0.5)
    really_fsync, calls = os.fsync, count(1)

    def fsync(descriptor):
        if next(calls) == number:
            raise OSError(errno.EIO, "Input/output error")
        really_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CheckpointError, match=r"step-00000002.*: Input/output error"):
        save(tmp_path, 2, 0.75, keep_last=1, in_background=is_background).publish()
    assert 1 in saved_steps(tmp_path)
    assert not [name for name in names(tmp_path) if name.startswith(("SAVING", "step-00000002.tmp"))]
    assert fill_of(find(tmp_path).folder) == (0.75 if 2 in saved_steps(tmp_path) else 0.5)
    save(tmp_path, 3, 1.0)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB; it can be filled, and made read-only."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root or user namespaces")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("is_background", MODES)
def test_a_full_disk_leaves_the_last_checkpoint(small_disk, monkeypatch, is_background):
    settings = CheckpointConfig(in_background=is_background)
    mine = saver.Saver(small_disk, IDENTITY, settings)
    mine.save(PlainEngine(0.5), RunState(step=1))
    mine.publish()
    usage = shutil.disk_usage(small_disk)._replace(free=1 << 40)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)  # another job takes the room after we looked
    with pytest.raises(CheckpointError, match=r"rank-00000.safetensors .*: No space left"):
        (mine.save(PlainEngine(0.75, width=600), RunState(step=2)), mine.publish())
    assert names(small_disk) == ["latest", "step-00000001"]
    assert fill_of(find(small_disk).folder) == 0.5
    mine.save(PlainEngine(0.75), RunState(step=2))
    mine.publish()
    assert fill_of(find(small_disk).folder) == 0.75


def test_a_read_only_disk_is_named(small_disk):
    save(small_disk, 1, 0.5)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(small_disk)], check=True)
    with pytest.raises(CheckpointError, match=r"step-00000002.tmp .*: Read-only file system"):
        save(small_disk, 2, 0.75)
    assert fill_of(find(small_disk).folder) == 0.5


def test_groups_that_step_otherwise_than_they_were_built_to_are_found(tmp_path):
    save(tmp_path, 1, 0.5)
    for change in ({"weight_decay": 0.0}, {"eps": 1e-3}):
        engine = PlainEngine()
        engine.optimizer.param_groups[0].update(change)
        with pytest.raises(AssertionError):
            load(engine, folder_of(tmp_path, 1), IDENTITY)


# On several ranks


def on_two_ranks(folder):
    """Return each rank's results of a good save, a save that fails on rank 1's disk, and a damaged file."""
    parallel.join(parallel.discover(os.environ))
    seen = {}
    for name, is_background in (("sync", False), ("async", True)):
        run_dir = folder / name
        save(run_dir, 1, 0.5, in_background=is_background).publish()
        really_write = saver.write_shard
        saver.write_shard = no_room if parallel.data_parallel_rank() == 1 else really_write
        try:
            save(run_dir, 2, 0.75, in_background=is_background).publish()
        except CheckpointError as error:
            seen[name] = str(error)
        saver.write_shard = really_write
        parallel.barrier()
        seen[f"{name} left"] = names(run_dir)
        parallel.barrier()
        save(run_dir, 2, 0.75, in_background=is_background).publish()
        engine = PlainEngine()
        load(engine, folder_of(run_dir, 2), IDENTITY)
        seen[f"{name} then"] = (engine.fill, find(run_dir).folder == folder_of(run_dir, 2))
        parallel.barrier()
        if parallel.is_main():
            path = folder_of(run_dir, 2) / "rank-00001.safetensors"  # the second rank hashes it
            path.write_bytes(path.read_bytes()[:-1] + b"?")
        parallel.barrier()
        seen[f"{name} found"] = find(run_dir)
    parallel.leave()
    return seen


def no_room(path, pieces):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.slow
def test_what_one_rank_cannot_write_or_read_all_ranks_know(run_ranks, tmp_path):
    main, other = run_ranks(2, on_two_ranks, tmp_path)
    for name in ("sync", "async"):
        assert re.search(r"rank-00001\.safetensors cannot be written: No space left on device", other[name])
        assert main[name] == f"rank 1: {other[name]}"
        assert main[f"{name} left"] == other[f"{name} left"] == ["latest", "step-00000001"]
        assert main[f"{name} then"] == other[f"{name} then"] == (0.75, True)
        assert main[f"{name} found"] == other[f"{name} found"]
        found = main[f"{name} found"]
        assert found.folder == folder_of(tmp_path / name, 1)
        assert "step-00000002/rank-00001.safetensors is damaged" in dict(found.damaged)["step-00000002"]
