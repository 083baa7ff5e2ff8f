"""The queue in which recorded traffic is replayed, held against the simulator's events mode.

Everything is a hundred times as fast in the latter: its limits, which refuse in an overload what
would wait for long, are then not met. The benchmark's queue holds a minute instead, and whoever
comes in such an overload is late.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nearfield.simulator.events import EventWorld
from nearfield.simulator.result import result
from nearfield.simulator.scenario import Scenario
from numpy.typing import NDArray

from benchmarks.autoscaling.waiting import WAIT_S, late_share

REPLICAS, PLACES, SERVICE_S = 6, 8, 1.0
SPEED = PLACES / SERVICE_S
"""Requests a second that a replica finishes."""
PACE = 0.01
RATES_RPS = {"steady": (36, 36, 36), "close": (40, 52, 20), "a peak": (30, 60, 20)}
ERROR = 0.03
"""Share of the requests by which both may differ."""


def arrivals(rates_rps: tuple[int, ...], seed: int) -> NDArray[np.float64]:
    """Poisson, half a minute at each rate."""
    rng = np.random.default_rng(seed)
    parts = [
        30.0 * part + np.sort(rng.uniform(0.0, 30.0, rng.poisson(30.0 * rate)))
        for part, rate in enumerate(rates_rps)
    ]
    return np.concatenate(parts)


def simulated(times: NDArray[np.float64], folder: Path) -> dict[str, Any]:
    """Request by request, each on one place of a replica for `SERVICE_S`."""
    with (folder / "requests.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("arrival_s", "input_tokens", "output_tokens"))
        writer.writerows((f"{at * PACE:.8f}", 1, 100) for at in times)
    step_ms = 1000 * SERVICE_S * PACE / 100
    engine = {
        "engine": "even",
        "prefill_tokens_per_s": 1e9,
        "step_ms": step_ms,
        "max_running": PLACES,
        "max_queued": 10_000,
    }
    world = EventWorld(
        Scenario.model_validate(
            {
                "simulation": "queue",
                "duration_s": 240 * PACE,
                "regions": [{"region": "eu", "jurisdiction": "eu"}],
                "local_rtt_ms": 0,
                "engines": [engine],
                "models": [
                    {
                        "model": "chat",
                        "scaling": {"policy": "static"},
                        "slo": {"ttft_s": WAIT_S * PACE + step_ms / 1000, "total_s": 1000},
                    }
                ],
                "pools": [
                    {
                        "pool": "l4",
                        "model": "chat",
                        "engine": "even",
                        "usd_per_hour": 1,
                        "max_replicas": REPLICAS,
                        "initial_replicas": REPLICAS,
                    }
                ],
                "traffic": [
                    {
                        "traffic": "t",
                        "model": "chat",
                        "arrivals": {
                            "kind": "requests",
                            "file": "requests.csv",
                            "time": "arrival_s",
                            "input_tokens": "input_tokens",
                            "output_tokens": "output_tokens",
                        },
                        "timeout_s": 1000,
                    }
                ],
            }
        ),
        folder,
    )
    world.run()
    found: dict[str, Any] = result(world)["traffic"][0]
    return found


@pytest.mark.parametrize("case", RATES_RPS)
def test_as_much_is_late_as_request_by_request(case: str, tmp_path: Path) -> None:
    times = arrivals(RATES_RPS[case], seed=3)
    got = simulated(times, tmp_path)
    counts = np.bincount(times.astype(np.int64), minlength=120).astype(np.float64)
    events = got["late_fraction"]
    capacity = np.full(len(counts), REPLICAS * SPEED)
    fluid = late_share(counts, capacity)
    print(f"\n{case}: late {fluid:.1%} as a fluid, {events:.1%} request by request")
    assert fluid == pytest.approx(events, abs=ERROR)
