"""Recorded traffic through the scaling policy, an oracle, and baselines: simulated.

    python -m benchmarks.autoscaling traces
    python -m benchmarks.autoscaling traces --traces m_large --boots 120 --scales 30 --days 2

Every trace with every boot time, at several sizes of the pool: a scale of 30 means replicas so
large that the trace's mean load keeps 30 of them busy. nearfield runs with its defaults, the same
everywhere. Reactive, Ray Serve and Knative are tuned for each cell, with the trace known, to the
least cost at which no more is late than allowed; beside that stands what they do untuned.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nearfield.policy.scale import step
from nearfield.simulator.parts import Step

from benchmarks.autoscaling import hindsight, traces_table, traffic
from benchmarks.autoscaling.baselines import Kpa, ServeDefault
from benchmarks.autoscaling.hindsight import Case, Setting
from benchmarks.autoscaling.traffic import Traffic
from benchmarks.autoscaling.waiting import SERVICE_S, Boots, Outcome, Replay, first_replicas

RESULTS = traffic.ROOT / "benchmarks" / "results" / "autoscaling"
BOOTS_S = (30, 120, 600)
SCALES = (3, 30, 300)
KPA_TICK_S = 2
"""Knative decides so often; Ray Serve and nearfield are asked every five seconds here."""
TARGETS = (0.1, 1.5)
"""Of concurrency, in batches: where Ray Serve's and Knative's are searched."""

Row = dict[str, Any]
_traffic: dict[str, Traffic] = {}
"""By name; filled before the processes are made, which inherit it."""


@dataclass(frozen=True, slots=True)
class Cell:
    trace: str
    scale: int
    boot_s: int

    @property
    def name(self) -> str:
        return f"{self.trace}, {self.scale} replicas, boots of {self.boot_s} s"

    def case(self) -> Case:
        found = _traffic[self.trace]
        speed = float(found.work.mean()) / self.scale
        boots = Boots.around(self.boot_s, found.loads_s)
        return Case(found.work, speed, boots, first_replicas(found.work, speed))


def main(arguments: list[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    try:
        data = traffic.folder(given.data)
        for name in given.traces:
            _traffic[name] = _read(name, data, given)
    except traffic.TracesMissing as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    cells = [Cell(t, s, b) for t in given.traces for s in given.scales for b in given.boots]
    earlier = _earlier(given.reuse)
    begun_s = time.monotonic()
    rows, grids = _run(cells, earlier, given.processes)
    if not earlier:
        _one_setting(rows, grids)
    result = {
        "figures": "simulated",
        "seed": given.seed,
        "allowed_late": hindsight.ALLOWED,
        "cells": [rows[cell] for cell in cells],
    }
    given.results.mkdir(parents=True, exist_ok=True)
    (given.results / "traces.json").write_text(json.dumps(result, indent=1) + "\n")
    text = traces_table.text(result)
    (given.results / "traces.md").write_text(text)
    print(text)
    print(f"{(time.monotonic() - begun_s) / 60:.1f} min", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.autoscaling traces")

    def names(text: str) -> list[str]:
        found = text.split(",")
        if unknown := set(found) - set(traffic.NAMES):
            raise argparse.ArgumentTypeError(
                f"no trace {sorted(unknown)[0]!r}; there are {', '.join(traffic.NAMES)}"
            )
        return found

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser.add_argument("--traces", type=names, default=list(traffic.NAMES), help="some of them")
    parser.add_argument("--boots", type=numbers, default=list(BOOTS_S), help="seconds")
    parser.add_argument("--scales", type=numbers, default=list(SCALES), help="mean replicas")
    parser.add_argument("--days", type=float, help="of each trace; else all of it")
    parser.add_argument("--from-day", type=float, default=0.0, help="and where to begin")
    parser.add_argument("--seed", type=int, default=1, help="of what is drawn")
    parser.add_argument(
        "--data", type=Path, help=f"the shared data; else {traffic.VARIABLE}, else shared/data"
    )
    parser.add_argument("--cache", type=Path, help="a folder that keeps what was drawn")
    parser.add_argument(
        "--reuse",
        type=Path,
        metavar="TRACES.JSON",
        help="take everything but nearfield's figures from an earlier run of the same cells",
    )
    parser.add_argument("--processes", type=int, default=2, help="at once")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where to write")
    return parser


def _read(name: str, data: Path, given: argparse.Namespace) -> Traffic:
    """A trace or the part of it that is wanted; drawn once where there is a cache."""
    print(f"reading {name}", file=sys.stderr)
    kept = given.cache / f"{name}-{given.seed}.npy" if given.cache else None
    days = None if given.days is None else given.from_day + given.days
    found = traffic.read(
        name,
        data,
        seed=given.seed,
        days=None if kept else days,
        drawn=np.load(kept) if kept and kept.exists() else None,
    )
    if kept and not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.save(kept, found.work)
    last_s = None if days is None else int(days * traffic.DAY_S)
    part = found.part(int(given.from_day * traffic.DAY_S), last_s)
    return part if len(part.work) else found  # of a trace that is shorter: all of it


def _earlier(path: Path | None) -> dict[Cell, Row]:
    if path is None:
        return {}
    rows = json.loads(path.read_text())["cells"]
    return {Cell(row["trace"], row["scale"], row["boot_s"]): row for row in rows}


def _run(
    cells: list[Cell], earlier: Mapping[Cell, Row], processes: int
) -> tuple[dict[Cell, Row], dict[Cell, dict[Setting, Outcome]]]:
    rows: dict[Cell, Row] = {}
    grids: dict[Cell, dict[Setting, Outcome]] = {}
    longest_first = sorted(cells, key=lambda cell: -len(_traffic[cell.trace].work))
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        asked = [pool.submit(compute, cell, earlier.get(cell)) for cell in longest_first]
        for number, done in enumerate(as_completed(asked), start=1):
            cell, rows[cell], grids[cell], took_s = done.result()
            own = rows[cell]["policies"]["nearfield"]
            above = own["cost"] / rows[cell]["policies"]["oracle"]["cost"] - 1.0
            print(
                f"{number}/{len(cells)} {cell.name}: {above:+.1%} over the oracle, "
                f"late {own['late']:.2%} ({took_s:.0f} s)",
                file=sys.stderr,
            )
    return rows, grids


def compute(cell: Cell, earlier: Row | None) -> tuple[Cell, Row, dict[Setting, Outcome], float]:
    """One cell: nearfield, and all others unless they were computed earlier."""
    begun_s = time.monotonic()
    case, found = cell.case(), _traffic[cell.trace]
    replay = Replay(case.work, case.speed, case.boots, case.first)
    policies: dict[str, Any] = {}
    grid: dict[Setting, Outcome] = {}
    if earlier:
        policies |= earlier["policies"]
    else:
        policies, grid = _baselines(case, replay)
    policies["nearfield"] = _shown(replay.run(step))
    row = {
        "trace": cell.trace,
        "unit": found.unit,
        "arrivals": "drawn" if found.drawn else "recorded",
        "from_s": found.from_s,
        "seconds": len(found.work),
        "scale": cell.scale,
        "boot_s": cell.boot_s,
        "first": case.first,
        "policies": policies,
    }
    return cell, row, grid, time.monotonic() - begun_s


def _baselines(case: Case, replay: Replay) -> tuple[dict[str, Any], dict[Setting, Outcome]]:
    full = case.speed * SERVICE_S
    outcome, how = hindsight.oracle(case)
    found: dict[str, Any] = {"oracle": _shown(outcome, how=how)}
    grid = hindsight.tried(case)
    best = hindsight.tuned(case, grid)
    found["reactive_tuned"] = best and _shown(best[0], setting=best[1]._asdict())
    by_tick = Replay(case.work, case.speed, case.boots, case.first, KPA_TICK_S)
    peers: tuple[tuple[str, Callable[[float], Step], Replay], ...] = (
        ("serve", ServeDefault, replay),
        ("kpa", Kpa, by_tick),
    )
    for name, policy, pace in peers:

        def at(batches: float, policy: Callable[[float], Step] = policy) -> Step:
            return policy(batches * full)

        default = pace.run(at(1.0))
        found[f"{name}_default"] = _shown(default)
        fit = hindsight.fitted(at, pace, default, least=TARGETS[0], most=TARGETS[1])
        found[f"{name}_tuned"] = fit and _shown(fit[0], batches=round(fit[1], 3))
    found["static"] = _shown(hindsight.static(case))
    found["static_peak"] = _shown(hindsight.peak(case))
    return found, grid


def _one_setting(rows: Mapping[Cell, Row], grids: Mapping[Cell, Mapping[Setting, Outcome]]) -> None:
    """The reactive policy with one setting for all cells: that which passes most of them, then the
    cheapest. It is what the same tuning comes to for somebody who must choose once."""
    best: tuple[tuple[float, float], Setting] | None = None
    for setting in hindsight.settings():
        outcomes = [_at(grids[cell], setting) for cell in rows]
        passed = sum(o.late <= hindsight.ALLOWED for o in outcomes)
        above = [
            o.cost / row["policies"]["oracle"]["cost"]
            for o, row in zip(outcomes, rows.values(), strict=True)
        ]
        rank = (-float(passed), float(np.mean(above)))
        if best is None or rank < best[0]:
            best = rank, setting
    assert best is not None
    for cell, row in rows.items():
        outcome = _at(grids[cell], best[1])
        row["policies"]["reactive_one"] = _shown(outcome, setting=best[1]._asdict())


def _at(grid: Mapping[Setting, Outcome], setting: Setting) -> Outcome:
    """What came of a setting. Where a higher utilisation already made hardly anybody late, lower
    ones were not tried: that one stands for them, cheaper than they are."""
    if setting in grid:
        return grid[setting]
    own = [s for s in grid if s[1:] == setting[1:]]
    return grid[min(own, key=lambda s: abs(s.utilisation - setting.utilisation))]


def _shown(outcome: Outcome, **more: Any) -> dict[str, Any]:
    return {
        "cost": round(float(outcome.cost), 4),
        "late": round(float(outcome.late), 6),
        "boots": outcome.boots,
        **more,
    }
