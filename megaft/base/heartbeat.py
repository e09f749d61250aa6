"""Heartbeat between ranks: ends a process when a peer dies or fails, even while its main thread waits for a GPU.

A rank that waits for the GPU behind a collective cannot be told by that collective that a peer is gone: NCCL's
watchdog aborts the process in the end, with no reason written. So every rank keeps a TCP connection to the main rank.
The kernel closes it when a process dies, however it dies, and its keepalive probes notice a host or a network that is
gone. The probes are answered by the peer's kernel: a rank that compiles, validates, holds Python's lock or hangs is
alive here, and a hang is found by the timeout of the hosts' collectives.

A rank that fails says so here before it leaves, and the main rank tells the others: all end with its exit code and its
reason. The first news counts.

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

from megaft.base.ending import Ending
from megaft.base.errors import UserError
from megaft.base.exit_code import REQUEUE
from megaft.base.line_socket import LineSocket, probe

SILENT_SECONDS = 60.0
"""Seconds without an answer to probes after which a host is lost, unless the run's timeout is shorter."""
GRACE_SECONDS = 10.0
"""Seconds after a loss in which the main thread may still end by itself, by an error or by finishing."""

KEY = "megaft/heartbeat"
DONE = b"done"

_at_end: list[Callable[[int, str], None]] = []


@contextmanager
def at_end(record: Callable[[int, str], None]) -> Iterator[None]:
    """Within the block: call `record(exit_code, reason)` before a peer's end or failure ends this process."""
    _at_end.append(record)
    try:
        yield
    finally:
        _at_end.remove(record)


