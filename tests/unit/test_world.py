"""What the world makes of what it is told, one word at a time. Time is walked, never waited for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from nearfield.api.load import (
    Application,
    EndpointReport,
    RegionReport,
    ReplicaLoad,
    Targets,
    parse_region,
)
from nearfield.api.load import Target as Told
from nearfield.core.errors import BadRequest
from nearfield.core.federation import GatewayFile, RegionFile
from nearfield.edge import last_good
from nearfield.edge.beliefs import Peer
from nearfield.edge.home import KEEP_LAST_S, HomeEndpoint, Replica
from nearfield.edge.known import RESTING, Books
from nearfield.edge.proxy.ports import Attempt, FailureKind, Leg
from nearfield.edge.router import WorldRouter
from nearfield.edge.site import Site, target_of
from nearfield.edge.world import World
from nearfield.policy.endpoints import Ask, Caller, Refusal

LOCATION = {"latitude": 53.35, "longitude": -6.26}
IDLE = ReplicaLoad(
    model="chat",
    version="1",
    running=0,
    waiting=0,
    room=20,
    queue_age_s=0.0,
    kv_usage=0.0,
    tokens=0,
    crashes=0,
    slots=4,
)


def region_file(name: str, jurisdiction: str) -> RegionFile:
    return RegionFile.model_validate(
        {
            "region": name,
            "jurisdiction": jurisdiction,
            "city": "Dublin",
            "location": LOCATION,
            "gateway_url": f"http://{name}.test:8080",
        }
    )


FILES = [region_file("eu", "eu"), region_file("us", "us"), region_file("in", "in")]


def gateway_file(home: str | None = "eu", **more: Any) -> GatewayFile:
    at_home = None if home is None else {"region": home, "serve": "http://127.0.0.1:8000"}
    return GatewayFile.model_validate(
        {"gateway": "g", "home": at_home, "jurisdiction": "eu", "regions": ["a.yaml"], **more}
    )


def app(
    replicas: Sequence[str] = ("a",), *, version: str = "1", status: str = "RUNNING", **spec: Any
) -> Application:
    full = {"model": "chat", "version": version, "engine": "generate", "source": "builtin://abacus"}
    ports = {name: 9000 + ord(name[0]) for name in replicas}
    return Application(
        name=f"chat-{version}-{spec.get('pool', 'default')}",
        route_prefix="/chat",
        status=status,
        spec={**full, **spec},
        targets=tuple(Told(name, "127.0.0.1", ports[name]) for name in replicas),
    )


def endpoint(**facts: Any) -> EndpointReport:
    given: dict[str, Any] = {
        "model": "chat", "version": "1", "pool": "default", "kind": "generate", "free": True,
        "current": True, "products": None, "fallbacks": (), "unit_usd": 0.0, "handicap_s": 0.0,
        "replicas": 2, "slots": 8, "max_queued": 8, "load": 0, "first_byte_s": 0.1,
        "hold_s": 0.5, "queue_age_s": 0.0, "cold_start_s": None, "prefill_token_s": 0.0,
        "draining": False,
    }  # fmt: skip
    return EndpointReport(**(given | facts))


def report(name: str, *endpoints: EndpointReport, **facts: Any) -> RegionReport:
    given = {"jurisdiction": name, "draining": False, "age_s": 0.1, "spent_s": 0.001}
    return RegionReport(region=name, endpoints=endpoints, **(given | facts))  # type: ignore[arg-type]


class Walk:
    """A world and its clock."""

    def __init__(self, home: str | None = "eu", **site: Any) -> None:
        self.now_s = 1000.0
        self.world = World(
            Site.of(gateway_file(home), FILES, **site), clock=lambda: self.now_s, draw=lambda: 0.5
        )
        self.given_up: list[object] = []
        self.world.abandon = self.given_up.append

    def agent(self, *applications: Application, age_s: float = 0.1) -> None:
        self.world.agent_answered(Targets(applications, age_s), self.now_s)
        self.world.round()

    def load(self, *names: str, **facts: Any) -> None:
        """These replicas tell of themselves; all of them if none is named."""
        for replica in self.world.replicas():
            if not names or replica.id in names:
                number = replica.number
                own, work = self.world.running.own[number], self.world.running.work[number]
                told = replace(IDLE, version=replica.endpoint.endpoint.version, **facts)
                self.world.replica_answered(replica, told, own, work, self.now_s)
        self.world.round()

    def region(
        self, name: str, *endpoints: EndpointReport, took_s: float = 0.081, **f: Any
    ) -> None:
        region = self.world.region(name)
        self.world.region_answered(
            region, report(name, *(endpoints or (endpoint(),)), **f), took_s, {}, self.now_s
        )
        self.world.round()

    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self.world.round()

    def replica(self, name: str) -> Replica:
        return next(r for r in self.world.replicas() if r.id == name)

    def home(self, version: str = "1", pool: str = "default") -> HomeEndpoint:
        assert self.world.home is not None
        return self.world.home.endpoints["chat", version, pool]

    def open(self, version: str = "1", pool: str = "default") -> list[str]:
        by_number = self.home(version, pool).by_number
        return sorted(by_number[p.number].id for p in self.home(version, pool).places)

    def rows(self, **ask: Any) -> list[str]:
        """The regions that a plan would send to."""
        made = self.world.plan(Ask("chat", **ask), Caller())
        return [row.candidate.state.endpoint.region for row in made.rows]

    def ended(
        self, replica: Replica, failure: FailureKind | None = None, *, status: int = 200,
        took_s: float = 0.1, **facts: Any,
    ) -> None:  # fmt: skip
        attempt = Attempt(Leg(replica.target), self.now_s - took_s)
        attempt.failure, attempt.status, attempt.ended_s = failure, status, self.now_s
        if failure is None:
            attempt.first_byte_s = self.now_s
        for name, value in facts.items():
            setattr(attempt, name, value)
        self.world.ended(replica.endpoint, replica, attempt, 0.1)


# ---- home -------------------------------------------------------------------------------------


def test_a_replica_takes_requests_once_it_has_told_of_itself() -> None:
    walk = Walk()
    walk.agent(app(["a", "b"]))
    assert walk.open() == []
    walk.load("a")
    assert walk.open() == ["a"]
    walk.load()
    assert walk.open() == ["a", "b"]
    state = walk.home().state
    assert (state.replicas, state.slots, state.max_queued, state.health) == (2, 8, 32, "up")


def test_the_state_adds_up_what_the_replicas_tell() -> None:
    walk = Walk()
    walk.agent(app(["a", "b"]))
    walk.load("a", running=4, waiting=3, room=13, queue_age_s=2.0)
    walk.load("b", running=1)
    state = walk.home().state
    assert (state.load, state.slots) == (8, 8)
    assert state.queue_age_s == 0.0  # the next one goes to b


def test_a_replica_that_is_no_longer_named_gets_nothing_new() -> None:
    walk = Walk()
    walk.agent(app(["a", "b"]))
    walk.load()
    walk.agent(app(["b"]))
    assert walk.open() == ["b"]
    assert [r.id for r in walk.world.replicas()] == ["b"]


def test_a_replica_whose_machine_is_taken_away_gets_nothing_new() -> None:
    walk = Walk()
    walk.agent(app(["a", "b"]))
    walk.load()
    walk.load("a", leaving=True)
    assert walk.open() == ["b"]
    walk.load("a")
    assert walk.open() == ["a", "b"]


@pytest.mark.parametrize("told", ["nothing", "by the agent", "by itself"])
def test_one_that_stops_is_left_to_finish_what_it_has(told: str) -> None:
    """It takes no connection any more: only of others does that say that they are dead."""
    walk = Walk()
    walk.agent(app(["a", "b"]))
    walk.load()
    replica = walk.replica("a")
    replica.running[Attempt(Leg(replica.target), walk.now_s)] = 0.0
    if told == "by itself":
        walk.load("a", leaving=True)
    elif told == "by the agent":
        walk.agent(app(["b"]))
    for _ in range(5):
        walk.world.replica_silent(replica, "refused", walk.now_s)
        walk.wait(0.3)
    assert walk.given_up == ([replica.target] if told == "nothing" else [])


def test_one_with_requests_is_remembered_until_they_end() -> None:
    walk = Walk()
    walk.agent(app(["a", "b"]))
    walk.load()
    replica = walk.replica("a")
    attempt = Attempt(Leg(replica.target), walk.now_s)
    replica.running[attempt] = 0.0
    walk.agent(app(["b"]))
    assert {r.id for r in walk.world.replicas()} == {"a", "b"}
    assert walk.open() == ["b"]
    replica.running.clear()
    walk.agent(app(["b"]))
    assert [r.id for r in walk.world.replicas()] == ["b"]


def test_the_last_ones_are_kept_for_a_while_when_none_is_named() -> None:
    """A controller that was restarted names none until it has found them again."""
    walk = Walk()
    walk.agent(app(["a", "b"]))
    walk.load()
    walk.agent(app([]))
    assert walk.open() == ["a", "b"]
    walk.wait(KEEP_LAST_S + 1)
    walk.agent(app([]))
    assert walk.open() == []
    assert walk.home().state.replicas == 0
    walk.agent(app(["a", "b"]))
    walk.load()
    assert walk.open() == ["a", "b"]


def test_a_model_at_zero_is_started_through_the_ingress_if_somebody_can() -> None:
    walk = Walk()
    walk.agent(app([]))
    state = walk.home().state
    assert (state.replicas, state.cold_start_s) == (0, 6.0)
    assert walk.rows() == ["eu"]
    for _ in range(2):
        walk.world.agent_silent("refused", walk.now_s)
    walk.world.round()
    assert walk.home().state.cold_start_s is None
    assert walk.rows() == []


def test_who_waits_for_a_pool_to_start_goes_to_one_that_has() -> None:
    walk = Walk()
    spot, tpu, others = ({"name": n, "products": p} for n, p in
                         [("spot", None), ("tpu", None), ("x", ["x"])])  # fmt: skip
    walk.agent(app([], pool=tpu), app([], pool=others), app([], pool=spot))
    waits = walk.home(pool="tpu").ingress
    assert waits.target is not None
    attempt = Attempt(Leg(waits.target), walk.now_s)
    waits.running[attempt] = 0.0
    walk.agent(app([], pool=tpu), app(["b"], pool=others), app([], pool=spot))
    walk.load()
    assert walk.given_up == []  # those are not for everybody
    walk.agent(app([], pool=tpu), app(["b"], pool=others), app(["a"], pool=spot))
    walk.load()
    walk.load()
    assert walk.given_up == [waits.target]  # once


def test_nothing_is_started_while_the_controller_is_gone() -> None:
    walk = Walk()
    walk.agent(app([]), age_s=60)
    assert walk.home().state.cold_start_s is None


def test_nothing_is_started_that_could_not_be_deployed() -> None:
    walk = Walk()
    walk.agent(app([], status="DEPLOY_FAILED"))
    assert walk.home().state.cold_start_s is None


def test_pools_and_versions_are_endpoints() -> None:
    walk = Walk()
    pool = {"name": "spot", "products": ["p"], "unit_usd": 2.0, "handicap_ms": 40}
    walk.agent(
        app(["a"], version="9"), app(["b"], version="10"), app(["c"], version="10", pool=pool)
    )
    walk.load()
    assert not walk.home("9").endpoint.current
    spot = walk.home("10", "spot").endpoint
    assert (spot.current, spot.products, spot.unit_usd) == (True, {"p"}, 2.0)
    assert spot.handicap_s == pytest.approx(0.04)
    assert walk.open("9") == ["a"]


def test_a_version_that_does_not_run_is_not_the_current_one() -> None:
    walk = Walk()
    walk.agent(app(["a"], version="1"), app([], version="2", status="DEPLOYING"))
    assert walk.home("1").endpoint.current
    walk.agent(app(["a"], version="1"), app(["b"], version="2"))
    assert walk.home("2").endpoint.current


def test_an_application_that_is_gone_is_forgotten() -> None:
    walk = Walk()
    walk.agent(app(["a"]))
    walk.load()
    walk.agent()
    assert not walk.world.has("chat")
    assert walk.world.replicas() == []


def test_an_upgrade_loses_no_replica_of_either_version() -> None:
    """One application, replaced replica by replica: both versions serve whoever names none."""
    walk = Walk()
    walk.agent(app(["a", "b"], version="1"))
    walk.load()
    same = walk.replica("a")
    walk.agent(app(["a", "b"], version="2", status="DEPLOYING"))
    assert walk.open("1") == ["a", "b"]
    assert walk.replica("a") is same
    first = walk.world.plan(Ask("chat"), Caller()).rows[0].candidate.state
    assert (first.endpoint.version, first.replicas) == ("1", 2)
    walk.agent(app(["b", "c"], version="2", status="DEPLOYING"))
    replica = walk.replica("c")
    told = replace(IDLE, version="2")
    walk.world.replica_answered(replica, told, 0, 0.0, walk.now_s)
    walk.world.round()
    assert (walk.open("1"), walk.open("2")) == (["b"], ["c"])
    assert walk.home("1").endpoint.current
    assert walk.home("2").endpoint.current
    assert walk.rows(version="1") == ["eu"]
    walk.agent(app(["c"], version="2"))
    assert walk.open("2") == ["c"]
    assert walk.rows(version="1") == []


def test_a_replica_that_turns_out_to_be_of_another_version_moves_there() -> None:
    """A gateway that starts in the middle of an upgrade."""
    walk = Walk()
    walk.agent(app(["a"], version="2", status="DEPLOYING"))
    old = walk.replica("a")
    walk.world.replica_answered(old, IDLE, 0, 0.0, walk.now_s)
    walk.agent(app(["a"], version="2", status="DEPLOYING"))
    moved = walk.replica("a")
    assert (moved.endpoint.endpoint.version, moved.target.port) == ("1", old.target.port)
    walk.world.replica_answered(moved, IDLE, 0, 0.0, walk.now_s)
    walk.world.round()
    assert walk.open("1") == ["a"]


def test_a_spec_that_cannot_be_read_is_left_out() -> None:
    walk = Walk()
    walk.agent(app(["a"], engine="no such engine"))
    assert not walk.world.has("chat")


def test_a_replica_of_another_model_is_not_believed() -> None:
    """Its port may be another's by now."""
    walk = Walk()
    walk.agent(app(["a"]))
    for _ in range(2):
        other = replace(IDLE, model="embed")
        walk.world.replica_answered(walk.replica("a"), other, 0, 0.0, walk.now_s)
    walk.world.round()
    assert walk.open() == []


