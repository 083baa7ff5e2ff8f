"""What a run has shown, as plain data. Every figure in it is simulated."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nearfield.policy import scale
from nearfield.simulator import scenario as s
from nearfield.simulator.books import Histogram, Tally, merged
from nearfield.simulator.events import EventWorld
from nearfield.simulator.fluid import FluidWorld
from nearfield.simulator.parts import Step
from nearfield.simulator.world import World

Plain = dict[str, Any]

MOST_CHANGES = 2000
"""Decisions and happenings that are told one by one; of more, the first and the last."""
QUANTILES = (0.5, 0.95, 0.99)
ASSUMED = (
    "A request reaches its region the moment it is sent; its round trip is added to its times.",
    "An engine follows its timings exactly; a boot and a spot replica's life are drawn.",
    "A booting replica costs as much as one that serves.",
)
ASSUMED_FLUID = (
    "A pool's replicas share its requests evenly, and all requests of a packet fare alike.",
)


def simulate(
    scenario: s.Scenario,
    folder: Path,
    *,
    step: Step = scale.step,
    seed: int | None = None,
    mode: str | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> Plain:
    """Run a scenario; what came out. The same seed gives the same bytes.

    Args:
        folder: what its files are relative to.
        step: how models are scaled whose policy is `nearfield`.
        seed, mode: instead of the scenario's.
        progress: is told the share that is done.

    Raises:
        TraceError: a recorded file cannot be used.
        InvariantError: something happened that must not.
    """
    kind = EventWorld if (mode or scenario.mode) == "events" else FluidWorld
    world = kind(scenario, folder, step=step, seed=seed)
    world.run(progress)
    return result(world)


def result(world: World) -> Plain:
    """Of a world that has run."""
    scenario = world.scenario
    tallies = [source.tally for source in world.sources]
    fluid = isinstance(world, FluidWorld)
    hours = scenario.duration_s / 3600
    usd = sum(pool.usd for pool in world.pools)
    by_capacity = {"on_demand": 0.0, "spot": 0.0}
    for pool in world.pools:
        by_capacity[pool.spec.capacity] += pool.usd
    done = sum(tally.done for tally in tallies)
    changes = [change.plain() for change in world.history]
    left_out = max(0, len(changes) - MOST_CHANGES)
    if left_out:
        half = MOST_CHANGES // 2
        changes = changes[:half] + changes[-half:]
    return {
        "figures": "simulated",
        "simulation": scenario.simulation,
        "mode": "fluid" if fluid else "events",
        "seed": world.seed,
        "start_s": scenario.start_s,
        "duration_s": scenario.duration_s,
        "requests": _counts(tallies) | {"in_flight_at_the_end": world.in_flight},
        "models": [_model(world, model) for model in scenario.models],
        "traffic": [
            {"traffic": source.name, "origin": source.place, "model": source.model}
            | _counts([source.tally])
            | _times([source.tally])
            | {"abroad": source.tally.abroad, "reasons": dict(sorted(source.tally.reasons.items()))}
            for source in world.sources
        ],
        "pools": [
            {
                "region": pool.endpoint.region,
                "pool": pool.spec.pool,
                "model": pool.spec.model,
                "capacity": pool.spec.capacity,
                "usd": _short(pool.usd),
                "replica_seconds": {k: _short(v) for k, v in pool.seconds.items()},
                "launched": pool.launched,
                "lost": pool.lost_all,
                "served": pool.served,
            }
            for pool in world.pools
        ],
        "cost": {
            "usd": _short(usd),
            "usd_by_capacity": {kind: _short(cost) for kind, cost in by_capacity.items()},
            "usd_per_hour": _short(usd / hours),
            "usd_per_1000_requests": _short(1000 * usd / done) if done else None,
            "replica_seconds": _short(sum(sum(p.seconds.values()) for p in world.pools)),
        },
        "decisions": {
            "made": sum(scaler.decisions for scaler in world.scalers),
            "that_changed_something": sum(c.kind == "scale" for c in world.history),
        },
        "history": changes,
        "history_left_out": left_out,
        "windows": _windows(world),
        "checks": world.checks,
        "assumed": list(ASSUMED + (ASSUMED_FLUID if fluid else ())),
    }


def _counts(tallies: list[Tally]) -> Plain:
    counts: Plain = {
        name: sum(getattr(tally, name) for tally in tallies)
        for name in ("arrived", "done", "late", "refused", "expired", "lost", "replayed")
    }
    ended = sum(tally.ended for tally in tallies)
    counts["late_fraction"] = _short(counts["late"] / ended) if ended else None
    counts["attainment"] = _short(1.0 - counts["late"] / ended) if ended else None
    return counts


def _times(tallies: list[Tally]) -> Plain:
    ttft, total = merged(tallies)
    return {"ttft_s": _quantiles(ttft), "total_s": _quantiles(total)}


def _quantiles(histogram: Histogram) -> Plain:
    shown: Plain = {f"p{round(100 * q)}": _short(histogram.quantile(q)) for q in QUANTILES}
    return shown | {"mean": _short(histogram.mean_s)}


def _model(world: World, model: s.Model) -> Plain:
    tallies = [source.tally for source in world.sources if source.model == model.model]
    counts = _counts(tallies)
    slo = model.slo
    kept = counts["attainment"] is None or counts["attainment"] >= slo.share
    return {
        "model": model.model,
        "slo": {"ttft_s": slo.ttft_s, "total_s": slo.total_s, "share": slo.share},
        "slo_kept": kept,
        "policy": model.scaling.policy,
        **counts,
        **_times(tallies),
        "usd": _short(sum(p.usd for p in world.pools if p.spec.model == model.model)),
    }


def _windows(world: World) -> Plain:
    """How it went, window by window."""
    count = max((len(samples) for samples in world.samples), default=0)
    window_s = world.window_s
    offered = []
    for source in world.sources:
        windows = source.tally.windows
        came = [windows[i].arrived if i in windows else 0 for i in range(count)]
        offered.append(
            {
                "traffic": source.name,
                "origin": source.place,
                "model": source.model,
                "rps": [_short(arrived / window_s) for arrived in came],
            }
        )
    latency = []
    for model in world.scenario.models:
        tallies = [source.tally for source in world.sources if source.model == model.model]
        series: Plain = {"model": model.model, "late_fraction": []}
        series |= {f"ttft_p{round(100 * q)}_s": [] for q in QUANTILES}
        for i in range(count):
            here = [tally.windows[i] for tally in tallies if i in tally.windows]
            histogram = Histogram()
            for window in here:
                histogram.merge(window.ttft)
            for q in QUANTILES:
                series[f"ttft_p{round(100 * q)}_s"].append(_short(histogram.quantile(q)))
            ended = sum(window.ended for window in here)
            late = sum(window.late for window in here)
            series["late_fraction"].append(_short(late / ended) if ended else None)
        latency.append(series)
    replicas = []
    for pool, samples in zip(world.pools, world.samples, strict=True):
        before = [0.0, *(sample.usd for sample in samples)]
        replicas.append(
            {
                "region": pool.endpoint.region,
                "pool": pool.spec.pool,
                "model": pool.spec.model,
                "capacity": pool.spec.capacity,
                "ready": [_short(sample.ready) for sample in samples],
                "starting": [_short(sample.starting) for sample in samples],
                "draining": [_short(sample.draining) for sample in samples],
                "usd_per_hour": [
                    _short((sample.usd - spent) * 3600 / window_s)
                    for sample, spent in zip(samples, before, strict=False)
                ],
            }
        )
    return {
        "window_s": window_s,
        "count": count,
        "offered": offered,
        "latency": latency,
        "replicas": replicas,
    }


def _short(value: float | None) -> float | None:
    """To six significant digits: what is shown, and no noise."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.6g}")
