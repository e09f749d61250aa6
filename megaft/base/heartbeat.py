"""Failure detector between ranks: ends this process when a peer dies or fails, even while it waits for a GPU.

An NCCL collective that waits for a dead peer raises no error: NCCL's watchdog aborts the process after the timeout,
without a reason. So every rank keeps a TCP connection to the main rank. The operating system closes the connection
when a process dies, however it dies, and TCP keepalive detects a lost host or network. The peer's operating system
answers the keepalive probes, so a rank that compiles, validates, holds the GIL or hangs counts as alive; a hang
is detected by the timeout of gloo's collectives.

A rank that fails reports its exit code and reason before it exits. The main rank forwards the first report to the
others, and all ranks exit with its code and reason.

A daemon thread reads the connections. It needs the GIL, which torch releases in long calls; a C extension that holds
the GIL delays this rank's exit.
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
from megaft.base.errors import REQUEUE, UserError
from megaft.base.line_socket import LineSocket, probe

SILENT_SECONDS = 60.0
"""Seconds without an answer to keepalive probes until a host counts as lost; less if the run's timeout is shorter."""
GRACE_SECONDS = 10.0
"""Seconds that the main thread has to raise or finish by itself after a rank failed or was lost."""

KEY = "megaft/heartbeat"
DONE = b"done"

_recorders: list[Callable[[int, str], None]] = []


@contextmanager
def before_forced_exit(record: Callable[[int, str], None]) -> Iterator[None]:
    """Within the block: call `record(exit_code, reason)` before a peer's failure ends this process."""
    _recorders.append(record)
    try:
        yield
    finally:
        _recorders.remove(record)


