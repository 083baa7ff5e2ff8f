"""Between the supervisor and a worker: a pair of sockets, for listening sockets and short lines.

    supervisor ──sockets──→ worker     once, at its start
    supervisor ←──ready──── worker     once it accepts
    supervisor ──drain S──→ worker     go, within so long; may be said again

The end of the channel is the end of the other process.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence

from nearfield.edge.proxy.handover import MAX_SOCKETS

READY = "ready"
DRAIN_S = 30.0
"""How long requests may take to end when a gateway stops, and nobody says otherwise."""
_SOCKETS = b"sockets\n"
_MAX_LINE = 1024


def send_sockets(line: socket.socket, sockets: Sequence[socket.socket]) -> None:
    """
    Raises:
        OSError: the other process is gone.
    """
    # The first bytes into an empty socket: it takes them at once.
    socket.send_fds(line, [_SOCKETS], [each.fileno() for each in sockets])


async def receive_sockets(line: socket.socket) -> list[socket.socket]:
    """What `send_sockets` sent; none if the other process ended before."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(line, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(line)
    _, descriptors, _, _ = socket.recv_fds(line, len(_SOCKETS), MAX_SOCKETS)
    sockets = [socket.socket(fileno=number) for number in descriptors]
    for each in sockets:
        each.setblocking(False)
    return sockets


async def say(line: socket.socket, text: str) -> None:
    """
    Raises:
        OSError: the other process is gone.
    """
    await asyncio.get_running_loop().sock_sendall(line, text.encode("ascii") + b"\n")


async def lines(line: socket.socket) -> AsyncIterator[str]:
    """What the other process says, until it ends."""
    loop = asyncio.get_running_loop()
    held = b""
    while True:
        try:
            data = await loop.sock_recv(line, _MAX_LINE)
        except ConnectionError:
            return
        if not data:
            return
        *whole, held = (held + data).split(b"\n")
        for each in whole:
            yield each.decode("ascii")