def test_speed_is_learnt_from_what_replicas_have_done() -> None:
    walk = Walk()
    walk.agent(app(["a", "b"]))
    for second in range(20):
        done = {"answered": second, "busy_s": second * 1.5, "request_s": second * 1.5}
        walk.load("a", answered_tokens=100 * second, **done)
        walk.load("b", answered_tokens=400 * second, **done)
    a, b = walk.replica("a").speed, walk.replica("b").speed
    assert a.alone_tokens_s == pytest.approx(100 / 1.5, rel=0.01)
    assert b.alone_tokens_s == pytest.approx(400 / 1.5, rel=0.01)
    assert walk.home().state.hold_s == pytest.approx(1.5, rel=0.01)
    walk.agent(app(["a", "b", "c"]))
    walk.load("c")
    fresh = walk.replica("c").speed.alone_tokens_s
    assert a.alone_tokens_s < fresh < b.alone_tokens_s  # as its peers are, on average


# ---- who is believed dead -----------------------------------------------------------------------


def test_a_replica_that_is_silent_with_requests_is_dead_and_given_up() -> None:
    walk = Walk()
    walk.agent(app(["a", "b"]))
    walk.load()
    replica = walk.replica("a")
    replica.running[Attempt(Leg(replica.target), walk.now_s)] = 0.0
    walk.world.replica_silent(replica, "no answer in time", walk.now_s)
    assert walk.given_up == [replica.target]
    assert walk.open() == ["b"]
    replica.running.clear()


