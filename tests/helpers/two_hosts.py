"""Two hosts for tests: the namespaces of tools/benchmarks/faults_hosts.py, with a real sshd on each."""

import os
import shutil
import signal
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import faults_hosts
import pytest
from faults_hosts import Host
from fork_server import CONTEXT

from megaft.base.topology import free_port

SECONDS = 300
"""Timeout of a command, generous for a busy machine; ranks that never meet say so before."""
WAIT = {"MEGAFT_RENDEZVOUS_SECONDS": "120"}
SSHD = "/usr/sbin/sshd"  # which must be started by its full path
SSHD_CONFIG = """\
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
PermitRootLogin yes
UsePAM no
PrintMotd no
"""
SSH = """\
#!/bin/sh
exec {ssh} -F none -i {folder}/key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR "$@"
"""
"""SSH options that leave out the user's own keys and settings."""


@dataclass(frozen=True)
class TwoHosts:
    """Two hosts, node1 and node2, and a shared folder."""

    hosts: tuple[Host, Host]
    folder: Path

    def start(self, host, *words, log, **environment):
        """Start a command on host 0 or 1, with its output in the file `log`."""
        with log.open("w") as output:
            return subprocess.Popen(
                self.hosts[host].command(*words),
                cwd=self.folder,
                env={**os.environ, "PATH": f"{self.folder}/bin:{os.environ['PATH']}", **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run_on(self, *hosts, command, **environment):
        """Run `command(host)` on hosts at the same time; return their exit codes and all output.

        What still runs after SECONDS is killed; its exit code is negative.
        """
        logs = [self.folder / f"{time.monotonic_ns()}-{host}.log" for host in hosts]
        started = [
            self.start(host, *command(host), log=log, **WAIT | environment)
            for host, log in zip(hosts, logs, strict=True)
        ]
        deadline = time.monotonic() + SECONDS
        for process in started:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        return [process.wait() for process in started], "".join(log.read_text() for log in logs)

    def ranks(self, function, *arguments, hosts=(0, 1), own=({}, {}), **environment):
        """Run a function on one rank of each of two hosts; return its results or exceptions.

        After SECONDS everything on the hosts is killed.

        Args:
            own: Variables of the first and of the second rank's environment alone.
        """
        shared = {"MASTER_ADDR": self.hosts[0].address, "MASTER_PORT": str(free_port()), **WAIT, **environment}
        with ProcessPoolExecutor(2, mp_context=CONTEXT) as pool:
            ranks = [
                pool.submit(_on_host, self.hosts[host], rank, shared | own[rank], function, arguments)
                for rank, host in enumerate(hosts)
            ]
            if wait(ranks, SECONDS).not_done:
                for host in self.hosts:
                    host.end_processes()
        return [rank.exception() or rank.result() for rank in ranks]


def _on_host(host, rank, environment, function, arguments):
    host.enter()
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE="2")
    import torch

    torch.set_num_threads(1)
    return function(*arguments)


def skip_unless_possible():
    """Skip a test if this machine cannot simulate two hosts."""
    if reason := faults_hosts.why_not():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory):
    """Two hosts for all tests of a module."""
    skip_unless_possible()
    folder = tmp_path_factory.mktemp("hosts")
    with faults_hosts.two_hosts(folder) as hosts:
        yield TwoHosts(hosts, folder)


@pytest.fixture(scope="module")
def with_ssh(two_hosts):
    """The two hosts, each with a running sshd; `ssh node2` works on both without a prompt."""
    if not (Path(SSHD).exists() and shutil.which("ssh")):
        pytest.skip("not installed: sshd and ssh (Debian: openssh-server)")
    if not faults_hosts.can_change_user():
        pytest.skip("sshd must be started by root")
    with _sshd_on(two_hosts):
        yield two_hosts


@contextmanager
def _sshd_on(two_hosts):
    folder = two_hosts.folder
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True)
    (folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=folder))
    ssh = folder / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(SSH.format(ssh=shutil.which("ssh"), folder=folder))
    ssh.chmod(0o755)
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    with ExitStack() as stack:
        for number in (0, 1):
            log = folder / f"sshd-{number}.log"
            daemon = two_hosts.start(number, SSHD, "-D", "-e", "-f", folder / "sshd_config", log=log)
            stack.callback(daemon.wait)
            stack.callback(daemon.terminate)
        yield
