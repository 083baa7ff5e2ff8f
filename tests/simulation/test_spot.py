"""Zones that come and go, run by the production policy: cheap, in time, and nothing is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nearfield.simulator.result import Plain, simulate
from nearfield.simulator.scenario import Scenario

ON_DEMAND_USD, SPOT_USD = 3.0, 0.9
HISTORY = {
    "a": [(0, 8), (1500, 0), (2400, 8)],
    "b": [(0, 8), (3000, 2), (3600, 8)],
    "c": [(0, 0), (900, 8), (4200, 0)],
}
"""Replicas that can be had, by zone: (from when, how many)."""


def run(tmp_path: Path, *, spot: bool = True, max_usd_per_hour: float | None = None) -> Plain:
    rows = [f"{zone},{at_s},{n}" for zone, steps in HISTORY.items() for at_s, n in steps]
    (tmp_path / "zones.csv").write_text(
        "\n".join(["trace_id,t_s,available_instances", *rows]) + "\n"
    )
    shared = {"model": "m", "engine": "e", "max_replicas": 8, "boot": 90}
    pools: list[dict[str, Any]] = [
        shared
        | {
            "pool": zone,
            "zone": zone,
            "capacity": "spot",
            "usd_per_hour": SPOT_USD,
            "initial_replicas": 2 if zone != "c" else 0,
            "spot": {"file": "zones.csv", "trace": zone, "notice_s": 60},
        }
        for zone in HISTORY
        if spot
    ]
    pools.append(
        shared
        | {
            "pool": "on-demand",
            "usd_per_hour": ON_DEMAND_USD,
            "initial_replicas": 0 if spot else 4,
        }
    )
    return simulate(
        Scenario.model_validate(
            {
                "simulation": "zones",
                "duration_s": 5400,
                "window_s": 60,
                "regions": [{"region": "us", "jurisdiction": "us"}],
                "engines": [
                    {
                        "engine": "e",
                        "prefill_tokens_per_s": 8000,
                        "step_ms": 50,
                        "step_ms_per_sequence": 1,
                    }
                ],
                "models": [
                    {
                        "model": "m",
                        "slo": {"ttft_s": 3},
                        "scaling": {"interval_s": 5, "max_usd_per_hour": max_usd_per_hour},
                    }
                ],
                "pools": pools,
                "traffic": [
                    {
                        "traffic": "t",
                        "model": "m",
                        "arrivals": {"kind": "poisson", "rate_rps": 3},
                        "input_tokens": 500,
                        "output_tokens": 150,
                    }
                ],
            }
        ),
        tmp_path,
    )


def test_zones_that_come_and_go_cost_half_and_lose_nothing(tmp_path: Path) -> None:
    found, steady = run(tmp_path), run(tmp_path, spot=False)
    assert found["cost"]["usd"] < 0.5 * steady["cost"]["usd"]
    model = found["models"][0]
    assert model["late_fraction"] <= 0.02  # of an hour and a half that knew nothing of the zones
    assert model["ttft_s"]["p95"] < 1.2 * steady["models"][0]["ttft_s"]["p95"]
    # Every replica with a notice was drained: what it had has ended or was sent again.
    assert sum(change["kind"] == "notice" for change in found["history"]) >= 2
    assert (model["lost"], model["expired"]) == (0, 0)


def test_the_budget_holds_when_spot_falls_back_to_on_demand(tmp_path: Path) -> None:
    """After every decision it is checked by the simulator. What Serve starts by itself, the first
    replica of a pool at zero that gets a request, nobody can decide against."""
    budget_usd = 6.0
    found = run(tmp_path, max_usd_per_hour=budget_usd)
    bills = zip(*(pool["usd_per_hour"] for pool in found["windows"]["replicas"]), strict=True)
    assert max(sum(bill) for bill in bills) <= budget_usd + ON_DEMAND_USD
    assert found["cost"]["usd_by_capacity"]["on_demand"] > 0
