"""What lost tries say, who may be tried again, and what that may cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from nearfield.core.errors import NearfieldError
from nearfield.edge.decisions import FROM, Routed
from nearfield.edge.limiter import LimitedRouter
from nearfield.edge.proxy.ports import Attempt, FailureKind, Grant, Request, Target
from nearfield.edge.retries import DEATH_S, BudgetRetries
from nearfield.edge.suspects import Suspects
from nearfield.policy.retry import HEDGE_LEAST, MOST_ATTEMPTS

from tests.support.gates import InOrder, end, granted, leg_of, request_of, try_of

ONE, TWO, THREE = (Target("h", port) for port in (1, 2, 3))


class World:
    """A BudgetRetries, and its time."""

    def __init__(self, **fields: Any) -> None:
        self.now_s = 0.0
        self.suspects = Suspects(lambda: self.now_s)
        self.retries = BudgetRetries(self.suspects, clock=lambda: self.now_s, **fields)
        self.inside: dict[Target, set[Attempt]] = {}

    def start(
        self,
        target: Target,
        *,
        grant: Grant | None = None,
        request: Request | None = None,
        leg: Routed | None = None,
        reused: bool = False,
    ) -> Attempt:
        request = request or request_of(timeout_s=1000.0)
        request.started_s, request.deadline_s = self.now_s, self.now_s + 1000.0
        attempt = try_of(
            target, grant or granted(), at_s=self.now_s, request=request, leg=leg, reused=reused
        )
        self.retries.began(attempt)
        self.inside.setdefault(target, set()).add(attempt)
        return attempt

    def end(self, attempt: Attempt, failure: FailureKind | None = None, status: int = 200) -> None:
        end(attempt, self.now_s, failure, status)
        company = self.inside[attempt.leg.target]
        company.discard(attempt)
        self.retries.ended(attempt, company)

    def again(self, *attempts: Attempt) -> bool:
        first = attempts[0]
        assert first.request is not None
        assert first.grant is not None
        return self.retries.again(first.request, first.grant, attempts)


def on_trial(attempt: Attempt) -> bool:
    assert attempt.grant is not None
    return attempt.grant.about.trial is not None


def bodies(count: int) -> list[Request]:
    return [request_of({"n": n}) for n in range(count)]


class TestDeath:
    def test_the_work_of_the_dead_is_done_again_whatever_it_costs(self) -> None:
        world = World()
        tries = [world.start(ONE, request=each) for each in bodies(60)]
        world.now_s = 1.0
        for attempt in tries:
            world.end(attempt, "closed")
            assert world.again(attempt), "no budget would allow sixty of sixty"
        assert world.retries.unbalanced == 0
        assert world.suspects.any

    def test_who_had_just_come_is_tried_and_who_had_not_stays_in_its_region(self) -> None:
        world = World()
        old = world.start(ONE, request=bodies(1)[0])
        world.now_s = 1.0
        fresh = world.start(ONE, request=bodies(2)[1])
        world.now_s = 1.05
        world.end(old, "closed")
        world.end(fresh, "closed")
        assert world.again(old)
        assert world.again(fresh)
        assert on_trial(fresh)
        assert not on_trial(old)
        for each in (old, fresh):
            assert each.grant is not None
            assert each.grant.about.confined is not None
        again = world.start(TWO, grant=old.grant, request=old.request)
        world.now_s = 1.5
        other = world.start(TWO, request=request_of({"other": 1}))
        world.now_s = 2.5
        world.end(again, "closed")
        world.end(other, "closed")
        assert on_trial(again), "two replicas died with it inside"
        assert again.grant is not None
        assert again.grant.about.trial_s is None

    def test_a_trial_takes_as_long_as_a_first_byte_and_no_queue(self) -> None:
        """Where twenty had waited for each other, trials as long would make the last one late."""
        world = World()
        leg = leg_of(ONE, predicted_s=2.0, first_byte_s=0.15)
        queued, beside = (world.start(ONE, request=each, leg=leg) for each in bodies(2))
        world.now_s = 1.0
        for attempt in (queued, beside):
            world.end(attempt, "closed")
            assert on_trial(attempt), "its prompt may not have been read before"
            assert attempt.grant is not None
            assert attempt.grant.about.trial_s == 0.15

    def test_a_target_that_ends_every_connection_is_dead_once(self) -> None:
        world = World()
        for _ in range(100):  # requests that earn a budget
            world.end(world.start(TWO))
        world.end(world.start(ONE), "closed")
        allowed = 0
        for _ in range(200):
            world.now_s += 0.01
            attempt = world.start(ONE)
            world.end(attempt, "closed")
            allowed += world.again(attempt)
        assert allowed <= 0.2 * 301 + 3

    def test_a_kept_connection_that_was_closed_is_no_death(self) -> None:
        world = World()
        attempt = world.start(ONE, reused=True)
        world.now_s = 0.001
        world.end(attempt, "closed")
        assert not world.suspects.any
        assert world.again(attempt)

    def test_unless_nobody_listens_there_any_more(self) -> None:
        world = World()
        attempt = world.start(ONE, reused=True)
        world.now_s = 0.001
        world.end(attempt, "closed")
        world.end(world.start(ONE, request=request_of({"other": 1})), "refused")
        assert world.suspects.any
        assert on_trial(attempt)

    def test_it_is_one_where_others_lose_theirs_too(self) -> None:
        world = World()
        one, other = (world.start(ONE, request=each, reused=True) for each in bodies(2))
        world.now_s = 0.001
        world.end(one, "closed")
        assert on_trial(one)
        assert on_trial(other)

    def test_a_stream_that_breaks_is_a_death_too(self) -> None:
        world = World()
        world.end(world.start(ONE), "truncated")
        assert world.suspects.any

    def test_who_is_given_up_is_not_blamed_on_anybody(self) -> None:
        world = World()
        attempt = world.start(ONE)
        world.end(attempt, "abandoned")
        assert not world.suspects.any
        assert world.again(attempt)

    @pytest.mark.parametrize("replica", [None])
    def test_nor_is_a_gateway(self, replica: None) -> None:
        world = World()
        attempt = world.start(ONE, leg=leg_of(ONE, "us", replica))
        world.end(attempt, "closed")
        assert not world.suspects.any
        assert world.again(attempt)

    def test_one_that_was_alone_gets_its_trial_and_dies_of_the_second(self) -> None:
        world = World()
        grant, request = granted(), request_of({"poison": 1})
        first = world.start(ONE, grant=grant, request=request)
        world.now_s = 10.0
        world.end(first, "closed")
        assert world.again(first)
        assert on_trial(first)
        second = world.start(TWO, grant=grant, request=request, leg=leg_of(TWO, trial=True))
        world.now_s = 20.0
        world.end(second, "closed")
        convicted = world.suspects.convicted(request)
        assert convicted is not None, "two replicas died of it"
        assert convicted.code == "request_quarantined"
        limited = LimitedRouter(InOrder(leg_of(THREE)), world.retries)
        assert world.again(first, second)
        refused = limited.pick(request, grant, [first, second])
        assert isinstance(refused, NearfieldError)
        assert refused.code == "request_quarantined"

    def test_deaths_are_forgotten(self) -> None:
        world = World()
        world.end(world.start(ONE), "closed")
        world.now_s = DEATH_S + 1
        world.end(world.start(TWO))
        assert not world.retries._deaths


class TestPlaces:
    def test_a_suspect_stays_in_its_region(self) -> None:
        world = World()
        attempt = world.start(ONE)
        world.end(attempt, "closed")
        assert world.again(attempt)
        assert attempt.grant is not None
        assert attempt.grant.about.confined == "eu"

    def test_unless_the_region_is_lost(self) -> None:
        world = World(region_lost=lambda region: region == "eu")
        attempt = world.start(ONE)
        world.end(attempt, "closed")
        assert world.again(attempt)
        assert attempt.grant is not None
        assert attempt.grant.about.confined is None

    def test_what_died_behind_another_gateway_is_a_suspect_here_too(self) -> None:
        world = World()
        attempts = [world.start(ONE, leg=leg_of(ONE, "us", None)) for _ in range(10)]
        for attempt in attempts:
            attempt.code = b"replica_lost"
            world.end(attempt, "status", 503)
            assert world.again(attempt), "the work of the dead is done again whatever it costs"
            assert attempt.grant is not None
            assert attempt.grant.about.accused
            assert attempt.grant.about.confined == "us", "until the Router lets it go"
        assert world.suspects.any

    def test_one_crossing_is_enough(self) -> None:
        world = World()
        grant, request = granted(), request_of()
        first = world.start(ONE, grant=grant, request=request)
        world.end(first, "status", 503)
        assert world.again(first)
        assert grant.about.confined is None
        second = world.start(TWO, grant=grant, request=request, leg=leg_of(TWO, "us", None))
        world.end(second, "status", 503)
        assert world.again(first, second)
        assert grant.about.confined == "eu"


class TestBudget:
    def test_a_fifth_and_three(self) -> None:
        world = World()
        allowed = 0
        for n in range(1000):
            world.now_s = n / 100
            attempt = world.start(ONE)
            world.end(attempt, "status", 503)
            allowed += world.again(attempt)
        assert 190 <= allowed <= 203

    def test_three_for_whoever_asks_seldom(self) -> None:
        world = World()
        for n in range(3):
            world.now_s = n * 20.0
            attempt = world.start(ONE)
            world.end(attempt, "status", 503)
            assert world.again(attempt)

    def test_what_was_never_sent_costs_nothing(self) -> None:
        world = World()
        for _ in range(50):
            attempt = world.start(ONE)
            world.end(attempt, "refused")
            assert world.again(attempt)

    def test_nor_what_a_region_had_nobody_for(self) -> None:
        world = World()
        for _ in range(50):
            attempt = world.start(ONE)
            attempt.code = b"no_capacity"
            world.end(attempt, "status", 503)
            assert world.again(attempt)
        world = World()
        for code in [b"draining", b"interrupted"] * 25:  # nor what a replica that leaves gave up
            attempt = world.start(ONE)
            attempt.code = code
            world.end(attempt, "status", 503)
            assert world.again(attempt)
        world = World()
        full = [world.start(ONE) for _ in range(10)]
        for attempt in full:
            attempt.code = b"overloaded"
            world.end(attempt, "status", 503)
        assert [world.again(attempt) for attempt in full].count(True) == 3, "that costs the budget"

    def test_not_without_end(self) -> None:
        world = World()
        grant, request = granted(), request_of()
        tries: list[Attempt] = []
        for _ in range(MOST_ATTEMPTS):
            tries.append(world.start(ONE, grant=grant, request=request))
            world.end(tries[-1], "protocol")
        assert not world.again(*tries)

    def test_what_may_have_had_effects_is_not_run_again(self) -> None:
        world = World()
        grant = granted(kind="other")
        grant.replayable = False
        attempt = world.start(ONE, grant=grant)
        world.end(attempt, "closed")
        assert not world.again(attempt)
        refused = world.start(ONE, grant=grant)
        world.end(refused, "refused")
        assert world.again(refused)
        reading = world.start(ONE, grant=grant, request=request_of(b"", method=b"GET"))
        world.end(reading, "closed")
        assert world.again(reading)

    def test_what_another_gateway_sent_is_its_own_to_try_again(self) -> None:
        world = World()
        attempt = world.start(ONE, grant=granted(from_gateway=True))
        world.end(attempt, "status", 503)
        assert not world.again(attempt)
        refused = world.start(ONE, grant=granted(from_gateway=True))
        world.end(refused, "refused")
        assert world.again(refused), "nobody ran it"

    def test_also_where_nobody_signs_passports(self) -> None:
        world = World()
        attempt = world.start(ONE, request=request_of(headers={FROM: b"edge"}))
        world.end(attempt, "status", 503)
        assert not world.again(attempt)

    def test_not_after_its_deadline(self) -> None:
        world = World()
        attempt = world.start(ONE)
        world.end(attempt, "refused")
        world.now_s = 1001.0
        assert not world.again(attempt)


class TestHedging:
    def learnt(self, **fields: Any) -> World:
        world = World(**fields)
        for _ in range(HEDGE_LEAST):
            attempt = world.start(ONE, grant=granted(kind="embed"))
            world.now_s += 0.02
            world.end(attempt)
        return world

    def test_after_what_nineteen_of_twenty_take(self) -> None:
        world = self.learnt()
        request = request_of(timeout_s=1e6)
        after_s = world.retries.hedge_after_s(request, granted(kind="embed", hedge=True))
        assert after_s == pytest.approx(0.02, rel=0.1)

    def test_only_what_is_short_and_asked_for(self) -> None:
        world = self.learnt()
        request = request_of(timeout_s=1e6)
        for fields in ({}, {"hedge": True, "kind": "generate"}, {"hedge": True, "trial": b"x"}):
            grant = granted(**{"kind": "embed", **fields})
            assert world.retries.hedge_after_s(request, grant) is None
        assert world.retries.hedge_after_s(request_of(model="new"), granted(hedge=True)) is None

    def test_five_in_a_hundred(self) -> None:
        world = self.learnt()
        grant, request = granted(kind="embed", hedge=True), request_of()
        hedges = 0
        for _ in range(1000):
            world.now_s += 0.01
            attempt = world.start(ONE, grant=granted(kind="embed"))
            hedges += world.retries.may_hedge(request, grant, [attempt])
            world.end(attempt)
        assert 45 <= hedges <= 60

    def test_not_into_a_queue(self) -> None:
        waits: list[float | None] = [0.1, None, 0.0]

        def wait_s(request: Request, grant: Grant, attempts: Sequence[Attempt]) -> float | None:
            return waits.pop(0)

        world = self.learnt(wait_s=wait_s)
        grant = granted(kind="embed", hedge=True)
        assert [world.retries.may_hedge(request_of(), grant, []) for _ in range(3)] == [
            False, False, True,
        ]  # fmt: skip


def test_ten_thousand_targets_leave_nothing_behind() -> None:
    world = World()
    for n in range(10_000):
        world.now_s += 0.01
        target = Target("h", 1 + n)
        attempt = world.start(target, request=request_of(b""), reused=n % 2 == 0)
        world.end(attempt, ("closed", "refused", "abandoned")[n % 3])
    retries = world.retries
    assert retries.unbalanced == 0
    assert len(retries._deaths) < 1500
    assert len(retries._doubts) < 500
