"""What the routes of one replica have in common: the model, its engine, the gate in front."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Self

from nearfield.api.events import (
    Completed,
    Embedded,
    Event,
    Failed,
    Inferred,
    Request,
    Task,
    Text,
    Timings,
)
from nearfield.api.load import ReplicaLoad, slots_of
from nearfield.core.errors import BadRequest, NearfieldError, NotFound, RateLimited
from nearfield.core.spec import ModelSpec
from nearfield.serving.departure import Departure
from nearfield.serving.engines.base import Capabilities
from nearfield.serving.gate import Gate, Place
from nearfield.serving.host import EngineHost, Flight
from nearfield.serving.http import Exchange
from nearfield.telemetry.setup import Moment

Numbered = tuple[int, Event]
"""An event and which of a call's requests it answers."""

_WAYS: dict[Task, str] = {
    "generate": "POST /v1/chat/completions or /v1/completions",
    "embed": "POST /v1/embeddings",
    "tensor": "POST /v2/models/{model}/infer",
}


@dataclass
class Tally:
    """What has been answered since the start. See `nearfield.api.load.ReplicaLoad`."""

    answered: int = 0
    answered_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    first_byte_s: float = 0.0

    def count(self, event: Completed | Embedded | Inferred) -> None:
        """One more answer is complete."""
        prompt = cached = computed = 0
        if isinstance(event, Completed):
            prompt, cached = event.prompt_tokens, event.cached_tokens
            computed = prompt - cached + event.completion_tokens
        elif isinstance(event, Embedded):
            prompt = computed = event.prompt_tokens
        self.answered += 1
        self.answered_tokens += max(1, computed)
        self.prompt_tokens += prompt
        self.cached_tokens += cached
        self.first_byte_s += event.timings.prefill_s


@dataclass
class Service:
    """One model behind one gate. `created_s` is Unix time, for `GET /v1/models`.

    Attributes:
        departure: when this replica goes.
    """

    spec: ModelSpec
    host: EngineHost
    gate: Gate
    departure: Departure
    created_s: int = field(default_factory=lambda: int(time.time()))
    tally: Tally = field(default_factory=Tally)

    @property
    def model(self) -> str:
        return self.spec.model

    @property
    def ready(self) -> bool:
        """A request that came now would start at once."""
        return self.host.ready and self.departure.due_s is None

    @property
    def capabilities(self) -> Capabilities:
        return self.host.capabilities

    def require_model(self, name: str, version: str | None = None) -> None:
        """Refuse a model that is not served here.

        Raises:
            NotFound: the message names the one that is.
        """
        if name != self.spec.model:
            raise NotFound(
                f"There is no model {name[:128]!r} here: ask for {self.spec.model!r}.",
                param="model",
                code="model_not_found",
            )
        if version is not None and version != self.spec.version:
            raise NotFound(
                f"Model {self.spec.model!r} has no version {version[:128]!r} here: it is at "
                f"version {self.spec.version!r}.",
                param="version",
                code="model_not_found",
            )

    def require_task(self, task: Task) -> None:
        """Refuse what the model cannot do.

        Raises:
            BadRequest: the message says what it can.
        """
        if task not in self.capabilities.tasks:
            ways = ", ".join(_WAYS[known] for known in sorted(self.capabilities.tasks))
            raise BadRequest(
                f"Model {self.spec.model!r} does not do this; use {ways}.",
                param="model",
                code="unsupported_task",
            )

    def moment(self) -> Moment:
        """The replica as it is now, for metrics."""
        stats, gate = self.host.stats, self.gate
        inside = min(stats.waiting, gate.running)  # what the engine itself keeps waiting
        return Moment(
            running=gate.running - inside,
            waiting=gate.waiting + inside,
            queue_age_s=max(gate.queue_age_s, stats.queue_age_s),
            batch_size=stats.batch_size,
            kv_usage=stats.kv_used / stats.kv_total if stats.kv_total else 0.0,
            steps=stats.steps,
            tokens=stats.tokens,
            crashes=self.host.crashes,
        )

    def load(self) -> ReplicaLoad:
        """The replica as it is now, for gateways."""
        moment, tally = self.moment(), self.tally
        request_s, busy_s = self.gate.inside()
        return ReplicaLoad(
            model=self.spec.model,
            version=self.spec.version,
            running=moment.running,
            waiting=moment.waiting,
            room=self.gate.room,
            queue_age_s=moment.queue_age_s,
            kv_usage=moment.kv_usage,
            tokens=moment.tokens,
            crashes=moment.crashes,
            slots=slots_of(self.spec),
            kv_total=self.host.stats.kv_total,
            answered=tally.answered,
            answered_tokens=tally.answered_tokens,
            prompt_tokens=tally.prompt_tokens,
            cached_tokens=tally.cached_tokens,
            first_byte_s=tally.first_byte_s,
            request_s=request_s,
            busy_s=busy_s,
            leaving=self.departure.due_s is not None,
        )

    def answer(
        self, exchange: Exchange, place: Place, requests: Sequence[Request], *, whole: bool
    ) -> Answer:
        """Run a call's requests; see `Answer`. `place` is the call's, already taken.

        Raises:
            RateLimited: there is no room for as many requests.
        """
        return Answer(self, exchange, place, requests, whole=whole)


