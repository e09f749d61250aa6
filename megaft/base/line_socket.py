"""TCP connections that are read line by line, and that the kernel probes."""

from __future__ import annotations

import socket

LONGEST_LINE = 2**16


class LineSocket:
    """A socket and the part of a line that has come so far."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._rest = b""

    def fileno(self) -> int:
        """Return the descriptor, which selectors ask for."""
        return self.socket.fileno()

    def read(self) -> tuple[list[bytes], str]:
        """Return the complete lines received, and the reason the connection is closed (empty while it is open)."""
        try:
            data = self.socket.recv(4096)
        except OSError as error:
            return [], error.strerror or str(error)
        *lines, self._rest = (self._rest + data).split(b"\n")
        is_over = not data or len(self._rest) > LONGEST_LINE
        return lines, "its process ended" if is_over else ""


def probe(connection: socket.socket, seconds: float) -> None:
    """Let the kernel send probes, and give the connection up when nothing was answered for so long."""
    connection.settimeout(None)
    every = max(1, int(seconds / 4))
    options = {socket.TCP_KEEPIDLE: every, socket.TCP_KEEPINTVL: every, socket.TCP_USER_TIMEOUT: int(1000 * seconds)}
    for option, value in options.items():
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
