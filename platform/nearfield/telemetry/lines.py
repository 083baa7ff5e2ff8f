"""Log lines in bulk: handed over in batches, written by a thread that may wait for the reader.

The process's other logs go through `logging` to the same place (`telemetry.logs`). A line is
written whole: `write` keeps up to `PIPE_BUF` bytes together, so the lines of several processes that
share one pipe are not mixed.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from collections import deque

log = logging.getLogger("nearfield.telemetry")

MOST_BYTES = 8 * 2**20
"""Waiting to be written. Who does not read its pipe loses lines; requests go on."""


class LineWriter:
    """Writes batches of whole lines to a file descriptor, in order.

    Attributes:
        lost: lines that were dropped, because nobody reads or nothing can be written.
    """

    def __init__(self, descriptor: int) -> None:
        self.lost = 0
        self._descriptor = descriptor
        self._waiting: deque[list[bytes]] = deque()
        self._waiting_bytes = 0
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="nearfield-lines", daemon=True)
        self._thread.start()

    def put(self, lines: list[bytes]) -> None:
        """Hand over lines, each with its newline. Never waits."""
        size = sum(map(len, lines))
        with self._changed:
            if self._waiting_bytes + size > MOST_BYTES or self._closing:
                self.lost += len(lines)
                return
            self._waiting.append(lines)
            self._waiting_bytes += size
            self._changed.notify()

    def close(self, within_s: float) -> None:
        """Write what waits, for so long at most."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(within_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closing:
                    self._changed.wait()
                if not self._waiting:
                    return
                lines = self._waiting.popleft()
            for group in _together(lines):
                try:
                    self._write(b"".join(group))
                except OSError:  # nobody has the other end, or the disk is full
                    self.lost += len(group)
            with self._changed:
                self._waiting_bytes -= sum(map(len, lines))

    def _write(self, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:  # whoever shares it with us made it non-blocking
                room = select.poll()
                room.register(self._descriptor, select.POLLOUT)
                room.poll()


def _together(lines: list[bytes]) -> list[list[bytes]]:
    """The lines in groups that one `write` keeps together."""
    groups: list[list[bytes]] = [[]]
    size = 0
    for line in lines:
        size += len(line)
        if size > select.PIPE_BUF and groups[-1]:
            groups.append([])
            size = len(line)
        groups[-1].append(line)
    return groups
