"""Ranking replicas by predicted time beats counting connections where replicas differ."""

from __future__ import annotations

import math

import pytest
from nearfield.policy.rank import ReplicaState

from tests.simulation.replica_world import batching, latencies, quantile, slots

MIXED = {"slots": slots("s", 2, 4, 4.0), "batching": batching("b", 2, 4, 4.0)}


@pytest.mark.parametrize("gateways", [1, 3])
@pytest.mark.parametrize("load", [0.5, 0.7, 0.85])
@pytest.mark.parametrize("kind", sorted(MIXED))
def test_mixed_replicas_beat_leastconn_and_power_of_two(
    kind: str, load: float, gateways: int, capsys: pytest.CaptureFixture[str]
) -> None:
    specs = MIXED[kind]
    ours, leastconn, two = (
        latencies(specs, name, load=load, requests=8000, gateways=gateways, seed=5)
        for name in ("nearfield", "leastconn", "power of two")
    )
    tails = [round(1000 * quantile(took_s, 0.99)) for took_s in (ours, leastconn, two)]
    with capsys.disabled():
        print(f"\n{kind}, {gateways} gateways, load {load}: p99 ms {tails} (ours, leastconn, two)")
    assert len(ours) == 7200
    assert tails[0] < 0.85 * tails[1]
    assert tails[0] < 0.85 * tails[2]
    assert math.fsum(ours) < math.fsum(leastconn)
    assert math.fsum(ours) < math.fsum(two)


@pytest.mark.parametrize("gateways", [1, 3])
def test_replicas_alike_lose_next_to_nothing(gateways: int) -> None:
    """leastconn knows its own count at once; old news must not cost more than a few per cent."""
    alike: list[ReplicaState] = slots("a", 0, 6, 1.0)
    ours, leastconn = (
        latencies(alike, name, load=0.85, requests=8000, gateways=gateways, seed=6)
        for name in ("nearfield", "leastconn")
    )
    assert math.fsum(ours) < 1.05 * math.fsum(leastconn)
    assert quantile(ours, 0.99) < 1.05 * quantile(leastconn, 0.99)


def test_the_same_seed_gives_the_same_world() -> None:
    first, second = (
        latencies(MIXED["slots"], "nearfield", load=0.7, requests=1000, seed=7) for _ in range(2)
    )
    assert first == second
