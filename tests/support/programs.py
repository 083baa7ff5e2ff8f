"""Engines that misbehave on request: they run in real child processes.

A prompt is a small program: words separated by spaces, each done in turn.

    say:TEXT     yield TEXT                     sleep:SECONDS  take so long
    exit:CODE    end the process at once        segv           crash as native code does
    stop         SIGSTOP the own process        raise          fail as Python code does
    touch:PATH   note that we came by here      block:SECONDS  stop the event loop so long
    wait:PATH    until that file is there
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nearfield.api.events import (
    Completed,
    Event,
    GenerateRequest,
    Request,
    Text,
    Timings,
)
from nearfield.core.errors import BadRequest
from nearfield.serving.engines.base import (
    Capabilities,
    Engine,
    EngineContext,
    EngineStats,
    FunctionEngine,
    TensorMetadata,
)
from numpy.typing import NDArray


class Programs(FunctionEngine):
    """Does what the prompt says."""

    dimensions = 3
    inputs = (TensorMetadata("x", "FP32", (-1, 2)),)
    outputs = (TensorMetadata("sum", "FP32", (-1,)),)

    def setup(self, context: EngineContext) -> None:
        print("the engine prints this while it loads", flush=True)
        options: dict[str, Any] = getattr(context.spec.engine, "options", {})
        if "refuse" in options:
            raise BadRequest(options["refuse"])
        if "raise" in options:
            raise RuntimeError(options["raise"])
        if "exit" in options and not _spent(options.get("exit_after")):
            print("these are the last words", flush=True)
            os._exit(int(options["exit"]))

    async def generate(self, request: GenerateRequest) -> AsyncIterator[str]:
        prompt = request.prompt or str((request.messages or ({"content": ""},))[-1]["content"])
        for word in prompt.split():
            verb, _, value = word.partition(":")
            if verb == "say":
                yield value
            elif verb == "sleep":
                await asyncio.sleep(float(value))
            elif verb == "wait":
                while not Path(value).exists():  # noqa: ASYNC110, ASYNC240 (another process)
                    await asyncio.sleep(0.005)
            elif verb == "block":
                time.sleep(float(value))  # noqa: ASYNC251 (it is meant to block everybody)
            elif verb == "exit":
                os._exit(int(value))
            elif verb == "touch":
                with Path(value).open("a") as file:  # noqa: ASYNC230
                    file.write(f"{os.getpid()}\n")
            elif verb == "segv":
                ctypes.string_at(0)
            elif verb == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
                await asyncio.sleep(1)  # other threads may stop a moment before this one
            elif verb == "raise":
                raise RuntimeError("a secret that the caller must not see")
            else:
                yield word

    def embed(self, texts: list[str]) -> NDArray[np.float32]:
        return np.array([[len(t), 1, 2] for t in texts], dtype=np.float32)

    def infer(self, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return {"sum": inputs["x"].sum(axis=-1)}


def _spent(path: str | None) -> bool:
    """True the first time only: then the file is there."""
    if path is None:
        return False
    marker = Path(path)
    if marker.exists():
        return False
    marker.touch()
    return True


class Ticker(Engine):
    """Emits one token for every running request each `period_s`, as a batching engine does.

    Options: `period_s` (0.003), `tokens` (32, when a request sets no max_tokens).
    """

    def load(self, context: EngineContext) -> Capabilities:
        import threading

        options: dict[str, Any] = getattr(context.spec.engine, "options", {})
        self._period_s = float(options.get("period_s", 0.003))
        self._tokens = int(options.get("tokens", 32))
        self._emit = context.emit
        self._wake = threading.Condition()
        self._left: dict[str, int] = {}
        self._started: dict[str, tuple[float, int]] = {}
        self._steps = self._made = 0
        threading.Thread(target=self._run, daemon=True).start()
        return Capabilities(frozenset({"generate"}), "test_ticker", max_model_len=4096, chat=True)

    def submit(self, request_id: str, request: Request) -> None:
        if not isinstance(request, GenerateRequest):
            raise BadRequest("text only")
        tokens = request.sampling.max_tokens or self._tokens
        with self._wake:
            self._left[request_id] = tokens
            self._started[request_id] = (time.monotonic(), tokens)
            self._wake.notify()

    def cancel(self, request_id: str) -> None:
        with self._wake:
            self._left.pop(request_id, None)

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self._left), steps=self._steps, batch_size=len(self._left),
            tokens=self._made, kv_used=10 * len(self._left), kv_total=1000,
        )  # fmt: skip

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._left:
                    self._wake.wait()
                events = self._step()
            self._emit(events)
            time.sleep(self._period_s)

    def _step(self) -> Sequence[tuple[str, Event]]:
        events: list[tuple[str, Event]] = []
        self._steps += 1
        batch = len(self._left)
        for request_id in list(self._left):
            self._left[request_id] -= 1
            self._made += 1
            done = self._left[request_id] == 0
            events.append((request_id, Text("tok ", finish_reason="length" if done else None)))
            if done:
                del self._left[request_id]
                started_s, tokens = self._started.pop(request_id)
                timings = Timings(
                    started_s, 0.0, self._period_s, (tokens - 1) * self._period_s, batch, tokens
                )
                events.append((request_id, Completed(3, tokens, timings)))
        return events


class Lengths(FunctionEngine):
    """Embeds texts by their length."""

    dimensions = 1

    def embed(self, texts: list[str]) -> NDArray[np.float32]:
        return np.array([[len(t)] for t in texts], dtype=np.float32)