def test_one_that_answers_requests_is_not_dead_because_its_page_is_slow() -> None:
    walk = Walk()
    walk.agent(app(["a", "b"]))
    walk.load()
    replica = walk.replica("a")
    streaming = Attempt(Leg(replica.target), walk.now_s, heard_s=walk.now_s + 0.9)
    replica.running[streaming] = 0.0
    sent_s = walk.now_s
    walk.now_s += 1.0
    for _ in range(3):
        walk.world.replica_silent(replica, "no answer in time", sent_s)
    assert walk.given_up == []
    replica.running.clear()


def test_three_connections_that_fail_in_a_row_eject_a_replica_at_once() -> None:
    walk = Walk()
    walk.agent(app(["a", "b"]))
    walk.load()
    for _ in range(3):
        walk.ended(walk.replica("a"), "closed")
    assert walk.open() == ["b"]
    assert walk.given_up == []  # it may still answer what it has


def test_one_replica_that_dies_with_many_requests_does_not_condemn_its_region() -> None:
    walk = Walk()
    walk.agent(app(["a", "b"]))
    walk.load()
    for _ in range(30):
        walk.ended(walk.replica("a"), "closed")
    assert walk.home().state.health == "up"


def test_an_endpoint_whose_answers_are_errors_loses_its_traffic_to_another_region() -> None:
    walk = Walk()
    walk.agent(app(["a"]))
    walk.load()
    walk.region("us")
    assert walk.rows() == ["eu", "us"]
    for _ in range(3):
        walk.ended(walk.replica("a"), status=500)
    assert walk.home().state.health == "ejected"
    assert walk.rows() == ["us"]


