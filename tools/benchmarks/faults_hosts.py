"""Two hosts on one machine: network namespaces joined by a virtual cable. Needs root and iproute2."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

CLONE_NEWNET, CLONE_NEWUTS, CLONE_NEWNS = 0x40000000, 0x04000000, 0x00020000
MS_BIND, MS_REC, MS_SLAVE = 0x1000, 0x4000, 0x80000
PREFIX = "megaft-"
"""Prefix of the namespaces' names; the pid of the process that made them follows."""
CABLE, DEAD_END = "eth0", "eth1"
"""The interface that reaches the other host, and one that reaches nothing."""
ENTER = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'


@dataclass(frozen=True, slots=True)
class Host:
    """A host name, a network stack and an /etc/hosts, on the file system that all share."""

    name: str
    address: str
    """On the cable."""
    dead_end_address: str
    """Address of the interface that reaches nothing."""
    namespace: str
    hosts_file: Path
    """File that processes on this host see as /etc/hosts."""

    def command(self, *words: str | Path) -> list[str]:
        """Return the command that runs `words` on this host."""
        enter = ["nsenter", f"--net=/run/netns/{self.namespace}", "unshare", "--uts", "--mount", "--propagation=slave"]
        return [*enter, "sh", "-c", ENTER, self.name, str(self.hosts_file), *map(str, words)]

    def enter(self) -> None:
        """Move this process to this host."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/run/netns/{self.namespace}") as namespace:
            _check(libc.setns(namespace.fileno(), CLONE_NEWNET))
        _check(libc.unshare(CLONE_NEWUTS | CLONE_NEWNS))
        _check(libc.mount(None, b"/", None, MS_SLAVE | MS_REC, None))
        _check(libc.mount(os.fsencode(self.hosts_file), b"/etc/hosts", None, MS_BIND, None))
        socket.sethostname(self.name)

    def cut(self) -> None:
        """Take the link down: packets are lost without notice to any connection."""
        _ip("-n", self.namespace, "link", "set", CABLE, "down")

    def heal(self) -> None:
        """Restore the link."""
        _ip("-n", self.namespace, "link", "set", CABLE, "up")

    def end_processes(self) -> None:
        """Kill the processes that run on this host."""
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def pids(self) -> list[int]:
        """Return the processes that run on this host."""
        return [*map(int, _ip("netns", "pids", self.namespace).split())]


def why_not() -> str | None:
    """Return the reason why this machine cannot have such hosts."""
    if not all(map(shutil.which, ("ip", "nsenter", "unshare"))):
        return "iproute2 or util-linux is not installed"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"{PREFIX}{os.getpid()}-trial"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if tried.returncode:
        return f"this machine allows no network namespaces: {tried.stderr.strip()}"
    _ip("netns", "del", name)
    return None


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Create node1 and node2, joined by a virtual cable; afterwards all their processes are killed.

    Args:
        folder: Folder for their /etc/hosts files.
    """
    _remove_left_behind()
    first, second = hosts = tuple(
        Host(
            f"node{number}",
            f"10.77.0.{number}",
            f"10.78.{number}.1",
            f"{PREFIX}{os.getpid()}-{folder.name}-{number}",
            folder / f"node{number}.hosts",
        )
        for number in (1, 2)
    )
    try:
        for host in hosts:
            _ip("netns", "add", host.namespace)
            host.hosts_file.write_text(hosts_text(hosts))
            _ip("-n", host.namespace, "link", "add", DEAD_END, "type", "veth", "peer", "name", "nowhere")
        peer = ("peer", "name", CABLE, "netns", second.namespace)
        _ip("link", "add", CABLE, "netns", first.namespace, "type", "veth", *peer)
        for host in hosts:
            _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", CABLE)
            _ip("-n", host.namespace, "address", "add", f"{host.dead_end_address}/24", "dev", DEAD_END)
            for interface in ("lo", CABLE, DEAD_END, "nowhere"):
                _ip("-n", host.namespace, "link", "set", interface, "up")
        yield first, second
    finally:
        for host in hosts:
            with suppress(subprocess.CalledProcessError):  # it was not created
                host.end_processes()
                _ip("netns", "del", host.namespace)


def hosts_text(hosts: tuple[Host, ...]) -> str:
    """Return an /etc/hosts with all addresses."""
    return "127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in hosts)


def _remove_left_behind() -> None:
    """Delete namespaces left behind by killed processes."""
    for path in Path("/run/netns").glob(f"{PREFIX}*"):
        if not Path(f"/proc/{path.name.removeprefix(PREFIX).partition('-')[0]}").exists():
            subprocess.run(["ip", "netns", "del", path.name], capture_output=True)


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def _check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