class Answer:
    """The events of a call's requests as they come: an async iterator of lists, to be left.

    With `whole`, a request's events come in one list once they are complete. Telemetry is told
    on the way. A failure of any of the requests is raised, and ends all of them.
    """

    def __init__(
        self,
        service: Service,
        exchange: Exchange,
        place: Place,
        requests: Sequence[Request],
        *,
        whole: bool,
    ) -> None:
        self._host = service.host
        self._tally = service.tally
        self._record = exchange.record
        self._whole = whole
        deadline_s = exchange.deadline_s
        self._requests = [
            replace(request, deadline_s=deadline_s, flow=exchange.flow) for request in requests
        ]
        self._turn = exchange.flow, max(1.0, exchange.size / len(requests))
        self._exits = ExitStack()
        self._places = [place]
        try:
            for _ in self._requests[1:]:
                self._places.append(self._exits.enter_context(service.gate.place()))
        except RateLimited:
            self._exits.close()
            raise
        self._begun = False
        self._flight: Flight | None = None
        self._arrived: asyncio.Queue[list[Numbered] | BaseException] = asyncio.Queue()
        self._unfinished = len(self._requests)
        self._error: NearfieldError | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[Numbered]:
        if not self._begun:
            self._begun = True
            await self._begin()
        if self._error is not None:
            raise self._error
        if self._flight is not None:
            return self._noted([(0, event) for event in await anext(self._flight)])
        if not self._unfinished:
            raise StopAsyncIteration
        arrived = await self._arrived.get()
        if isinstance(arrived, BaseException):
            raise arrived
        return self._noted(arrived)

    async def _begin(self) -> None:
        if len(self._requests) == 1:
            await self._places[0].turn(*self._turn)
            self._flight = self._host.open(self._requests[0], whole=self._whole)
            self._exits.callback(self._flight.close)
            return
        for index, (request, place) in enumerate(zip(self._requests, self._places, strict=True)):
            task = asyncio.create_task(self._relay(index, request, place))
            self._exits.callback(task.cancel)

    async def _relay(self, index: int, request: Request, place: Place) -> None:
        """One of several requests, in a task of its own."""
        try:
            await place.turn(*self._turn)
            with self._host.open(request, whole=self._whole) as flight:
                async for events in flight:
                    self._arrived.put_nowait([(index, event) for event in events])
        except NearfieldError as error:
            self._arrived.put_nowait(error)
        finally:
            place.release()

    def _noted(self, arrived: list[Numbered]) -> list[Numbered]:
        """Tell telemetry; an answer that failed raises once what came before is handed over."""
        record = self._record
        for position, (_, event) in enumerate(arrived):
            if isinstance(event, Text):
                if record.first_token_s is None and not self._whole:
                    record.first_token_s = time.monotonic()
                if event.finish_reason is not None:
                    record.finish_reasons.append(event.finish_reason)
                continue
            if isinstance(event, Failed):
                self._error = event.error
                if not position:
                    raise event.error
                return arrived[:position]
            self._unfinished -= 1
            self._tally.count(event)
            if not self._unfinished:
                # Rendering and sending the rest is not the engine's work: let the next one in.
                self._places[0].release()
            record.timings = event.timings
            if isinstance(event, Completed):
                record.count(event.prompt_tokens, event.completion_tokens, event.cached_tokens)
                if record.first_token_s is None:
                    record.first_token_s = _first_token_s(event.timings)
            elif isinstance(event, Embedded):
                record.count(event.prompt_tokens)
        return arrived


def _first_token_s(timings: Timings) -> float:
    return timings.started_s + timings.queue_s + timings.prefill_s