def test_a_full_queue_is_no_illness() -> None:
    walk = Walk()
    walk.agent(app(["a", "b"]))
    walk.load()
    for _ in range(10):
        walk.ended(walk.replica("a"), "status", status=429)
        walk.ended(walk.replica("a"), "status", status=503, retry_after=True)
    assert walk.open() == ["a", "b"]


def test_short_deadlines_eject_nobody() -> None:
    walk = Walk()
    walk.agent(app(["a", "b"]))
    walk.load()
    for _ in range(10):
        walk.ended(walk.replica("a"), "deadline", took_s=0.05)
    assert walk.open() == ["a", "b"]
    for _ in range(3):
        walk.ended(walk.replica("a"), "deadline", took_s=5.0)
    assert walk.open() == ["b"]


def test_home_lives_as_long_as_a_replica_answers() -> None:
    walk = Walk()
    walk.agent(app(["a"]))
    walk.load()
    for _ in range(5):
        walk.world.agent_silent("refused", walk.now_s)
    walk.world.round()
    assert walk.rows() == ["eu"]
    replica = walk.replica("a")
    for _ in range(2):
        walk.world.replica_silent(replica, "refused", walk.now_s)
        walk.world.agent_silent("refused", walk.now_s)
        walk.world.agent_silent("refused", walk.now_s)
    walk.world.round()
    assert walk.home().state.health == "down"
    found = walk.world.plan(Ask("chat"), Caller()).refusal
    assert found is not None
    assert found.filter == "health"


