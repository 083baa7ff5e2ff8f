"""Routing: inside the jurisdiction, never to the dead, settled, and deaf to noise."""

from __future__ import annotations

import dataclasses
import random

from hypothesis import given, settings
from hypothesis import strategies as st
from nearfield.policy.endpoints import Ask, Caller, Endpoint, EndpointState, Refusal
from nearfield.policy.explain import explain
from nearfield.policy.route import (
    JOIN,
    LEAVE,
    SETTLE_S,
    STAND_S,
    Pick,
    Plan,
    alternatives,
    pick,
    plan,
)
from nearfield.policy.rtt import Rtt

from tests.simulation.jitter import changes, gaussian, uniform

ASK = Ask("chat")
JURISDICTIONS = ("eu", "us", "asia")


@st.composite
def worlds(draw: st.DrawFn, least: int = 0) -> list[EndpointState]:
    size = draw(st.integers(least, 7))
    return [draw(endpoint_states(number)) for number in range(size)]


@st.composite
def endpoint_states(draw: st.DrawFn, number: int) -> EndpointState:
    replicas = draw(st.integers(0, 3))
    load = draw(st.integers(0, 40))
    return EndpointState(
        Endpoint(
            region=f"region-{number // 2}",
            model=draw(st.sampled_from(["chat", "chat", "chat", "small"])),
            version="1",
            pool=f"pool-{number % 2}",
            jurisdiction=draw(st.sampled_from(JURISDICTIONS)),
            products=draw(st.sampled_from([None, None, frozenset({"bank"}), frozenset({"shop"})])),
            unit_usd=draw(st.sampled_from([0.5, 1.0, 2.0])),
            handicap_s=draw(st.sampled_from([0.0, 0.0, 0.05])),
        ),
        number,
        rtt_s=draw(st.floats(0.0001, 0.4)),
        health=draw(st.sampled_from(["up", "up", "ejected", "down", "unknown"])),
        weight=draw(st.sampled_from([1.0, 1.0, 0.1, 0.5])),
        draining=draw(st.integers(0, 5)) == 0,
        replicas=replicas,
        slots=8 * replicas,
        max_queued=draw(st.sampled_from([0, 16])),
        load=load,
        own=draw(st.integers(0, load)),
        first_byte_s=draw(st.floats(0.001, 0.3)),
        hold_s=draw(st.floats(0.01, 3.0)),
        queue_age_s=draw(st.floats(0, 1)),
        cold_start_s=draw(st.sampled_from([None, 0.2, 4.0])),
        prefill_token_s=0.0001,
    )


callers = st.builds(
    Caller,
    jurisdictions=st.one_of(
        st.none(), st.frozensets(st.sampled_from(JURISDICTIONS), min_size=1, max_size=2)
    ),
    product=st.sampled_from([None, "bank"]),
    mode=st.sampled_from(["nearest", "economy"]),
    slo_s=st.sampled_from([None, 0.1, 0.5]),
)
draws = st.floats(0, 1, exclude_max=True)
in_flight = st.lists(st.integers(0, 60), min_size=8, max_size=8)


@given(
    worlds(),
    callers,
    in_flight,
    draws,
    st.integers(0, 2),
    st.sampled_from([0.01, 0.3, 60.0]),
    st.integers(-1, 7),
)
@settings(max_examples=200)
def test_whoever_is_picked_passes_every_filter(
    world: list[EndpointState],
    caller: Caller,
    own: list[int],
    draw: float,
    criticality: int,
    allowed_s: float,
    session: int,
) -> None:
    smaller = plan(world, Ask("small"), caller, now_s=0)
    first = plan(world, ASK, caller, now_s=0, degraded=(smaller,))
    found = pick(
        first,
        own,
        draw,
        criticality=criticality,
        allowed_s=allowed_s,
        session=session,
        cached_tokens=900,
    )
    reachable = list(alternatives(first, own, tried=()))
    if isinstance(found, Pick):
        reachable.append(found.candidate)
        assert found.predicted_s >= 0
    elif found.retry_after_s is not None:
        assert found.retry_after_s >= 0
    alive = any(s.health == "up" for s in world)
    for candidate in reachable:
        state = candidate.state
        endpoint = state.endpoint
        assert caller.jurisdictions is None or endpoint.jurisdiction in caller.jurisdictions
        assert endpoint.model in ("chat", "small")
        assert endpoint.products is None or caller.product in endpoint.products
        assert state.health in ("up", "ejected")
        assert not state.draining
        assert state.replicas or state.cold_start_s is not None
        if state.health == "ejected" and alive:  # an ejected one only where no other would do
            others = [s for s in world if s.endpoint.model == endpoint.model and s.health == "up"]
            sent = plan(others, Ask(endpoint.model), caller, now_s=0)
            assert not sent.rows
    assert explain(first, found, own, criticality=criticality).outcome


@given(worlds(least=1), callers, draws)
def test_never_to_the_dead_while_one_lives(
    world: list[EndpointState], caller: Caller, draw: float
) -> None:
    found = pick(plan(world, ASK, caller, now_s=0), [0] * 8, draw)
    if isinstance(found, Pick):
        return
    # Whoever is refused had no live endpoint that may serve it, or only full ones.
    live = [s for s in world if s.health == "up"]
    again = plan(live, ASK, caller, now_s=0)
    assert not again.rows or found.filter == "full"


