"""A gateway's view of the keys: followed every second, believed for a while when the store is gone.

Asking costs the same whether nothing changed or much did: one number. Only what is newer is then
read. A key that is revoked is refused everywhere after `POLL_S` and the time of one read.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self, TypeVar

from nearfield.api.keys import KeyTable, load_keys, save_keys
from nearfield.core.errors import BadRequest, Unavailable
from nearfield.store.ports import Directory

log = logging.getLogger("nearfield.store")
Result = TypeVar("Result")

POLL_S = 1.0
GRACE_S = 24 * 3600.0
"""How long keys are believed without a word from the store. Then nobody is let in."""
SAVE_S = 10.0
"""The last good state is written down no more often than this."""
CONFIRM_S = 60.0
"""How often its file is marked as still true: `GRACE_S` goes on over a restart."""


class KeyFollower:
    """Keeps a `KeyTable` up to date. One event loop's property.

        async with KeyFollower(store.directory, pepper, last_good=path) as follower:
            follower.table.authenticate(…)

    Attributes:
        table: the keys.
        heard_s: when the store last answered (monotonic); None: never, since the start.
    """

    def __init__(
        self,
        directory: Directory,
        pepper: bytes,
        *,
        last_good: Path | None = None,
        poll_s: float = POLL_S,
        grace_s: float = GRACE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            last_good: a file for the keys, so that a gateway can start without the store.
        """
        self.table = KeyTable(pepper)
        self.heard_s: float | None = None
        self._directory = directory
        self._last_good = last_good
        self._poll_s = poll_s
        self._grace_s = grace_s
        self._clock = clock
        self._started_s = clock()
        self._saved_revision = 0
        self._saved_s = self._confirmed_s = -math.inf
        self._thread = ThreadPoolExecutor(1, "nearfield-keys")
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """
        Raises:
            Unavailable: the store does not answer, and there is no last good state.
        """
        try:
            await self._poll()
        except Unavailable:
            if not await self._in_thread(self._load):
                self._thread.shutdown(wait=False)
                raise
        self._task = asyncio.create_task(self._follow(), name="keys")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._thread.shutdown(wait=False)

    @property
    def silent_s(self) -> float:
        """How long the store has not answered."""
        since_s = self._started_s if self.heard_s is None else self.heard_s
        return self._clock() - since_s

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._poll_s)
            try:
                await self._poll()
            except Unavailable:
                self._close_when_stale()
            except Exception:
                # A mistake of ours must not end the following: the next round may do.
                log.exception("the keys could not be followed")
                self._close_when_stale()

    def _close_when_stale(self) -> None:
        if self.silent_s > self._grace_s and not self.table.closed:
            log.error("no word from the store for %.0f s: API keys are refused", self.silent_s)
            self.table.closed = True

    async def _poll(self) -> None:
        asked_s = self._clock()
        revision = await self._in_thread(self._directory.revision)
        if revision != self.table.revision:
            # Smaller: the database was put back to an earlier state. Then everything counts anew.
            since = self.table.revision if revision > self.table.revision else 0
            changes = await self._in_thread(lambda: self._directory.changes(since))
            if not since and self.table.revision:
                self.table.clear()
            self.table.apply(changes)
        self.heard_s = asked_s
        self.table.closed = False
        await self._save(asked_s)

    async def _save(self, now_s: float) -> None:
        path = self._last_good
        if path is None:
            return
        try:
            if self.table.revision != self._saved_revision and now_s >= self._saved_s + SAVE_S:
                snapshot = self.table.snapshot()
                self._saved_s = self._confirmed_s = now_s
                await self._in_thread(lambda: save_keys(path, snapshot, pepper=None))
                self._saved_revision = snapshot.revision
            elif self._saved_revision and now_s >= self._confirmed_s + CONFIRM_S:
                self._confirmed_s = now_s
                await self._in_thread(path.touch)
        except OSError as error:
            log.warning("the last good state of the keys could not be written: %s", error)

    def _load(self) -> bool:
        if self._last_good is None:
            return False
        try:
            snapshot, _ = load_keys(self._last_good)
            age_s = max(0.0, time.time() - self._last_good.stat().st_mtime)
        except (BadRequest, OSError) as error:
            log.error("the store does not answer, and: %s", error)
            return False
        self.table.apply(snapshot)
        self._started_s -= age_s
        self._close_when_stale()
        log.warning("the store does not answer: %d keys from %s", len(self.table), self._last_good)
        return True

    async def _in_thread(self, call: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)