def test_when_a_replica_fails_the_roll_is_called() -> None:
    """Whether a request has killed it or the region is lost, only the others can tell."""
    walk = Walk()
    walk.agent(app(["a", "b"]))
    walk.load()
    doubted: list[Peer] = []
    walk.world.doubt = doubted.append
    walk.now_s += 0.01
    died_s = walk.now_s
    walk.ended(walk.replica("a"), "closed")
    home = walk.world.region("eu")
    assert {each.name for each in doubted} == {home.name, *(r.name for r in walk.world.replicas())}
    assert not walk.world.home_lived(died_s)
    walk.load("b")
    assert walk.world.home_lived(died_s)


def test_who_may_be_gone_is_asked_again_at_once_until_it_is_settled() -> None:
    walk = Walk()
    walk.agent(app(["a"]))
    walk.load()
    walk.region("us")
    doubted: list[Peer] = []
    walk.world.doubt = doubted.append
    replica, home, us = walk.replica("a"), walk.world.region("eu"), walk.world.region("us")
    walk.world.agent_silent("refused", walk.now_s)
    assert doubted == [], "a replica answers: only the agent is gone"
    walk.world.replica_silent(replica, "refused", walk.now_s)
    assert doubted == [replica]
    walk.world.replica_silent(replica, "refused", walk.now_s)
    assert doubted[1:] == [home], "the last replica is gone: is it the region?"
    walk.world.agent_silent("refused", walk.now_s)
    assert doubted[2:] == [home]
    walk.world.agent_silent("refused", walk.now_s)
    assert walk.world.is_lost("eu")
    for _ in range(3):
        walk.world.agent_silent("refused", walk.now_s)
        walk.world.replica_silent(replica, "refused", walk.now_s)
    assert len(doubted) == 3, "what is settled is asked at the usual pace"
    walk.world.region_silent(us, "no answer in time", walk.now_s)
    assert len(doubted) == 3, "that took its time"
    walk.world.region_silent(us, "refused", walk.now_s)
    assert walk.world.is_lost("us")
    assert len(doubted) == 3


