"""Regions some milliseconds apart, each with enough to do: each keeps its own traffic."""

from __future__ import annotations

from pathlib import Path

import pytest
from nearfield.simulator.result import Plain, simulate
from nearfield.simulator.scenario import Scenario, read

SCENARIOS = Path("examples/scenarios")
NEAR = ("eu-west-2", "eu-west-3", "eu-central-1", "eu-south-1")
"""Round trips of 9 to 27 ms, measured."""


def neighbours(mode: str, mean_rps: float, replicas: int, seconds: float) -> Plain:
    plain = read(SCENARIOS / "twenty-regions.yaml")
    assert isinstance(plain, Scenario)
    traffic, pool = plain.traffic[0], plain.pools[0]
    arrivals = traffic.arrivals.model_copy(update={"mean_rps": mean_rps})
    of = plain.model_copy(
        update={
            "regions": [region for region in plain.regions if region.region in NEAR],
            "start_s": 6 * 3600.0,
            "duration_s": seconds,
            "pools": [pool.model_copy(update={"initial_replicas": replicas})],
            "traffic": [traffic.model_copy(update={"arrivals": arrivals})],
        }
    )
    return simulate(of, SCENARIOS, mode=mode)


@pytest.mark.parametrize(
    ("mode", "mean_rps", "replicas", "seconds"),
    [("fluid", 579.0, 30, 3000.0), ("events", 60.0, 5, 200.0)],
)
def test_neighbours_do_not_flock(mode: str, mean_rps: float, replicas: int, seconds: float) -> None:
    found = neighbours(mode, mean_rps, replicas, seconds)
    shares = {each["origin"]: each["abroad"] / each["done"] for each in found["traffic"]}
    print(f"\nabroad, {mode}: " + ", ".join(f"{k} {v:.1%}" for k, v in shares.items()))
    assert max(shares.values()) < 0.1
