"""Usage records on their way to the ledger: written down here first, sent in batches, sent again.

    put → journal on this machine's disk → ledger → that part of the journal is removed
              │ the ledger does not answer: kept, segment by segment, and tried again
              └ the process dies: the next one that uses the folder takes its journal over

A record may reach the ledger twice: it has a name, and the ledger keeps one of each. None is lost
but those of the last moment before a process is killed, which nobody had put here yet.

    folder/
      <process>/lock            held for as long as the process lives
      <process>/<n>.jsonl       a segment: one record a line
      <process>/rejected.jsonl  what the ledger will never take; for a person to look at
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import random
import secrets
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import msgspec
from nearfield.core.errors import BadRequest, Unavailable
from nearfield.store.ports import Ledger, Usage

log = logging.getLogger("nearfield.store")

SEND_S = 0.5
"""How long records are gathered for one transaction."""
RETRY_S = 0.5
MAX_RETRY_S = 10.0
"""Between tries while the ledger is gone: doubled each time, and spread by half."""
SEGMENT_RECORDS = 5000
"""Of the segment that is written, all are in memory as well. A full one is on disk alone."""
MAX_BYTES = 512 * 2**20
"""Of a process's journal; a record takes about 400. Beyond it records are lost, and counted."""
MOST_SEGMENTS_IN_MEMORY = 4
"""While nothing can be written to the disk either."""
ADOPT_S = 10.0
"""How often to look for what other processes left."""
_LOCK, _REJECTED = "lock", "rejected.jsonl"

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Usage).decode


@dataclass(slots=True, eq=False)
class _Segment:
    """A part of the journal.

    Attributes:
        path: its file; None: the disk takes nothing, and it is in memory alone.
        records: None: on disk alone.
    """

    path: Path | None = None
    records: list[Usage] | None = field(default_factory=list)
    count: int = 0
    size_bytes: int = 0


