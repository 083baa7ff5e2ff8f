"""What happens to requests when replicas, regions and spot machines go: by production's rules."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from nearfield.policy import health
from nearfield.simulator.books import InvariantError
from nearfield.simulator.events import EventWorld
from nearfield.simulator.fluid import FluidWorld
from nearfield.simulator.result import Plain, simulate
from nearfield.simulator.scenario import Scenario
from nearfield.simulator.world import World

HERE = Path()
MODES = ["events", "fluid"]


def run(mode: str, *, faults: list[dict[str, Any]], seconds: float = 60, **more: Any) -> Plain:
    return simulate(scenario(faults=faults, seconds=seconds, **more), HERE, mode=mode)


def scenario(
    *, faults: list[dict[str, Any]], seconds: float = 60, others: tuple[Any, ...] = (), **more: Any
) -> Scenario:
    """Two regions of two replicas each; callers in both, those of eu bound to it."""
    pool = {
        "pool": "p",
        "model": "m",
        "engine": "e",
        "usd_per_hour": 3.6,
        "max_replicas": 4,
        "initial_replicas": 2,
        "boot": 5,
    }
    traffic = {
        "model": "m",
        "arrivals": {"kind": "poisson", "rate_rps": 6.0},
        "input_tokens": 300,
        "output_tokens": 60,
    }
    return Scenario.model_validate(
        {
            "simulation": "faults",
            "duration_s": seconds,
            "tick_s": 0.5,
            "regions": [
                {"region": "eu", "jurisdiction": "eu", "rtt_ms": {"us": 80}},
                {"region": "us", "jurisdiction": "us"},
            ],
            "engines": [
                {
                    "engine": "e",
                    "prefill_tokens_per_s": 8000,
                    "step_ms": 15,
                    "step_ms_per_sequence": 0.5,
                }
            ],
            "models": [{"model": "m", "scaling": {"policy": "static"}}],
            "pools": [pool | more, *(pool | other for other in others)],
            "traffic": [
                traffic | {"traffic": "bound", "origin": ["eu"], "jurisdictions": ["eu"]},
                traffic | {"traffic": "free", "origin": ["us"]},
            ],
            "faults": faults,
        }
    )


def kinds(result: Plain) -> list[str]:
    return [change["kind"] for change in result["history"]]


@pytest.mark.parametrize("mode", MODES)
def test_replicas_cost_from_launch_to_end(mode: str) -> None:
    result = run(mode, faults=[])
    assert result["cost"]["usd"] == pytest.approx(4 * 60 * 3.6 / 3600)
    assert result["cost"]["replica_seconds"] == pytest.approx(240)
    assert result["requests"]["late"] == 0


@pytest.mark.parametrize("mode", MODES)
def test_what_a_dead_replica_had_is_lost_if_begun_and_sent_again_if_not(mode: str) -> None:
    fault = {"kind": "lose_replicas", "region": "us", "pool": "p", "at_s": 30, "count": 2}
    result = run(mode, faults=[fault])
    counts = result["requests"]
    assert kinds(result).count("lost") == 2
    assert 0 < counts["lost"] <= 20
    assert counts["lost"] + counts["refused"] + counts["expired"] < 40
    free = next(each for each in result["traffic"] if each["traffic"] == "free")
    assert free["abroad"] > 5, "eu stands in until there are new ones"
    us = next(pool for pool in result["pools"] if pool["region"] == "us")
    assert us["launched"] == 4
    assert us["replica_seconds"]["starting"] == pytest.approx(10, abs=0.01)


@pytest.mark.parametrize("mode", MODES)
def test_a_lost_region_keeps_who_is_bound_to_it_inside(mode: str) -> None:
    fault = {"kind": "lose_region", "region": "eu", "at_s": 20, "lasts_s": 20}
    result = run(mode, faults=[fault])
    bound, free = result["traffic"]
    assert bound["abroad"] == 0
    assert bound["refused"] + bound["expired"] + bound["lost"] > 60, "for twenty seconds"
    assert bound["done"] > 100, "before and afterwards"
    assert free["late"] <= 3
    assert "region lost" in kinds(result)
    assert "region back" in kinds(result)


@pytest.mark.parametrize("mode", MODES)
def test_callers_of_a_lost_region_come_to_the_next_gateway(mode: str) -> None:
    fault = {"kind": "lose_region", "region": "us", "at_s": 20, "lasts_s": 20}
    result = run(mode, faults=[fault])
    free = next(each for each in result["traffic"] if each["traffic"] == "free")
    assert free["lost"] < 20, "what was in flight"
    assert free["refused"] < 30, "until eu's gateway has noticed"
    assert free["done"] > 300
    noticed = [
        change
        for change in result["history"]
        if change["kind"] == "health" and change["region"] == "eu" and change["subject"] == "us"
    ]
    assert noticed[0]["at_s"] < 24
    assert "down" in noticed[0]["reason"]
    assert "up" in noticed[-1]["reason"]


@pytest.mark.parametrize("mode", MODES)
def test_a_region_that_two_faults_keep_away_comes_back_once(mode: str) -> None:
    faults = [
        {"kind": "lose_region", "region": "eu", "at_s": 10, "lasts_s": 5},
        {"kind": "lose_region", "region": "eu", "at_s": 12, "lasts_s": 8},
    ]
    result = run(mode, faults=faults)
    found = [(c["kind"], c["at_s"]) for c in result["history"] if c["kind"].startswith("region")]
    assert found == [("region lost", 10), ("region back", 20)]


def test_a_slow_replica_is_found_by_its_peers_and_comes_back() -> None:
    fault = {
        "kind": "slow_replicas",
        "region": "eu",
        "pool": "p",
        "at_s": 20,
        "lasts_s": 40,
        "factor": 12,
    }
    result = run("events", faults=[fault], seconds=120, initial_replicas=3)
    reasons = [c["reason"] for c in result["history"] if c["kind"] == "health"]
    assert any("times slower than its peers" in reason for reason in reasons)
    assert reasons[-1].startswith("up")


@pytest.mark.parametrize("mode", MODES)
def test_spot_capacity_is_never_exceeded_and_notices_come_first(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    path.write_text("trace_id,t_s,available_instances\nz,0,2\nz,20,1\nz,40,2\n")
    result = run(mode, faults=[], capacity="spot", spot={"file": str(path), "notice_s": 4}, boot=3)
    for region in ("eu", "us"):
        found = [c for c in result["history"] if c["region"] == region]
        assert [c["kind"] for c in found] == ["notice", "lost"]
        assert [c["at_s"] for c in found] == [20.0, 24.0]
    pool = result["pools"][0]
    assert pool["launched"] == 3
    assert result["cost"]["usd_by_capacity"]["on_demand"] == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_recorded_price_is_paid_from_its_time_on(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("zone,t_s,usd_per_hour\na,0,3.6\na,130,7.2\nb,0,99\n")
    prices = {"file": str(path), "where": {"zone": "a"}, "offset_s": 100}
    usd, steady_usd = (
        run(mode, faults=[], **more)["cost"]["usd"] for more in ({"prices": prices}, {})
    )
    assert usd == pytest.approx(1.5 * steady_usd)


@pytest.mark.parametrize("kind", [EventWorld, FluidWorld])
def test_nothing_is_sent_where_it_must_not_be(kind: type[World]) -> None:
    """The policy's filters are believed by nobody: whoever is sent astray ends the run."""
    world = kind(scenario(faults=[]), HERE)
    for source in world.sources:
        source.open = frozenset()
    with pytest.raises(InvariantError, match="outside of its law, or another's"):
        world.run()


