"""`Idempotency-Key`: a request that may be sent again is executed once, and answered every time.

    claim ──Claimed──→ it runs ──→ its answer is kept ──→ replayed for a day
      │                       └──→ it came to nothing ──→ the next one may run
      ├──Answered──→ replay
      ├──InFlight──→ wait for the other one
      └──OtherRequest──→ 422

Rules:

- A run whose client leaves goes on: the client that asks again gets its answer.
- Kept is what the caller could rely on: a whole answer below 500, except 429, that does not end in
  an error. What was refused, failed or broke off is no execution: it was cancelled where it ran,
  and what runs on behalf of models changes nothing. The same key may run it again.
- An answer above `MOST_BYTES` is not kept, but that it was given is. Who asks again is told so with
  409, and nothing is executed.
- What is no inference and ended without a word (its gateway was killed) may have had effects:
  it is not run again, and its key is answered with 409 from then on.
- While the store is gone, requests with a key are refused with 503. An answer that could not be
  kept is tried again for `PERSIST_S`.
- A process that holds claims says in the store that it lives, once for all of them. When one was
  killed, its claims are free about `LEASE_S + DOUBT_S` later (`store.idempotency`).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, Self, TypeVar

from nearfield.core.errors import (
    BadRequest,
    Conflict,
    NearfieldError,
    RateLimited,
    Unavailable,
    Unprocessable,
)
from nearfield.edge.meter import Meter
from nearfield.edge.proxy.answers import error_bytes
from nearfield.edge.proxy.ports import NEVER_SENT, Answer, Fields, Outcome, Request
from nearfield.store.ports import Answered, Claimed, Idempotency, InFlight, OtherRequest

log = logging.getLogger("nearfield.edge")
Result = TypeVar("Result")

LEASE_S: Final = 0.9
"""How long others believe that a gateway lives which has said so. Then they doubt it for a while,
and run its requests: it may be silent for `LEASE_S + DOUBT_S`."""
BEATS: Final = 4
"""How often it says so within that."""
KEEP_S: Final = 24 * 3600.0
"""How long an answer is replayed. The usage records rely on it (`recorder`)."""
MOST_BYTES: Final = 2 * 2**20
"""Of a kept answer: a stream of some eight thousand tokens."""
POLL_S: Final = (0.05, 0.1, 0.2, 0.4)
"""How long to wait before asking again after a run on another gateway; then always the last."""
MARGIN_S: Final = 0.05
"""A request that waits for another is answered so long before its deadline."""
MOST_WAITING: Final = 64
"""Requests that wait for one key in this process."""
PERSIST_S: Final = 60.0
PERSIST_BYTES: Final = 64 * 2**20
"""Answers that wait for the store to come back: for how long, and how much of them."""
THREADS: Final = 4
"""Transactions at once; one takes milliseconds."""
ASK_S: Final = 2.0
MOST_ASKING: Final = 512
"""How long, and how many at once, wait for an answer of the store: then it is as good as gone."""
SWEEP_S: Final = 600.0
CLOSE_S: Final = 5.0

MOST_KEY_BYTES: Final = 255
_NOT_KEPT: Final = "x-nearfield-not-kept"
_PASSING: Final = frozenset(
    (b"x-request-id", b"date", b"server", b"set-cookie", b"content-length", b"retry-after")
)
"""Fields of an answer that are true of that one delivery only; rate limits too."""


def check_key(key: bytes) -> None:
    """
    Raises:
        BadRequest: it is no key.
    """
    if not 0 < len(key) <= MOST_KEY_BYTES or not key.isascii() or not key.decode().isprintable():
        raise BadRequest(
            f"Idempotency-Key must be 1 to {MOST_KEY_BYTES} printable ASCII characters.",
            param="idempotency-key",
            code="invalid_idempotency_key",
        )


@dataclass(slots=True, eq=False)
class _Line:
    """The requests of this process that have one key. Whoever holds `turn` talks to the store.

    Attributes:
        fingerprint: of the request that the key belongs to, once the store has said so.
        users: requests that wait or run. answer: what the one that ran was answered.
    """

    tenant: str
    key: str
    fingerprint: str | None = None
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0
    answer: Answered | None = None


class Claim:
    """The right to run a request, which must be ended in one of three ways, once."""

    __slots__ = ("_keyed", "attempt", "line")

    def __init__(self, keyed: KeyedRequests, line: _Line, attempt: int) -> None:
        self._keyed = keyed
        self.line = line
        self.attempt = attempt

    def complete(self, answer: Answered) -> None:
        """It ran, and this is its answer."""
        self._keyed._end(self, answer)

    def release(self) -> None:
        """It came to nothing: the next one may run."""
        self._keyed._end(self, None)

    def leave(self) -> None:
        """What came of it is not known: the next one finds it orphaned."""
        self._keyed._leave(self)


class KeyedRequests:
    """Claims of one gateway process. One event loop's property.

    async with KeyedRequests(store.idempotency, owner="eu-west-1") as keyed:
        found = await keyed.claim("acme", request, key, rerun=True)
    """

    def __init__(
        self,
        store: Idempotency,
        *,
        owner: str,
        lease_s: float = LEASE_S,
        keep_s: float = KEEP_S,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        """
        Args:
            owner: names this process in the records.
            lease_s: see `LEASE_S`.
        """
        self.most_bytes = most_bytes
        self._store = store
        self._owner = f"{owner}-{secrets.token_hex(4)}"  # process ids are given again
        self._lease_s = lease_s
        self._keep_s = keep_s
        self._lines: dict[tuple[str, str], _Line] = {}
        self._claims: set[Claim] = set()  # until the store has heard how they ended
        self._unkept_bytes = 0
        self._asking = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._threads = ThreadPoolExecutor(THREADS, "nearfield-idempotency")
        # A thread of its own: neither a busy event loop nor slow claims make others think it dead.
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="nearfield-claims", daemon=True)

    async def __aenter__(self) -> Self:
        self._heart.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Write down what is still to be written, if the store answers soon. Exchanges are over."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_S)
        self._ended.set()
        for task in tuple(self._tasks):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._threads.shutdown(wait=False)
        await asyncio.to_thread(self._heart.join, CLOSE_S)

    @property
    def unbalanced(self) -> int:
        """Requests with a key that wait or run; none where there is none."""
        return sum(line.users for line in self._lines.values())

    # ---- a request's part -------------------------------------------------------------------

    async def claim(
        self, tenant: str, request: Request, key: bytes, *, rerun: bool
    ) -> Claim | Answered:
        """The right to run it, or the answer that it has had; waits while another one runs.

        Args:
            rerun: running it twice does no harm.

        Raises:
            Unprocessable: the key came with another request.
            Conflict: it has not ended by this request's deadline; or it did, and cannot be told.
            Unavailable: the store is gone.
        """
        fingerprint = _fingerprint(request)
        line = self._join(tenant, key.decode("ascii"), fingerprint)
        wait_s = request.deadline_s - MARGIN_S - time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, wait_s)):
                await line.turn.acquire()
        except TimeoutError:
            self._part(line)
            raise _in_flight() from None
        except BaseException:
            self._part(line)
            raise
        try:
            found = await self._turn(line, fingerprint, request.deadline_s - MARGIN_S)
        except _Undone as undone:
            raise undone.reason from None  # its turn is given back by whoever undoes it
        except BaseException:
            self._give_back(line)
            raise
        if isinstance(found, Claimed):
            claim = Claim(self, line, found.attempt)
            self._claims.add(claim)
            if rerun or not found.orphaned:
                return claim
            claim.complete(_unknown(request))
            raise _outcome_unknown()
        self._give_back(line)
        if any(name == _NOT_KEPT for name, _ in found.headers):
            raise Conflict(
                "The request with this Idempotency-Key was executed, and its answer was too large "
                f"to be kept (more than {self.most_bytes} bytes). It is not executed again: use "
                "another key.",
                code="idempotent_answer_not_kept",
            )
        return found

    def _join(self, tenant: str, key: str, fingerprint: str) -> _Line:
        line = self._lines.get((tenant, key))
        if line is None:
            line = self._lines[tenant, key] = _Line(tenant, key)
        elif line.fingerprint not in (None, fingerprint):
            raise _other_request()
        elif line.users >= MOST_WAITING:
            raise _in_flight()
        line.users += 1
        return line

    def _part(self, line: _Line) -> None:
        line.users -= 1
        if line.users == 0:
            del self._lines[line.tenant, line.key]

    def _give_back(self, line: _Line) -> None:
        line.turn.release()
        self._part(line)

    async def _turn(self, line: _Line, fingerprint: str, until_s: float) -> Claimed | Answered:
        """It is its turn: what another one was answered, or what the store says."""
        if line.fingerprint not in (None, fingerprint):
            raise _other_request()
        if line.answer is None:
            found = await self._ask(line, fingerprint, until_s)
            line.fingerprint = fingerprint
            if isinstance(found, Claimed):
                return found
            line.answer = found
        return line.answer

    async def _ask(self, line: _Line, fingerprint: str, until_s: float) -> Claimed | Answered:
        """Ask the store until it is ours or answered."""
        polls = 0
        while True:
            if self._asking >= MOST_ASKING:
                raise _store_silent()
            asking = self._call(
                lambda: self._store.claim(
                    line.tenant,
                    line.key,
                    fingerprint=fingerprint,
                    owner=self._owner,
                    lease_s=self._lease_s,
                )
            )
            self._asking += 1
            try:
                async with asyncio.timeout(ASK_S):
                    found = await asyncio.shield(asking)
            except (asyncio.CancelledError, TimeoutError) as error:
                self._spawn(self._undo(line, asking))
                raise _Undone(error) from None
            finally:
                self._asking -= 1
            if isinstance(found, OtherRequest):
                raise _other_request()
            if not isinstance(found, InFlight):
                return found
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                raise _in_flight()
            pause_s = POLL_S[min(polls, len(POLL_S) - 1)]
            polls += 1
            pause_s = min(pause_s, max(found.lease_left_s, POLL_S[0]))
            await asyncio.sleep(min(pause_s, left_s))

    async def _undo(self, line: _Line, asking: asyncio.Future[Any]) -> None:
        """Nobody waits any more for what the store is being asked."""
        try:
            found = await asking
            if isinstance(found, Claimed):
                await self._call(lambda: self._store.release(line.tenant, line.key, found.attempt))
        except Unavailable:
            log.warning("a claim that nobody needs could not be given back")
        finally:
            self._give_back(line)

    # ---- its end ----------------------------------------------------------------------------

    def _leave(self, claim: Claim) -> None:
        self._spawn(self._free(claim, self._store.abandon))

    def _end(self, claim: Claim, answer: Answered | None) -> None:
        if answer is None:
            self._spawn(self._free(claim, self._store.release))
            return
        claim.line.answer = answer
        claim.line.turn.release()  # those who wait in this process need not wait for the store
        self._spawn(self._keep(claim, answer))

    async def _free(self, claim: Claim, how: Callable[[str, str, int], bool]) -> None:
        """The next one may have it, once the store has heard so."""
        line = claim.line

        def free() -> bool:
            return how(line.tenant, line.key, claim.attempt)

        try:
            try:
                await self._call(free)
            except Unavailable:
                line.turn.release()  # who waits is told that the store is gone
                await self._persist(free, 0)
            else:
                line.turn.release()
        except Unavailable:
            log.error("an idempotent request that came to nothing could not be given back")
        finally:
            self._claims.discard(claim)
            self._part(line)

    async def _keep(self, claim: Claim, answer: Answered) -> None:
        line = claim.line

        def complete() -> bool:
            return self._store.complete(
                line.tenant, line.key, claim.attempt, answer, keep_s=self._keep_s
            )

        try:
            if not await self._persist(complete, len(answer.body)):
                log.error("this gateway was taken for dead: an idempotent request may run twice")
        except Unavailable:
            log.error("an idempotent request's answer could not be kept: it may run twice")
        finally:
            self._claims.discard(claim)
            self._part(line)

    async def _persist(self, write: Callable[[], bool], size: int) -> bool:
        """Write something of so many bytes down; while the store is gone, try for a while."""
        give_up_s = time.monotonic() + PERSIST_S
        polls = 0
        while True:
            try:
                return await self._call(write)
            except Unavailable:
                if time.monotonic() > give_up_s or self._unkept_bytes + size > PERSIST_BYTES:
                    raise
            self._unkept_bytes += size
            try:
                await asyncio.sleep(POLL_S[min(polls, len(POLL_S) - 1)])
            finally:
                self._unkept_bytes -= size
            polls += 1

    # ---- the store --------------------------------------------------------------------------

    def _beat(self) -> None:
        """In its thread: say that this process lives, while it holds claims."""
        swept_s = time.monotonic()
        while not self._ended.wait(self._lease_s / BEATS):
            try:
                if self._claims or self._asking:
                    self._store.lives(self._owner, lease_s=self._lease_s)
                if time.monotonic() - swept_s > SWEEP_S:
                    swept_s = time.monotonic()
                    self._store.sweep()
            except Unavailable:
                log.warning(
                    "the store does not answer: %d keyed requests run on", len(self._claims)
                )
            except Exception:
                # A mistake of ours must not end the beats: the next one may do.
                log.exception("that this gateway lives could not be said")

    def _call(self, call: Callable[[], Result]) -> asyncio.Future[Result]:
        return asyncio.get_running_loop().run_in_executor(self._threads, call)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Undone(Exception):
    """The request does not wait any more for what the store is being asked."""

    def __init__(self, why: BaseException) -> None:
        super().__init__()
        self.reason = _store_silent() if isinstance(why, TimeoutError) else why


# ---- its answer ---------------------------------------------------------------------------------


class Keeper:
    """The Tap of a request with a claim: what the meter sees, and the answer to be kept."""

    __slots__ = ("_claim", "_fields", "_meter", "_most_bytes", "_parts", "_rerun", "_size_bytes")

    def __init__(self, meter: Meter, claim: Claim, *, rerun: bool, most_bytes: int) -> None:
        self._meter = meter
        self._claim = claim
        self._rerun = rerun
        self._most_bytes = most_bytes
        self._fields: tuple[tuple[str, str], ...] = ()
        self._parts: list[bytes] = []
        self._size_bytes = 0

    def on_head(self, status: int, fields: Fields) -> None:
        self._meter.on_head(status, fields)
        self._fields = tuple(
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in fields
            if name not in _PASSING and not name.startswith(b"x-ratelimit-")
        )

    def on_data(self, data: bytes) -> None:
        self._meter.on_data(data)
        self._size_bytes += len(data)
        if self._size_bytes <= self._most_bytes:
            self._parts.append(data)
        else:
            self._parts.clear()

    def on_end(self, outcome: Outcome, complete: bool) -> None:
        try:
            self._meter.on_end(outcome, complete)
        finally:
            self._conclude(outcome, complete)

    def _conclude(self, outcome: Outcome, complete: bool) -> None:
        claim, status = self._claim, self._meter.status
        ran = any(attempt.failure not in NEVER_SENT for attempt in outcome.attempts)
        whole = complete and outcome.error is None and not self._meter.broken
        if ran and whole and 0 < status < 500 and status != RateLimited.status:
            claim.complete(self._answer(status))
        elif self._rerun or not ran:
            claim.release()
        else:
            claim.leave()

    def _answer(self, status: int) -> Answered:
        if self._size_bytes > self._most_bytes:
            return Answered(status, ((_NOT_KEPT, str(self._size_bytes)),), b"")
        return Answered(status, self._fields, b"".join(self._parts))


def replay(answer: Answered, shown: Fields) -> Answer:
    """A kept answer as it is given again."""
    content_type = b"application/json"
    headers: list[tuple[bytes, bytes]] = [(b"idempotent-replayed", b"true"), *shown]
    for name, value in answer.headers:
        if name == "content-type":
            content_type = value.encode("latin-1")
        else:
            headers.append((name.encode("latin-1"), value.encode("latin-1")))
    return Answer(answer.status, answer.body, content_type, headers)


def _fingerprint(request: Request) -> str:
    hashed = hashlib.blake2b(digest_size=16)
    hashed.update(b"%b %b\n" % (request.method, request.target))
    hashed.update(request.body)
    return hashed.hexdigest()


def _unknown(request: Request) -> Answered:
    error = _outcome_unknown()
    headers = (("content-type", "application/json"),)
    return Answered(error.status, headers, error_bytes(error, request.dialect))


def _outcome_unknown() -> NearfieldError:
    return Conflict(
        "The request with this Idempotency-Key was begun, and nobody knows what came of it. It is "
        "not executed again: look whether it was, and use another key.",
        code="idempotency_outcome_unknown",
    )


def _store_silent() -> NearfieldError:
    return Unavailable(
        "Whether this Idempotency-Key was used before cannot be found out at present.",
        code="database_unavailable",
        retry_after_s=2.0,
    )


def _in_flight() -> NearfieldError:
    return Conflict(
        "A request with this Idempotency-Key is still being executed. Send it again later.",
        code="idempotency_in_flight",
        retry_after_s=1.0,
    )


def _other_request() -> NearfieldError:
    return Unprocessable(
        "This Idempotency-Key came with another request before: use a new one.",
        param="idempotency-key",
        code="idempotency_key_reused",
    )
