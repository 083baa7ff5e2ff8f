"""Which way the router takes, and what it counts, without any socket."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from nearfield.core.errors import NearfieldError
from nearfield.edge.decisions import Admission
from nearfield.edge.proxy.ports import Attempt, FailureKind, Grant, Request
from nearfield.edge.router import Way, WorldRouter

from tests.property.test_edge_routing import grant, request
from tests.unit.test_world import Walk, app, endpoint


class Routing:
    """A router over a walked world: eu with two replicas, us and in beyond."""

    def __init__(self, *replicas: str, **us: Any) -> None:
        self.walk = Walk()
        self.router = WorldRouter(self.walk.world, draw=lambda: 0.3)
        self.walk.agent(app(replicas or ("a", "b")))
        self.walk.load()
        self.walk.region("us", endpoint(**us))
        self.walk.region("in", endpoint(), took_s=0.2)

    def pick(self, asked: Request, granted: Grant, attempts: list[Attempt]) -> Way:
        found = self.router.pick(asked, granted, attempts)
        assert isinstance(found, Way), found
        return found

    def fail(self, way: Way, failure: FailureKind, asked: Request, granted: Grant) -> Attempt:
        attempt = Attempt(way, self.walk.now_s, request=asked, grant=granted)
        self.router.began(attempt)
        attempt.failure, attempt.ended_s = failure, self.walk.now_s
        self.router.ended(attempt)
        return attempt


@pytest.mark.parametrize("confined", [None, "eu"])
def test_a_request_that_may_not_leave_its_region_does_not(confined: str | None) -> None:
    routing = Routing()
    asked, granted = request(routing.walk.now_s), grant(None)
    about: Admission = granted.about
    attempts: list[Attempt] = []
    for _ in range(2):
        way = routing.pick(asked, granted, attempts)
        assert way.region == "eu"
        attempts.append(routing.fail(way, "closed", asked, granted))
    assert len({attempt.leg.target for attempt in attempts}) == 2
    about.confined = confined
    way = routing.pick(asked, granted, attempts)
    assert (way.region, way.replica) == (("eu", None) if confined else ("us", None))


@pytest.mark.parametrize("bound", [None, frozenset({"eu"})])
async def test_a_suspect_does_not_wait_for_a_region_that_is_lost_meanwhile(
    bound: frozenset[str] | None,
) -> None:
    """It was confined while nobody could tell a dead replica from a dead region."""
    routing = Routing("a")
    walk = routing.walk
    asked, granted = request(walk.now_s), grant(bound)
    about: Admission = granted.about
    attempts = [routing.fail(routing.pick(asked, granted, []), "closed", asked, granted)]
    about.confined, about.trial, about.accused = "eu", b"fingerprint", True
    waiting = routing.router.pick(asked, granted, attempts)
    assert isinstance(waiting, asyncio.Future)
    assert not waiting.done()
    for _ in range(4):
        walk.now_s += 1.0
        for replica in walk.world.replicas():
            walk.world.replica_silent(replica, "refused", walk.now_s)
        walk.world.agent_silent("refused", walk.now_s)
        walk.region("us")
    assert walk.world.alive.of("eu").health == "down"
    found = await waiting
    if bound is None:
        assert isinstance(found, Way)
        assert (found.region, found.trial) == ("us", False), "no request takes a region"
    else:
        assert isinstance(found, NearfieldError)
        assert found.status == 503
        assert found.retry_after_s is not None


def test_the_ingress_is_no_way_around_a_full_replica() -> None:
    """Whoever bounds what runs at an upstream asks what else there is, as if that had failed."""
    routing = Routing("a")
    routing.walk.region("us", endpoint(replicas=0, cold_start_s=None))
    routing.walk.region("in", endpoint(replicas=0, cold_start_s=None))
    asked, granted = request(routing.walk.now_s), grant(None)
    way = routing.pick(asked, granted, [])
    supposed = Attempt(way, routing.walk.now_s, ended_s=routing.walk.now_s, failure="refused")
    assert isinstance(routing.router.pick(asked, granted, [supposed]), NearfieldError)
    real = routing.fail(way, "refused", asked, granted)
    assert routing.pick(asked, granted, [real]).replica is None  # the region's ingress


def test_a_session_goes_where_its_cache_is() -> None:
    routing = Routing(prefill_token_s=0.001)
    walk = routing.walk
    for second in range(3):  # the engines at home tell that they keep one
        done = {"answered": 10 * second, "busy_s": 2.0 * second, "request_s": 2.0 * second}
        tokens = {"answered_tokens": 1000 * second, "prompt_tokens": 900 * second}
        walk.load(**done, **tokens, cached_tokens=100 * second, first_byte_s=0.9 * second)
    body = b"x" * 9000
    session = grant(None, session=b"s", prompt_tokens=2000)
    session.about.tokens = 2200
    first = routing.pick(request(walk.now_s, body=body), session, [])
    again = [
        routing.pick(request(walk.now_s, body=body + b"y" * 100), session, []) for _ in "12345"
    ]
    assert {way.replica for way in again} == {first.replica}


def test_where_it_would_go_next_is_told_without_going() -> None:
    routing = Routing("a")
    asked, granted = request(routing.walk.now_s), grant(None)
    failed = routing.fail(routing.pick(asked, granted, []), "closed", asked, granted)
    prospect = routing.router.prospect(asked, granted, [failed])
    assert prospect is not None
    assert (prospect.region, prospect.crosses, prospect.wait_s) == ("us", True, 0.0)
    assert sum(routing.walk.world.books.own) == 0
    routing.walk.agent(app(["a", "b"]))
    routing.walk.load()
    prospect = routing.router.prospect(asked, granted, [failed])
    assert prospect is not None
    assert (prospect.region, prospect.crosses) == ("eu", False)


def test_plans_are_not_kept_for_whatever_a_caller_names() -> None:
    routing = Routing()
    for number in range(50):
        granted = grant(None, version=f"v{number}")
        assert isinstance(
            routing.router.pick(request(routing.walk.now_s), granted, []), NearfieldError
        )
        asked = request(routing.walk.now_s, model=f"m{number}")
        assert isinstance(routing.router.pick(asked, grant(None), []), NearfieldError)
    assert routing.router._plans == {}


async def test_a_trial_that_nobody_can_run_is_refused_and_one_that_can_waits() -> None:
    routing = Routing("a")
    asked = request(routing.walk.now_s)
    found = routing.router.pick(asked, grant(frozenset({"cn"}), trial=b"t"), [])
    assert isinstance(found, NearfieldError)
    first = routing.pick(asked, grant(None, trial=b"t"), [])
    assert first.trial
    attempt = Attempt(first, routing.walk.now_s, request=asked)
    routing.router.began(attempt)
    waits = routing.router.pick(asked, grant(None, trial=b"t"), [])
    assert isinstance(waits, asyncio.Future)
    attempt.ended_s = routing.walk.now_s
    routing.router.ended(attempt)
    assert isinstance(await waits, Way)
    await asyncio.sleep(0)  # it has not begun: its place is free again
    assert routing.walk.replica("a").trials == 0
