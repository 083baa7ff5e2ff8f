"""Whatever happens in a scenario, requests are conserved, bounds kept, and the seed decides all."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nearfield.policy import scale
from nearfield.simulator import events, fluid
from nearfield.simulator.arrivals import gaps, stream
from nearfield.simulator.books import Histogram, InvariantError
from nearfield.simulator.result import simulate
from nearfield.simulator.scenario import Scenario, Traffic
from nearfield.simulator.traces import length_table, mixed_table

HERE = Path()
SECONDS = 30.0


def eager(
    signals: scale.Signals, state: scale.State, spec: scale.ScalingSpec
) -> tuple[scale.Decision, scale.State]:
    """As many as have work, at once: the most restless of policies, within its bounds."""
    targets = []
    for pool, bounds in zip(signals.pools, spec.pools, strict=True):
        assert isinstance(pool.ongoing, float)
        wanted = math.ceil(pool.ongoing / bounds.target_ongoing)
        wanted = max(bounds.min_replicas, min(bounds.max_replicas, wanted))
        drain = tuple(notice.replica for notice in pool.notices)
        targets.append(scale.PoolTarget(pool.name, wanted, drain, "eager"))
    return scale.Decision(tuple(targets), "eager"), replace(state, now_s=signals.now_s)


REGIONS = ("eu", "us", "asia")
times_s = st.floats(0, SECONDS)


@st.composite
def faults(draw: st.DrawFn) -> dict[str, Any]:
    fault: dict[str, Any] = {
        "kind": draw(st.sampled_from(["lose_replicas", "slow_replicas", "lose_region"])),
        "region": draw(st.sampled_from(REGIONS)),
        "at_s": draw(times_s),
    }
    if fault["kind"] != "lose_replicas":
        fault["lasts_s"] = draw(st.floats(0.1, SECONDS))
    if fault["kind"] != "lose_region":
        fault["pool"] = draw(st.sampled_from(["spot", "sure"]))
        fault["count"] = draw(st.integers(1, 3))
    return fault


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    rate = draw(st.floats(0.2, 12))
    arrivals = draw(
        st.sampled_from(
            [
                {"kind": "poisson", "rate_rps": rate},
                {"kind": "gamma", "rate_rps": rate, "cv": 4.0},
                {
                    "kind": "burst",
                    "base_rps": rate / 3,
                    "burst_rps": 5 * rate,
                    "every_s": 20.0,
                    "lasts_s": 5.0,
                },
            ]
        )
    )
    lengths = {"kind": "lognormal", "p50": 200, "p95": 900}
    return Scenario.model_validate(
        {
            "simulation": "any",
            "seed": draw(st.integers(0, 2**31)),
            "mode": draw(st.sampled_from(["events", "fluid"])),
            "duration_s": SECONDS,
            "window_s": 1.0,
            "tick_s": draw(st.sampled_from([0.5, 1.0, 3.0])),
            "regions": [
                {"region": "eu", "jurisdiction": "eu", "rtt_ms": {"us": 80, "asia": 150}},
                {"region": "us", "jurisdiction": "us", "rtt_ms": {"asia": 170}},
                {"region": "asia", "jurisdiction": "asia"},
            ],
            "sites": [{"site": "edge", "jurisdiction": "eu", "rtt_ms": dict.fromkeys(REGIONS, 30)}],
            "engines": [
                {
                    "engine": "e",
                    "prefill_tokens_per_s": 4000,
                    "step_ms": 20,
                    "step_ms_per_sequence": 1,
                    "max_running": draw(st.integers(1, 6)),
                    "max_queued": draw(st.integers(0, 20)),
                    "kv_tokens": draw(st.sampled_from([None, 2048])),
                }
            ],
            "models": [{"model": "m"}],
            "pools": [
                {
                    "pool": "spot",
                    "model": "m",
                    "engine": "e",
                    "capacity": "spot",
                    "usd_per_hour": 1,
                    "min_replicas": draw(st.integers(0, 1)),
                    "max_replicas": 4,
                    "boot": {"kind": "lognormal", "p50": 5, "p95": 9},
                    "drain_s": draw(st.sampled_from([0.0, 2.0, 30.0])),
                    "spot": {"mean_life_s": 15, "notice_s": draw(st.sampled_from([0.0, 3.0]))},
                },
                {
                    "pool": "sure",
                    "model": "m",
                    "engine": "e",
                    "regions": ["eu", "us"],
                    "usd_per_hour": 3,
                    "handicap_ms": 100,
                    "max_replicas": 3,
                    "initial_replicas": draw(st.integers(0, 2)),
                    "boot": 4,
                },
            ],
            "traffic": [
                {
                    "traffic": "bound",
                    "model": "m",
                    "origin": ["eu", "edge"],
                    "jurisdictions": ["eu"],
                    "arrivals": arrivals,
                    "input_tokens": lengths,
                    "output_tokens": {"kind": "exponential", "mean": 40},
                    "timeout_s": 20,
                },
                {
                    "traffic": "free",
                    "model": "m",
                    "arrivals": arrivals,
                    "input_tokens": lengths,
                    "output_tokens": {"kind": "exponential", "mean": 40},
                    "criticality": "sheddable",
                    "mode": "economy",
                },
            ],
            "faults": draw(st.lists(faults(), max_size=4)),
        },
        strict=True,
    )


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(scenarios())
def test_nothing_is_lost_and_the_seed_decides_all(scenario: Scenario) -> None:
    """The world checks its invariants after every event, and everything each simulated second."""
    first = simulate(scenario, HERE, step=eager)
    counts = first["requests"]
    assert counts["arrived"] == sum(
        counts[name] for name in ("done", "refused", "expired", "lost", "in_flight_at_the_end")
    )
    assert first["checks"] >= SECONDS
    bound = [each for each in first["traffic"] if each["traffic"] == "bound"]
    served = sum(pool["served"] for pool in first["pools"] if pool["region"] == "eu")
    assert sum(each["done"] for each in bound) <= served, "all of it at home"
    assert json.dumps(first) == json.dumps(simulate(scenario, HERE, step=eager))


SMALL = {
    "simulation": "small",
    "duration_s": 20.0,
    "regions": [{"region": "eu", "jurisdiction": "eu"}],
    "engines": [{"engine": "e", "prefill_tokens_per_s": 4000, "step_ms": 20}],
    "models": [{"model": "m", "scaling": {"max_usd_per_hour": 5}}],
    "pools": [
        {
            "pool": "p",
            "model": "m",
            "engine": "e",
            "usd_per_hour": 2,
            "min_replicas": 1,
            "max_replicas": 9,
        }
    ],
    "traffic": [
        {
            "traffic": "t",
            "model": "m",
            "jurisdictions": ["eu"],
            "arrivals": {"kind": "poisson", "rate_rps": 50},
            "input_tokens": 2000,
            "output_tokens": 100,
        }
    ],
}


@pytest.mark.parametrize("mode", ["events", "fluid"])
def test_a_policy_that_breaks_its_budget_is_caught(mode: str) -> None:
    with pytest.raises(InvariantError, match=r"and 5.00 are allowed"):
        simulate(Scenario.model_validate(SMALL), HERE, step=eager, mode=mode)


@pytest.mark.parametrize("mode", [events, fluid])
def test_a_request_that_leaves_its_jurisdiction_is_caught(mode: Any) -> None:
    """As if routing had a mistake: the world does not trust it."""
    kind = mode.EventWorld if mode is events else mode.FluidWorld
    world = kind(Scenario.model_validate(SMALL), HERE, step=eager)
    for source in world.sources:
        source.open = frozenset()
    with pytest.raises(InvariantError, match="outside of its law"):
        world.run()


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["Gamma", "Weibull"]),
    st.floats(0.3, 3.0),
    st.integers(0, 1000),
)
def test_gaps_have_a_mean_of_one_and_the_variance_they_say(
    family: str, shape: float, seed: int
) -> None:
    draw, cv2 = gaps(family, shape)
    rng = random.Random(seed)
    drawn = [draw(rng) for _ in range(4000)]
    mean = sum(drawn) / len(drawn)
    assert mean == pytest.approx(1.0, abs=6 * math.sqrt(cv2 / len(drawn)))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(0.01, 20), min_size=1, max_size=6),
    st.integers(0, 1000),
    st.floats(0.3, 30),
)
def test_a_stream_is_the_same_however_it_is_cut(cuts: list[float], seed: int, rate: float) -> None:
    traffic = Traffic.model_validate(
        {
            "traffic": "t",
            "model": "m",
            "arrivals": {"kind": "diurnal", "mean_rps": rate, "cv": 2.0},
            "input_tokens": {"kind": "exponential", "mean": 100},
            "output_tokens": 7,
        }
    )

    def made() -> Any:
        return stream(traffic, HERE, random.Random(seed), start_s=0.0, utc_offset_h=3.0)

    parts, whole = made(), made()
    until_s, taken = 0.0, []
    for cut_s in cuts:
        until_s += cut_s
        taken += parts.take(until_s)
    all_ = whole.take(until_s)
    assert [a[1:] for a in taken] == [a[1:] for a in all_]
    assert [a[0] for a in taken] == pytest.approx([a[0] for a in all_])
    assert [a[0] for a in taken] == sorted(a[0] for a in taken)


@given(st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=300), st.floats(0.01, 0.99))
def test_a_histograms_quantile_is_right_to_its_bins(values: list[float], q: float) -> None:
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    ordered = sorted(values)
    exact = ordered[max(0, math.ceil(q * len(values)) - 1)]
    got = histogram.quantile(q)
    assert got is not None
    assert got == pytest.approx(exact, rel=0.0201)


@given(st.lists(st.floats(1, 1e5), min_size=9, max_size=9), st.floats(0.5, 3))
def test_a_table_of_lengths_has_the_quantiles_it_was_made_of(
    quantiles: list[float], times: float
) -> None:
    quantiles.sort()
    table = length_table(quantiles, times * quantiles[4])
    assert table == sorted(table)
    assert table[len(table) // 2] >= int(quantiles[4])
    assert mixed_table([(1.0, table)]) == table
