"""One request's life: admit, pick, try, retry or hedge, relay, record.

    start → Gate.admit → Router.pick → Try ──head──→ relay ──→ over
                             ↑          │ fails before the first byte
                             └─Retries──┘

Whatever happens, it ends once: the Recorder hears of the request, and the Router of every try,
exactly one time each.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from nearfield.core.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineFailed,
    NearfieldError,
    Unavailable,
    UpstreamFailed,
)
from nearfield.edge.proxy import facts
from nearfield.edge.proxy.answers import last_words, refusal
from nearfield.edge.proxy.attempt import Try
from nearfield.edge.proxy.events import EventStream
from nearfield.edge.proxy.ports import (
    Answer,
    FailureKind,
    Feed,
    Fields,
    Grant,
    Leg,
    Outcome,
    Request,
    Soon,
    Tap,
    Target,
)

if TYPE_CHECKING:
    from nearfield.edge.proxy.proxy import Proxy

log = logging.getLogger("nearfield.edge.proxy")

PERHAPS_ELSEWHERE = frozenset((429, 500, 502, 503, 504))
"""Statuses after which another target may do better."""
NOWHERE = frozenset((b"engine_crashed",))
"""... but for these codes: the engine died of it, was started again, and died of it again."""
EVENT_STREAM_FIELDS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
)


class Client(Protocol):
    """The caller's side of one exchange, whatever protocol it speaks."""

    def begin(self, status: int, fields: Fields, length: int | None) -> None:
        """The answer's head; `length` of the body where it is known."""
        ...

    def write(self, data: bytes) -> None:
        """A part of the body. May call `Exchange.pause` before it returns."""
        ...

    def end(self) -> None:
        """The answer is complete."""
        ...

    def abort(self) -> None:
        """The answer breaks off here, and the client must notice."""
        ...

    def answer(self, answer: Answer) -> None:
        """A whole answer, in place of `begin` to `end`."""
        ...

    def over(self) -> None:
        """The exchange is over: another one may start."""
        ...


class _Nobody:
    """In place of a client that has left while its answer is still wanted."""

    def begin(self, status: int, fields: Fields, length: int | None) -> None: ...
    def write(self, data: bytes) -> None: ...
    def end(self) -> None: ...
    def abort(self) -> None: ...
    def answer(self, answer: Answer) -> None: ...
    def over(self) -> None: ...


_NOBODY = _Nobody()


