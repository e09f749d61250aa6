import json
import math
import shutil
from dataclasses import asdict
from hashlib import sha256
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as safetensors
from safetensors.torch import save_file

from megaft.base.errors import CheckpointError
from megaft.checkpoint import resume
from megaft.checkpoint.resume import ResumePoint, find
from megaft.checkpoint.run_state import RunState
from megaft.weights import manifest as manifest_module
from megaft.weights.checkpoint_reader import CheckpointReader
from megaft.weights.manifest import folder_of, newest_manifest, saved_steps, verify

SHAPES = {"a.weight": [3, 4], "b": [5]}


def write_checkpoint(run_dir, step=1, shards=None):
    """Write a checkpoint of two parameters in two files; `shards` maps file names to tensors."""
    folder = folder_of(run_dir, step)
    folder.mkdir(parents=True)
    shards = shards or {
        "rank-00000.safetensors": {"weight/a.weight@0": torch.arange(7.0), "weight/b@0": torch.ones(5)},
        "rank-00001.safetensors": {"weight/a.weight@7": torch.arange(7.0, 12.0)},
    }
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256((folder / name).read_bytes()).hexdigest()}
        for name in shards
    }
    manifest = {"format": manifest_module.FORMAT, "shapes": SHAPES, "files": files}
    write_manifest(folder, manifest)
    (folder.parent / "latest").write_text(f"{folder.name}\n")
    return folder


def write_manifest(folder, manifest):
    (folder / "manifest.json").write_text(manifest_module.manifest_text(manifest))


# The run's state


@pytest.mark.parametrize(
    ("best", "nats", "expected"),  # expected: best step, best nats, validations since
    [
        pytest.param((None, None, 0), 3.0, (7, 3.0, 0), id="the first is the best"),
        pytest.param((5, 3.0, 2), 2.9, (7, 2.9, 0), id="better"),
        pytest.param((5, 3.0, 2), 3.0, (5, 3.0, 3), id="as good is no improvement"),
        pytest.param((5, 3.0, 0), 3.1, (5, 3.0, 1), id="worse"),
        pytest.param((5, 3.0, 0), math.nan, (5, 3.0, 1), id="not a number"),
        pytest.param((None, None, 0), math.nan, (None, None, 1), id="not a number is never the best"),
        pytest.param((None, None, 1), math.inf, (None, None, 2), id="nor is infinity"),
    ],
)
def test_after_validation(best, nats, expected):
    state = RunState(7, 1, 900, 28, ((3, 5),), *best).after_validation(nats)
    assert (state.best_step, state.best_nats_per_token, state.validations_since_best) == expected
    assert (state.step, state.skipped_steps, state.tokens_seen) == (7, 1, 900)
    assert RunState.from_json(json.loads(json.dumps(asdict(state)))) == state


# Reading pieces


@given(data=st.data(), shape=st.lists(st.integers(1, 5), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_range_is_read_from_pieces_cut_anywhere(tmp_path_factory, data, shape):
    numel = math.prod(shape)
    whole = torch.arange(float(numel))
    cuts = sorted({0, numel, *data.draw(st.lists(st.integers(0, numel), max_size=5))})
    num_shards = data.draw(st.integers(1, 3))
    shards = {f"rank-{rank:05d}.safetensors": {"weight/other@0": torch.zeros(1)} for rank in range(num_shards)}
    for begin, end in pairwise(cuts):
        shard = data.draw(st.sampled_from(sorted(shards)))
        shards[shard][f"weight/x@{begin}"] = whole[begin:end].clone()
        shards[shard][f"exp_avg/x@{begin}"] = -whole[begin:end]
    folder = write_checkpoint(tmp_path_factory.mktemp("run"), shards=shards)
    pieces = CheckpointReader(folder, {"shapes": {"x": shape}, "files": dict.fromkeys(shards)})

    begin = data.draw(st.integers(0, numel))
    length = data.draw(st.integers(0, numel - begin))
    assert torch.equal(pieces.read("x", "weight", begin, length), whole[begin : begin + length])
    assert torch.equal(pieces.read("x", "exp_avg", begin, length), -whole[begin : begin + length])
    assert torch.equal(pieces.whole("x", "weight"), whole.view(shape))


def test_names_and_kinds_are_told_apart(tmp_path):
    tensors = {
        "weight/h.1@0": torch.full((2,), 1.0),
        "weight/h.11@0": torch.full((2,), 2.0),
        "exp_avg/h.1@0": torch.full((2,), 3.0),
        "weight/a/b@c@0": torch.full((2,), 4.0),
    }
    folder = write_checkpoint(tmp_path, shards={"rank-00000.safetensors": tensors})
    pieces = CheckpointReader(folder, verify(folder))
    read = [pieces.read(name, kind, 0, 2)[0] for name, kind in [("h.1", "weight"), ("h.11", "weight")]]
    assert [*read, pieces.read("h.1", "exp_avg", 0, 2)[0], pieces.read("a/b@c", "weight", 1, 1)[0]] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("name", "kind", "offset", "numel", "held"),
    [
        ("a.weight", "weight", 0, 13, 12),
        ("a.weight", "exp_avg", 0, 12, 0),
        ("c", "weight", 2, 3, 0),
        ("b", "weight", 4, 2, 1),
    ],
)
def test_what_is_not_there_is_named(tmp_path, name, kind, offset, numel, held):
    folder = write_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=f"{held} of {numel} elements .*{kind} of {name}"):
        CheckpointReader(folder, verify(folder)).read(name, kind, offset, numel)


