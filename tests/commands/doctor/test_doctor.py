"""`megaft doctor`: checks of the machine, and the distributed test of ranks."""

import json
import os
import runpy
import subprocess
import sys
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megaft.base import parallel
from megaft.base.exit_code import exit_code_of
from megaft.commands.doctor import machine, toy
from megaft.commands.doctor import ranks as doctor_ranks
from megaft.commands.doctor.command import main
from megaft.commands.doctor.floors import FLOORS
from megaft.commands.doctor.machine import Kernel, disks, requirements, variables, versions
from megaft.commands.doctor.table import Check, exit_code, show

BIN = Path(sys.executable).parent
CANARY = "canary-0123456789"


@pytest.mark.parametrize(
    ("version", "is_too_old"),
    [("2.9.1", True), ("2.10.0a0+git", True), ("2.10", False), ("2.10.0+cu130", False), ("3.0", False)],
)
def test_a_floor_is_the_first_safe_release(version, is_too_old):
    assert FLOORS[0].package == "torch"
    assert FLOORS[0].rejects(version) is is_too_old


@pytest.fixture
def installed(monkeypatch):
    """installed(torch="2.9") makes that the version found; None is not there."""

    def install(**wanted):
        def version(name):
            found = wanted.get(name.replace("-", "_"), "99")
            if found is None:
                raise metadata.PackageNotFoundError(name)
            return found

        monkeypatch.setattr("megaft.base.environment.version", version)

    return install


def test_versions_below_the_floors_fail_and_name_the_hole(installed):
    installed(torch="2.9.1", sentencepiece=None)
    checks = {check.name: check for check in versions()}
    assert {name: check.status for name, check in checks.items()} == {
        "torch": "fail",
        "transformers": "pass",
        "sentencepiece": "fail",
        "megatron-core": "pass",
    }
    assert "CVE-2026-24747" in checks["torch"].fix
    assert "pip install 'torch>=2.10'" in checks["torch"].fix
    assert exit_code(list(checks.values())) == 2


def test_requirements(installed):
    assert requirements().status == "pass"
    installed(tyro="0.9", peft=None)
    check = requirements()
    assert check.status == "fail"
    assert "tyro is 0.9, not >=1.0" in check.found
    assert "peft is not installed" in check.found


