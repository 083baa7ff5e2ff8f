"""What a gateway has where there is a store: keys, limits, idempotency, administration.

No request waits for the store. It may be gone at the start too, if this gateway has met it before:
then the keys are those of the last good state.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Self

from nearfield.api.keys import KeyTable
from nearfield.core.errors import Unavailable
from nearfield.edge.idempotency import KeyedRequests
from nearfield.store.administration import Administration, open_pepper, read_pepper
from nearfield.store.follow import KeyFollower
from nearfield.store.ports import Ledger
from nearfield.store.shares import ShareKeeper
from nearfield.store.sql import Store

log = logging.getLogger("nearfield.edge")


class Accounts:
    """One process's use of one store. A context.

    Attributes:
        table: the keys, followed. shares: of the limits. keyed: requests with an `Idempotency-Key`.
        administration: for the admin API. All from entering on.
    """

    table: KeyTable
    shares: ShareKeeper
    keyed: KeyedRequests
    administration: Administration

    def __init__(self, url: str, pepper_file: Path, *, last_good: Path, owner: str) -> None:
        """
        Args:
            last_good: a file for the keys. owner: this process, for the records.

        Raises:
            BadRequest: the URL is of no database that is supported.
        """
        self._store = Store(url)
        self._pepper_file = pepper_file
        self._last_good = last_good
        self._owner = owner
        self._stack = AsyncExitStack()

    @property
    def ledger(self) -> Ledger:
        return self._store.ledger

    async def __aenter__(self) -> Self:
        """
        Raises:
            BadRequest, Conflict: the pepper does not fit the store.
            Unavailable: the store does not answer, and nothing is known of former times.
        """
        store = self._store
        async with AsyncExitStack() as stack:
            stack.callback(store.close)
            pepper = await asyncio.to_thread(self._pepper)
            enter = stack.enter_async_context
            follower = await enter(KeyFollower(store.directory, pepper, last_good=self._last_good))
            self.table = follower.table
            self.shares = await enter(ShareKeeper(store.quotas))
            self.keyed = await enter(KeyedRequests(store.idempotency, owner=self._owner))
            self.administration = Administration(store, pepper)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def _pepper(self) -> bytes:
        """The pepper of the store's keys; the file's own word where the store does not answer."""
        try:
            return open_pepper(self._store, self._pepper_file)
        except Unavailable:
            if not self._pepper_file.exists():
                raise
            log.warning("the store does not answer: the key pepper is taken as it stands")
            return read_pepper(self._pepper_file)
