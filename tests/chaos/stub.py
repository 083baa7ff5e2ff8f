"""The engine under fire: it writes down each run before it begins, and does as it is told.

A prompt is words of `name:value`:

    id:X        names the request        hold:S      how long it computes, seconds
    tokens:N    pieces of its answer     die:engine  ends its own process
                                         die:replica kills its replica's, as the OOM killer would

One file for each process, one line for each thing that happens: nothing that was begun is missing,
whatever is killed.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from nearfield.api.events import GenerateRequest
from nearfield.core.errors import EngineFailed, Unavailable
from nearfield.serving.engines.base import EngineContext, FunctionEngine

from tests.chaos.ledger import Execution

TOKENS = 4
PREFILL = 0.1
"""Share of the time until the first of them."""
DEATH_S = 10.0
"""Longer than it takes a process to notice that it was killed."""


def words_of(prompt: str) -> dict[str, str]:
    """`id:7 hold:0.1` → {"id": "7", "hold": "0.1"}."""
    return dict(word.split(":", 1) for word in prompt.split())


def text_of(id_: str, tokens: int) -> str:
    """The whole answer: of this request and no other, so that a splice shows."""
    return "".join(_piece(id_, number) for number in range(tokens))


def _piece(id_: str, number: int) -> str:
    return f"{id_}.{number} "


class Stub(FunctionEngine):
    """Options: `region`, and `folder`, where it writes and where `troubles` finds its orders."""

    def setup(self, context: EngineContext) -> None:
        options = context.options
        folder = Path(options["folder"])
        self._region = options["region"]
        self._orders = orders_file(folder, self._region)
        self._read_ns = 0
        self._trouble: dict[str, Any] = {}
        path = folder / f"{self._region}-{os.getpid()}.runs"
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[str]:
        words = words_of(request.prompt or "")
        id_, tokens = words["id"], int(words.get("tokens", TOKENS))
        self._note(id_, "begun")
        ended = "cancelled"
        try:
            ended = "failed"
            self._fail_perhaps()
            self._die_perhaps(words.get("die"))
            ended = "cancelled"
            hold_s = float(words.get("hold", 0))
            for number in range(tokens):
                share = (1 - PREFILL) / (tokens - 1) if number else PREFILL
                await asyncio.sleep(share * hold_s)
                if number == tokens - 1:
                    ended = "done"
                    self._note(id_, ended)
                yield _piece(id_, number)
        finally:
            if ended != "done":
                self._note(id_, ended)

    def _note(self, id_: str, event: str) -> None:
        line = json.dumps([id_, self._region, event, time.monotonic()]) + "\n"
        os.write(self._file, line.encode())

    def _fail_perhaps(self) -> None:
        try:
            changed_ns = self._orders.stat().st_mtime_ns
        except FileNotFoundError:
            return
        if changed_ns != self._read_ns:
            self._read_ns = changed_ns
            self._trouble = json.loads(self._orders.read_text())
        if random.random() < self._trouble["share"]:
            if self._trouble["status"] == 503:
                raise Unavailable("This replica is out of order.")
            raise EngineFailed("The model failed on this request.")

    def _die_perhaps(self, how: str | None) -> None:
        if how == "engine":
            os._exit(9)
        if how == "replica":
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(DEATH_S)


def orders_file(folder: Path, region: str) -> Path:
    """What `trouble` writes for the engines of a region."""
    return folder / f"{region}.orders"


def trouble(folder: Path, region: str, *, share: float, status: int) -> None:
    """From now on this share of a region's runs fails."""
    path = orders_file(folder, region)
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps({"share": share, "status": status}))
    fresh.replace(path)


def executions(folder: Path) -> list[Execution]:
    """Every run that was begun, in order."""
    runs = [run for path in folder.glob("*.runs") for run in _read(path)]
    return sorted(runs, key=lambda run: run.begun_s)


def _read(path: Path) -> Iterator[Execution]:
    open_: dict[str, list[float]] = {}
    for line in path.read_text().splitlines():
        id_, region, event, at_s = json.loads(line)
        if event == "begun":
            open_.setdefault(id_, []).append(at_s)
        else:
            yield Execution(id_, region, open_[id_].pop(0), event, at_s)
    region = path.name.rpartition("-")[0]
    for id_, begun in open_.items():
        for begun_s in begun:
            yield Execution(id_, region, begun_s)
