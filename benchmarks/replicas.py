"""The replicas suite: who sends requests to which of several replicas that are not alike.

Two of four replicas compute three times as fast as the others. Requests come at random, whether or
not earlier ones are answered, at shares of what the replicas can compute together. Nobody is told
which replica is fast; nearfield finds out by what replicas tell of themselves.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from benchmarks import replica_work
from benchmarks.load import Job
from benchmarks.server import load, running
from benchmarks.sides import REGION, Side
from benchmarks.workload import KEY

LOADS = (0.6, 0.8)
WARMUP_S = 8.0
TIMES = 6.0
"""A window is so many times as long as elsewhere: replicas are slow, and a p99 needs many."""

Figures = dict[str, float]


def measure(side: Side, data: Path, *, seconds: float, quick: bool) -> Figures:
    """One round of a side.

    Raises:
        SideFailed: it does not start, or answers with errors.
    """
    with (
        running(REGION, data, data) as region,
        running(side, data, data, {"upstream": str(region.port)}) as server,
    ):
        figures = {"ready_s": server.started_s}
        job = Job(
            server.port,
            side.path,
            replica_work.bodies(),
            0,
            warmup_s=1.0 if quick else WARMUP_S,
            seconds=seconds if quick else TIMES * seconds,
            headers=f"Authorization: Bearer {KEY}\r\n",
        )
        for share in LOADS:
            rate_rps = share * replica_work.capacity_rps()
            found = load(dataclasses.replace(job, rate_rps=rate_rps))
            figures |= {f"l{100 * share:.0f}_{key}": value for key, value in found.items()}
    return figures