def test_a_tiny_inference_that_hangs_takes_a_replica_out_and_brings_it_back() -> None:
    walk = Walk()
    walk.agent(app(["a", "b"]))
    walk.load()
    replica = walk.replica("a")
    for _ in range(2):
        walk.world.deep_probed(replica, False, walk.now_s, "no answer in time")
    assert walk.open() == ["b"]
    assert walk.given_up == [replica.target]
    assert walk.world.deep_down(replica)
    for _ in range(4):
        walk.load("a")
    assert walk.open() == ["b"]
    walk.world.deep_probed(replica, True, walk.now_s, "")
    walk.load("a")
    assert walk.open() == ["a", "b"]


# ---- other regions ------------------------------------------------------------------------------


def test_a_region_is_as_far_as_its_answer_takes_without_its_own_time() -> None:
    walk = Walk()
    walk.region("us", took_s=0.081)
    (known,) = walk.world.region("us").endpoints.values()
    assert known.state.rtt_s == pytest.approx(0.080)
    assert (known.state.health, known.state.slots) == ("up", 8)


def test_a_region_that_says_it_is_somewhere_else_is_not_believed() -> None:
    """Nothing bound to a place may go where only a file says that this place is."""
    walk = Walk(home=None)
    walk.region("us")
    assert walk.rows() == ["us"]
    walk.region("us", jurisdiction="cn")
    walk.region("us", jurisdiction="cn")
    assert walk.rows() == []
    (status,) = [r for r in walk.world.regions if r.name == "us"]
    assert status.health == "down"
    assert "says it is us in cn" in status.reason


def test_a_region_that_goes_down_is_given_up_at_all_its_endpoints() -> None:
    walk = Walk()
    walk.agent(app(["a"]))
    walk.load()
    walk.region("us", endpoint(), endpoint(model="embed"))
    targets = {known.target for known in walk.world.region("us").endpoints.values()}
    for _ in range(2):
        walk.world.region_silent(walk.world.region("us"), "refused", walk.now_s)
    assert set(walk.given_up) == targets
    assert len(targets) == 2
    assert walk.rows() == ["eu"]