@given(worlds(), callers, draws, in_flight)
def test_a_full_endpoint_takes_nobody(
    world: list[EndpointState], caller: Caller, draw: float, own: list[int]
) -> None:
    found = pick(plan(world, ASK, caller, now_s=0), own, draw, criticality=0)
    if isinstance(found, Pick):
        state = found.candidate.state
        assert state.load - state.own + own[state.number] < state.slots + state.max_queued


def same(a: Plan, b: Plan) -> bool:
    return (a.rows, a.near, a.held, a.refused) == (b.rows, b.near, b.held, b.refused)


@given(worlds(), worlds(), callers, st.sampled_from([1.0, 2 * SETTLE_S]))
@settings(max_examples=60)
def test_constant_inputs_settle(
    before: list[EndpointState], world: list[EndpointState], caller: Caller, at_s: float
) -> None:
    """From any history: at once while the set is new, later once it has stood; then for good."""
    earlier = plan(before, ASK, caller, now_s=0)
    first = plan(world, ASK, caller, now_s=at_s, previous=earlier)
    second = plan(world, ASK, caller, now_s=at_s + 1, previous=first)
    third = plan(world, ASK, caller, now_s=at_s + 2, previous=second)
    assert same(second, third)
    if caller.mode == "nearest":
        assert same(first, second)
        later = plan(world, ASK, caller, now_s=at_s + 2 + STAND_S, previous=third)
        assert same(later, plan(world, ASK, caller, now_s=at_s + 3 + STAND_S, previous=later))


@given(worlds(least=1), draws)
def test_idle_endpoints_are_chosen_by_distance_within_the_edge(
    world: list[EndpointState], draw: float
) -> None:
    idle = [dataclasses.replace(s, load=0, own=0, weight=1.0, replicas=1, slots=8) for s in world]
    found = pick(plan(idle, ASK, Caller(), now_s=0), [0] * 8, draw)
    if isinstance(found, Pick):
        usable = {row.number: row for row in found.plan.rows}
        least_s = min(row.floor_s for row in usable.values())
        assert found.candidate.floor_s <= least_s + max(JOIN * least_s, 0.0005) + 1e-12


@given(worlds(least=1), in_flight, draws, st.sampled_from([0.1, 0.5]))
def test_economy_takes_the_cheapest_that_is_in_time(
    world: list[EndpointState], own: list[int], draw: float, slo_s: float
) -> None:
    world = [dataclasses.replace(s, weight=1.0) for s in world]
    caller = Caller(mode="economy", slo_s=slo_s)
    first = plan(world, ASK, caller, now_s=0)
    found = pick(first, own, draw)
    if isinstance(found, Refusal):
        return
    for row in first.rows:
        wait_s = row.wait_s(own[row.number])
        in_time = row.floor_s + wait_s <= 0.8 * slo_s and own[row.number] < row.rooms[1]
        if in_time:
            cheapest = row.candidate.state.endpoint.unit_usd
            assert found.candidate.state.endpoint.unit_usd <= cheapest * 1.02


def region(number: int, rtt_s: float, first_byte_s: float) -> EndpointState:
    endpoint = Endpoint(f"region-{number}", "chat", "1", "l4", "eu")
    return EndpointState(endpoint, number, rtt_s, slots=64, first_byte_s=first_byte_s)


@given(
    st.lists(st.floats(0.001, 0.3), min_size=2, max_size=5),
    st.sampled_from([0.0, 0.02, 0.2]),
    st.integers(0, 2**32),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_seven_per_cent_of_jitter_moves_nobody(
    rtts_s: list[float], first_byte_s: float, seed: int, flat: bool
) -> None:
    """Ten minutes of probes once a second, after the first minute: nobody comes and goes."""
    draw = uniform(seed) if flat else gaussian(seed)
    assert changes(rtts_s, draw, first_byte_s=first_byte_s) <= 2


@given(st.integers(0, 2**32), st.floats(0.01, 0.3), st.floats(-0.07, 0.07), st.floats(0.02, 0.99))
@settings(max_examples=50, deadline=None)
def test_a_re_entering_region_gets_its_share(
    seed: int, rtt_s: float, jitter: float, weight: float
) -> None:
    back = dataclasses.replace(region(0, rtt_s, 0.0), weight=weight)
    other = region(1, rtt_s * (1.5 + jitter), 0.0)
    current = plan([back, other], ASK, Caller(), now_s=0)
    noise = random.Random(seed)
    found = [pick(current, [0, 0], noise.random()) for _ in range(2000)]
    share = sum(isinstance(f, Pick) and f.candidate.state.number == 0 for f in found) / 2000
    assert abs(share - weight) < 0.06
    alone = pick(plan([back], ASK, Caller(), now_s=0), [0], 0.999)
    assert isinstance(alone, Pick)
    assert alone.why == "re-entry"


@given(st.floats(0.001, 0.5), st.floats(0.3, 3.0), st.integers(0, 2**32))
@settings(max_examples=100)
def test_a_round_trip_that_has_changed_is_soon_believed(
    before_s: float, factor: float, seed: int
) -> None:
    noise = random.Random(seed)
    estimate = Rtt()
    for _ in range(100):
        estimate = estimate.learn(before_s * (1 + noise.uniform(-0.07, 0.07)))
    assert abs(estimate.level_s / before_s - 1) < 0.03
    for _ in range(70):
        estimate = estimate.learn(before_s * factor * (1 + noise.uniform(-0.07, 0.07)))
    assert abs(estimate.level_s / (before_s * factor) - 1) < 0.05


def test_the_edge_is_wider_than_what_noise_is_left_with() -> None:
    assert LEAVE - JOIN >= 0.07