class Exchange:
    """See the module. Created by the client's side, which calls `start`, and later `pause`,
    `resume` and `client_left`."""

    __slots__ = (
        "_client", "_events", "_feed", "_grant", "_hedge", "_over", "_paused", "_proxy", "_tap",
        "_tries", "_waits_for", "_winner", "due_s", "outcome", "request", "timer",
    )  # fmt: skip

    def __init__(self, proxy: Proxy, client: Client, request: Request) -> None:
        self._proxy = proxy
        self._client = client
        self.request = request
        self.outcome = Outcome(request)
        self.due_s = request.deadline_s
        self.timer: asyncio.TimerHandle | None = None
        self._grant: Grant | None = None
        self._tap: Tap | None = None
        self._tries: list[Try] = []  # those under way
        self._winner: Try | None = None  # whose answer is relayed
        self._events: EventStream | None = None
        self._feed: Feed | None = None  # in place of all tries
        self._hedge: asyncio.TimerHandle | None = None
        self._waits_for: asyncio.Future[Any] | None = None
        self._paused = False
        self._over = False

    # ---- deciding ---------------------------------------------------------------------------

    def refuse(self, error: NearfieldError) -> None:
        """In place of `start`: answer with this."""
        self._reply(error)

    def start(self) -> None:
        """Run: the request is complete. It may be over when this returns."""
        proxy = self._proxy
        proxy.live.add(self)
        proxy.timers.watch(self)
        wait_s = proxy.standstill.wait_s()
        if wait_s:
            proxy.loop.call_later(wait_s, self._begin)
        else:
            self._begin()

    def _begin(self) -> None:
        if self._over:
            return  # the client had left, or the deadline had passed, while we stood still
        request = self.request
        if request.says_model and request.method == b"POST":
            refused = facts.learn(request)
            if refused is not None:
                self._reply(refused)
                return
        self._guard(self._admit)

    def _guard(self, step: Callable[..., None], *given: Any) -> None:
        """Take a step that asks ports. What they raise is a bug, and ends this request only."""
        try:
            step(*given)
        except Exception:
            log.exception("a request failed unexpectedly")
            self._bug()

    def _admit(self) -> None:
        request = self.request
        if request.page is not None:
            self._settle(request.page(request), self._turned)
            return
        verdict = self._proxy.gate.admit(request)
        if type(verdict) is Grant:
            self._admitted(verdict)
        else:
            self._settle(verdict, self._admitted)

    def _turned(self, page: Answer | Feed) -> None:
        if isinstance(page, Answer):
            self._reply(page)
            return
        self._feed = page
        if self.request.deadline_s != self.due_s:
            self.due_s = self.request.deadline_s
            self._proxy.timers.sooner(self)
        self.outcome.status = 200
        self.outcome.first_byte_s = time.monotonic()
        fields = [*EVENT_STREAM_FIELDS, (b"x-request-id", self.request.request_id)]
        self._client.begin(200, fields, None)
        page.open(self)

    def _settle(self, found: Any, then: Callable[[Any], None]) -> None:
        """Go on with what a port found, now or when it is known."""
        if not isinstance(found, asyncio.Future):
            then(found)
            return

        def resolved(future: asyncio.Future[Any]) -> None:
            self._waits_for = None
            if self._over:
                self._guard(self._unwanted, future)
                return
            if future.cancelled():
                self._reply(Unavailable("The gateway could not decide.", retry_after_s=1.0))
            else:
                self._guard(lambda: then(future.result()))

        self._waits_for = found
        found.add_done_callback(resolved)

    def _unwanted(self, found: asyncio.Future[Any]) -> None:
        """What a port found comes too late. Whoever keeps books on a grant must hear of its end."""
        if not found.cancelled() and found.exception() is None:
            verdict = found.result()
            if isinstance(verdict, Grant) and verdict.tap is not None:
                verdict.tap.on_end(self.outcome, False)

    def _admitted(self, verdict: Grant | Answer | NearfieldError) -> None:
        if not isinstance(verdict, Grant):
            self._reply(verdict)
            return
        self._grant = self.outcome.grant = verdict
        self._tap = verdict.tap
        if self.request.deadline_s < self.due_s:
            self.due_s = self.request.deadline_s
            self._proxy.timers.sooner(self)
        self._pick()
        if self._tries:
            hedge_s = self._proxy.retries.hedge_after_s(self.request, verdict)
            if hedge_s is not None:
                self._hedge = self._proxy.loop.call_later(hedge_s, self._guard, self._start_hedge)

    def _pick(self) -> None:
        assert self._grant is not None
        found = self._proxy.router.pick(self.request, self._grant, self.outcome.attempts)
        if isinstance(found, Leg):
            self._launch(found)
        else:
            self._settle(found, self._picked)

    def _picked(self, found: Leg | Answer | NearfieldError) -> None:
        if isinstance(found, Leg):
            self._launch(found)
        else:
            self._reply(found)

    def _launch(self, leg: Leg) -> None:
        attempt = Try(self, self._proxy, leg)
        # A kept connection that had died under the last try says that its pool may be dead too.
        fresh = False
        if self.outcome.attempts:
            last = self.outcome.attempts[-1]
            fresh = last.reused and last.failure == "closed" and last.leg.target is leg.target
        self.outcome.attempts.append(attempt)
        self._tries.append(attempt)
        assert self._grant is not None
        attempt.request, attempt.grant = self.request, self._grant
        self._proxy.router.began(attempt)
        attempt.launch(self.request, self._grant, fresh=fresh)

    def _start_hedge(self) -> None:
        self._hedge = None
        if self._over or self._winner is not None or self._waits_for is not None:
            return
        assert self._grant is not None
        found = self._proxy.router.pick(self.request, self._grant, self.outcome.attempts)
        if isinstance(found, Leg):
            self._launch(found)
        elif isinstance(found, asyncio.Future):
            found.cancel()  # a second try that has to be waited for comes too late

    # ---- a try reports ----------------------------------------------------------------------

    def on_failed(self, attempt: Try, kind: FailureKind) -> None:
        """A try ended without a complete answer."""
        attempt.finish(kind)
        self._tries.remove(attempt)
        if self._over:
            return
        if attempt is self._winner:
            self._break(_failure(kind))
        elif not self._tries:
            self._guard(self._go_on, kind)

    def _go_on(self, kind: FailureKind) -> None:
        assert self._grant is not None
        if self._proxy.retries.again(self.request, self._grant, self.outcome.attempts):
            self._pick()
        else:
            self._reply(_failure(kind, harmless=self._grant.replayable))

    def on_head(
        self, attempt: Try, status: int, fields: list[tuple[bytes, bytes]], length: int | None
    ) -> None:
        """A try has got the head of an answer."""
        if status in PERHAPS_ELSEWHERE and attempt.code not in NOWHERE:
            attempt.failure = "status"
            # What stands before the models says 503 in words of its own, which tell nobody much.
            telling = (
                status != 503 or bool(attempt.code) or any(n == b"retry-after" for n, _ in fields)
            )
            self._guard(self._elsewhere, attempt, telling)
            if attempt not in self._tries:
                return
        self._winner = attempt
        for other in tuple(self._tries):
            if other is not attempt:
                self._cancel(other)
        if self._hedge is not None:
            self._hedge.cancel()
            self._hedge = None
        for name, value in fields:
            if name == b"content-type" and value.startswith(b"text/event-stream"):
                if not any(name == b"content-encoding" for name, _ in fields):
                    self._events = EventStream()
                break
        grant, request = self._grant, self.request
        assert grant is not None
        fields += attempt.leg.shown
        fields += grant.shown
        fields.append((b"x-request-id", request.request_id))
        self.outcome.status = status
        self.outcome.first_byte_s = attempt.first_byte_s
        if self._tap is not None:
            self._tap.on_head(status, fields)
        self._client.begin(status, fields, length if self._events is None else None)

    def _elsewhere(self, attempt: Try, telling: bool) -> None:
        """End a try that was told to go elsewhere, if there is anything better than that answer.

        Args:
            telling: it says to a caller what to do; else our own refusal is better.
        """
        assert self._grant is not None
        if len(self._tries) > 1:
            self._discard(attempt)
            return
        found: Soon[Leg | Answer] | None = None
        if self._proxy.retries.again(self.request, self._grant, self.outcome.attempts):
            found = self._proxy.router.pick(self.request, self._grant, self.outcome.attempts)
        if isinstance(found, asyncio.Future):
            found.cancel()  # the answer is here, and would have to be held meanwhile
            found = None
        if isinstance(found, Leg):
            self._discard(attempt)
            self._launch(found)
        elif not telling:
            self._discard(attempt)
            self._reply(_failure("refused") if found is None else found)

    def _discard(self, attempt: Try) -> None:
        self._tries.remove(attempt)
        attempt.discard()

    def on_data(self, data: bytes) -> None:
        """A part of the winner's answer."""
        if self._events is not None:
            data = self._events.take(data)
            if not data:
                return
        self.outcome.body_bytes += len(data)
        if self._tap is not None:
            self._tap.on_data(data)
        self._client.write(data)

    def on_end(self, attempt: Try) -> None:
        """The winner's answer is complete."""
        attempt.finish(attempt.failure)
        self._tries.remove(attempt)
        if self._over:
            return
        if self._events is not None and (rest := self._events.rest()):
            self.outcome.body_bytes += len(rest)
            self._client.write(rest)
        self._client.end()
        self._finish(complete=True)

    # ---- Line, for a feed -------------------------------------------------------------------

    def send(self, data: bytes) -> bool:
        if self._over or self._paused:
            return False
        self.outcome.body_bytes += len(data)
        self._client.write(data)
        return True

    def end(self) -> None:
        if not self._over:
            self._client.end()
            self._finish(complete=True)

    # ---- the client and the clock report ----------------------------------------------------

    def pause(self) -> None:
        """The client reads too slowly: the upstream is not read until `resume`."""
        self._paused = True
        if self._winner is not None:
            self._winner.pause()

    def resume(self) -> None:
        self._paused = False
        if self._winner is not None:
            self._winner.resume()

    def client_left(self) -> None:
        """Nobody waits for the answer any more: what runs for it is cancelled at once."""
        if self._over:
            return
        if self._tries and self._grant is not None and self._grant.outlives:
            self._client = _NOBODY
            self.resume()
            return
        self.outcome.error = "cancelled"
        self.outcome.status = self.outcome.status or Cancelled.status
        self._finish(complete=False)

    def on_due(self, now_s: float) -> None:
        """The deadline has passed."""
        if self._feed is not None:
            self.end()
            return
        for attempt in self._tries:
            attempt.failure = "deadline"
        error = DeadlineExceeded(
            "The request's deadline passed before its answer was complete. Ask for less, or allow "
            "more time with x-request-timeout-ms."
        )
        if self._winner is None:
            self._reply(error)
        else:
            self._break(error)

    def cut(self) -> None:
        """The process stops and cannot wait any longer."""
        if self._feed is not None:
            self.end()
            return
        error = Unavailable("The gateway is stopping. Send the request again.", retry_after_s=1.0)
        if self._winner is None:
            self._reply(error)
        else:
            self._break(error)

    def abandon(self, target: Target) -> None:
        """Whoever watches `target` has given it up: do not wait for what is asked of it."""
        for attempt in tuple(self._tries):
            if attempt.leg.target is target:
                attempt.abandon()

    # ---- ending -----------------------------------------------------------------------------

    def _reply(self, answer: Answer | NearfieldError) -> None:
        """Answer with something made here."""
        if isinstance(answer, NearfieldError):
            self.outcome.error = answer.code or answer.type
            answer = refusal(answer, self.request.dialect)
        else:
            self.outcome.error = answer.error
        self.outcome.status = answer.status
        self.outcome.body_bytes = len(answer.body)
        self.outcome.first_byte_s = time.monotonic()
        shown: list[tuple[bytes, bytes]] = [(b"x-request-id", self.request.request_id)]
        if self._grant is not None:
            shown += self._grant.shown
        headers = [*answer.headers, *shown]
        self._client.answer(Answer(answer.status, answer.body, answer.content_type, headers))
        self._finish(complete=True)

    def _break(self, error: NearfieldError) -> None:
        """The answer has begun and cannot be completed: end it so that the client notices."""
        self.outcome.error = error.code or error.type
        words = None
        if self._events is not None:
            words = self._events.last_words(last_words(error, self.request.dialect))
        if words is None:
            self._client.abort()
        else:
            self.outcome.body_bytes += len(words)
            self._client.write(words)
            self._client.end()
        self._finish(complete=False)

    def _bug(self) -> None:
        """The caller gets an id to report."""
        if self._over:
            return
        request_id = self.request.request_id.decode("latin-1")
        error = EngineFailed(
            f"Something went wrong in the gateway. Its log has it under {request_id}.",
            code="internal_error",
        )
        if self._feed is not None:
            self._client.abort()
            self._finish(complete=False)
        elif self._winner is None:
            self._reply(error)
        else:
            self._break(error)

    def _finish(self, *, complete: bool) -> None:
        self._over = True
        proxy = self._proxy
        proxy.live.discard(self)
        proxy.timers.unwatch(self)
        if self._hedge is not None:
            self._hedge.cancel()
            self._hedge = None
        if self._waits_for is not None:
            self._waits_for.cancel()
        for attempt in tuple(self._tries):
            self._cancel(attempt)
        self._winner = None
        feed, self._feed = self._feed, None
        if feed is not None:
            self._guard(feed.closed)
        self.outcome.ended_s = time.monotonic()
        self._guard(self._record, complete)
        self._client.over()

    def _record(self, complete: bool) -> None:
        try:
            if self._tap is not None:
                self._tap.on_end(self.outcome, complete)
        finally:
            self._proxy.recorder.done(self.outcome)

    def _cancel(self, attempt: Try) -> None:
        self._tries.remove(attempt)
        attempt.cancel()


def _failure(kind: FailureKind, *, harmless: bool = False) -> NearfieldError:
    """What the caller is told when no target gave a complete answer.

    Args:
        harmless: running it again does no harm, also where it may have run.
    """
    if kind in ("refused", "connect_timeout", "abandoned") or (harmless and kind == "closed"):
        return Unavailable(
            "No replica of the model can be reached at the moment. Send the request again later.",
            retry_after_s=1.0,
        )
    if kind == "truncated":
        return UpstreamFailed("The model's answer broke off. Send the request again.")
    return UpstreamFailed("The replica failed before it answered. Send the request again.")
