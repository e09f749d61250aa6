"""Two hosts on one machine: network namespaces joined by a virtual cable. Needs iproute2.

An ordinary user makes them, and mounts file systems, as root of a user namespace, where the system allows one.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

CLONE_NEWNET, CLONE_NEWUSER, CLONE_NEWUTS, CLONE_NEWNS = 0x40000000, 0x10000000, 0x04000000, 0x00020000
MS_BIND, MS_REC, MS_SLAVE = 0x1000, 0x4000, 0x80000
LIBC = ctypes.CDLL(None, use_errno=True)
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
    """Path of its network namespace: a file that the process that made it has open."""
    hosts_file: Path
    """File that processes on this host see as /etc/hosts."""

    def command(self, *words: str | Path) -> list[str]:
        """Return the command that runs `words` on this host."""
        enter = ["nsenter", f"--net={self.namespace}", "unshare", "--uts", "--mount", "--propagation=slave"]
        return [*enter, "sh", "-c", ENTER, self.name, str(self.hosts_file), *map(str, words)]

    def enter(self) -> None:
        """Move this process to this host."""
        with open(self.namespace) as namespace:
            _check(LIBC.setns(namespace.fileno(), CLONE_NEWNET))
        _check(LIBC.unshare(CLONE_NEWUTS | CLONE_NEWNS))
        _check(LIBC.mount(None, b"/", None, MS_SLAVE | MS_REC, None))
        _check(LIBC.mount(os.fsencode(self.hosts_file), b"/etc/hosts", None, MS_BIND, None))
        socket.sethostname(self.name)

    def cut(self) -> None:
        """Take the link down: packets are lost without notice to any connection."""
        self.ip("link", "set", CABLE, "down")

    def heal(self) -> None:
        """Restore the link."""
        self.ip("link", "set", CABLE, "up")

    def ip(self, *words: str) -> None:
        """Run iproute2 on this host."""
        subprocess.run(["nsenter", f"--net={self.namespace}", "ip", *words], check=True, capture_output=True)

    def end_processes(self) -> None:
        """Kill the processes that run on this host."""
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def pids(self) -> list[int]:
        """Return the processes that run on this host."""
        found, own = [], os.stat(self.namespace)
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended, or belongs to another user
                if os.path.samestat((path / "ns/net").stat(), own):
                    found.append(int(path.name))
        return found


def become_root() -> None:
    """Make an ordinary user root of a new user namespace, if the system allows it.

    The caller must have a single thread; it still owns its files and can no longer become another user.
    """
    ids = (os.geteuid(), os.getegid())
    if ids[0] == 0 or not _can_become_root():
        return
    _check(LIBC.unshare(CLONE_NEWUSER | CLONE_NEWNS))
    for name, content in (("setgroups", "deny"), ("uid_map", f"0 {ids[0]} 1"), ("gid_map", f"0 {ids[1]} 1")):
        Path("/proc/self", name).write_text(content)


def _can_become_root() -> bool:
    """Return whether the new root may mount: some systems allow the namespace, and nothing in it."""
    trial = ["unshare", "--user", "--map-root-user", "--net", "--mount", "mount", "-t", "tmpfs", "none", "/tmp"]
    return bool(shutil.which(trial[0])) and subprocess.run(trial, capture_output=True).returncode == 0


def can_change_user() -> bool:
    """Return True if this process is root outside such a namespace; daemons that change users need it."""
    return os.geteuid() == 0 and Path("/proc/self/setgroups").read_text() == "allow\n"


def why_not() -> str | None:
    """Return the reason why this machine cannot have such hosts."""
    if not all(map(shutil.which, ("ip", "nsenter", "unshare"))):
        return "iproute2 or util-linux is not installed"
    try:
        os.close(_new_namespace())
    except OSError as error:
        return f"network namespaces need root or user namespaces: {error.strerror}"
    return None


def _new_namespace() -> int:
    """Return a descriptor of a new network namespace, which lives as long as it is open or a process is in it."""

    def in_a_thread() -> int:
        _check(LIBC.unshare(CLONE_NEWNET))
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(in_a_thread).result()


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Create node1 and node2, joined by a virtual cable; afterwards all their processes are killed.

    Args:
        folder: Folder for their /etc/hosts files.
    """
    with ExitStack() as stack:
        first, second = hosts = (_new_host(1, folder, stack), _new_host(2, folder, stack))
        first.ip("link", "add", CABLE, "type", "veth", "peer", "name", CABLE, "netns", second.namespace)
        for host in hosts:
            host.hosts_file.write_text(hosts_text(hosts))
            host.ip("link", "add", DEAD_END, "type", "veth", "peer", "name", "nowhere")
            host.ip("address", "add", f"{host.address}/24", "dev", CABLE)
            host.ip("address", "add", f"{host.dead_end_address}/24", "dev", DEAD_END)
            for interface in ("lo", CABLE, DEAD_END, "nowhere"):
                host.ip("link", "set", interface, "up")
        yield first, second


def _new_host(number: int, folder: Path, stack: ExitStack) -> Host:
    descriptor = _new_namespace()
    stack.callback(os.close, descriptor)
    namespace, hosts_file = f"/proc/{os.getpid()}/fd/{descriptor}", folder / f"node{number}.hosts"
    host = Host(f"node{number}", f"10.77.0.{number}", f"10.78.{number}.1", namespace, hosts_file)
    stack.callback(host.end_processes)
    return host


def hosts_text(hosts: tuple[Host, ...]) -> str:
    """Return an /etc/hosts with all addresses."""
    return "127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in hosts)


def _check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
