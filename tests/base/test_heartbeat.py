"""A rank whose peer died ends with the code to requeue, although its main thread is in a call that never returns."""

import ctypes
import errno
import json
import os
import signal
import socket
import sys
import time
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import pytest
from fork_server import CONTEXT

from megaft.base import exit_code, heartbeat, parallel
from megaft.base.ending import Ending
from megaft.base.errors import ConfigError, DataError
from megaft.base.line_socket import MAX_LINE_BYTES, probe
from megaft.run.events import recording_errors

GRACE_SECONDS = 0.5
ENOUGH = 300
"""Seconds that end a hang, however busy the machine is."""
NEVER = 10 * ENOUGH
MISTAKE = {"exit_code": 2, "reason": "a setting is wrong."}


def blocked(topology):
    """Stay in C code, where no Python error is raised, as behind a kernel that waits for a peer."""
    ctypes.CDLL(None).sleep(NEVER)


def failing(error, culprit, topology):
    """One rank raises while the others are in C code."""
    if topology.rank == culprit:
        raise error
    blocked(topology)


def mistaken(topology):
    """Both ranks find the same mistake, the main one first."""
    time.sleep(0 if topology.is_main else GRACE_SECONDS)  # it has ended then, or is about to
    raise ConfigError("a setting is wrong.")


def main_is_last(topology):
    time.sleep(4 * GRACE_SECONDS if topology.is_main else 0)


def main_is_first(topology):
    time.sleep(0 if topology.is_main else 4 * GRACE_SECONDS)


def run(run_dir, work, topology):
    with recording_errors(run_dir, topology.is_main):
        parallel.join(topology, timedelta(seconds=ENOUGH))
        parallel.barrier()
        (run_dir / f"ready-{topology.rank}").touch()
        work(topology)
    return 0


def start(rank, world_size, port, run_dir, work, grace_seconds):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    heartbeat.GRACE_SECONDS = grace_seconds
    exit_code.SECONDS_FOR_MAIN = 2 * grace_seconds  # longer than any rank's grace
    sys.exit(parallel.exit_code_on_ranks(partial(run, run_dir, work)))


@pytest.fixture
def ranks(tmp_path):
    """ranks(3, work) starts ranks as processes, and returns them when all have met."""
    started = []

    def start_all(world_size, work, grace_seconds=GRACE_SECONDS):
        port = parallel.free_port()
        for place in ((rank, world_size) for rank in range(world_size)):
            started.append(CONTEXT.Process(target=start, args=(*place, port, tmp_path, work, grace_seconds)))
            started[-1].start()
        deadline = time.monotonic() + ENOUGH
        while len(list(tmp_path.glob("ready-*"))) < world_size:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return started

    yield start_all
    for process in started:
        process.kill()
        process.join()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [pytest.param(0, id="the main rank"), pytest.param(1, id="another rank")])
def test_a_blocked_rank_ends_with_the_code_to_requeue_when_a_peer_dies(ranks, tmp_path, victim):
    processes = ranks(3, blocked)
    os.kill(processes[victim].pid, signal.SIGKILL)
    for process in processes:
        process.join(ENOUGH)
    codes = [75, 75, 75]
    codes[victim] = -signal.SIGKILL
    assert [process.exitcode for process in processes] == codes
    ended = json.loads((tmp_path / "ended.json").read_text())
    assert ended["exit_code"] == 75
    assert f"lost its peers (rank {victim}: " in ended["reason"]
    ends = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [end["exit_code"] for end in ends] == [75]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "culprit", "ended"),
    [
        pytest.param(
            OSError(errno.EIO, "Input/output error"),
            1,
            {
                "exit_code": 75,
                "reason": "rank 0 lost its peers (rank 1: OSError: [Errno 5] Input/output error); see that rank's "
                "error, if it printed one. The same command resumes from the last checkpoint.",
            },
            id="a broken disk of another rank",
        ),
        pytest.param(
            MemoryError("no room"),
            1,
            {"exit_code": 1, "reason": "rank 1: MemoryError: no room"},
            id="a crash of another rank",
        ),
        pytest.param(
            DataError("train.bin, token 7 is 99."),
            2,
            {"exit_code": 3, "reason": "rank 2: train.bin, token 7 is 99."},
            id="bad data on another rank",
        ),
        pytest.param(
            FloatingPointError("underflow"),
            0,
            {"exit_code": 1, "reason": "FloatingPointError: underflow"},
            id="a crash of the main rank",
        ),
    ],
)
def test_blocked_ranks_end_as_the_one_that_failed(ranks, tmp_path, error, culprit, ended):
    processes = ranks(3, partial(failing, error, culprit))
    for process in processes:
        process.join(ENOUGH)
    assert [process.exitcode for process in processes] == [ended["exit_code"]] * 3
    assert json.loads((tmp_path / "ended.json").read_text()) == ended
    ends = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(end["exit_code"], end["reason"]) for end in ends] == [tuple(ended.values())]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "grace_seconds", "codes", "reason"),
    [
        pytest.param(main_is_last, GRACE_SECONDS, [0, 0], None, id="the main rank ends last"),
        pytest.param(main_is_first, GRACE_SECONDS, [0, 0], None, id="the main rank ends first"),
        # The other rank finds it when the main one may be gone, and within its grace on a busy machine too.
        pytest.param(mistaken, 4 * GRACE_SECONDS, [2, 2], MISTAKE, id="a mistake of all ranks"),
    ],
)
def test_a_rank_that_ends_by_itself_is_not_lost(ranks, tmp_path, work, grace_seconds, codes, reason):
    processes = ranks(2, work, grace_seconds)
    for process in processes:
        process.join(ENOUGH)
    assert [process.exitcode for process in processes] == codes
    path = tmp_path / "ended.json"
    assert (json.loads(path.read_text()) if path.exists() else None) == reason