# Verifying


def test_a_whole_checkpoint_holds(tmp_path):
    manifest = verify(write_checkpoint(tmp_path))
    assert sorted(manifest["files"]) == ["rank-00000.safetensors", "rank-00001.safetensors"]


def remove(path):
    path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def append(path):
    path.write_bytes(path.read_bytes() + b"\0")


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("file", ["rank-00000.safetensors", "rank-00001.safetensors"])
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (remove, "is missing"),
        (truncate, "bytes, .*manifest"),
        (append, "bytes, .*manifest"),
        (flip_a_bit, "is damaged"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, file, damage, says):
    folder = write_checkpoint(tmp_path)
    damage(folder / file)
    with pytest.raises(CheckpointError, match=rf"{file} .*{says}"):
        verify(folder)


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "sub/rank-00000.safetensors", "..", "", "a" * 256, "a\0", "a\ud800"]
)
def test_a_manifest_cannot_name_files_elsewhere(tmp_path, name):
    folder = write_checkpoint(tmp_path)
    (folder.parent / "outside").write_bytes(b"x")
    manifest = manifest_module.read_manifest(folder)
    manifest["files"][name] = {"bytes": 1, "sha256": "0"}
    write_manifest(folder, manifest)
    with pytest.raises(CheckpointError, match=r"outside the checkpoint"):
        verify(folder)
    with pytest.raises(CheckpointError, match=r"no checkpoint .*valid; .*outside"):
        resume.find(tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        pytest.param(None, "incomplete", id="none"),
        pytest.param("", "incomplete", id="empty"),
        pytest.param('{"format": 3, "files": {"rank-0', "incomplete", id="cut off"),
        pytest.param("[]", "incomplete", id="a list"),
        pytest.param("{}", "incomplete", id="no format"),
        pytest.param('{"format": 99}', "format 99; .*format 3", id="another format"),
        pytest.param('{"format": 3}', "manifest.json is damaged", id="no files"),
    ],
)
def test_a_folder_without_its_manifest_is_no_checkpoint(tmp_path, text, says):
    folder = write_checkpoint(tmp_path)
    (folder / "manifest.json").unlink()
    if text is not None:
        (folder / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=says):
        verify(folder)


@pytest.mark.parametrize(("before", "after"), [('"bytes": ', '"bytes": 1'), ("a.weight", "a.weighs"), ("5\n", "6\n")])
def test_a_changed_manifest_is_found(tmp_path, before, after):
    folder = write_checkpoint(tmp_path)
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace(before, after, 1))
    with pytest.raises(CheckpointError, match=r"manifest.json is damaged"):
        verify(folder)


def test_a_file_that_is_not_safetensors_is_named(tmp_path):
    folder = write_checkpoint(tmp_path)
    for damage in (b"pickle?", safetensors({"weight/b@x": torch.ones(1)}), None):
        (folder / "rank-00001.safetensors").unlink()
        if damage is not None:
            (folder / "rank-00001.safetensors").write_bytes(damage)
        with pytest.raises(CheckpointError, match=r"rank-00001.safetensors is not"):
            CheckpointReader(folder, manifest_module.read_manifest(folder))


def test_nothing_is_read_through_symbolic_links(tmp_path):
    folder = write_checkpoint(tmp_path / "run")
    outside = write_checkpoint(tmp_path / "outside")
    (folder / "rank-00001.safetensors").unlink()
    (folder / "rank-00001.safetensors").symlink_to(outside / "rank-00001.safetensors")
    with pytest.raises(CheckpointError, match=r"rank-00001.safetensors, .*outside"):
        verify(folder)
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").symlink_to(outside / "manifest.json")
    folder_of(tmp_path / "run", 2).symlink_to(outside)
    for linked in (folder, folder_of(tmp_path / "run", 2)):
        with pytest.raises(CheckpointError, match="symbolic link"):
            verify(linked)


