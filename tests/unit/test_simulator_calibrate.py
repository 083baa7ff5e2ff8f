"""Timings from a run: what a known engine did is told back."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nearfield.core.errors import BadRequest
from nearfield.simulator.calibrate import fit
from nearfield.simulator.engine import Batch, Request, Timing
from nearfield.simulator.scenario import Engine

TRUE = Engine(
    engine="true",
    prefill_tokens_per_s=6000.0,
    step_ms=18.0,
    step_ms_per_sequence=0.9,
    prefill_chunk_tokens=512,
    max_running=16,
)
GUESS = TRUE.model_copy(
    update={"prefill_tokens_per_s": 1000.0, "step_ms": 100.0, "step_ms_per_sequence": 9.0}
)


def recorded(
    path: Path, requests: int, *, noise: float = 0.0, engine: Engine = TRUE, rate_rps: float = 2.5
) -> None:
    rng = random.Random(3)
    source: Any = SimpleNamespace(timeout_s=1e9)
    batch = Batch(Timing.of(engine), 2.0)
    around_s = engine.request_ms / 1000
    now_s = 0.0
    done: list[tuple[float, Request]] = []
    for _ in range(requests):
        now_s += rng.expovariate(rate_rps)
        while batch.next_s <= now_s:
            at_s = batch.next_s
            done += [(at_s, each) for each in batch.run(at_s)]
        prompt, answer = int(rng.lognormvariate(6, 1)), 1 + int(rng.expovariate(1 / 80))
        batch.add(Request(now_s, source, source, prompt, answer), now_s)
    with path.open("w") as file:
        file.write("arrival_s,input_tokens,output_tokens,first_token_s,total_s\n")
        for ended_s, each in done:
            first_s, total_s = (
                (seconds + around_s) * (1 + noise * rng.uniform(-1, 1))
                for seconds in (each.first_s - each.came_s, ended_s - each.came_s)
            )
            file.write(
                f"{each.came_s},{each.prompt},{each.answer},{min(first_s, total_s)},{total_s}\n"
            )


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_a_known_engine_is_found(tmp_path: Path, noise: float) -> None:
    path = tmp_path / "run.csv"
    recorded(path, 600, noise=noise)
    found = fit(GUESS, path)
    assert found.engine.prefill_tokens_per_s == pytest.approx(6000, rel=0.15)
    assert found.engine.step_ms == pytest.approx(18, rel=0.1)
    assert found.engine.step_ms_per_sequence == pytest.approx(0.9, rel=0.2)
    assert found.engine.max_running == 16
    assert found.error < 0.05
    assert "measured" in str(found)


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_what_is_around_the_engine_and_who_is_alone_are_told_apart(
    tmp_path: Path, noise: float
) -> None:
    true = TRUE.model_copy(update={"request_ms": 60.0, "step_ms_alone": 10.0})
    path = tmp_path / "run.csv"
    recorded(path, 600, noise=noise, engine=true, rate_rps=0.8)
    found = fit(GUESS, path).engine
    assert found.prefill_tokens_per_s == pytest.approx(6000, rel=0.15)
    assert found.request_ms == pytest.approx(60, rel=0.15)
    assert found.step_ms_alone == pytest.approx(10, rel=0.1)
    assert found.step_ms == pytest.approx(18, rel=0.1)
    assert found.step_ms_per_sequence == pytest.approx(0.9, rel=0.25)


def test_pauses_count_in_the_mean(tmp_path: Path) -> None:
    """Every fifth answer takes twice as long: what is to come takes a fifth longer."""
    path = tmp_path / "run.csv"
    recorded(path, 600)
    head, *lines = path.read_text().splitlines()
    for i in range(0, len(lines), 5):
        *same, first_s, total_s = lines[i].split(",")
        later_s = 2 * float(total_s) - float(first_s)
        lines[i] = ",".join((*same, first_s, str(later_s)))
    path.write_text("\n".join([head, *lines]))
    found = fit(GUESS, path).engine
    for decoding in (2, 8):
        plain_ms = TRUE.step_ms + decoding * TRUE.step_ms_per_sequence
        slowed_ms = found.step_ms + decoding * found.step_ms_per_sequence
        assert slowed_ms / plain_ms == pytest.approx(1.2, abs=0.1)


def test_too_little_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    recorded(path, 8)
    with pytest.raises(BadRequest, match="tells too little"):
        fit(GUESS, path)


def test_a_file_without_the_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(BadRequest, match="has no column 'arrival_s': its columns are a, b"):
        fit(GUESS, path)
