from __future__ import annotations

import asyncio
import random

import pytest
from nearfield.core.errors import RateLimited
from nearfield.serving.gate import Gate


async def test_runs_up_to_the_bound_and_queues_behind_it_in_order() -> None:
    gate = Gate(max_running=2, max_queued=2)
    order: list[int] = []
    doors = [asyncio.Event() for _ in range(4)]

    async def one(number: int) -> None:
        with gate.place() as place:
            await place.turn()
            order.append(number)
            await doors[number].wait()

    tasks = [asyncio.create_task(one(number)) for number in range(4)]
    await asyncio.sleep(0)
    assert (order, gate.running, gate.waiting) == ([0, 1], 2, 2)
    assert gate.queue_age_s > 0
    with pytest.raises(RateLimited) as refused:
        gate.place()
    assert refused.value.retry_after_s == 1
    doors[1].set()
    await tasks[1]
    await asyncio.sleep(0)
    assert (order, gate.running, gate.waiting) == ([0, 1, 2], 2, 1)
    for door in doors:
        door.set()
    await asyncio.gather(*tasks)
    assert (order, gate.running, gate.waiting, gate.queue_age_s) == ([0, 1, 2, 3], 0, 0, 0)


async def test_flows_take_turns_by_what_they_ask_for() -> None:
    gate = Gate(max_running=1, max_queued=20)
    order: list[str] = []

    async def one(flow: str, cost: float) -> None:
        with gate.place() as place:
            await place.turn(flow, cost)
            order.append(flow)
            await asyncio.sleep(0)

    asked = [("a", 3.0)] * 4 + [("b", 1.0)] * 6 + [("c", 3.0)]
    await asyncio.gather(*(one(flow, cost) for flow, cost in asked))
    assert "".join(order) == "abcbbabbbaa"
    assert gate.room == 21


async def test_a_place_that_never_asks_for_its_turn_is_given_back() -> None:
    gate = Gate(max_running=1, max_queued=0)
    with pytest.raises(ValueError), gate.place():
        raise ValueError("the body was unusable")
    with gate.place() as place:
        await place.turn()
        place.release()
        place.release()
    assert (gate.running, gate.waiting) == (0, 0)


async def test_retry_after_follows_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr("nearfield.serving.gate.time.monotonic", lambda: now_s)
    gate = Gate(max_running=2, max_queued=10)
    with gate.place() as place:
        await place.turn()
        now_s = 8.0
    places = [gate.place() for _ in range(12)]
    for place in places[:2]:
        await place.turn()
    with pytest.raises(RateLimited) as refused:
        gate.place()
    assert refused.value.retry_after_s == 10 * 8 / 2


async def test_no_place_is_lost_whatever_happens() -> None:
    """Cancelled while waiting, while running, in the moment of being called, or never."""
    chance = random.Random(7)
    gate = Gate(max_running=3, max_queued=40)
    most = 0

    async def one() -> None:
        nonlocal most
        with gate.place() as place:
            if chance.random() < 0.1:
                raise ValueError
            await place.turn()
            most = max(most, gate.running)
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(0)

    for _ in range(300):
        tasks = [asyncio.create_task(one()) for _ in range(chance.randrange(1, 40))]
        for _ in range(chance.randrange(12)):
            await asyncio.sleep(0)
            chance.choice(tasks).cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (gate.running, gate.waiting, gate.queue_age_s) == (0, 0, 0)
    assert most == 3


async def test_who_may_fill_less_of_the_queue_is_refused_earlier() -> None:
    gate = Gate(max_running=2, max_queued=10)
    places = [gate.place(0.5) for _ in range(7)]
    with pytest.raises(RateLimited):
        gate.place(0.5)
    places += [gate.place(0.9) for _ in range(4)]
    with pytest.raises(RateLimited):
        gate.place(0.9)
    places.append(gate.place())
    with pytest.raises(RateLimited):
        gate.place()
    assert gate.room == 0
    for place in places:
        place.release()