class UsageWriter:
    """One process's way to the ledger. Any thread may `put`; nothing there waits.

    One thread of its own writes the journal, another sends: a ledger that takes its time does not
    keep records from being written down.

    Attributes:
        written: records that the ledger has. lost: those that could be kept nowhere, or that it
            will never take.
    """

    def __init__(
        self,
        ledger: Ledger,
        folder: Path,
        *,
        send_s: float = SEND_S,
        retry_s: float = RETRY_S,
        adopt_s: float = ADOPT_S,
        max_bytes: int = MAX_BYTES,
        segment_records: int = SEGMENT_RECORDS,
    ) -> None:
        """
        Args:
            folder: for journals; made where there is none. Processes may share it.

        Raises:
            BadRequest: nothing can be written there.
        """
        self.written = 0
        self.lost = 0
        self._ledger = ledger
        self._folder = folder
        self._send_s, self._retry_s, self._every_s = send_s, retry_s, adopt_s
        self._max_bytes = max_bytes
        self._segment_records = segment_records
        try:
            self._home, self._lock = _new_home(folder)
        except OSError as error:
            raise BadRequest(f"Usage records cannot be kept in {folder}: {error}") from None
        self._changed = threading.Condition()  # guards these four
        self._incoming: list[Usage] = []
        self._sealed: deque[_Segment] = deque()  # to be sent, in this order
        self._closing = False
        self._complete = False  # closing, and nothing more will be sealed
        # The journal's thread's own.
        self._open = _Segment()
        self._file: BinaryIO | None = None
        self._numbers = 0
        self._adopt_s = self._due_s = 0.0
        self._full = False
        self._threads = [
            threading.Thread(target=target, name=f"nearfield-usage-{name}", daemon=True)
            for name, target in (("journal", self._write_down), ("ledger", self._send_all))
        ]
        for thread in self._threads:
            thread.start()

    def put(self, records: Sequence[Usage]) -> None:
        """Hand over records. They are in the journal some milliseconds later."""
        with self._changed:
            self._incoming += records
            self._changed.notify_all()

    @property
    def waiting(self) -> int:
        """Records that the ledger does not have yet."""
        with self._changed:
            sealed = sum(segment.count for segment in self._sealed)
            return len(self._incoming) + self._open.count + sealed

    def close(self, within_s: float) -> None:
        """Send what is left, for so long at most. What cannot be sent stays in the journal, for
        the next process that uses the folder."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        until_s = time.monotonic() + within_s
        for thread in self._threads:
            thread.join(max(0.0, until_s - time.monotonic()))
        if not any(thread.is_alive() for thread in self._threads):
            self._leave()

    # ---- the journal ------------------------------------------------------------------------

    def _write_down(self) -> None:
        closing = False
        while not closing:
            with self._changed:
                if not self._incoming and not self._closing:
                    self._changed.wait(self._idle_s())
                taken, self._incoming = self._incoming, []
                closing = self._closing
            try:
                self._turn(taken, closing=closing)
            except Exception:
                # A mistake of ours must not end the writing: the next round may do.
                log.exception("usage records could not be written down")
        with self._changed:
            self._complete = True
            self._changed.notify_all()

    def _idle_s(self) -> float:
        """How long there is nothing to do here if nothing comes."""
        next_s = self._adopt_s
        if self._open.count and not self._sealed:
            next_s = min(next_s, self._due_s)
        return max(0.0, next_s - time.monotonic())

    def _turn(self, taken: list[Usage], *, closing: bool) -> None:
        now_s = time.monotonic()
        if taken:
            if not self._open.count:
                self._due_s = now_s + self._send_s
            self._keep(taken)
        if now_s >= self._adopt_s:
            self._adopt_s = now_s + self._every_s
            self._adopt()
        if not self._open.count:
            return
        # While something waits to be sent, more than a full segment at a time is not worth it.
        due = now_s >= self._due_s and not self._sealed
        if closing or due or self._open.count >= self._segment_records:
            self._seal()

    def _keep(self, records: list[Usage]) -> None:
        """Write records down, as far as there is room."""
        segment = self._open
        data = b"".join([_encode(record) + b"\n" for record in records])
        with self._changed:
            held = [segment, *self._sealed]
        room = self._max_bytes - sum(each.size_bytes for each in held)
        if len(data) <= room and not self._write(data):
            memory = sum(each.count for each in held if each.path is None) + len(records)
            room = len(data) if memory <= MOST_SEGMENTS_IN_MEMORY * self._segment_records else 0
        if len(data) > room:
            if not self._full:
                log.error("no room for usage records: they are lost, and counted")
            self._full = True
            self.lost += len(records)
            return
        if room > self._max_bytes // 4:  # a few small ones that still fit are no news
            self._full = False
        assert segment.records is not None
        segment.records += records
        segment.count += len(records)
        segment.size_bytes += len(data)

    def _write(self, data: bytes) -> bool:
        """Add to the open segment's file; False: the disk takes nothing, and the segment is in
        memory alone from now on."""
        segment = self._open
        try:
            if self._file is None:
                if segment.count:
                    return False  # part of it could not be written before
                self._numbers += 1
                segment.path = self._home / f"{self._numbers:08d}.jsonl"
                self._file = segment.path.open("xb", buffering=0)
            if self._file.write(data) == len(data):
                return True
            reason = "the disk is full"
        except OSError as error:
            reason = str(error)
        log.error("usage records cannot be written down, they are in memory only: %s", reason)
        if self._file is not None:
            self._file.close()
            self._file = None
        segment.path = None
        return False

    def _seal(self) -> None:
        """Give the open segment to be sent, and begin another."""
        segment, self._open = self._open, _Segment()
        file, self._file = self._file, None
        if file is not None:
            if self._sealed:
                # The ledger is slow or gone: this one has to last, also over a power cut.
                with contextlib.suppress(OSError):
                    os.fsync(file.fileno())
            file.close()
        with self._changed:
            if self._sealed and segment.path is not None:
                segment.records = None
            self._sealed.append(segment)
            self._changed.notify_all()

    # ---- sending ----------------------------------------------------------------------------

    def _send_all(self) -> None:
        failures = 0
        while True:
            with self._changed:
                while not self._sealed and not self._complete:
                    self._changed.wait()
                if not self._sealed:
                    return
                segment = self._sealed[0]
            try:
                self._send(segment)
            except Unavailable:
                if not failures:
                    log.warning("the ledger does not answer: usage is kept in %s", self._home)
                if self._pause(failures):
                    return
                failures += 1
            except Exception:
                log.exception("usage records could not be sent")
                if self._pause(failures):
                    return
                failures += 1
            else:
                if failures:
                    log.info("the ledger answers again")
                failures = 0

    def _pause(self, failures: int) -> bool:
        """Wait before the next try; whether there is to be none."""
        delay_s = min(MAX_RETRY_S, self._retry_s * 2 ** min(failures, 10))
        until_s = time.monotonic() + delay_s * (1 - 0.5 * random.random())
        with self._changed:
            while not self._closing and (left_s := until_s - time.monotonic()) > 0:
                self._changed.wait(left_s)
            return self._complete

    def _send(self, segment: _Segment) -> None:
        """
        Raises:
            Unavailable: the ledger does not answer.
        """
        records = segment.records
        if records is None:
            assert segment.path is not None
            records = _read(segment.path)
        self._append(records)
        if segment.path is not None:
            segment.path.unlink(missing_ok=True)
        with self._changed:
            self._sealed.popleft()
            self._changed.notify_all()  # the next one may be due

    def _append(self, records: Sequence[Usage]) -> None:
        """
        Raises:
            Unavailable: the ledger does not answer; some of them may be there.
        """
        if not records:
            return
        try:
            self._ledger.append(records)
        except Unavailable:
            raise
        except Exception:
            # One that it will never take must not stand in the way of all others.
            if len(records) == 1:
                log.exception("the ledger refuses a usage record: see %s", self._home / _REJECTED)
                self._reject(records[0])
                return
            half = len(records) // 2
            self._append(records[:half])
            self._append(records[half:])
            return
        self.written += len(records)

    def _reject(self, record: Usage) -> None:
        self.lost += 1
        with contextlib.suppress(OSError), (self._home / _REJECTED).open("ab") as file:
            file.write(_encode(record) + b"\n")

    # ---- other processes --------------------------------------------------------------------

    def _adopt(self) -> None:
        """Take over the journals of processes that are no more."""
        for home in sorted(self._folder.iterdir()):
            if home == self._home or home.name.startswith("."):
                continue
            with contextlib.suppress(OSError), (home / _LOCK).open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused: it lives
                self._take_over(home)

    def _take_over(self, home: Path) -> None:
        """
        Raises:
            OSError: not all of it: the rest is left for the next time.
        """
        for left in sorted(home.glob("[0-9]*.jsonl")):
            self._numbers += 1
            mine = left.rename(self._home / f"{self._numbers:08d}.jsonl")
            count = len(_read(mine))
            if count:
                log.info("took over %d usage records of a process that is no more", count)
            segment = _Segment(mine, None, count, mine.stat().st_size)
            with self._changed:
                self._sealed.append(segment)
                self._changed.notify_all()
        if not (home / _REJECTED).exists():
            (home / _LOCK).unlink()
            home.rmdir()

    def _leave(self) -> None:
        """The end: what is left stays for others."""
        if self._sealed:
            log.warning("%d usage records are left in %s", self.waiting, self._home)
            memory = [s for s in self._sealed if s.path is None]
            self.lost += sum(segment.count for segment in memory)
        elif not (self._home / _REJECTED).exists():
            with contextlib.suppress(OSError):
                for path in self._home.iterdir():
                    path.unlink()
                self._home.rmdir()
        self._lock.close()


def _new_home(folder: Path) -> tuple[Path, BinaryIO]:
    """A folder of this process's own, locked before others can see it.

    Raises:
        OSError: it cannot be made.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    name = f"{os.getpid()}-{secrets.token_hex(6)}"
    hidden = folder / f".{name}"
    hidden.mkdir(mode=0o700)
    lock = (hidden / _LOCK).open("xb")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return hidden.rename(folder / name), lock


def _read(path: Path) -> list[Usage]:
    """A segment's records. The last line may be torn: its process was killed while it wrote."""
    records: list[Usage] = []
    for line in path.read_bytes().splitlines():
        try:
            records.append(_decode(line))
        except (msgspec.DecodeError, UnicodeDecodeError):
            log.warning("a usage record in %s is torn", path)
    return records
