"""The scaling policy, one matter at a time, time walked through."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from nearfield.policy.scale import (
    Notice,
    PoolSignals,
    PoolSpec,
    ScalingSpec,
    Signals,
    State,
    step,
)

from tests.support.scaling import Replicas, World


def world(*pools: PoolSpec, speeds: dict[str, float] | None = None, **facts: object) -> World:
    given = pools or (PoolSpec("gpu", max_replicas=50, boot_s=30.0),)
    options = {k: facts.pop(k) for k in ("max_usd_per_hour", "idle_s") if k in facts}
    spec = ScalingSpec(given, hold_s=60.0, **options)  # type: ignore[arg-type]
    return World(spec, speeds or {p.name: 10.0 for p in given}, **facts)  # type: ignore[arg-type]


def test_steady_load_gets_what_it_needs_and_no_more() -> None:
    made = world().run(1800, 95.0)
    assert 10 <= made.total <= 12
    settled = [t.replicas for at_s, d in made.decisions if at_s > 60 for t in d.targets]
    assert settled == sorted(settled, reverse=True)  # less as trust grows, never back and forth


def test_a_jump_is_followed_within_a_boot_and_the_queue_is_worked_off() -> None:
    made = world().run(900, 50.0)
    made.run(30, 100.0)
    assert made.total >= 10
    made.run(150, 100.0)
    assert made.backlog == 0.0


def test_less_load_gives_replicas_back() -> None:
    made = world().run(600, 200.0).run(600, 40.0)
    assert made.total <= 8


def test_zero_after_idle_and_back_with_the_first_request() -> None:
    made = world(idle_s=120.0).run(300, 20.0)
    made.run(115, 0.0)
    assert made.total >= 1
    made.run(10, 0.0)
    assert made.total == 0
    assert "no request for" in made.decisions[-1][1].reason
    assert made.tick(1.0).targets[0].replicas >= 1


def test_no_request_yet_is_no_reason_to_start_one() -> None:
    made = world(idle_s=60.0)
    made.run(120, 0.0)
    assert made.total == 0


def test_no_data_gives_nothing_up() -> None:
    made = world().run(600, 95.0)
    before = made.total
    for _ in range(900):
        decision = made.tick(0.0, dark=True)
        assert decision.targets[0].replicas >= before
    assert decision.reason == "no data from gpu: nothing is given up"


def test_a_pool_that_is_silent_is_no_data() -> None:
    made = world().run(300, 95.0)
    before = made.total
    decision, _ = step(Signals(made.now_s + 600.0, ()), made.state, made.spec)
    assert decision.target("gpu").replicas == before


def test_without_a_measured_speed_concurrency_is_the_measure() -> None:
    """Requests of half a second each, four at once: a replica finishes eight a second."""
    spec = ScalingSpec((PoolSpec("gpu", max_replicas=50, target_ongoing=4.0),), hold_s=60.0)
    state = State()
    running = 1
    for second in range(900):
        signals = PoolSignals("gpu", running, ongoing=40.0, queued=0.0, arrivals=80.0, late=0.0)
        decision, state = step(Signals(float(second), (signals,)), state, spec)
        running = decision.target("gpu").replicas
    assert 10 <= running <= 13


def test_before_anything_is_known_it_goes_by_the_requests_there_are() -> None:
    spec = ScalingSpec((PoolSpec("gpu", max_replicas=50, target_ongoing=4.0),))
    signals = PoolSignals("gpu", 0, ongoing=17.0, queued=17.0, arrivals=17.0)
    decision, _ = step(Signals(0.0, (signals,)), State(), spec)
    assert decision.target("gpu").replicas == 5
    assert "17 requests at once, 4 for each replica" in decision.target("gpu").reason


def test_the_cheaper_pool_first_and_the_dearer_where_it_is_full() -> None:
    cheap = PoolSpec("l4", max_replicas=4, usd_per_hour=1.0)
    dear = PoolSpec("h100", max_replicas=9, usd_per_hour=9.0)
    made = world(cheap, dear, speeds={"l4": 10.0, "h100": 60.0}).run(600, 20.0)
    assert made.counts() == {"l4": 3, "h100": 0}
    made.run(600, 75.0)
    assert made.counts()["h100"] >= 1


def test_a_pool_whose_starts_are_overdue_is_replaced_and_tried_again() -> None:
    spot = PoolSpec("spot", kind="spot", max_replicas=9, usd_per_hour=1.0, boot_s=30.0)
    steady = PoolSpec("on-demand", max_replicas=9, usd_per_hour=3.0, boot_s=30.0)
    spec = ScalingSpec((spot, steady))
    state, counts = State(), {"spot": 0, "on-demand": 0}
    asked_s: dict[str, float] = {}
    for second in range(400):
        now_s = float(second)
        for name in counts:
            if counts[name]:
                asked_s.setdefault(name, now_s)
        ready = "on-demand" in asked_s and now_s - asked_s["on-demand"] > 30.0
        pools = (
            PoolSignals(
                "spot", 0, starting=(now_s - asked_s.get("spot", now_s),) * counts["spot"],
                ongoing=0.0, queued=0.0, arrivals=0.0, late=0.0, replica_work_s=10.0,
            ),
            PoolSignals(
                "on-demand", counts["on-demand"] if ready else 0,
                starting=() if ready else (now_s - asked_s.get("on-demand", now_s),) * 3,
                ongoing=20.0, queued=0.0, arrivals=20.0, late=0.0, replica_work_s=10.0,
            ),
        )  # fmt: skip
        decision, state = step(Signals(now_s, pools), state, spec)
        counts = {t.name: t.replicas for t in decision.targets}
    assert counts["on-demand"] >= 2
    assert counts["spot"] == 1  # waits for a machine: how it is noticed that there are some again


def test_what_waits_for_a_machine_replaces_nothing() -> None:
    """Two pools without machines wait on top of what does the work, and stay."""
    pools = [
        PoolSpec(name, max_replicas=4, usd_per_hour=usd, boot_s=5.0)
        for name, usd in [("tpu", 1.0), ("spot", 2.0), ("steady", 3.0)]
    ]
    spec = ScalingSpec(tuple(pools), hold_s=5.0)
    state, counts, asked = State(), {"tpu": 1, "spot": 1, "steady": 1}, set[tuple[int, ...]]()
    for second in range(300):
        signals = tuple(
            PoolSignals(
                pool.name, running, starting=(math.inf,) * (counts[pool.name] - running),
                ongoing=1.0 * running, queued=0.0, arrivals=5.0 * running, late=0.0,
                replica_work_s=10.0,
            )
            for pool in pools
            if (running := counts[pool.name] if pool.name == "steady" else 0) >= 0
        )  # fmt: skip
        decision, state = step(Signals(float(second), signals), state, spec)
        counts = {t.name: t.replicas for t in decision.targets}
        asked.add(tuple(counts.values()))
    assert {(tpu, spot) for tpu, spot, _ in asked} == {(1, 1)}
    assert counts["steady"] >= 1


def test_a_pool_whose_first_replica_finds_no_machine_is_replaced_at_once() -> None:
    """Before any speed is known, too: the cloud is out of spot when the first request comes."""
    spot = PoolSpec("spot", kind="spot", max_replicas=9, usd_per_hour=1.0)
    steady = PoolSpec("on-demand", max_replicas=9, usd_per_hour=3.0)
    spec = ScalingSpec((spot, steady))

    def targets(state: State, second: float, waits_s: float) -> tuple[dict[str, int], State]:
        pools = (
            PoolSignals(
                "spot", 0, starting=(waits_s,), ongoing=1.0, queued=1.0, arrivals=0.0, late=0.0
            ),
            PoolSignals("on-demand", 0, ongoing=0.0, queued=0.0, arrivals=0.0, late=0.0),
        )
        decision, state = step(Signals(second, pools), state, spec)
        return {t.name: t.replicas for t in decision.targets}, state

    counts, state = targets(State(), 1.0, waits_s=1.0)
    assert counts == {"spot": 1, "on-demand": 0}
    counts, state = targets(state, 2.0, waits_s=math.inf)
    assert counts == {"spot": 1, "on-demand": 1}


def test_spot_is_spread_over_zones() -> None:
    zones = [PoolSpec(z, kind="spot", zone=z, max_replicas=9, boot_s=600.0) for z in "abc"]
    counts = world(*zones, boot_s=600.0).run(1500, 60.0).counts()
    assert max(counts.values()) - min(counts.values()) <= 1


def test_noticed_replicas_are_drained_first_and_replaced() -> None:
    made = world(PoolSpec("spot", kind="spot", max_replicas=20)).run(600, 95.0)
    before = made.total
    signals = made.signals(95.0, 0.0, 100.0, dark=False)
    notices = (Notice("b", made.now_s + 90.0), Notice("a", made.now_s + 30.0))
    noticed = replace(signals.pools[0], notices=notices)
    decision, _ = step(Signals(made.now_s + 1.0, (noticed,)), made.state, made.spec)
    assert decision.target("spot").drain == ("a", "b")
    assert decision.target("spot").replicas >= before  # without those two: both are replaced


def test_a_replica_stays_until_what_replaces_it_serves() -> None:
    old = PoolSpec("old", max_replicas=20, usd_per_hour=1.0, boot_s=30.0)
    new = PoolSpec("new", max_replicas=20, usd_per_hour=5.0, boot_s=30.0)
    made = world(old, new).run(600, 95.0)
    assert made.counts()["new"] == 0
    made.spec = ScalingSpec((old, replace(new, usd_per_hour=0.2)), hold_s=60.0)
    least = math.inf
    for _ in range(120):
        made.tick(95.0)
        least = min(least, sum(10.0 * p.running for p in made.pools.values()))
    assert made.counts()["old"] == 0
    assert least >= 95.0


def test_products_are_scaled_apart_within_one_budget() -> None:
    mine = PoolSpec("mine", products=frozenset({"search"}), max_replicas=9)
    shared = PoolSpec("shared", max_replicas=9)
    spec = ScalingSpec((mine, shared), max_usd_per_hour=6.0)
    state = State()
    for second in range(300):
        pools = (
            PoolSignals("mine", 1, ongoing=9.0, queued=0.0, arrivals=5.0, replica_work_s=10.0),
            PoolSignals("shared", 5, ongoing=90.0, queued=0.0, arrivals=80.0, replica_work_s=10.0),
        )
        decision, state = step(Signals(float(second), pools), state, spec)
    assert decision.target("mine").replicas == 1
    assert decision.target("shared").replicas == 5
    assert "would pass max_usd_per_hour 6" in decision.target("shared").reason
    assert "search: " in decision.reason


def test_the_budget_counts_what_drains() -> None:
    spec = ScalingSpec((PoolSpec("gpu", max_replicas=50, usd_per_hour=2.0),), max_usd_per_hour=20.0)
    signals = PoolSignals("gpu", 3, draining=4, ongoing=90.0, queued=50.0, arrivals=90.0)
    decision, _ = step(Signals(0.0, (signals,)), State(), spec)
    assert decision.target("gpu").replicas == 6


def test_every_decision_says_why() -> None:
    made = world().run(600, 95.0)
    target = made.decisions[-1][1].targets[0]
    assert target.reason.startswith(f"{target.replicas}: ")
    assert "95 work/s come" in target.reason
    assert made.decisions[-1][1].terms["level"] == pytest.approx(95.0)


def test_the_state_survives_json() -> None:
    made = world().run(700, lambda s: 60.0 + 40.0 * math.sin(s / 90.0))
    plain = json.loads(json.dumps(made.state.to_plain(), allow_nan=False))
    assert State.from_plain(plain) == made.state
    assert State.from_plain({"version": 0}) == State()
    assert State.from_plain({}) == State()
    assert State.from_plain(State().to_plain()) == State()


def test_next_to_no_request_does_not_say_what_a_requests_work_is() -> None:
    spec, state = ScalingSpec((PoolSpec("gpu"),)), State()
    for second, arrivals in enumerate((5e-324, 1.0)):
        signals = PoolSignals("gpu", 1, ongoing=0.0, queued=0.0, arrivals=arrivals, work_in=1.0)
        _, state = step(Signals(float(second), (signals,)), state, spec)
    assert state.groups[""].request_work == 1.0


def test_what_is_refused() -> None:
    spec = ScalingSpec((PoolSpec("gpu"),))
    with pytest.raises(ValueError, match="not in the spec: 'other'"):
        step(Signals(0.0, (PoolSignals("other", 0),)), State(), spec)
    with pytest.raises(ValueError, match="time ran backwards"):
        step(Signals(1.0, ()), State(now_s=2.0), spec)
    with pytest.raises(ValueError, match="min_replicas 3 and max_replicas 2"):
        ScalingSpec((PoolSpec("gpu", min_replicas=3, max_replicas=2),))
    with pytest.raises(ValueError, match="boot_s 0"):
        ScalingSpec((PoolSpec("gpu", boot_s=0.0),))
    with pytest.raises(ValueError, match="max_late 1"):
        ScalingSpec((PoolSpec("gpu"),), max_late=1.0)
    with pytest.raises(ValueError, match="different names"):
        ScalingSpec((PoolSpec("gpu"), PoolSpec("gpu")))


def test_boots_are_learnt_and_looked_ahead_by() -> None:
    made = world(PoolSpec("gpu", max_replicas=50, boot_s=30.0), boot_s=300.0).run(1200, 95.0)
    assert made.decisions[-1][1].terms["lead_s"] > 200.0
    assert made.pools["gpu"] == Replicas(made.total)
