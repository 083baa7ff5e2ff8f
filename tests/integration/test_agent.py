"""The region's agent: gateways learn where the replicas are, whatever happens to the controller."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from nearfield.api.load import LOAD_PATH, TARGETS_PATH, Application, parse_load, parse_targets
from nearfield.api.scaling import SCALING_PATH, parse_scaling
from nearfield.cli import processes
from nearfield.core.scaling import SCALING_POLICY
from nearfield.core.serve_config import AGENT_BUILDER

from tests.integration.conftest import TestRegion

ROOT = Path(__file__).resolve().parents[2]
ENGINE = {"kind": "custom", "import_path": "tests.support.programs:Programs"}
APP = "ag-programs"


@pytest.fixture(scope="module")
def agent(region: TestRegion) -> Iterator[TestRegion]:
    region.deploy(
        {"name": "ag-agent", "route_prefix": "/-/nearfield", "import_path": AGENT_BUILDER}
    )
    deploy(region, replicas=1)
    yield region
    region.remove("ag-agent", APP)


def deploy(region: TestRegion, *, replicas: int) -> None:
    region.deploy_model(
        APP, engine=ENGINE, pythonpath=ROOT, replica={"num_replicas": replicas}, version="7"
    )


def application(region: TestRegion) -> Application:
    answer = httpx.get(region.base_url + TARGETS_PATH)
    targets = parse_targets(answer.raise_for_status().content)
    assert targets.age_s < 5
    return next(app for app in targets.applications if app.name == APP)


def until(condition: Callable[[], Any], timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.02)


def test_every_replica_is_there_and_answers_by_itself(agent: TestRegion) -> None:
    deploy(agent, replicas=2)
    until(lambda: len(application(agent).targets) == 2, timeout_s=30)
    app = application(agent)
    assert (app.route_prefix, app.status, app.spec["version"]) == (f"/{APP}", "RUNNING", "7")
    assert len({(target.host, target.port) for target in app.targets}) == 2
    for target in app.targets:
        answer = httpx.get(f"http://{target.host}:{target.port}{app.route_prefix}{LOAD_PATH}")
        load = parse_load(answer.raise_for_status().content)
        assert (load.model, load.version, load.running, load.waiting) == (APP, "7", 0, 0)
        assert load.room > 0


def test_why_a_model_has_its_replicas(agent: TestRegion) -> None:
    policy = {"policy_function": SCALING_POLICY, "policy_kwargs": {"idle_s": 600}}
    scaled = {"min_replicas": 2, "max_replicas": 2, "metrics_interval_s": 0.5, "policy": policy}
    agent.deploy_model(
        APP, engine=ENGINE, pythonpath=ROOT, replica={"autoscaling_config": scaled}, version="7"
    )
    until(lambda: application(agent).scaling.startswith("2: "), timeout_s=30)
    told = parse_scaling(httpx.get(agent.base_url + SCALING_PATH).raise_for_status().content)
    (model,) = [model for model in told if model.model == APP]
    assert [(pool.application, pool.replicas) for pool in model.pools] == [(APP, 2)]
    assert model.pools[0].reason


def test_a_replica_that_leaves_is_gone_when_it_no_longer_answers(agent: TestRegion) -> None:
    deploy(agent, replicas=2)
    until(lambda: len(application(agent).targets) == 2, timeout_s=30)
    before = set(application(agent).targets)
    deploy(agent, replicas=1)
    until(lambda: len(application(agent).targets) == 1, timeout_s=30)
    (left,) = application(agent).targets
    assert left in before
    url = f"http://{left.host}:{left.port}/{APP}/v1/models"
    assert httpx.get(url).status_code == 200


def test_the_last_known_outlives_the_controller(agent: TestRegion) -> None:
    """Killed, it comes back; until then the agent says what it knew."""
    known = application(agent)
    for process in processes.of_region(agent.region.state.region_id):
        if "ServeController" in " ".join(psutil.Process(process.pid).cmdline()):
            psutil.Process(process.pid).kill()
    assert application(agent).targets == known.targets
    until(lambda: application(agent) == known, timeout_s=30)
