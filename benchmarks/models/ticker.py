"""An engine that costs nothing: what is left to measure is the way to it and back."""

from __future__ import annotations

import threading
import time

from nearfield.api.events import Completed, Event, GenerateRequest, Request, Text, Timings
from nearfield.core.errors import BadRequest
from nearfield.serving.engines.base import Capabilities, Engine, EngineContext


class Ticker(Engine):
    """One token for every running request each `period_s` (option, 0.005), as a batching engine
    emits them: in one message per step."""

    def load(self, context: EngineContext) -> Capabilities:
        self._period_s = float(context.options.get("period_s", 0.005))
        self._emit = context.emit
        self._wake = threading.Condition()
        self._left: dict[str, int] = {}
        self._started: dict[str, tuple[float, int]] = {}
        threading.Thread(target=self._run, name="ticker", daemon=True).start()
        return Capabilities(frozenset({"generate"}), "bench_ticker", max_model_len=65536, chat=True)

    def submit(self, request_id: str, request: Request) -> None:
        if not isinstance(request, GenerateRequest):
            raise BadRequest("text only")
        tokens = request.sampling.max_tokens or 200
        with self._wake:
            self._left[request_id] = tokens
            self._started[request_id] = (time.monotonic(), tokens)
            self._wake.notify()

    def cancel(self, request_id: str) -> None:
        with self._wake:
            self._left.pop(request_id, None)
            self._started.pop(request_id, None)

    def _run(self) -> None:
        due_s = time.perf_counter()
        while True:
            with self._wake:
                while not self._left:
                    self._wake.wait()
                    due_s = time.perf_counter()
                events = self._step()
            self._emit(events)
            due_s += self._period_s
            time.sleep(max(0.0, due_s - time.perf_counter()))

    def _step(self) -> list[tuple[str, Event]]:
        events: list[tuple[str, Event]] = []
        for request_id in list(self._left):
            self._left[request_id] -= 1
            done = self._left[request_id] == 0
            events.append((request_id, Text("tick ", finish_reason="length" if done else None)))
            if done:
                del self._left[request_id]
                started_s, tokens = self._started.pop(request_id)
                timings = Timings(started_s, decode_s=time.monotonic() - started_s, steps=tokens)
                events.append((request_id, Completed(1, tokens, timings)))
        return events
