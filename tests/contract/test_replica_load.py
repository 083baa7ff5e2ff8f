"""What a replica tells gateways of what it has done: totals that only grow."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from nearfield.api.events import Completed, Embedded, Inferred, Timings
from nearfield.api.load import LOAD_PATH, parse_load
from nearfield.serving.gate import Gate
from nearfield.serving.service import Tally

from tests.support.hosting import PROGRAMS
from tests.support.serving import served, spec_of


async def test_time_inside_the_engine_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr("nearfield.serving.gate.time.monotonic", lambda: now_s)
    gate = Gate(max_running=2, max_queued=10)
    assert gate.inside() == (0.0, 0.0)
    now_s += 5  # idle
    first, second, third = (gate.place() for _ in range(3))
    await first.turn()
    now_s += 1
    await second.turn()
    waits = asyncio.ensure_future(third.turn())
    await asyncio.sleep(0)
    now_s += 2
    assert gate.inside() == (1 + 2 * 2, 3)
    first.release()
    await waits
    now_s += 1
    second.release()
    now_s += 1
    third.release()
    now_s += 10
    assert gate.inside() == (5 + 2 + 1, 5)


def test_answers_are_counted_in_tokens_that_were_computed() -> None:
    tally, timings = Tally(), Timings(0.0, queue_s=9.0, prefill_s=0.5)
    tally.count(Completed(100, 20, timings, cached_tokens=60))
    assert (tally.answered_tokens, tally.prompt_tokens, tally.cached_tokens) == (60, 100, 60)
    tally.count(Embedded(np.zeros((1, 2), np.float32), 7, timings))
    tally.count(Inferred({}, timings))
    assert (tally.answered, tally.answered_tokens, tally.first_byte_s) == (3, 68, 1.5)


async def test_a_replica_tells_of_it() -> None:
    spec = spec_of(PROGRAMS, limits={"max_running": 3, "max_queued": 2})
    async with served(spec) as replica:
        for _ in range(2):
            body = {"model": "test", "prompt": "say hello", "max_tokens": 8}
            answer = await replica.client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
        load = parse_load((await replica.client.get(LOAD_PATH)).content)
        assert (load.answered, load.slots, load.room, load.running) == (2, 3, 5, 0)
        assert load.answered_tokens >= 2
        assert 0 < load.busy_s <= load.request_s + 1e-9
