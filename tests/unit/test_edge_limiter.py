"""Full upstreams: what the Router would do instead, and who is refused at last."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from nearfield.core.errors import NearfieldError
from nearfield.edge.decisions import Routed
from nearfield.edge.limiter import FORGOTTEN_S, LimitedRouter
from nearfield.edge.proxy.ports import Answer, Attempt, Grant, Leg, Request, Target
from nearfield.edge.retries import BudgetRetries
from nearfield.edge.suspects import Suspects
from nearfield.policy.limit import Limit

from tests.support.gates import InOrder, end, granted, leg_of, request_of, try_of

ONE, TWO, THREE = (Target("h", port) for port in (1, 2, 3))


class World:
    def __init__(self, *legs: Leg, most: float = 10.0, router: Any = None) -> None:
        self.now_s = 0.0
        self.router = router or InOrder(*legs)
        self.retries = BudgetRetries(Suspects(), clock=lambda: self.now_s)
        self.limited = LimitedRouter(
            self.router,
            self.retries,
            limit=Limit(value=most, most=most),
            clock=lambda: self.now_s,
            draw=lambda: 0.0,
        )

    def pick(self, *attempts: Attempt, **fields: Any) -> Any:
        return self.limited.pick(request_of(), granted(**fields), attempts)

    def fill(self, target: Target, count: int, **fields: Any) -> list[Attempt]:
        tries = []
        for _ in range(count):
            request = request_of(stream=True)
            attempt = try_of(
                target, granted(**fields), at_s=self.now_s, request=request, leg=leg_of(target)
            )
            self.limited.began(attempt)
            tries.append(attempt)
        return tries

    def end(self, attempt: Attempt, first_s: float | None = None) -> None:
        end(attempt, self.now_s)
        if first_s is not None:
            attempt.first_byte_s = attempt.started_s + first_s
        self.limited.ended(attempt)


def test_while_there_is_room_the_router_decides() -> None:
    world = World(leg_of(ONE), leg_of(TWO))
    world.fill(ONE, 8)
    assert world.pick().target is ONE
    assert world.router.asked == 1


def test_a_full_upstream_is_passed_over_in_the_routers_order() -> None:
    fallback = leg_of(THREE, model="small", why="fallback")
    world = World(leg_of(ONE), leg_of(TWO), fallback)
    world.fill(ONE, 10)
    assert world.pick().target is TWO
    world.fill(TWO, 10)
    assert world.pick() is fallback, "a smaller model comes before a refusal"


def test_then_it_is_refused_with_an_honest_time() -> None:
    world = World(leg_of(ONE))
    tries = world.fill(ONE, 10)
    world.now_s = 8.0
    world.end(tries[0])  # a request holds its slot for eight seconds
    world.fill(ONE, 11)
    refused = world.pick()
    assert isinstance(refused, NearfieldError)
    assert (refused.status, refused.code) == (503, "overloaded")
    assert refused.retry_after_s == 10.0  # twelve too many for nine places, one in 0.8 s


def test_the_least_critical_first() -> None:
    world = World(leg_of(ONE))
    world.fill(ONE, 6)
    assert [isinstance(world.pick(criticality=level), Leg) for level in (0, 1, 2)] == [
        True, True, False,
    ]  # fmt: skip
    world.fill(ONE, 3)
    assert [isinstance(world.pick(criticality=level), Leg) for level in (0, 1, 2)] == [
        True, False, False,
    ]  # fmt: skip


def test_a_regions_models_are_limited_apart() -> None:
    world = World(leg_of(ONE, "us", None, model="embed"))
    world.fill(ONE, 10)  # with chat
    assert world.pick().target is ONE


def test_the_ingress_before_full_replicas_is_no_way_round() -> None:
    world = World(leg_of(ONE), leg_of(TWO, replica=None))
    world.fill(ONE, 10)
    assert world.pick().code == "overloaded"


def test_late_first_tokens_make_it_smaller() -> None:
    world = World(leg_of(ONE), most=1000.0)
    for _ in range(30):
        world.now_s += 0.6
        for attempt in world.fill(ONE, 10):
            world.end(attempt, 0.1)
    assert world.limited.limits()[0].limit == 1000.0
    assert world.limited.limits()[0].baseline_s == pytest.approx(0.1)
    standing = world.fill(ONE, 90)
    for _ in range(10):
        world.now_s += 0.6
        for attempt in world.fill(ONE, 10):
            world.end(attempt, 3.0)
    (state,) = world.limited.limits()
    assert state.limit < 60
    assert (state.address, state.model, state.in_flight) == ("h:1", "chat", len(standing))


def test_whole_answers_tell_nothing_of_the_queue() -> None:
    world = World(leg_of(ONE), most=1000.0)
    for took_s in (0.1, 30.0):
        for _ in range(40):
            attempt = try_of(ONE, granted(kind="generate"), at_s=world.now_s)
            world.limited.began(attempt)
            world.now_s += took_s
            world.end(attempt)
    assert world.limited.limits()[0].limit == 1000.0
    assert world.limited.limits()[0].baseline_s == 0.0


def test_a_suspect_does_not_leave_its_region() -> None:
    world = World(leg_of(TWO, "us", None), leg_of(THREE))
    lost = end(try_of(ONE, granted()), 0.0, "closed")
    assert world.pick(lost, confined="eu").target is THREE
    world = World(leg_of(TWO, "us", None))
    refused = world.pick(lost, confined="eu")
    assert isinstance(refused, NearfieldError)
    assert refused.code == "no_capacity"


async def test_what_the_router_has_to_wait_for_is_not_waited_for_twice() -> None:
    later: list[asyncio.Future[Leg]] = []

    class Waits(InOrder):
        def pick(self, request: Request, grant: Grant, attempts: Sequence[Attempt]) -> Any:
            if attempts:
                later.append(asyncio.get_running_loop().create_future())
                return later[-1]
            return leg_of(ONE)

    world = World(router=Waits())
    world.fill(ONE, 10)
    assert world.pick().code == "overloaded"
    assert later[0].cancelled()


def test_answers_of_the_router_pass() -> None:
    class Answers(InOrder):
        def pick(self, request: Request, grant: Grant, attempts: Sequence[Attempt]) -> Any:
            return Answer(200)

    assert World(router=Answers()).pick().status == 200


class TestSecondTries:
    def test_elsewhere_and_within_the_budget(self) -> None:
        world = World(leg_of(ONE), leg_of(TWO))
        for _ in range(40):
            for attempt in world.fill(ONE, 1):
                world.end(attempt)
        (running,) = world.fill(ONE, 1, kind="embed", hedge=True)
        assert world.pick(running, kind="embed", hedge=True).target is TWO
        assert world.pick(running, kind="embed", hedge=True).target is TWO
        spent = world.pick(running, kind="embed", hedge=True)
        assert isinstance(spent, NearfieldError), "two in forty"

    def test_not_where_it_runs_or_where_it_is_full(self) -> None:
        world = World(leg_of(ONE))
        (running,) = world.fill(ONE, 1)
        assert isinstance(world.pick(running), NearfieldError)
        world = World(leg_of(ONE), leg_of(TWO))
        world.fill(TWO, 10)
        (running,) = world.fill(ONE, 1)
        assert isinstance(world.pick(running), NearfieldError)


class TestBooks:
    def test_an_end_without_a_begin_changes_nothing(self) -> None:
        world = World(leg_of(ONE))
        attempt = try_of(ONE, granted())
        world.limited.ended(end(attempt, 1.0))
        assert world.limited.unbalanced == 0
        (begun,) = world.fill(ONE, 1)
        world.end(begun)
        world.limited.ended(begun)
        assert world.limited.unbalanced == 0

    def test_the_routers_mistakes_do_not_cost_ours(self) -> None:
        class Fails(InOrder):
            def began(self, attempt: Attempt) -> None:
                raise RuntimeError

            def ended(self, attempt: Attempt) -> None:
                raise RuntimeError

        world = World(router=Fails(leg_of(ONE)))
        attempt = try_of(ONE, granted())
        with pytest.raises(RuntimeError):
            world.limited.began(attempt)
        with pytest.raises(RuntimeError):
            world.limited.ended(end(attempt, 1.0))
        assert world.limited.unbalanced == 0

    def test_upstreams_that_are_gone_are_forgotten(self) -> None:
        world = World(leg_of(ONE))
        for n in range(100):
            (attempt,) = world.fill(Target("h", n), 1)
            world.end(attempt)
        (running,) = world.fill(TWO, 1)
        world.now_s = FORGOTTEN_S + 20
        world.end(world.fill(THREE, 1)[0])
        assert {state.address for state in world.limited.limits()} == {"h:2", "h:3"}
        world.end(running)
        assert world.limited.unbalanced == 0


def test_a_routed_leg_is_not_needed() -> None:
    world = World(Leg(ONE))
    assert type(world.pick()) is Leg
    assert not isinstance(world.pick(), Routed)