@pytest.fixture
def on_path(tmp_path, monkeypatch):
    """on_path("apex/__init__.py", text) makes a file that this process and its children import."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(name, text=""):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    return write


APEX = machine.KERNELS[0]


@pytest.mark.parametrize(
    ("files", "status", "said"),
    [
        pytest.param({}, "none", "not installed; would provide --optim.name apex-adamw", id="not there"),
        pytest.param({"apex/__init__.py": ""}, "warn", "another project called apex", id="PyPI's web toolkit"),
        pytest.param(
            {"apex/__init__.py": "", "apex/optimizers/__init__.py": "", "torch.py": ""},
            "warn",
            "does not work: ModuleNotFoundError: No module named 'amp_C'",
            id="NVIDIA's without kernels",
        ),
        pytest.param(
            {"apex/__init__.py": "", "apex/optimizers/__init__.py": "", "amp_C.py": "", "torch.py": ""},
            "pass",
            "works",
            id="NVIDIA's",
        ),
    ],
)
def test_apex(files, status, said, on_path):
    for name, text in files.items():
        on_path(name, text)
    check = APEX.check()
    assert check.status == status
    assert said in check.found


def test_a_kernel_that_crashes_on_import_does_not_end_the_doctor(on_path):
    on_path("some_kernel.py", "import os; os.abort()")
    check = Kernel("some_kernel", "some_kernel", "speed").check()
    assert check.status == "warn"
    assert "exit code -6" in check.found


def test_a_missing_kernel_is_a_warning_only_where_it_could_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert APEX.check().status == "warn"


@pytest.mark.parametrize(
    ("script", "status", "said"),
    [
        pytest.param(None, "none", "not found", id="none"),
        pytest.param("echo 'main*: 2 nodes idle'", "pass", "main*: 2 nodes idle; in job 7", id="a cluster"),
        pytest.param("echo no controller >&2; exit 1", "warn", "no cluster responds: no controller", id="clients only"),
        pytest.param("exec /bin/sleep 9", "warn", "no result after 0.5 s", id="a controller that hangs"),
    ],
)
def test_slurm(script, status, said, tmp_path, monkeypatch):
    if script:
        (tmp_path / "sinfo").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(machine, "SECONDS", 0.5)
    check = machine.slurm()
    assert check.status == status
    assert said in check.found


def test_secrets_are_masked_wherever_they_stand(monkeypatch):
    for name, value in {
        "WANDB_API_KEY": CANARY,
        "HF_TOKEN": "short",
        "WANDB_BASE_URL": f"https://me:{CANARY}@host",
        "https_proxy": "http://me:password@proxy:80",
        "NCCL_DEBUG": "INFO",
        "EDITOR": "vi",
    }.items():
        monkeypatch.setenv(name, value)
    shown = {check.name: check.found for check in variables()}
    assert shown["WANDB_API_KEY"] == shown["HF_TOKEN"] == "***"
    assert shown["WANDB_BASE_URL"] == "https://***@host"
    assert shown["https_proxy"] == "http://***@proxy:80"
    assert shown["NCCL_DEBUG"] == "INFO"
    assert "EDITOR" not in shown


def test_a_variable_that_lets_checkpoints_run_code_fails(monkeypatch):
    monkeypatch.setenv(machine.UNSAFE, "1")
    assert [check.name for check in variables() if check.status == "fail"] == [machine.UNSAFE]


def test_little_disk_is_a_warning(monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**20))
    assert {check.status for check in disks()} == {"warn"}


@pytest.mark.parametrize(
    ("checks", "code"),
    [
        pytest.param([Check("a", "pass", ""), Check("b", "warn", ""), Check("c", "none", "")], 0, id="nothing fails"),
        pytest.param([Check("a", "fail", "")], 2, id="installation"),
        pytest.param([Check("a", "fail", ""), Check("b", "fail", "", is_numeric=True)], 5, id="numbers"),
    ],
)
def test_exit_code(checks, code):
    assert exit_code(checks) == code


def test_the_table_shows_what_was_found_and_the_way_out(capsys):
    show("title", [Check("apex", "fail", "found [red]it[/red]", "Do this")], as_json=False)
    out = capsys.readouterr().out
    assert "found [red]it[/red]. Do this" in out  # brackets are no markup
    assert "0 pass, 0 warn, 1 fail" in out


def test_json_is_one_line_with_the_environment(capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    code = main(["--json"])
    out = capsys.readouterr().out
    report = json.loads(out)
    assert out.count("\n") == 1
    assert report["ok"] is (code == 0)
    assert {"torch", "requirements", "apex", "SLURM", "C++ compiler"} <= {check["name"] for check in report["checks"]}
    assert report["environment"]["packages"]["torch"]
    assert CANARY not in out


TWO_SPLITS = ((0, 4), (2, 1))


def break_data(folder, rank, patch):
    """Rank 1 trains on other samples."""
    if rank == 1:
        whole = toy.sample
        patch.setattr(toy, "sample", lambda position: whole(position + 1))
    return folder


def break_reduce(folder, rank, patch):
    """Rank 1 gets another sum."""
    reduce = doctor_ranks.dist.all_reduce

    def flipped(tensor, *args, **kwargs):
        done = reduce(tensor, *args, **kwargs)
        if tensor.numel() > 1000:
            tensor.view(-1)[7] += 1
        return done

    if rank == 1:
        patch.setattr(doctor_ranks.dist, "all_reduce", flipped)
    return folder


def part_folders(folder, rank, patch):
    """Each rank has a folder of its own."""
    patch.setattr(doctor_ranks, "SECONDS_FOR_FILES", 0)
    return folder / str(rank)


def refuse_folder(folder, rank, patch):
    """Rank 1 cannot write."""
    return Path(__file__) / "folder" if rank == 1 else folder


FAULTS = {"data": break_data, "reduce": break_reduce, "own folder": part_folders, "no folder": refuse_folder}


def prove_all(folder):
    """Run the distributed test once per fault; return the exit codes and the printed tables."""
    topology = parallel.discover(os.environ)
    proven = {name: prove(fault, folder, topology) for name, fault in FAULTS.items()}
    parallel.leave()
    return proven


def prove(fault, folder, topology):
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor_ranks, "show", lambda title, checks, as_json: found.extend(checks))
        patch.setattr(doctor_ranks, "BATCH_SPLITS", TWO_SPLITS)
        patch.setattr(doctor_ranks, "RESUMED", ())
        patch.setattr(doctor_ranks, "TIMEOUT", timedelta(minutes=10))
        folder = fault(folder, topology.rank, patch)
        code = exit_code_of(doctor_ranks.run, folder, False, topology)
    return code, [(check.name, check.status, check.found) for check in found]


@pytest.fixture(scope="module")
def proven(run_ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctor")
    return folder, run_ranks(2, prove_all, folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "code", "failing", "said"),
    [
        pytest.param("data", 5, "ZeRO 2, micro-batch 1 x 4", "off by", id="a rank trains on other samples"),
        pytest.param("reduce", 5, "all-reduce", "on rank 1", id="a rank gets another sum"),
        pytest.param("own folder", 2, "shared folder", "not shared by all ranks", id="a folder of each rank's own"),
    ],
)
def test_a_fault_on_one_of_two_ranks_is_found(fault, code, failing, said, proven):
    _, (main, other) = proven
    assert (main[fault][0], other[fault]) == (code, (code, []))
    failed = {name: found for name, status, found in main[fault][1] if status == "fail"}
    assert said in failed[failing]


@pytest.mark.slow
def test_a_rank_that_cannot_write_the_folder_ends_all_and_nothing_is_left(proven):
    folder, ranks = proven
    assert [rank["no folder"] for rank in ranks] == [(2, []), (2, [])]
    assert not list(folder.rglob("megaft-doctor-*"))


@pytest.mark.parametrize(("rank", "count"), [(0, 1), (1, 0)])
def test_the_former_spelling_works_and_the_main_rank_says_that_it_goes(rank, count, monkeypatch, capsys):
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    for name, value in ranks.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(sys, "argv", ["doctor", f"--local_rank={rank}", "--help"])
    monkeypatch.delitem(sys.modules, "megaft.doctor", raising=False)
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("megaft.doctor", run_name="__main__")
    printed = capsys.readouterr()
    assert (stop.value.code, printed.err.count("-m megaft doctor")) == (0, count)
    assert "--distributed" in printed.out


@pytest.mark.slow
def test_the_deepspeed_launcher_proves_two_ranks(tmp_path):
    port = f"--master_port={parallel.free_port()}"
    command = [BIN / "deepspeed", "--num_gpus=2", port, "--module", "megaft", "doctor", "--distributed"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for expected in ("megaft doctor: 2 ranks, cpu", "│ ZeRO 3, micro-batch 1", "│ resumed at ZeRO 3", "0 warn, 0 fail"):
        assert done.stdout.count(expected) == 1
    assert list(tmp_path.iterdir()) == []
