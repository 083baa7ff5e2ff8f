"""Start-time fair queueing: what Goyal, Vin and Cheng prove of it, and that nothing is lost."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nearfield.policy.fair import FairQueue

FLOWS = "abc"
costs = st.floats(1.0, 1000.0)
requests = st.lists(st.tuples(st.sampled_from(FLOWS), costs), max_size=60)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.sampled_from(FLOWS), costs),
        st.tuples(st.just("pop"), st.just(""), st.just(0.0)),
        st.tuples(st.just("remove"), st.just(""), st.floats(0.0, 0.999)),
    ),
    max_size=80,
)


class Item:
    def __init__(self, flow: str, cost: float, number: int) -> None:
        self.flow, self.cost, self.number = flow, cost, number


@given(requests)
def test_flows_that_both_wait_are_served_alike(pushed: list[tuple[str, float]]) -> None:
    queue: FairQueue[Item] = FairQueue()
    left: dict[str, int] = defaultdict(int)
    largest: dict[str, float] = defaultdict(float)
    for number, (flow, cost) in enumerate(pushed):
        queue.push(Item(flow, cost, number), flow, cost)
        left[flow] += 1
        largest[flow] = max(largest[flow], cost)
    served: dict[str, float] = defaultdict(float)
    while (item := queue.pop()) is not None:
        served[item.flow] += item.cost
        left[item.flow] -= 1
        waiting = [flow for flow in FLOWS if left[flow]]
        for one in waiting:
            for other in waiting:
                apart = abs(served[one] - served[other])
                assert apart <= largest[one] + largest[other] + 1e-6
    assert not any(left.values())


@given(operations)
def test_nothing_is_lost_and_a_flow_keeps_its_order(
    steps: list[tuple[str, str, float]],
) -> None:
    queue: FairQueue[Item] = FairQueue()
    waiting: list[Item] = []
    for number, (what, flow, value) in enumerate(steps):
        if what == "push":
            item = Item(flow, value, number)
            queue.push(item, flow, value)
            waiting.append(item)
        elif what == "pop":
            assert queue.pop(lambda _: False) is None
            taken = queue.pop()
            assert (taken is None) == (not waiting), "it never idles while somebody waits"
            if taken is not None:
                first = next(item for item in waiting if item.flow == taken.flow)
                assert taken is first
                waiting.remove(taken)
        elif waiting:
            gone = waiting.pop(int(value * len(waiting)))
            assert queue.remove(gone)
            assert not queue.remove(gone)
        assert len(queue) == len(waiting)
        assert {item.number for item in queue} == {item.number for item in waiting}


@given(requests, st.integers(0, 40), costs)
def test_who_was_idle_is_overtaken_once_by_each_other_flow(
    pushed: list[tuple[str, float]], pops: int, cost: float
) -> None:
    queue: FairQueue[Item] = FairQueue()
    for number, (flow, size) in enumerate(pushed):
        queue.push(Item(flow, size, number), flow, size)
    for _ in range(pops):
        queue.pop()
    newcomer = Item("new", cost, -1)
    queue.push(newcomer, "new", cost)
    before: dict[str, int] = defaultdict(int)
    while (item := queue.pop()) is not newcomer:
        assert item is not None
        before[item.flow] += 1
    assert all(count <= 1 for count in before.values())


@given(st.lists(costs, min_size=1, max_size=20), st.data())
def test_who_gives_up_costs_its_flow_nothing(given_up: list[float], data: st.DataObject) -> None:
    """Both flows stay as they would be, had those never been there."""
    kept = data.draw(requests)
    plain: FairQueue[int] = FairQueue()
    ghosts = [Item("a", cost, 0) for cost in given_up]
    mixed: FairQueue[object] = FairQueue()
    for number, (flow, cost) in enumerate(kept):
        plain.push(number, flow, cost)
        mixed.push(number, flow, cost)
    for ghost in ghosts:
        mixed.push(ghost, "a", ghost.cost)
    for ghost in ghosts:
        mixed.remove(ghost)
    order = [plain.pop() for _ in kept]
    assert order == [mixed.pop() for _ in kept]
    assert mixed.pop() is None


def test_a_burst_of_long_ones_does_not_hold_up_short_ones() -> None:
    queue: FairQueue[str] = FairQueue()
    for i in range(100):
        queue.push(f"report {i}", "reports", 6000.0)
    assert queue.pop() == "report 0"
    for i in range(3):
        queue.push(f"chat {i}", "chat", 300.0)
    assert [queue.pop() for _ in range(5)] == [
        "chat 0", "chat 1", "chat 2", "report 1", "report 2",
    ]  # fmt: skip


def test_a_request_without_a_cost_is_a_mistake() -> None:
    queue: FairQueue[str] = FairQueue()
    with pytest.raises(ValueError, match="costs 0"):
        queue.push("x", "a", 0.0)


def test_a_flow_that_cannot_be_served_keeps_its_turn() -> None:
    queue: FairQueue[str] = FairQueue()
    for name in ("long 1", "long 2"):
        queue.push(name, "long", 10.0)
    for name in ("short 1", "short 2"):
        queue.push(name, "short", 10.0)
    assert queue.pop(lambda item: not item.startswith("long")) == "short 1"
    assert [queue.pop() for _ in range(3)] == ["long 1", "short 2", "long 2"]