@pytest.mark.parametrize("kind", [EventWorld, FluidWorld])
def test_nothing_is_sent_to_who_is_believed_dead(kind: type[World]) -> None:
    world = kind(scenario(faults=[]), HERE)
    eu, gateway = world.regions[0], world.gateways[0]

    def believe(_: None) -> None:  # and do not plan anew
        for _ in range(10):
            event = health.Probed(eu.name, False, world.now_s, reason="no answer")
            gateway.beliefs, _ = health.step(gateway.beliefs, event, world.now_s, 0.5)
        gateway.due_s = math.inf

    world.at(10.0, believe, None)
    with pytest.raises(InvariantError, match="believed dead"):
        world.run()


@pytest.mark.parametrize("mode", MODES)
def test_who_waits_for_a_pool_to_start_goes_to_one_that_starts_first(mode: str) -> None:
    slow: dict[str, Any] = {"initial_replicas": 0, "min_replicas": 1, "boot": 50, "regions": ["eu"]}
    quick = slow | {"pool": "quick", "boot": 20, "handicap_ms": 60_000}
    found = run(mode, faults=[], others=(quick,), **slow)
    bound = found["traffic"][0]
    served = {pool["pool"]: pool["served"] for pool in found["pools"]}
    assert served["quick"] > 100
    assert bound["ttft_s"]["p99"] < 25.0
