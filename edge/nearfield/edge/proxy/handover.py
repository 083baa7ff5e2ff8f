"""Handing listening sockets to the next process: a restart that refuses nobody.

The process that serves offers its sockets at a path. The next one takes them (SCM_RIGHTS), starts
to accept, says so, and only then does the first one drain. The sockets, with the connections that
wait in their queues, are the same throughout; SO_REUSEPORT alone would lose those.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

MAX_SOCKETS = 16
MOST_WORKERS = MAX_SOCKETS // 2
"""Each has a socket for HTTP and perhaps one for gRPC, and all of them must be handed over at once.
A worker forwards about as much as a core can."""
MAX_PATH_BYTES = 100
"""Of a Unix socket's address: 107 on Linux, 103 on macOS."""
READY = b"ready"
TIMEOUT_S = 30.0


@contextlib.contextmanager
def address(path: Path) -> Iterator[str]:
    """The path as a Unix socket's address, however long it is (where there is /proc)."""
    if len(os.fsencode(path)) <= MAX_PATH_BYTES or not Path("/proc/self/fd").exists():
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


class Inherited:
    """Sockets taken over from another process. Call `ready` when they are accepted on."""

    def __init__(self, sockets: list[socket.socket], other: socket.socket) -> None:
        self.sockets = sockets
        self._other = other

    def ready(self) -> None:
        """Tell the other process that it can go."""
        with contextlib.suppress(OSError):  # gone already
            self._other.sendall(READY)
        self._other.close()


def inherit(path: Path) -> Inherited | None:
    """The sockets of the process that serves at the moment; None where there is none."""
    other = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    other.settimeout(TIMEOUT_S)
    try:
        with address(path) as name:
            other.connect(name)
        _, descriptors, _, _ = socket.recv_fds(other, 64, MAX_SOCKETS)
    except (FileNotFoundError, ConnectionRefusedError, ConnectionResetError):
        descriptors = []
    if not descriptors:
        other.close()
        return None
    sockets = [socket.socket(fileno=number) for number in descriptors]
    for each in sockets:
        each.setblocking(False)
    return Inherited(sockets, other)


class Offer:
    """Offers sockets at a path, mode 0600, until they are taken or `close` is called."""

    def __init__(
        self, path: Path, sockets: Sequence[socket.socket], on_taken: Callable[[], None]
    ) -> None:
        """`on_taken` is called in the event loop once the other process accepts."""
        self._path = path
        self._descriptors = [each.fileno() for each in sockets]
        self._on_taken = on_taken
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Bound beside the path and moved over it: there is always one process to be found.
        beside = path.with_name(f"{path.name}.{os.getpid()}")
        beside.unlink(missing_ok=True)
        previous = os.umask(0o177)
        try:
            with address(beside) as name:
                self._listening.bind(name)
        finally:
            os.umask(previous)
        self._listening.listen(1)
        self._listening.setblocking(False)
        beside.rename(path)
        self._inode = path.stat().st_ino
        self._task = asyncio.get_running_loop().create_task(self._serve())

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            other, _ = await loop.sock_accept(self._listening)
            with other:
                other.setblocking(False)
                with contextlib.suppress(OSError, TimeoutError):
                    socket.send_fds(other, [b"sockets"], self._descriptors)
                    async with asyncio.timeout(TIMEOUT_S):
                        if await loop.sock_recv(other, len(READY)) == READY:
                            self._on_taken()
                            return

    def close(self) -> None:
        """Offer no more. The path is left to whoever has it now."""
        self._task.cancel()
        self._listening.close()
        with contextlib.suppress(FileNotFoundError):
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()