class Heartbeat:
    """This rank's connection to the main rank, or the main rank's to all others, and the thread that reads them."""

    def __init__(self, rank: int, world_size: int, host: str, store: Any, timeout_seconds: float) -> None:
        """Connect the ranks, all of which call this; `store` is torch's, and tells the main rank's port."""
        self._rank, self._world_size = rank, world_size
        self._silent_seconds = min(SILENT_SECONDS, timeout_seconds)
        # If the main rank is alive it ends first: it writes the reason, and the launcher may then end the other ranks.
        self._grace_seconds = min(GRACE_SECONDS, timeout_seconds) * (1.0 if rank == 0 else 1.5)
        self._is_over, self._has_news, self._has_told = threading.Event(), threading.Event(), threading.Event()
        self._news: Ending | None = None
        self._peers: dict[LineSocket, int | None] = {}  # None: has not said which rank it is
        self._wake, woken = socket.socketpair()
        self._woken = LineSocket(woken)
        watch = self._listen(store) if rank == 0 else self._connect(host, store)
        self._thread = threading.Thread(target=watch, name="heartbeat", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Announce that this rank is done, so that the others do not take it for lost."""
        self._is_over.set()
        self._wake_with(DONE + b"\n")
        self._thread.join(self._grace_seconds)

    def tell(self, ending: Ending) -> None:
        """Tell the other ranks why this one ends, unless the run ends for another reason already."""
        if self._note(ending) is ending:
            self._wake_with(ending.to_line())
            if self._thread.is_alive():
                self._has_told.wait(self._grace_seconds)  # else this process may end before

    def news(self) -> Ending | None:
        """Wait up to the grace period for the report of how the first rank ended; return it, or None."""
        self._has_news.wait(self._grace_seconds)
        return self._news

    def stand_down(self) -> None:
        """Leave the exit to the main thread, which has an error to report; the others notice when it has ended."""
        self._is_over.set()

    def wait_for_main(self, seconds: float) -> None:
        """Wait until the main rank has ended, after which this one may: a launcher then ends the rest."""
        if self._rank != 0:
            self._thread.join(seconds)

    def _note(self, ending: Ending) -> Ending:
        """Keep the first news, and return it."""
        if self._news is None:
            self._news = ending
            self._has_news.set()
        return self._news

    def _wake_with(self, line: bytes) -> None:
        with suppress(OSError):  # the thread has ended before
            self._wake.send(line)

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
        connection.sendall(f"{secret} {self._rank}\n".encode())
        probe(connection, self._silent_seconds)
        return lambda: self._watch_main(LineSocket(connection))

    def _watch_main(self, main: LineSocket) -> None:
        """Wait until the main rank is done or gone, or says how a rank ended, or this rank is done."""
        with selectors.DefaultSelector() as selector:
            selector.register(main, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select()]
                if self._woken in ready and self._pass_on([main]):
                    main.socket.close()
                    return
                if main in ready and self._is_told(main):
                    return

    def _is_told(self, main: LineSocket) -> bool:
        """Read the main rank's messages; return True if no more will come. If a rank failed, end this process."""
        lines, how = main.read()
        if lines == [DONE]:
            return True
        if lines:
            self._stop(Ending.from_line(lines[0]))
        elif how:
            self._stop(Ending(0, REQUEUE, how))
        return bool(how)

    def _watch_all(self, server: socket.socket) -> None:
        """Wait until a rank is gone, or this one is done."""
        with server, selectors.DefaultSelector() as selector:
            selector.register(server, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._woken:
                        if self._pass_on(list(self._peers)):
                            return
                    elif key.fileobj is server:
                        connection, _ = server.accept()
                        probe(connection, self._silent_seconds)
                        peer = LineSocket(connection)
                        self._peers[peer] = None
                        selector.register(peer, selectors.EVENT_READ)
                    elif not self._hear(key.fileobj):
                        selector.unregister(key.fileobj)
                        self._forget(key.fileobj)

    def _pass_on(self, connections: list[LineSocket]) -> bool:
        """Send what the main thread says to the other ranks; return True where it says that this rank is done."""
        lines, _ = self._woken.read()
        for line in lines:
            send_all(connections, line + b"\n")
        self._has_told.set()
        return DONE in lines

    def _hear(self, peer: Any) -> bool:
        """Take a rank's hello, failure or goodbye; or find it gone. Return False when it has no more to say."""
        lines, how = peer.read()
        if self._peers[peer] is None and lines:
            self._peers[peer] = self._rank_of(lines.pop(0))
            if self._peers[peer] is None:
                return False
        rank = self._peers[peer]
        is_lost = bool(how) and rank is not None and DONE not in lines
        if failures := [Ending.from_line(line) for line in lines if rank is not None and line != DONE]:
            self._tell_all_of(failures[0])
        elif is_lost:
            self._tell_all_of(Ending(rank or 0, REQUEUE, how))
        return not how and DONE not in lines and (rank is not None or not lines)

    def _forget(self, peer: Any) -> None:
        """Close a connection that is over, or a stranger's, such as a port scanner's."""
        del self._peers[peer]
        peer.socket.close()

    def _rank_of(self, hello: bytes) -> int | None:
        """Return a peer's rank; None for a stranger, such as the same rank of another job that was given this port."""
        secret, _, rank = hello.partition(b" ")
        is_peer = secret == self._secret and int(rank) not in self._peers.values()
        return int(rank) if is_peer else None

    def _tell_all_of(self, ending: Ending) -> None:
        if self._note(ending) is ending:
            send_all(list(self._peers), ending.to_line())
        self._stop(ending)

    def _stop(self, ending: Ending) -> None:
        """End this process as a peer has ended, unless it ends by itself."""
        first = self._note(ending)
        reason = first.message_on(self._rank)
        if self._rank == 0 and first.rank != 0:  # which wrote no reason, unless it had one of its own
            with suppress(UserError):
                _record(first.exit_code, reason)
        if not self._is_over.wait(self._grace_seconds):
            _end(first.exit_code, reason)


def send_all(connections: list[LineSocket], line: bytes) -> None:
    """Send a line to every peer that is there."""
    for connection in connections:
        with suppress(OSError):
            connection.socket.sendall(line)


def _record(exit_code: int, reason: str) -> None:
    for record in list(_at_end):
        record(exit_code, reason)


def _end(exit_code: int, reason: str) -> NoReturn:
    try:
        print(f"error: {reason}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        _record(exit_code, reason)
    finally:
        os._exit(exit_code)
