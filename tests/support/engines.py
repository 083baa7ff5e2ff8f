"""Drives an engine through its bare protocol, as a replica's worker does."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nearfield.api.events import Event, Failed, Request, Text
from nearfield.core.errors import NearfieldError
from nearfield.core.spec import ModelSpec
from nearfield.serving.engines.base import Capabilities, Engine, EngineContext

DEADLINE_S = 30.0


class Driver:
    """Collects what an engine emits. `events[id]` is in order of emission."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.events: dict[str, list[Event]] = {}
        self.capabilities: Capabilities | None = None
        self._changed = threading.Condition()

    def load(self, spec: dict[str, Any], weights: Path | None) -> Capabilities:
        model = ModelSpec.model_validate({"model": "m", **spec})
        context = EngineContext(model, weights, threads=1, emit=self._emit)
        self.capabilities = self.engine.load(context)
        return self.capabilities

    def _emit(self, batch: Sequence[tuple[str, Event]]) -> None:
        with self._changed:
            for request_id, event in batch:
                self.events.setdefault(request_id, []).append(event)
            self._changed.notify_all()

    def wait(self, request_id: str, count: int | None = None) -> list[Event]:
        """A request's events once it ended, or once there are `count` of them."""

        def ready() -> bool:
            events = self.events.get(request_id, [])
            ended = bool(events) and events[-1].terminal
            return ended or (count is not None and len(events) >= count)

        with self._changed:
            assert self._changed.wait_for(ready, DEADLINE_S), self.events.get(request_id)
            return list(self.events[request_id])

    def run(self, request: Request, request_id: str = "r") -> list[Event]:
        """Submit one request and wait for its end. Raises the error of one that failed."""
        self.events.pop(request_id, None)
        self.engine.submit(request_id, request)
        events = self.wait(request_id)
        if isinstance(events[-1], Failed):
            raise events[-1].error
        return events

    def refused(self, request: Request, request_id: str = "bad") -> NearfieldError:
        """The error of a request that must fail."""
        self.events.pop(request_id, None)
        self.engine.submit(request_id, request)
        end = self.wait(request_id)[-1]
        assert isinstance(end, Failed), end
        return end.error


def text_of(events: Sequence[Event], choice: int = 0) -> str:
    return "".join(e.text for e in events if isinstance(e, Text) and e.choice == choice)
