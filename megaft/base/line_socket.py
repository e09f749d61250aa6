"""TCP connections that are read line by line, with keepalive probes."""

from __future__ import annotations

import socket

MAX_LINE_BYTES = 2**16
"""Maximum bytes of a line; a peer that sends more is disconnected."""


class LineSocket:
    """A socket with a buffer for the incomplete last line."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._rest = b""

    def fileno(self) -> int:
        """Return the file descriptor, so that a selector accepts this object."""
        return self.socket.fileno()

    def read(self) -> tuple[list[bytes], str]:
        """Return the complete lines received, and the reason the connection is closed (empty while it is open)."""
        try:
            data = self.socket.recv(4096)
        except OSError as error:
            return [], error.strerror or str(error)
        *lines, self._rest = (self._rest + data).split(b"\n")
        is_over = not data or len(self._rest) > MAX_LINE_BYTES
        return lines, "its process ended" if is_over else ""


def probe(connection: socket.socket, seconds: float) -> None:
    """Enable TCP keepalive: the connection is closed when no probe was answered for `seconds`."""
    connection.settimeout(None)
    interval = max(1, int(seconds / 4))
    options = {
        socket.TCP_KEEPIDLE: interval,
        socket.TCP_KEEPINTVL: interval,
        socket.TCP_USER_TIMEOUT: int(1000 * seconds),
    }
    for option, value in options.items():
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
