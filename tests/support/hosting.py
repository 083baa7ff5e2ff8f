"""Running an engine host with the engines of `programs`, and waiting for what it does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from nearfield.api.events import Event, Failed, GenerateRequest, Text
from nearfield.core.errors import NearfieldError
from nearfield.core.spec import CustomEngine, Limits, ModelSpec
from nearfield.serving.host import EngineHost

PROGRAMS = "tests.support.programs:Programs"
TICKER = "tests.support.programs:Ticker"


def spec_of(import_path: str = PROGRAMS, **options: Any) -> ModelSpec:
    engine = CustomEngine(import_path=import_path, options=options)
    return ModelSpec(model="test", engine=engine, limits=Limits(timeout_s=60))


@asynccontextmanager
async def running(spec: ModelSpec | None = None, **settings: Any) -> AsyncIterator[EngineHost]:
    host = EngineHost(spec or spec_of(), **settings)
    await host.start()
    try:
        yield host
    finally:
        await host.close()


def program(prompt: str, **fields: Any) -> GenerateRequest:
    return GenerateRequest(prompt=prompt, **fields)


async def answer(host: EngineHost, prompt: str, *, whole: bool = False) -> list[Event]:
    collected: list[Event] = []
    with host.open(program(prompt), whole=whole) as flight:
        async for events in flight:
            collected += events
    return collected


def text_of(events: list[Event]) -> str:
    return "".join(e.text for e in events if isinstance(e, Text))


def error_of(events: list[Event]) -> NearfieldError:
    assert isinstance(events[-1], Failed), events
    return events[-1].error


async def until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come true in time"
        await asyncio.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether a process with this pid runs (a zombie does not)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return not stat.rpartition(")")[2].split()[0].startswith("Z")
