"""Two hosts for tests: the namespaces of tools/benchmarks/faults_hosts.py, with a real sshd on each."""

import os
import shutil
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import faults_hosts
import pytest
from faults_hosts import Host
from fork_server import CONTEXT

from megaft.base.topology import free_port

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
            )

    def run_on(self, host, *words, seconds=600, **environment):
        """Run a command on host 0 or 1; return its exit code and output."""
        log = self.folder / f"{time.monotonic_ns()}.log"
        code = self.start(host, *words, log=log, **environment).wait(seconds)
        return code, log.read_text()

    def ranks(self, function, *arguments, hosts=(0, 1), own=({}, {}), **environment):
        """Run a function on one rank of each of two hosts; return its results or exceptions.

        Args:
            own: Variables of the first and of the second rank's environment alone.
        """
        shared = {"MASTER_ADDR": self.hosts[0].address, "MASTER_PORT": str(free_port()), **environment}
        with ProcessPoolExecutor(2, mp_context=CONTEXT) as pool:
            ranks = [
                pool.submit(_on_host, self.hosts[host], rank, shared | own[rank], function, arguments)
                for rank, host in enumerate(hosts)
            ]
        return [rank.exception() or rank.result() for rank in ranks]

    def run_on_both(self, command, seconds=600, **environment):
        """Run `command(host number)` on both hosts at the same time; return two exit codes and the outputs."""
        logs = [self.folder / f"{time.monotonic_ns()}-{number}.log" for number in (0, 1)]
        started = [self.start(number, *command(number), log=logs[number], **environment) for number in (0, 1)]
        deadline = time.monotonic() + seconds
        codes = [process.wait(max(0.1, deadline - time.monotonic())) for process in started]
        return codes, "".join(log.read_text() for log in logs)


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
