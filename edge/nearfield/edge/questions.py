"""Asking upstreams questions of this gateway's own: small, often, over kept connections.

The connections are of the same kind as those of requests (`proxy.upstream`), and others: what
happens to requests does not happen to questions, and the other way round.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from nearfield.edge.proxy.limits import Limits
from nearfield.edge.proxy.ports import FailureKind, Target
from nearfield.edge.proxy.upstream import Pools, Upstream

MOST_BYTES = 4 * 1024 * 1024
"""Of an answer: a region of ten thousand endpoints."""
LATE_S = 0.1
"""When a timer fires so much too late, it was this process that stood still."""


class Silent(Exception):
    """There is no answer.

    Attributes:
        void: it was us who stood still: it says nothing about the other side.
    """

    def __init__(self, reason: str, *, void: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.void = void


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer. took_s: from the question to its first byte."""

    status: int
    body: bytes
    took_s: float
    retry_after: bool = False


class _Question:
    """A question that is being asked: the receiver of its answer."""

    def __init__(self, loop: asyncio.AbstractEventLoop, head: bytes, body: bytes) -> None:
        self.answered: asyncio.Future[Reply] = loop.create_future()
        self.reused = False
        self._loop = loop
        self._head, self._body = head, body
        self._upstream: Upstream | None = None
        self._sent_s = self._took_s = 0.0
        self._status = 0
        self._retry_after = False
        self._parts: list[bytes] = []
        self._size = 0

    def send(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._sent_s = self._loop.time()
        upstream.send(self, self._head, self._body, bodiless=False)

    def drop(self) -> None:
        """Nobody waits any more."""
        if self._upstream is not None:
            self._upstream.drop()
            self._upstream = None

    # ---- Receiver ----

    def on_connected(self, upstream: Upstream) -> None:
        self.send(upstream)

    def on_head(self, status: int, fields: list[tuple[bytes, bytes]], length: int | None) -> None:
        self._took_s = self._loop.time() - self._sent_s
        self._status = status
        self._retry_after = any(name == b"retry-after" for name, _ in fields)

    def on_data(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > MOST_BYTES:
            self.drop()
            self._fail("its answer is too long")
        else:
            self._parts.append(data)

    def on_end(self) -> None:
        self._upstream = None
        if not self.answered.done():
            body = b"".join(self._parts)
            self.answered.set_result(Reply(self._status, body, self._took_s, self._retry_after))

    def on_lost(self, kind: FailureKind) -> None:
        self._upstream = None
        self._fail(kind)

    def _fail(self, reason: str) -> None:
        if not self.answered.done():
            self.answered.set_exception(Silent(reason))


class Questions:
    """Asks. One event loop's property."""

    def __init__(self, limits: Limits | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._pools = Pools(limits or Limits())

    async def ask(
        self,
        target: Target,
        path: bytes,
        timeout_s: float,
        *,
        method: bytes = b"GET",
        headers: bytes = b"",
        body: bytes = b"",
    ) -> Reply:
        """Ask, once; once more where a kept connection turns out to have ended.

        Args:
            path: below the target's prefix. headers: whole lines, in addition.

        Raises:
            Silent: there is no answer in time.
        """
        if body:
            headers += b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body)
        head = b"%b %b%b HTTP/1.1\r\nhost: %b\r\naccept: application/json\r\n%b\r\n" % (
            method,
            target.prefix,
            path,
            target.authority,
            headers,
        )
        due_s = self._loop.time() + timeout_s
        question = await self._ask(target, head, body, due_s, fresh=False)
        try:
            return question.answered.result()
        except Silent as silent:
            if silent.reason != "closed" or not question.reused:
                raise
        return (await self._ask(target, head, body, due_s, fresh=True)).answered.result()

    async def _ask(
        self, target: Target, head: bytes, body: bytes, due_s: float, *, fresh: bool
    ) -> _Question:
        """A question whose answer, or failure, is there.

        Raises:
            Silent: it is not there in time.
        """
        question = _Question(self._loop, head, body)
        pool = self._pools.of(target)
        upstream = None if fresh else pool.take()
        opening = None
        if upstream is not None:
            question.reused = True
            question.send(upstream)
        else:
            opening = pool.connect(question)
            if opening is None:
                raise Silent("too many connections are open to it")
        try:
            async with asyncio.timeout_at(due_s):
                await asyncio.wait((question.answered,))
        except TimeoutError:
            late_s = self._loop.time() - due_s
            raise Silent("no answer in time", void=late_s > LATE_S) from None
        finally:
            if not question.answered.done():
                question.drop()
                if opening is not None:
                    opening.cancel()
        return question

    def sweep(self) -> None:
        """Close what has been idle too long. About once a second."""
        self._pools.sweep(self._loop.time())

    def close(self) -> None:
        """Close what is idle; no question may be under way."""
        self._pools.close()
