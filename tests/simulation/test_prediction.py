"""Recorded runs of a real model on Ray Serve, and what the simulator says they should have taken.

The engine's timings come from three runs, the predictions are of three others: other arrivals,
other lengths, other rates (`data/README.md`).
"""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest
from nearfield.simulator.calibrate import COLUMNS, calibrate
from nearfield.simulator.result import simulate
from nearfield.simulator.scenario import Scenario

DATA = Path(__file__).parent / "data"
RUNS = (1, 2, 3)
APART_S = 60.0
"""Between the runs that timings are taken from: nobody is there any more when the next begins."""
WITHIN = 0.15

SCENARIO = Scenario.model_validate(
    {
        "simulation": "predicted",
        "duration_s": 60,
        "regions": [{"region": "here", "jurisdiction": "any"}],
        "local_rtt_ms": 0,
        "engines": [
            {"engine": "real", "prefill_tokens_per_s": 1000, "step_ms": 50, "max_running": 8}
        ],
        "models": [{"model": "sim", "scaling": {"policy": "static"}}],
        "pools": [
            {
                "pool": "one",
                "model": "sim",
                "engine": "real",
                "usd_per_hour": 1,
                "initial_replicas": 1,
            }
        ],
        "traffic": [
            {
                "traffic": "again",
                "model": "sim",
                "arrivals": {"kind": "requests", "file": "run.csv"},
            }
        ],
    }
)


def recorded(run: int, what: str) -> list[dict[str, float]]:
    with (DATA / f"engine_run_{run}_{what}.csv").open(encoding="ascii") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


@pytest.fixture
def calibrated(tmp_path: Path) -> Scenario:
    """With the timings of all three."""
    together = tmp_path / "timings.csv"
    with together.open("w", newline="", encoding="ascii") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for run in RUNS:
            for row in recorded(run, "timings"):
                late = {"arrival_s": row["arrival_s"] + APART_S * run}
                whole = {name: int(row[name]) for name in ("input_tokens", "output_tokens")}
                writer.writerow(row | whole | late)
    return calibrate(SCENARIO, None, together)[0]


@pytest.mark.parametrize("run", RUNS)
def test_a_run_is_predicted_from_others_timings(
    run: int, calibrated: Scenario, tmp_path: Path
) -> None:
    shutil.copy(DATA / f"engine_run_{run}_predicted.csv", tmp_path / "run.csv")
    found = simulate(calibrated, tmp_path)["traffic"][0]
    rows = recorded(run, "predicted")
    assert found["done"] == len(rows)
    for told, column in (("total_s", "total_s"), ("ttft_s", "first_token_s")):
        took_s = sorted(row[column] for row in rows)
        for q in (0.5, 0.95):
            measured_s = took_s[int(q * (len(took_s) - 1))]
            predicted_s = found[told][f"p{round(100 * q)}"]
            off = predicted_s / measured_s - 1
            print(f"\nrun {run}, {told} p{100 * q:.0f}: {measured_s:.4f} measured, {off:+.1%}")
            assert predicted_s == pytest.approx(measured_s, rel=WITHIN)
