import fcntl
import os
import signal
import subprocess
import sys

import pytest

from megaft.base.errors import ConfigError
from megaft.base.lock import locked

HOLD = """
import sys
from pathlib import Path
from megaft.base.lock import locked
with locked(Path(sys.argv[1])):
    print("in", flush=True)
    sys.stdin.read()
"""


def hold(folder, **environment):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | environment,
    )
    assert process.stdout.readline() == b"in\n"
    return process


@pytest.mark.slow
def test_a_folder_in_use_is_refused_with_who_uses_it(tmp_path):
    run_dir = tmp_path / "run"
    process = hold(run_dir, SLURM_JOB_ID="4711")
    with pytest.raises(ConfigError) as refused, locked(run_dir):
        pass
    assert refused.value.exit_code == 2
    said = f"{run_dir} is in use by host {os.uname().nodename}, pid {process.pid}, job 4711, since 20"
    assert str(refused.value).startswith(said)
    with locked(run_dir, is_main=False), locked(tmp_path / "another"):
        pass  # a rank of the run that has it; another run
    process.communicate()
    assert list(run_dir.iterdir()) == []
    with locked(run_dir):
        pass


@pytest.mark.slow
def test_who_was_killed_holds_nothing(tmp_path):
    process = hold(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (tmp_path / "lock").exists()
    with locked(tmp_path), pytest.raises(ConfigError, match=f"pid {os.getpid()}"), locked(tmp_path):
        pass


def test_it_is_let_go_when_the_block_fails(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    with locked(tmp_path, file=tmp_path / "x.lock"), locked(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "x.lock"]


def test_a_lock_removed_while_we_waited_for_it_is_not_ours(tmp_path, monkeypatch):
    """Its holder unlinks it between our open and our lock: then we would hold what nobody else sees."""
    really_flock, others = fcntl.flock, []

    def flock(descriptor, operation):
        if not others:
            others.append((tmp_path / "lock").unlink())
        really_flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path), pytest.raises(ConfigError), locked(tmp_path):
        pass


def test_a_file_system_without_locks_is_named_once(tmp_path, monkeypatch, capsys):
    def flock(descriptor, operation):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path):
        pass
    assert capsys.readouterr().err == (
        f"warning: {tmp_path / 'lock'} cannot be locked (No locks available); start no second job on {tmp_path}.\n"
    )


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"lock .*: Not a directory"), locked(tmp_path / "file" / "run"):
        pass


def test_a_link_in_the_lock_files_place_is_not_followed(tmp_path):
    (tmp_path / "another").write_text("mine")
    (tmp_path / "lock").symlink_to(tmp_path / "another")
    with pytest.raises(ConfigError, match="lock cannot be written"), locked(tmp_path):
        pass
    assert (tmp_path / "another").read_text() == "mine"