class Heartbeat:
    """Connection of this rank to the main rank (on the main rank: to all others), with the thread that reads it."""

    def __init__(self, rank: int, world_size: int, host: str, store: Any, timeout_seconds: float) -> None:
        """Connect the ranks; every rank calls this. torch's `store` passes on the main rank's port."""
        self._rank, self._world_size = rank, world_size
        self._silent_seconds = min(SILENT_SECONDS, timeout_seconds)
        # The main rank, if alive, exits first: it writes the reason, and the launcher may then kill the other ranks.
        self.grace_seconds = min(GRACE_SECONDS, timeout_seconds) * (1.0 if rank == 0 else 1.5)
        self._is_over, self._has_ending, self._is_sent = threading.Event(), threading.Event(), threading.Event()
        self._first_ending: Ending | None = None
        self._peers: dict[LineSocket, int | None] = {}  # None: it has not sent its rank yet
        self._wake, woken = socket.socketpair()
        self._wake_receiver = LineSocket(woken)
        watch = self._listen(store) if rank == 0 else self._connect(host, store)
        self._thread = threading.Thread(target=watch, name="heartbeat", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Announce that this rank is done, so that the others do not count it as lost."""
        self._is_over.set()
        self._wake_with(DONE + b"\n")
        self._thread.join(self.grace_seconds)

    def tell(self, ending: Ending) -> None:
        """Report to the other ranks why this one fails, unless another failure was reported before."""
        if self._keep_first(ending) is ending:
            self._wake_with(ending.to_line())
            if self._thread.is_alive():
                self._is_sent.wait(self.grace_seconds)  # else this process might exit before it is sent

    def first_ending(self) -> Ending | None:
        """Wait up to the grace period for the report of the first failed rank; return it, or None if none comes."""
        self._has_ending.wait(self.grace_seconds)
        return self._first_ending

    def stand_down(self) -> None:
        """Leave the exit to the main thread, which has an error to report; the others detect when it has exited."""
        self._is_over.set()

    def wait_for_main(self, seconds: float) -> None:
        """Wait until the main rank has exited; this rank may exit after it, since a launcher then kills the rest."""
        if self._rank != 0:
            self._thread.join(seconds)

    def peers(self) -> list[int]:
        """Return the ranks connected to the main rank, on the main rank."""
        return sorted(rank for rank in self._peers.values() if rank is not None)

    def _keep_first(self, ending: Ending) -> Ending:
        """Keep the first ending, and return the one that is kept."""
        if self._first_ending is None:
            self._first_ending = ending
            self._has_ending.set()
        return self._first_ending

    def _wake_with(self, line: bytes) -> None:
        with suppress(OSError):  # the thread has ended already
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
                f"warning: rank {self._rank} cannot reach {host}:{port} ({error}), so it detects lost ranks only by "
                "the timeout of collectives. Allow connections between the hosts on every port.",
                file=sys.stderr,
            )
            return lambda: None
        connection.sendall(f"{secret} {self._rank}\n".encode())
        probe(connection, self._silent_seconds)
        return lambda: self._watch_main(LineSocket(connection))

    def _watch_main(self, main: LineSocket) -> None:
        """Read the main rank's messages until it is done or lost, a rank has failed, or this rank is done."""
        with selectors.DefaultSelector() as selector:
            selector.register(main, selectors.EVENT_READ)
            selector.register(self._wake_receiver, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select()]
                if self._wake_receiver in ready and self._forward([main]):
                    main.socket.close()
                    return
                if main in ready and self._read_main(main):
                    return

    def _read_main(self, main: LineSocket) -> bool:
        """Read the main rank's messages; return True if no more will come. If a rank failed, end this process."""
        lines, closed_because = main.read()
        if lines == [DONE]:
            return True
        if lines:
            self._end_with(Ending.from_line(lines[0]))
        elif closed_because:
            self._end_with(Ending(0, REQUEUE, closed_because))
        return bool(closed_because)

    def _watch_all(self, server: socket.socket) -> None:
        """Read the messages of all ranks until one fails or is lost, or this rank is done."""
        with server, selectors.DefaultSelector() as selector:
            selector.register(server, selectors.EVENT_READ)
            selector.register(self._wake_receiver, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._wake_receiver:
                        if self._forward(list(self._peers)):
                            return
                    elif key.fileobj is server:
                        connection, _ = server.accept()
                        probe(connection, self._silent_seconds)
                        peer = LineSocket(connection)
                        self._peers[peer] = None
                        selector.register(peer, selectors.EVENT_READ)
                    elif not self._read_peer(key.fileobj):
                        selector.unregister(key.fileobj)
                        self._drop(key.fileobj)

    def _forward(self, connections: list[LineSocket]) -> bool:
        """Send the main thread's messages to the other ranks; return True if this rank is done."""
        lines, _ = self._wake_receiver.read()
        for line in lines:
            send_all(connections, line + b"\n")
        self._is_sent.set()
        return DONE in lines

    def _read_peer(self, peer: Any) -> bool:
        """Read a rank's number, failure or goodbye, or detect that it is lost; return False if no more will come."""
        lines, closed_because = peer.read()
        if self._peers[peer] is None and lines:
            self._peers[peer] = self._rank_of(lines.pop(0))
            if self._peers[peer] is None:
                return False
        rank = self._peers[peer]
        is_lost = bool(closed_because) and rank is not None and DONE not in lines
        if failures := [Ending.from_line(line) for line in lines if rank is not None and line != DONE]:
            self._broadcast(failures[0])
        elif is_lost:
            self._broadcast(Ending(rank or 0, REQUEUE, closed_because))
        return not closed_because and DONE not in lines and (rank is not None or not lines)

    def _drop(self, peer: Any) -> None:
        """Close a connection that is over, or that is not a rank's, such as a port scanner's."""
        del self._peers[peer]
        peer.socket.close()

    def _rank_of(self, hello: bytes) -> int | None:
        """Return a peer's rank; None if it is no rank of this run, such as one of another job with this port."""
        secret, _, rank = hello.partition(b" ")
        is_peer = secret == self._secret and int(rank) not in self._peers.values()
        return int(rank) if is_peer else None

    def _broadcast(self, ending: Ending) -> None:
        if self._keep_first(ending) is ending:
            send_all(list(self._peers), ending.to_line())
        self._end_with(ending)

    def _end_with(self, ending: Ending) -> None:
        """Exit with a peer's exit code and reason after the grace period, unless the main thread exits before."""
        first = self._keep_first(ending)
        reason = first.message_on(self._rank)
        if self._rank == 0 and first.rank != 0:  # other ranks write no reason, except their own
            with suppress(UserError):
                _call_recorders(first.exit_code, reason)
        if not self._is_over.wait(self.grace_seconds):
            exit_process(first.exit_code, reason)


def send_all(connections: list[LineSocket], line: bytes) -> None:
    """Send a line to every peer that is still connected."""
    for connection in connections:
        with suppress(OSError):
            connection.socket.sendall(line)


def _call_recorders(exit_code: int, reason: str) -> None:
    for record in list(_recorders):
        record(exit_code, reason)


def exit_process(exit_code: int, reason: str) -> NoReturn:
    """Exit at once, with a message, from the thread that reads the connections."""
    try:
        print(f"error: {reason}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        _call_recorders(exit_code, reason)
    finally:
        os._exit(exit_code)