@pytest.mark.parametrize("spans", [{0: 3, 1: 2}, {0: 2, 3: 3}, {1: 5}])
def test_five_elements_that_are_not_each_of_the_five_are_no_parameter(tmp_path, spans):
    tensors = {f"weight/b@{begin}": torch.ones(numel) for begin, numel in spans.items()}
    folder = write_checkpoint(tmp_path, shards={"rank-00000.safetensors": tensors})
    with pytest.raises(CheckpointError, match=r"of 5 elements .*weight of b"):
        CheckpointReader(folder, verify(folder)).read("b", "weight", 0, 5)


# Finding


def test_a_new_run_has_no_checkpoint(tmp_path):
    assert find(tmp_path) == ResumePoint(None, ())
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-00000003.tmp").mkdir()  # a save that was cut off
    (tmp_path / "checkpoints" / "step-00000001.old").mkdir()
    assert find(tmp_path) == ResumePoint(None, ())
    assert (saved_steps(tmp_path), newest_manifest(tmp_path)) == ([], None)


def test_the_newest_that_holds_is_found(tmp_path, capsys):
    for step in (2, 9, 10):
        write_checkpoint(tmp_path, step)
    assert find(tmp_path) == ResumePoint(folder_of(tmp_path, 10), ())
    assert capsys.readouterr().out == ""
    flip_a_bit(folder_of(tmp_path, 10) / "rank-00001.safetensors")
    (folder_of(tmp_path, 9) / "manifest.json").unlink()
    found = find(tmp_path)
    assert found.folder == folder_of(tmp_path, 2)
    assert [name for name, _ in found.damaged] == ["step-00000010", "step-00000009", "latest"]
    for (name, reason), line in zip(found.damaged, capsys.readouterr().out.splitlines(), strict=True):
        assert line.startswith("warning: ")
        assert name in line
        assert line.endswith(reason)
    reasons = dict(found.damaged)
    assert "rank-00001.safetensors is damaged" in reasons["step-00000010"]
    assert "it names 'step-00000010'; using step-00000002 (found: step-00000002, step-0" in reasons["latest"]


@pytest.mark.parametrize(
    ("pointer", "says"),
    [
        pytest.param(None, "it is missing", id="none"),
        pytest.param("", "it names ''", id="empty"),
        pytest.param("step-00000009\n", "it names 'step-00000009'", id="naming nothing"),
        pytest.param("step-00000001\n", "it names 'step-00000001'", id="an older one"),
        pytest.param("../../other/checkpoints/step-00000001", "it names '../../other", id="outside"),
    ],
)
def test_the_pointer_is_only_a_hint(tmp_path, pointer, says):
    for step in (1, 2):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoints" / "latest").unlink()
    if pointer is not None:
        (tmp_path / "checkpoints" / "latest").write_text(pointer)
    found = find(tmp_path)
    assert found.folder == folder_of(tmp_path, 2)
    assert found.damaged[0][1].startswith(says)
    assert found.damaged[0][1].endswith("; using step-00000002 (found: step-00000001, step-00000002).")


def test_when_none_holds_nothing_is_trained_from_scratch(tmp_path):
    for step in (1, 2):
        remove(write_checkpoint(tmp_path, step) / "rank-00000.safetensors")
    with pytest.raises(CheckpointError, match=r"no checkpoint .*valid; .*--run.fresh"):
        find(tmp_path)
    for step in (1, 2):
        shutil.rmtree(folder_of(tmp_path, step))
    with pytest.raises(CheckpointError, match=r"no checkpoint .*valid; .*--run.fresh"):  # latest names one
        find(tmp_path)


def test_one_about_to_be_replaced_counts_until_it_is(tmp_path):
    write_checkpoint(tmp_path, 1)
    second = write_checkpoint(tmp_path, 2)
    aside = second.rename(second.with_name("step-00000002.replaced-17"))
    assert find(tmp_path).folder == aside
    assert write_checkpoint(tmp_path, 2) == find(tmp_path).folder


def test_a_glance_at_the_newest_reads_no_more_than_a_manifest(tmp_path):
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step)
    (folder_of(tmp_path, 3) / "manifest.json").write_text("{")
    for path in folder_of(tmp_path, 2).glob("rank-*"):
        path.unlink()
    assert (newest_manifest(tmp_path) or {}) == manifest_module.read_manifest(folder_of(tmp_path, 2))


def test_starting_over_forgets_all(tmp_path):
    resume.remove_all(tmp_path)
    write_checkpoint(tmp_path)
    (tmp_path / "checkpoints").rename(tmp_path / "checkpoints.old")  # it was killed here
    write_checkpoint(tmp_path)
    resume.remove_all(tmp_path)
    assert list(tmp_path.iterdir()) == []