class Store(dict):
    """As much of torch's store as the main rank needs."""

    set = dict.__setitem__


@pytest.fixture
def main_rank(monkeypatch):
    """The main rank of three, its port and secret, and the reasons it would have ended the process for."""
    reasons = []
    monkeypatch.setattr(heartbeat, "exit_process", lambda code, reason: reasons.append(f"{code} {reason}"))
    monkeypatch.setattr(heartbeat, "GRACE_SECONDS", 0.0)
    store = Store()
    one = heartbeat.Heartbeat(0, 3, "127.0.0.1", store, 600)
    port, secret = store[heartbeat.KEY].split()
    yield one, int(port), secret, reasons
    one.end()


def until(is_so):
    deadline = time.monotonic() + ENOUGH
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_stranger_at_the_port_is_no_peer(main_rank):
    one, port, secret, reasons = main_rank
    for hello in (b"", b"GET / HTTP/1.1\r\n\r\n", b"0" * 32 + b" 1\n", b'[1, 3, "no peer"]\n', b"x" * MAX_LINE_BYTES):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(hello)
    with socket.create_connection(("127.0.0.1", port)) as peer, socket.create_connection(("127.0.0.1", port)) as other:
        peer.sendall(f"{secret} 1\n".encode())
        other.sendall(f"{secret} ".encode())
        other.sendall(b"2\n")
        until(lambda: one.peers() == [1, 2])
        assert reasons == []
        peer.close()
        assert json.loads(other.recv(64)) == [1, 75, "its process ended"]
        until(lambda: reasons)
    assert reasons[0].startswith("75 rank 0 lost its peers (rank 1: its process ended)")


def test_a_rank_of_another_job_at_the_port_is_no_peer(main_rank):
    """Two launches on one host with the port of `deepspeed`: the second one's ranks meet the first one's store."""
    one, port, secret, reasons = main_rank
    with socket.create_connection(("127.0.0.1", port)) as peer:
        peer.sendall(f"{secret} 1\n".encode())
        until(lambda: 1 in one.peers())
        with socket.create_connection(("127.0.0.1", port)) as other:
            other.sendall(f"{secret} 1\n".encode())
            assert other.recv(64) == b""  # closed
        one.tell(Ending(0, 1, "the end"))
        assert peer.recv(64) == b'[0, 1, "the end"]\n'
        assert reasons == []


def test_a_rank_that_fails_before_its_group_is_there_tells_its_own_number(monkeypatch):
    """As one that has another rank's GPU does, found between the heartbeat and the group."""
    told = []
    monkeypatch.setattr(parallel, "_heartbeat", SimpleNamespace(tell=told.append, stand_down=lambda: None))
    with pytest.raises(ConfigError):
        parallel._run_and_leave(mistaken, parallel.Topology("torch", 1, 1, 2, "127.0.0.1", 29500))
    assert told == [Ending(1, 2, "a setting is wrong.")]


def test_the_first_failure_is_the_one_that_all_hear_of(main_rank):
    _, port, secret, reasons = main_rank
    with socket.create_connection(("127.0.0.1", port)) as peer, socket.create_connection(("127.0.0.1", port)) as other:
        other.sendall(f"{secret} 2\n".encode())
        said = Ending(1, 3, "no\nsuch \ud800 file " + "x" * 10_000)
        for part in (f"{secret} 1\n".encode(), said.to_line()[:50], said.to_line()[50:]):
            peer.sendall(part)
        until(lambda: reasons)
        other.sendall(Ending(2, 5, "not finite").to_line())
        with other.makefile("rb") as lines:
            assert Ending.from_line(lines.readline()) == said._replace(reason=said.reason[:4000])
        until(lambda: reasons[1:])
    assert {reason[:14] for reason in reasons} == {"3 rank 1: no\ns"}


def test_the_kernel_gives_up_a_silent_host():
    """The kernel does the rest; a test with a cut network needs root and two network namespaces."""
    with socket.socket() as connection:
        probe(connection, 60)
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_USER_TIMEOUT)
        assert [connection.getsockopt(socket.IPPROTO_TCP, option) for option in options] == [15, 15, 60_000]
        assert connection.gettimeout() is None


def test_others_have_been_told_when_the_process_may_end(main_rank):
    one, port, secret, reasons = main_rank
    with socket.create_connection(("127.0.0.1", port)) as peer:
        peer.sendall(f"{secret} 1\n".encode())
        until(lambda: 1 in one.peers())
        one.grace_seconds = ENOUGH
        one.tell(Ending(0, 1, "OSError"))
        assert peer.recv(64, socket.MSG_DONTWAIT) == b'[0, 1, "OSError"]\n'
        assert reasons == []
