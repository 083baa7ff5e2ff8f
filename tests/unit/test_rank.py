"""Ranking replicas, one matter at a time."""

from __future__ import annotations

import pytest
from nearfield.policy.endpoints import crowd
from nearfield.policy.rank import MOST_LOOKED_AT, ReplicaState, choose, places

ALONE = 100.0


def replica(number: int, **facts: object) -> ReplicaState:
    defaults: dict[str, object] = {
        "tokens_s": 4 * ALONE,
        "alone_tokens_s": ALONE,
        "slots": 4,
        "max_queued": 8,
    }
    return ReplicaState(number, f"replica-{number}", **{**defaults, **facts})  # type: ignore[arg-type]


def best(*states: ReplicaState, tokens: float = 100, **options: object) -> int | None:
    own, work = options.pop("own", [0] * 40), options.pop("work", [0.0] * 40)
    found = choose(places(states), own, work, 0.5, tokens=tokens, **options)  # type: ignore[arg-type]
    return None if found is None else found.state.number


def test_the_faster_hardware_first_and_the_slower_when_that_has_a_queue() -> None:
    slow, fast = replica(0), replica(1, tokens_s=8 * ALONE, alone_tokens_s=2 * ALONE)
    assert best(slow, fast) == 1
    assert best(slow, fast, own=[0, 9], work=[0.0, 900.0]) == 0


def test_tokens_in_flight_count_not_requests() -> None:
    many_short = replica(0, load=6, work=60.0)
    few_long = replica(1, load=5, work=2000.0)
    assert best(many_short, few_long) == 0


def test_a_queue_older_than_its_work_explains_is_a_slow_replica() -> None:
    stuck = replica(0, load=5, work=100.0, queue_age_s=6.0)
    assert best(stuck, replica(1, load=5, work=300.0)) == 1


def test_a_full_kv_cache_is_a_queue() -> None:
    assert best(replica(0, kv_used=9990, kv_total=10_000), replica(1, kv_total=10_000)) == 1
    assert best(replica(0, kv_used=9000, kv_total=10_000), replica(1, load=2, work=99.0)) == 0


def test_sharing_one_accelerator_slows_everyone() -> None:
    """Four slots and the speed of two: a third request takes from the others."""
    shared = replica(0, tokens_s=2 * ALONE, load=3, work=300.0)
    assert best(shared, replica(1, tokens_s=2 * ALONE, load=1, work=300.0)) == 1


def test_what_this_gateway_has_sent_since_the_poll_counts() -> None:
    assert best(replica(0), replica(1, load=1, work=10.0), own=[5, 0], work=[500.0, 0.0]) == 1


def test_old_news_is_read_by_others_too() -> None:
    assert crowd([10, 20], [5, 5]) == 3.0
    assert crowd([0, 0], [0, 0]) == 1.0
    assert crowd([100], [1]) == 8.0
    # Of a load of three gateways, three more of ours since the poll mean about six in all.
    mine = replica(0, load=3, work=300.0, own=1, own_work=100.0)
    alone = choose(places([mine]), [4], [400.0], 0.5, tokens=100)
    assert alone is not None
    assert alone.wait_s > 0  # 2 of others + 4 + 3 of an echo, for 4 slots


def test_a_cached_prefix_is_work_saved() -> None:
    near_full = replica(1, load=2, work=100.0)
    assert best(replica(0), near_full, tokens=1000, cached={1: 800}) == 1
    queued = replica(1, load=8, work=4000.0)
    assert best(replica(0), queued, tokens=1000, cached={1: 800}) == 0


def test_a_draining_a_dead_and_a_full_replica_get_nothing() -> None:
    assert best(replica(0, draining=True), replica(1, health="down"), replica(2, load=12)) is None
    assert best(replica(0, health="ejected"), replica(1, load=10, work=9999.0)) == 1
    assert best(replica(0, health="ejected"), replica(1, health="down")) == 0


def test_the_last_places_are_for_the_critical() -> None:
    nearly_full = replica(0, load=11, work=10.0)
    levels = [best(nearly_full, criticality=level) for level in (0, 1, 2)]
    assert levels == [0, None, None]


def test_a_returning_replica_gets_its_share_and_everything_if_it_is_alone() -> None:
    back = replica(0, tokens_s=8 * ALONE, alone_tokens_s=2 * ALONE, weight=0.25)
    open_places = places([back, replica(1)])
    own, work = [0, 0], [0.0, 0.0]
    tally = [0, 0]
    for i in range(100):
        found = choose(open_places, own, work, i / 100, tokens=10)
        assert found is not None
        tally[found.state.number] += 1
    assert tally == [25, 75]
    alone = choose(places([back]), own, work, 0.99, tokens=10)
    assert alone is not None
    assert alone.state is back


@pytest.mark.parametrize("draw", [0.0, 0.4, 0.999])
def test_of_very_many_a_sample_of_all_speeds_is_compared(draw: float) -> None:
    states = [replica(i, tokens_s=4.0 * (i + 1), alone_tokens_s=i + 1.0) for i in range(320)]
    found = choose(places(states), [0] * 320, [0.0] * 320, draw, tokens=10)
    assert found is not None
    assert found.state.number >= 320 - 320 // MOST_LOOKED_AT
