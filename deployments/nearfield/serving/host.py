"""The replica's side of its engine: starts the process, talks to it, survives it.

The engine runs in a process of its own, so that a crash in native code, a leak or a dead lock
costs an engine and not a replica. When the process dies, `EngineHost` starts it again and
answers the requests that were inside it:

- those that had already streamed something to their client fail, in so many words: their
  continuation could differ from what was sent;
- the others run once more, one at a time, the likeliest culprit first, while new arrivals wait.
  The one that takes the process down again fails with `engine_crashed`; the rest are answered.

No request runs more than twice. A process that stops giving signs of life, or that answers
nobody for a whole request's lifetime, is killed and treated the same.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Self

from nearfield.api.events import Event, Failed, Request
from nearfield.core.errors import EngineFailed, NearfieldError, Unavailable
from nearfield.core.spec import ModelSpec
from nearfield.serving.engines.base import Capabilities, EngineStats, Slice
from nearfield.serving.framing import Kind, unpack_event
from nearfield.serving.process import EngineProcess, exit_in_words, start_process

log = logging.getLogger("nearfield.host")

HEARTBEAT_TIMEOUT_S = 15.0
"""No sign of life from the process for so long means it is stopped or wedged."""
RETRY_ALONE_S = 30.0
"""How long suspects run one at a time before the rest go on together."""
MAX_CRASHES = 8
"""Crashes that no one request explains, without an answer in between, before giving up."""
MAX_LOAD_FAILURES = 3
BACKOFF_S = (0.0, 0.2, 0.5, 1.0, 2.0, 5.0)
CLOSE_TIMEOUT_S = 5.0


class Flight:
    """One request inside the engine, and its answer so far.

    Iterate over it for lists of events: everything that has arrived since the last time, so that
    one wake-up may hand over several. Leave its `with` block, or `close` it, to cancel.

    With `whole`, the events come in one list once the answer is complete. Nothing of it has
    been shown to anybody before, so a crash can be made good by running the request again.
    """

    def __init__(self, host: EngineHost, request_id: str, request: Request, whole: bool) -> None:
        self.id = request_id
        self.request = request
        self.whole = whole
        self.opened_s = time.monotonic()
        self.runs = 0
        self.answered = False
        self.ended = False
        self._host = host
        self._events: list[Event] = []
        self._waiter: asyncio.Future[None] | None = None

    @property
    def shown(self) -> bool:
        """Somebody may have seen a part of the answer, so it cannot be made again."""
        return self.answered and not self.whole

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[Event]:
        while not self._events or (self.whole and not self.ended):
            if self.ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        """Cancel, unless the answer is complete. May be called again."""
        self._host._leave(self)

    def deliver(self, event: Event) -> None:
        """Add an event of the answer (the host's business)."""
        self._events.append(event)
        self.answered = True
        if event.terminal:
            self.ended = True
        elif self.whole:
            return
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def forget(self) -> None:
        """Drop what a dead process had answered and nobody has seen (the host's business)."""
        if self.whole:
            self._events.clear()


class EngineHost:
    """Runs one model's engine. One event loop's property: nothing here is thread-safe."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        threads: int = 1,
        heartbeat_timeout_s: float = HEARTBEAT_TIMEOUT_S,
        stall_timeout_s: float | None = None,
        retry_alone_s: float = RETRY_ALONE_S,
        max_crashes: int = MAX_CRASHES,
    ) -> None:
        """
        Args:
            threads: CPU threads of the engine.
            heartbeat_timeout_s: no sign of life for so long: the process is killed.
            stall_timeout_s: no answer to anybody for so long: likewise. Absent: the spec's
                `limits.timeout_s`.
            retry_alone_s: how long suspects of a crash run one at a time.
            max_crashes: unexplained crashes in a row before `healthy` is False.
        """
        self.capabilities = Capabilities(frozenset(), "")
        self.healthy = False
        self.crashes = 0
        self._spec = spec
        self._threads = threads
        self._slice: Slice | None = None
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._stall_timeout_s = stall_timeout_s or spec.limits.timeout_s
        self._retry_alone_s = retry_alone_s
        self._max_crashes = max_crashes
        self._unexplained = 0
        self._numbers = itertools.count(1)
        self._flights: dict[str, Flight] = {}
        self._waiting: deque[Flight] = deque()
        self._process: EngineProcess | None = None
        self._open = False
        self._alone: Flight | None = None
        self._alone_over = asyncio.Event()
        self._supervisor: asyncio.Task[None] | None = None

    # ---- for the replica --------------------------------------------------------------------

    @property
    def stats(self) -> EngineStats:
        """The engine's last word about itself, at most about a second old."""
        return EngineStats() if self._process is None else self._process.stats

    @property
    def pid(self) -> int | None:
        """The engine's process, None while there is none."""
        return None if self._process is None else self._process.popen.pid

    @property
    def ready(self) -> bool:
        """A request that came now would start at once (False while a process is replaced)."""
        return self.healthy and self._open

    async def start(self, slice_: Slice | None = None) -> None:
        """Start the process and load the model.

        Args:
            slice_: what the engine runs on, where the spec asks for a slice.

        Raises:
            NearfieldError: the model cannot be served; the message says why.
        """
        self._slice = slice_
        process = await self._start_process()
        self.healthy = True
        self._supervisor = asyncio.create_task(self._supervise(process), name="engine host")

    def open(self, request: Request, *, whole: bool = False) -> Flight:
        """Send a request to the engine; see `Flight`.

        Raises:
            Unavailable: the engine is beyond repair or closed.
        """
        if not self.healthy:
            raise _engine_down()
        flight = Flight(self, f"{next(self._numbers)}", request, whole)
        self._flights[flight.id] = flight
        if self._open:
            self._submit(flight)
        else:
            self._waiting.append(flight)
        return flight

    async def close(self) -> None:
        """End the process and every request. May be called again."""
        self.healthy = False
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
            self._supervisor = None
        process, self._process = self._process, None
        if process is not None:
            process.send(Kind.CLOSE)
            await process.reap(CLOSE_TIMEOUT_S)
        self._fail_everybody()

    # ---- requests ---------------------------------------------------------------------------

    def _submit(self, flight: Flight) -> None:
        assert self._process is not None
        flight.runs += 1
        self._process.send(Kind.SUBMIT, (flight.id, flight.request))

    def _dispatch(self, events: Sequence[tuple[str, Any]]) -> None:
        flights = self._flights
        for request_id, packed in events:
            flight = flights.get(request_id)
            if flight is None:
                continue  # cancelled meanwhile
            event = unpack_event(packed)
            flight.deliver(event)
            if event.terminal:
                if not isinstance(event, Failed):
                    self._unexplained = 0
                self._forget(flight)

    def _leave(self, flight: Flight) -> None:
        if self._flights.get(flight.id) is not flight:
            return
        self._forget(flight)
        if flight.runs and self._process is not None:
            self._process.send(Kind.CANCEL, flight.id)

    def _forget(self, flight: Flight) -> None:
        del self._flights[flight.id]
        if flight is self._alone:
            self._alone_over.set()

    def _fail(self, flight: Flight, error: NearfieldError) -> None:
        flight.forget()
        flight.deliver(Failed(error))
        self._forget(flight)

    def _fail_everybody(self) -> None:
        for flight in list(self._flights.values()):
            self._fail(flight, _stopped() if flight.shown else _engine_down())
        self._waiting.clear()

    # ---- the process ------------------------------------------------------------------------

    async def _start_process(self) -> EngineProcess:
        process = await start_process(self._spec, self._threads, self._dispatch, self._slice)
        self.capabilities = process.loaded.result()
        self._process = process
        return process

    # ---- supervision ------------------------------------------------------------------------

    async def _supervise(self, process: EngineProcess) -> None:
        try:
            await self._keep_running(process)
        except Exception:
            # A mistake here would leave every request waiting for ever.
            log.exception("the engine's supervisor failed")
            self._give_up("its supervisor failed")

    async def _keep_running(self, process: EngineProcess) -> None:
        suspects: deque[Flight] = deque()
        while self.healthy:
            watch = asyncio.create_task(self._watch(process))
            try:
                await self._retry(process, suspects)
                if not process.ended.done():
                    self._release()
                await process.ended
            finally:
                self._open = False
                watch.cancel()
            await self._after_crash(process, suspects)
            process = await self._restart(process)

    def _release(self) -> None:
        """Let everybody who waited in."""
        self._open = True
        while self._waiting:
            flight = self._waiting.popleft()
            if flight.id in self._flights:
                self._submit(flight)

    async def _retry(self, process: EngineProcess, suspects: deque[Flight]) -> None:
        """Run the suspects of the last crash, one at a time while time allows."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + self._retry_alone_s
        while suspects and not process.ended.done() and loop.time() < until_s:
            flight = suspects.popleft()
            if flight.id not in self._flights:
                continue
            self._alone = flight
            self._alone_over.clear()
            self._submit(flight)
            over = asyncio.create_task(self._alone_over.wait())
            try:
                either: set[asyncio.Future[Any]] = {over, process.ended}
                await asyncio.wait(
                    either, timeout=until_s - loop.time(), return_when=asyncio.FIRST_COMPLETED
                )
            finally:
                answered = over.done()
                over.cancel()
            if answered or not process.ended.done():
                self._alone = None
        if not process.ended.done():
            self._waiting.extendleft(reversed(suspects))
            suspects.clear()

    async def _after_crash(self, process: EngineProcess, suspects: deque[Flight]) -> None:
        """Settle what was inside a process that is gone; `suspects` becomes who to run again."""
        self._process = None
        status = await process.reap()
        how = process.killed_because or f"its process {exit_in_words(status)}"
        self.crashes += 1
        culprit, self._alone = self._alone, None
        if culprit is None:
            self._unexplained += 1
        inside = [flight for flight in self._flights.values() if flight.runs]
        waiting_again = set(suspects)
        again: list[Flight] = []
        for flight in inside:
            if flight in waiting_again:
                continue
            if flight.runs > 1 or flight.shown:
                self._fail(flight, _stopped())
            else:
                again.append(flight)
        # Who had just come is likelier to have done it than who had been running well.
        again.sort(key=lambda flight: (flight.answered, -int(flight.id)))
        for flight in again:
            flight.forget()
        suspects.extend(again)
        log.error(
            "the engine stopped: %s; %d requests run again, %d wait",
            how,
            len(suspects),
            len(self._waiting),
        )
        if self._unexplained > self._max_crashes:
            self._give_up(f"the engine stopped {self._unexplained} times in a row")

    async def _restart(self, gone: EngineProcess) -> EngineProcess:
        """A new process; `gone` itself if that is not to be."""
        failures = 0
        while self.healthy:
            await asyncio.sleep(_backoff_s(self._unexplained + failures))
            try:
                return await self._start_process()
            except (NearfieldError, OSError) as error:
                failures += 1
                log.error("the engine could not be started again: %s", error)
                if failures >= MAX_LOAD_FAILURES:
                    self._give_up("the engine could not be started again")
        return gone

    def _give_up(self, why: str) -> None:
        self.healthy = False
        log.error("giving up: %s", why)
        self._fail_everybody()

    async def _watch(self, process: EngineProcess) -> None:
        """Kill a process that lives but does not work."""
        period_s = min(1.0, self._heartbeat_timeout_s / 4)
        before_s = time.monotonic()
        while True:
            await asyncio.sleep(period_s)
            now_s = time.monotonic()
            elapsed_s, before_s = now_s - before_s, now_s
            if elapsed_s > period_s + 1.0:
                # We were the ones who stood still: its messages wait unread in our socket.
                process.heard_s = now_s
            elif self._flights:
                process.unanswered_s += elapsed_s
                silent_s = now_s - process.heard_s
                if silent_s > self._heartbeat_timeout_s:
                    process.kill(f"it gave no sign of life for {silent_s:.0f} s")
                elif process.unanswered_s > self._patience_s():
                    process.kill(f"it answered nobody in {process.unanswered_s:.0f} s of work")

    def _patience_s(self) -> float:
        """How long nobody may be answered: a request's lifetime, the longest of those inside."""
        lifetimes_s = (
            flight.request.deadline_s - flight.opened_s
            for flight in self._flights.values()
            if flight.request.deadline_s is not None
        )
        return max(self._stall_timeout_s, max(lifetimes_s, default=0.0))


def _stopped() -> EngineFailed:
    return EngineFailed(
        "The model's engine stopped while it worked on this request. What was received so far "
        "is incomplete.",
        code="engine_crashed",
    )


def _engine_down() -> Unavailable:
    return Unavailable(
        "The model's engine is not running here. Try again: another replica may answer.",
        code="engine_down",
        retry_after_s=5,
    )


def _backoff_s(failures: int) -> float:
    return BACKOFF_S[max(0, min(failures, len(BACKOFF_S)) - 1)]
