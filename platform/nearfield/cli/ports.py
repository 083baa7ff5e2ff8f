"""Free TCP ports on this machine, without two regions that start at once choosing the same."""

from __future__ import annotations

import random
import socket
import sys

# Below every common ephemeral range, so that no outgoing connection takes one of ours.
_BLOCK_MIN, _BLOCK_MAX = 20_000, 32_000


def is_free(port: int, host: str = "") -> bool:
    """Whether `host:port` can be listened on now; "" is every interface."""
    with socket.socket() as probe:
        # A port in TIME_WAIT counts as free, as it does for Ray and HAProxy.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


class Reservations:
    """Ports chosen for a region that has not bound them yet: Ray and Serve take seconds to.

    Regions see each other's reservations, other programs do not. They last until `close`, or as
    long as this process.
    """

    def __init__(self) -> None:
        self._held: list[socket.socket] = []

    def block(self, size: int) -> int:
        """The first of `size` free ports in a row.

        Raises:
            OSError: there is no such run.
        """
        # Aligned, so that the blocks of two regions are the same or have nothing in common.
        starts = list(range(_BLOCK_MIN, _BLOCK_MAX - size + 1, size))
        for first in random.sample(starts, len(starts)):
            if all(is_free(port) for port in range(first, first + size)) and self._hold(first):
                return first
        raise OSError(f"no {size} free ports in a row between {_BLOCK_MIN} and {_BLOCK_MAX}")

    def next_free(self, port: int, host: str, *, tries: int = 100) -> int:
        """The first free port at or after `port`.

        Raises:
            OSError: none of `tries` ports is free.
        """
        for candidate in range(port, min(port + tries, 65_536)):
            if is_free(candidate, host) and self._hold(candidate):
                return candidate
        raise OSError(f"no free port from {port} to {port + tries - 1} on {host}")

    def close(self) -> None:
        for held in self._held:
            held.close()
        self._held.clear()

    def _hold(self, port: int) -> bool:
        if sys.platform != "linux":
            return True
        # An abstract Unix socket: a name that one process can have, gone when the process is.
        held = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            held.bind(f"\0nearfield-port-{port}")
        except OSError:
            held.close()
            return False
        self._held.append(held)
        return True