def test_a_region_that_keeps_requests_waiting_is_asked_before_its_turn() -> None:
    walk = Walk()
    doubted: list[object] = []
    walk.world.doubt = doubted.append
    walk.region("us")
    region = walk.world.region("us")
    (known,) = region.endpoints.values()
    assert known.target is not None
    attempt = Attempt(Leg(known.target), walk.now_s)
    region.running[attempt] = walk.now_s + 0.1
    region.asked_s = walk.now_s
    walk.wait(0.3)
    assert doubted == []  # it is late by less than a quarter of a second
    walk.wait(0.1)
    assert doubted == [region]
    region.asked_s = walk.now_s
    walk.wait(0.1)
    assert doubted == [region]
    attempt.heard_s = walk.now_s
    walk.wait(5)
    assert doubted == [region]  # its answer has begun
    region.running.clear()


def test_a_way_that_seems_much_longer_is_measured_again_at_once() -> None:
    walk = Walk(home=None)
    for _ in range(20):
        walk.region("us", took_s=0.081)
    doubted: list[Peer] = []
    walk.world.doubt = doubted.append
    walk.region("us", took_s=0.095)
    assert doubted == []
    for _ in range(3):
        walk.region("us", took_s=0.581)
    assert len(doubted) == 2
    (known,) = walk.world.region("us").endpoints.values()
    assert known.state.rtt_s > 0.4, "believed after three"


def test_an_endpoint_that_is_no_longer_told_of_drains_and_goes() -> None:
    walk = Walk(home=None)
    walk.region("us", endpoint(), endpoint(model="embed"))
    (_, known) = walk.world.region("us").endpoints.values()
    walk.world.books.own[known.number] = 1
    walk.region("us", endpoint())
    assert known.state.draining
    assert walk.world.has("embed")
    walk.world.books.own[known.number] = 0
    walk.region("us", endpoint())
    assert not walk.world.has("embed")


def test_a_gateway_that_drains_gets_nothing_new() -> None:
    walk = Walk(home=None)
    walk.region("us", draining=True)
    assert walk.rows() == []


def test_the_report_of_one_world_is_what_the_next_one_believes() -> None:
    walk, other = Walk(), Walk("us")
    walk.agent(app(["a", "b"], fallback_models=["small"]))
    walk.load(running=3)
    told = parse_region(_json(walk.world.report(0.002)))
    other.world.region_answered(other.world.region("eu"), told, 0.052, {}, other.now_s)
    other.world.round()
    (known,) = other.world.region("eu").endpoints.values()
    state, ours = known.state, walk.home().state
    assert (state.replicas, state.slots, state.load) == (2, 8, 6)
    assert (state.first_byte_s, state.hold_s) == (ours.first_byte_s, ours.hold_s)
    assert known.fallbacks == ("small",)
    assert state.rtt_s == pytest.approx(0.05)


def _json(told: RegionReport) -> bytes:
    import msgspec

    return msgspec.json.encode(told)


def test_an_edge_site_has_nothing_to_tell_of() -> None:
    with pytest.raises(BadRequest):
        Walk(home=None).world.report(0.0)


def test_what_is_told_is_not_believed_beyond_reason() -> None:
    for wrong in ({"load": -1}, {"hold_s": float("nan")}, {"model": "../x"}, {"slots": 2**60}):
        with pytest.raises(ValueError):
            parse_region(_json(report("us", endpoint(**wrong))))


# ---- fallbacks, explanations, readiness ---------------------------------------------------------


def test_fallback_models_are_planned_for_where_the_caller_may_ask_them() -> None:
    walk = Walk()
    walk.agent(app(["a"], fallback_models=["small", "tiny"]))
    walk.load()
    walk.region("us", endpoint(model="small"), endpoint(model="tiny"))
    made = walk.world.plan(Ask("chat"), Caller())
    assert [smaller.ask.model for smaller in made.degraded] == ["small", "tiny"]
    made = walk.world.plan(Ask("chat"), Caller(), models=frozenset({"chat", "tiny"}))
    assert [smaller.ask.model for smaller in made.degraded] == ["tiny"]
    assert walk.world.plan(Ask("chat"), Caller(), home_only=True).degraded == ()


