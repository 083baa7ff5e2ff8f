"""nearfield's scaling policy inside Ray Serve: one to several and back, to zero and from zero."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import pytest

from tests.integration.conftest import TestRegion
from tests.support.scaled import autoscaling, callers

ROOT = Path(__file__).parents[2]
MODEL = "sc-programs"
AUTOSCALING = {
    "initial_replicas": 1,
    **autoscaling(
        0, 3, at_once=2, boot_s=10, hold_s=10, idle_s=8, usd_per_hour=2, max_usd_per_hour=6
    ),
}


@pytest.fixture(scope="module")
def model(region: TestRegion) -> Iterator[str]:
    region.deploy_model(
        MODEL,
        engine={"kind": "custom", "import_path": "tests.support.programs:Programs"},
        limits={"max_running": 4, "max_queued": 64, "drain_s": 2},
        pythonpath=ROOT,
        replica={"autoscaling_config": AUTOSCALING},
    )
    yield region.url(MODEL)
    region.remove(MODEL)


def ask(url: str, program: str) -> httpx.Response:
    body = {"model": MODEL, "messages": [{"role": "user", "content": program}]}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=90)


def load(url: str, at_once: int) -> AbstractContextManager[list[int]]:
    """So many callers, each asking again when it is answered; the statuses they got."""
    return callers(at_once, lambda: ask(url, "sleep:0.5 say:x").status_code)


def replicas(region: TestRegion) -> int:
    """Those that run."""
    details = region.region.api.details()["applications"][MODEL]["deployments"]["replica"]
    return sum(replica["state"] == "RUNNING" for replica in details["replicas"])


def until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not in time: {what}"
        time.sleep(0.1)


def reasons(region: TestRegion) -> list[str]:
    """What the controller has logged of this model's scaling."""
    logs = (region.region.logs_dir / "serve").glob("controller_*.log")
    lines = [line for path in logs for line in path.read_text().splitlines()]
    return [line for line in lines if f"scaling {MODEL}" in line]


def test_up_down_to_zero_and_from_zero(region: TestRegion, model: str) -> None:
    with load(model, at_once=6) as statuses:
        until(lambda: replicas(region) == 3, 90, "three replicas for six callers")
    with load(model, at_once=1) as fewer:
        until(lambda: replicas(region) == 1, 200, "one replica for one caller")
    until(lambda: replicas(region) == 0, 90, "none for nobody")
    answer = ask(model, "say:back")
    assert answer.json()["choices"][0]["message"]["content"] == "back"
    assert set(statuses) | set(fewer) == {200}  # nobody noticed any of it
    told = " ".join(reasons(region))
    assert "3: " in told
    assert "work/s come" in told
    assert "no request for" in told
