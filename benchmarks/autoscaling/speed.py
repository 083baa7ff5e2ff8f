"""How many requests a second of a core's time `nearfield simulate` simulates, in both modes.

    python -m benchmarks.autoscaling speed

Time is the process's own: what else runs on the machine takes none of it, though it slows memory
and caches down. Each row is the best of `--rounds`; the scenarios run with the live scaling policy,
and one with as many replicas as at first, to see what that costs. What happens every second anyhow
(decisions, polls) is most of it where few requests come: that row is there to show it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from nearfield.simulator.result import simulate
from nearfield.simulator.scenario import Scenario, read

from benchmarks.machine import describe

RESULT = Path("benchmarks/results/autoscaling/speed.md")
SCENARIOS = Path("examples/scenarios")
BARS_RPS = {"events": 20_000, "fluid": 300_000}


class Case(NamedTuple):
    name: str
    scenario: Scenario
    mode: str


class Row(NamedTuple):
    case: Case
    requests: int
    cpu_s: float

    @property
    def rps(self) -> float:
        return self.requests / self.cpu_s


def dense(policy: str) -> Scenario:
    """Three regions, a dozen replicas in each, 120 requests a second."""
    region: dict[str, Any] = {"jurisdiction": "any"}
    return Scenario.model_validate(
        {
            "simulation": "speed",
            "duration_s": 300,
            "regions": [
                region | {"region": "eu", "rtt_ms": {"us": 80.0, "asia": 150.0}},
                region | {"region": "us", "rtt_ms": {"asia": 180.0}},
                region | {"region": "asia"},
            ],
            "engines": [
                {
                    "engine": "l4",
                    "prefill_tokens_per_s": 9000,
                    "step_ms": 20,
                    "step_ms_per_sequence": 0.3,
                    "max_running": 32,
                }
            ],
            "models": [{"model": "chat", "scaling": {"policy": policy}}],
            "pools": [
                {
                    "pool": "l4",
                    "model": "chat",
                    "engine": "l4",
                    "usd_per_hour": 0.8,
                    "max_replicas": 400,
                    "initial_replicas": 11,
                    "boot": 45,
                }
            ],
            "traffic": [
                {
                    "traffic": "day",
                    "model": "chat",
                    "arrivals": {"kind": "poisson", "rate_rps": 40},
                    "input_tokens": {"kind": "lognormal", "p50": 500, "p95": 2000},
                    "output_tokens": {"kind": "lognormal", "p50": 100, "p95": 300},
                }
            ],
        }
    )


def shortened(name: str, seconds: float) -> Scenario:
    found = read(SCENARIOS / f"{name}.yaml")
    assert isinstance(found, Scenario), found
    return found.model_copy(update={"duration_s": seconds})


def cases() -> Iterator[Case]:
    yield Case("3 regions, 36 replicas, 120 requests a second", dense("nearfield"), "events")
    yield Case("the same, static", dense("static"), "events")
    spot = shortened("spot-with-fallback", 3600)
    yield Case("the first hour of `spot-with-fallback.yaml`, 4 pools", spot, "events")
    yield Case("two hours of `twenty-regions.yaml`", shortened("twenty-regions", 7200), "fluid")


def measure(case: Case, rounds: int) -> Row:
    best: Row | None = None
    for _ in range(rounds):
        begun_s = time.process_time()
        found = simulate(case.scenario, SCENARIOS, mode=case.mode)
        row = Row(case, found["requests"]["arrived"], time.process_time() - begun_s)
        best = row if best is None or row.rps > best.rps else best
    assert best is not None
    return best


def report(rows: list[Row], machine: dict[str, Any]) -> str:
    lines = [
        "# How fast the simulator is",
        "",
        "Measured: requests simulated in a second of one core's time. Written by",
        "`python -m benchmarks.autoscaling speed`.",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}, load "
        f"{machine['load_average'][0]:.1f} when it began, {machine['started']}.",
        "",
        "| | mode | requests | seconds of a core | requests a second | wanted | seconds in one |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name, scenario, mode = row.case
        lines.append(
            f"| {name} | {mode} | {row.requests:,} | {row.cpu_s:.2f} | {row.rps:,.0f} | "
            f"{BARS_RPS[mode]:,} | {scenario.duration_s / row.cpu_s:,.0f} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.autoscaling speed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args(arguments)
    machine = describe()
    rows = []
    for case in cases():
        rows.append(measure(case, given.rounds))
        print(f"{case.name}, {case.mode}: {rows[-1].rps:,.0f} requests/s", flush=True)
    given.out.write_text(report(rows, machine), encoding="utf-8")
    print(f"written to {given.out}")
    return 0
