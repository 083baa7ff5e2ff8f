"""Demand that its own region cannot serve spills, and gateways with old news do not flock."""

from __future__ import annotations

import math
import statistics

import pytest

from tests.simulation.region_world import Outcome, measure


def mean_s(outcome: Outcome) -> float:
    return math.fsum(outcome.added_s) / len(outcome.added_s)


@pytest.mark.parametrize("load", [0.4, 0.6, 0.8])
def test_old_news_costs_little(load: float, capsys: pytest.CaptureFixture[str]) -> None:
    """Polls a second apart: nearly as good as knowing every queue at every moment."""
    ours, fresh, nearest = (
        measure(name, load, seconds=25, seed=3)
        for name in ("nearfield", "fresh news", "always nearest")
    )
    with capsys.disabled():
        ms = [f"{1000 * mean_s(outcome):.0f} ms" for outcome in (ours, fresh, nearest)]
        print(f"\nload {load}: way and wait {ms[0]}, fresh news {ms[1]}, no spill {ms[2]}")
    assert mean_s(ours) < 1.35 * mean_s(fresh)
    assert mean_s(ours) < 0.6 * mean_s(nearest)
    late = int(0.99 * len(ours.added_s))
    assert ours.added_s[late] < 0.3


def test_the_overloaded_region_stays_full_and_its_queue_steady() -> None:
    """No waves: neither idle slots while others wait, nor queues of seconds."""
    ours = measure("nearfield", 0.8, seconds=25, seed=3)
    loads = ours.loads[20:]
    assert statistics.mean(loads) > 40  # its 40 slots, in the middle of the demand, are used
    assert statistics.stdev(loads) < 0.35 * statistics.mean(loads)
    assert max(loads) < 120
