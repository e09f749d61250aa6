"""Heartbeat between ranks: ends a process whose peer died, although its main thread waits inside a device call.

A rank that waits for the GPU behind a collective cannot be told by that collective that a peer is gone: NCCL's
watchdog aborts the process in the end, with no reason written. So every rank keeps a TCP connection to the main rank
that carries nothing. The kernel closes it when a process dies, however it dies, and its keepalive probes notice a host
or a network that is gone. The probes are answered by the peer's kernel: a rank that compiles, validates, holds
Python's lock or hangs is alive here, and a hang is found by the timeout of the hosts' collectives.

A daemon thread reads the connections. It runs while the main thread is inside a call that lets go of Python's lock, as
torch's do; a C extension that keeps it delays this rank's own end.
"""

from __future__ import annotations

import os
import secrets
import selectors
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from megaft.errors import UserError
from megaft.exit_code import REQUEUE

SILENT_SECONDS = 60.0
"""Seconds without an answer to probes after which a host is lost, unless the run's timeout is shorter."""
GRACE_SECONDS = 10.0
"""Seconds after a loss in which the main thread may still end by itself, by an error or by finishing."""

KEY = "megaft/heartbeat"
DONE = b"done\n"
LENGTH_OF_HELLO = 40  # a secret of 32 characters, and the rank

_at_loss: list[Callable[[str], None]] = []


@contextmanager
def at_loss(record: Callable[[str], None]) -> Iterator[None]:
    """Call `record` with the reason before this process is ended inside the block because a peer was lost."""
    _at_loss.append(record)
    try:
        yield
    finally:
        _at_loss.remove(record)


class Heartbeat:
    """This rank's connection to the main rank, or the main rank's to all others, and the thread that reads them."""

    def __init__(self, rank: int, world_size: int, host: str, store: Any, timeout_seconds: float) -> None:
        """Connect the ranks, all of which call this; `store` is torch's, and tells the main rank's port."""
        self._rank, self._world_size = rank, world_size
        self._silent_seconds = min(SILENT_SECONDS, timeout_seconds)
        # The main rank ends first where it lives: it writes the reason, and the launcher may end the rest.
        self._grace_seconds = min(GRACE_SECONDS, timeout_seconds) * (1.0 if rank == 0 else 1.5)
        self._is_over = threading.Event()
        self._peers: dict[socket.socket, int | None] = {}  # None: has not said which rank it is
        self._wake, self._woken = socket.socketpair()
        watch = self._listen(store) if rank == 0 else self._connect(host, store)
        self._thread = threading.Thread(target=watch, name="heartbeat", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Announce that this rank is done, so that the others do not take it for lost."""
        self._is_over.set()
        with suppress(OSError):  # the thread has ended before
            self._wake.send(DONE)
        self._thread.join(self._grace_seconds)

    def stand_down(self) -> None:
        """Leave the exit to the main thread, which has an error to report; the others notice when it has ended."""
        self._is_over.set()

    def _listen(self, store: Any) -> Callable[[], None]:
        is_dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if is_dual else socket.AF_INET
        server = socket.create_server(("", 0), family=family, backlog=self._world_size, dualstack_ipv6=is_dual)
        self._secret = secrets.token_hex(16).encode()
        store.set(KEY, f"{server.getsockname()[1]} {self._secret.decode()}")
        return lambda: self._watch_all(server)

    def _connect(self, host: str, store: Any) -> Callable[[], None]:
        port, secret = store.get(KEY).decode().split()
        try:
            connection = socket.create_connection((host, int(port)), timeout=self._silent_seconds)
        except OSError as error:
            print(
                f"rank {self._rank} does not reach {host}:{port} ({error}): it notices lost ranks in collectives only.",
                file=sys.stderr,
            )
            return lambda: None
        connection.sendall(f"{secret}{self._rank:8}".encode())
        probe(connection, self._silent_seconds)
        return lambda: self._watch_main(connection)

    def _watch_main(self, connection: socket.socket) -> None:
        """Wait until the main rank is done or gone, or says which rank is, or this rank is done."""
        with selectors.DefaultSelector() as selector:
            selector.register(connection, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            ready = [key.fileobj for key, _ in selector.select()]
        if self._woken in ready:
            with suppress(OSError):
                connection.sendall(DONE)
            connection.close()
            return
        said, how = _received(connection)
        if said != DONE:
            self._lose(int(said.split()[0]) if said else 0, how)

    def _watch_all(self, server: socket.socket) -> None:
        """Wait until a rank is gone, or this one is done."""
        with server, selectors.DefaultSelector() as selector:
            selector.register(server, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._woken:
                        self._tell_all(DONE)
                        return
                    if key.fileobj is server:
                        connection, _ = server.accept()
                        probe(connection, self._silent_seconds)
                        self._peers[connection] = None
                        selector.register(connection, selectors.EVENT_READ)
                    else:
                        self._hear(key.fileobj, selector)

    def _hear(self, connection: Any, selector: selectors.BaseSelector) -> None:
        """Take a rank's hello or goodbye; or find it gone."""
        said, how = _received(connection)
        rank = self._peers[connection]
        if rank is None and said[:32] == self._secret and len(said) >= LENGTH_OF_HELLO:
            self._peers[connection] = int(said[32:LENGTH_OF_HELLO])
            said = said[LENGTH_OF_HELLO:]
            if not said:
                return
        elif rank is not None and said != DONE:
            self._tell_all(b"%d\n" % rank)
            self._lose(rank, how)
        selector.unregister(connection)
        del self._peers[connection]  # and so a stranger's, such as a port scanner's
        connection.close()

    def _tell_all(self, word: bytes) -> None:
        for connection in self._peers:
            with suppress(OSError):
                connection.sendall(word)

    def _lose(self, rank: int, how: str) -> None:
        """End this process with the code to requeue, unless it ends by itself."""
        reason = (
            f"rank {self._rank} lost its peers (rank {rank}: {how}); its own message says why, if it had time for one. "
            "The same command continues from the last checkpoint."
        )
        if rank == 0:  # which wrote no reason, unless it had one of its own
            with suppress(UserError):
                _record(reason)
        if not self._is_over.wait(self._grace_seconds):
            _end(reason)


def probe(connection: socket.socket, seconds: float) -> None:
    """Let the kernel send probes, and give the connection up when nothing was answered for so long."""
    connection.settimeout(None)
    every = max(1, int(seconds / 4))
    options = {socket.TCP_KEEPIDLE: every, socket.TCP_KEEPINTVL: every, socket.TCP_USER_TIMEOUT: int(1000 * seconds)}
    for option, value in options.items():
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def _received(connection: socket.socket) -> tuple[bytes, str]:
    """Return what a peer said (nothing if it is gone) and how it went."""
    try:
        return connection.recv(64), "its process ended"
    except OSError as error:
        return b"", error.strerror or str(error)


def _record(reason: str) -> None:
    for record in list(_at_loss):
        record(reason)


def _end(reason: str) -> NoReturn:
    try:
        print(f"error: {reason}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        _record(reason)
    finally:
        os._exit(REQUEUE)
