"""Ranking replicas: never a dead or full one, monotone in load, and fair to a returning one."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from nearfield.policy.rank import MOST_LOOKED_AT, ReplicaState, choose, places


@st.composite
def replicas(draw: st.DrawFn) -> list[ReplicaState]:
    found = []
    for number in range(draw(st.integers(0, 24))):
        alone = draw(st.floats(10, 5000))
        load = draw(st.integers(0, 40))
        own = draw(st.integers(0, load))
        work = load * draw(st.floats(1, 500))
        kv_total = draw(st.sampled_from([0, 10_000]))
        found.append(
            ReplicaState(
                number,
                f"replica-{number}",
                tokens_s=alone * draw(st.floats(1, 16)),
                alone_tokens_s=alone,
                slots=draw(st.integers(1, 16)),
                max_queued=draw(st.sampled_from([0, 8])),
                health=draw(st.sampled_from(["up", "up", "up", "ejected", "down", "unknown"])),
                weight=draw(st.sampled_from([1.0, 1.0, 0.3])),
                draining=draw(st.integers(0, 4)) == 0,
                load=load,
                work=work,
                own=own,
                own_work=work * own / max(1, load),
                queue_age_s=draw(st.floats(0, 5)),
                kv_used=draw(st.integers(0, kv_total)),
                kv_total=kv_total,
            )
        )
    return found


draws = st.floats(0, 1, exclude_max=True)
own_counts = st.lists(st.integers(0, 30), min_size=24, max_size=24)


@given(replicas(), own_counts, draws, st.floats(1, 4000), st.integers(0, 2))
@settings(max_examples=60)
def test_a_request_goes_to_a_live_replica_with_room_or_nowhere(
    states: list[ReplicaState], own: list[int], draw: float, tokens: float, criticality: int
) -> None:
    open_places = places(states)
    found = choose(
        open_places,
        own,
        [n * 100.0 for n in own],
        draw,
        tokens=tokens,
        criticality=criticality,
        cached={3: 50},
    )
    usable = [s for s in states if not s.draining]
    live = [s for s in usable if s.health == "up"] or [s for s in usable if s.health == "ejected"]
    room = [s for s in live if s.load - s.own + own[s.number] < s.slots + s.max_queued]
    if found is None:
        if criticality == 0 and len(live) <= MOST_LOOKED_AT:
            assert not room
        return
    assert found.state in live
    assert found.state in room
    assert found.score_s >= found.wait_s >= 0


@given(replicas(), draws, st.floats(1, 4000), st.integers(0, 23))
@settings(max_examples=60)
def test_more_work_on_the_chosen_one_never_attracts(
    states: list[ReplicaState], draw: float, tokens: float, number: int
) -> None:
    """A replica that is passed over is not chosen for having more to do."""
    states = [s._replace(weight=1.0) for s in states[:MOST_LOOKED_AT]]
    own, work = [0] * 24, [0.0] * 24
    before = choose(places(states), own, work, draw, tokens=tokens)
    if before is None or before.state.number == number or number >= len(states):
        return
    own[number], work[number] = 1, 400.0
    after = choose(places(states), own, work, draw, tokens=tokens)
    assert after is None or after.state.number != number


@given(st.integers(2, 12), st.integers(0, 2**32))
@settings(max_examples=40)
def test_equals_share(count: int, seed: int) -> None:
    states = [ReplicaState(i, f"r{i}", 1000.0, 250.0, slots=4) for i in range(count)]
    noise = random.Random(seed)
    open_places = places(states)
    tally = [0] * count
    for _ in range(600 * count):
        found = choose(open_places, [0] * count, [0.0] * count, noise.random(), tokens=100)
        assert found is not None
        tally[found.state.number] += 1
    assert min(tally) > 400
    assert max(tally) < 800