def test_an_explanation_for_somebody_elsewhere_assumes_their_distances() -> None:
    from nearfield.edge.distance import Place

    walk = Walk()
    walk.agent(app(["a"]))
    walk.load()
    walk.region("us")
    explanation, decision = walk.world.explain("chat", client=Place(53.3, -6.3))
    assert not isinstance(decision, Refusal)
    rtts = {line.endpoint: line.rtt_s for line in explanation.lines}
    assert rtts["eu/chat@1/default"] == rtts["us/chat@1/default"]  # both files say Dublin
    assert "chosen" in str(explanation)


def test_ready_with_a_route_and_complete_when_all_were_heard() -> None:
    walk = Walk()
    assert not walk.world.ready
    walk.agent(app([]))
    assert walk.world.ready  # it can be started
    assert not walk.world.complete
    walk.region("us")
    walk.region("in")
    assert walk.world.complete


# ---- over a restart -----------------------------------------------------------------------------


def test_a_gateway_starts_with_what_was_known(tmp_path: Path) -> None:
    file = tmp_path / "state" / "world.json"
    walk = Walk()
    walk.agent(app(["a"]))
    walk.load()
    walk.region("us", took_s=0.081)
    walk.home().learn_cold_start(10.0)
    last_good.save(file, walk.world.last_good())
    assert file.stat().st_mode & 0o777 == 0o600

    again = Walk(last_good=file)
    assert again.rows() == ["us"]  # believed until its probes fail
    (known,) = again.world.region("us").endpoints.values()
    assert known.state.rtt_s == pytest.approx(0.08)
    assert again.home().cold_start_s == 8.0
    assert again.home().state.cold_start_s is None  # nobody has said that it can be started
    again.load()  # the replica answers, the agent is still silent
    assert again.rows() == ["eu", "us"]
    for _ in range(2):
        again.world.region_silent(again.world.region("us"), "refused", again.now_s)
    assert again.rows() == ["eu"]


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe"])
def test_a_file_that_cannot_be_read_stops_nobody(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "world.json"
    file.write_bytes(content)
    file.chmod(0o600)
    assert Walk(last_good=file).rows() == []


def test_what_is_too_old_is_not_believed(tmp_path: Path) -> None:
    file = tmp_path / "world.json"
    walk = Walk()
    walk.region("us")
    last_good.save(file, replace(walk.world.last_good(), saved_s=1.0))
    assert Walk(last_good=file).rows() == []


# ---- files --------------------------------------------------------------------------------------


def test_a_site_is_checked() -> None:
    with pytest.raises(BadRequest, match="not among"):
        Site.of(gateway_file("cn"), FILES)
    with pytest.raises(BadRequest, match="twice"):
        Site.of(gateway_file(), [*FILES, FILES[0]])
    assert Site.of(gateway_file(None), FILES).jurisdiction == "eu"


def test_urls() -> None:
    assert target_of("http://a:81").authority == b"a:81"
    assert target_of("http://[::1]").authority == b"[::1]:80"
    assert target_of("https://a").tls is not None
    for wrong in ("ftp://a", "http://", "http://a:0", "http://a:99999"):
        with pytest.raises(BadRequest):
            target_of(wrong)


def test_numbers_rest_before_they_are_given_out_again() -> None:
    books = Books()
    first = books.take()
    books.give_back(first)
    taken = {books.take() for _ in range(10)}
    assert first not in taken
    for number in taken:
        books.give_back(number)
    for _ in range(RESTING):
        books.give_back(books.take())
    assert len(books.own) <= RESTING + 12


def test_a_router_needs_only_a_world() -> None:
    assert WorldRouter(Walk().world).world.models == {}
