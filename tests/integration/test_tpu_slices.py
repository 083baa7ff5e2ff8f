"""A replica has a whole TPU slice, or none: raylets that say they are TPU hosts, up to the engine.

Each says so as a TPU VM does, in its environment; what Ray makes of that is Ray's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from nearfield.cli import deploy, processes
from nearfield.cli import region as regions

from tests.support.processes import until
from tests.support.raylets import Nodes

ROOT = Path(__file__).parents[2]
MODEL = "on-slice"
HEAD = "TPU-v4-16-head"


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Two slices v4-16 of two hosts, a and b, and the first host of a third, broken."""
    root = tmp_path_factory.mktemp("tpu") / "regions" / "tpu"
    region = regions.start(root, regions.RegionOptions(num_cpus=2), print)
    found = Nodes(region)
    try:
        host(found, "broken", 0)
        yield found
    finally:
        found.close()
        regions.end(region, drain_timeout_s=0)
        assert processes.of_region(region.state.region_id) == []


def host(nodes: Nodes, name: str, worker: int) -> None:
    """One host of a slice."""
    nodes.start(
        {"TPU": 4},
        TPU_ACCELERATOR_TYPE="v4-16",
        TPU_NAME=name,
        TPU_WORKER_ID=str(worker),
        TPU_TOPOLOGY="2x2x2",
    )


def application(replicas: int) -> dict[str, Any]:
    return {
        "name": MODEL,
        "route_prefix": f"/{MODEL}",
        "import_path": "nearfield.serving:app",
        "runtime_env": {"env_vars": {"PYTHONPATH": str(ROOT)}},
        "args": {
            "model": MODEL,
            "engine": "tests.support.on_slice:OnSlice",
            "slice": {"accelerator_type": "TPU-V4", "topology": "2x2x2", "wait_s": 1},
            "threads": 1,
        },
        "deployments": [
            {
                "name": "replica",
                "num_replicas": replicas,
                "ray_actor_options": {"num_cpus": 0.1, "resources": {HEAD: 1}},
            }
        ],
    }


def said(nodes: Nodes) -> str:
    url = f"{nodes.region.base_url}/{MODEL}/v1/completions"
    body = {"model": MODEL, "prompt": "which?"}
    answer = httpx.post(url, json=body, timeout=30, trust_env=False)
    return str(answer.json()["choices"][0]["text"])


def message(nodes: Nodes) -> str:
    app = nodes.region.api.details()["applications"].get(MODEL, {})
    told = [d["message"] for d in app.get("deployments", {}).values()]
    return " ".join([str(app.get("message", "")), *told])


def test_a_slice_with_a_missing_host_is_not_used_and_whole_ones_are_not_shared(
    nodes: Nodes,
) -> None:
    deploy.apply(nodes.region, [application(1)])
    until(lambda: "is not whole after 1 s: 4 of 8 chips" in message(nodes), 60, every_s=0.2)
    assert nodes.replicas(MODEL) == []
    for name in "ab":
        for worker in range(2):
            host(nodes, name, worker)
    deploy.apply(nodes.region, [application(2)])
    until(lambda: len(nodes.replicas(MODEL)) == 2, 90, lambda: message(nodes), every_s=0.2)
    where = {labels["id"]: labels for labels in nodes.alive()}
    used = [where[node] for node in nodes.replicas(MODEL)]
    assert {labels["ray.io/tpu-slice-name"] for labels in used} == {"a", "b"}
    assert {labels["ray.io/tpu-worker-id"] for labels in used} == {"0"}
    assert {said(nodes) for _ in range(20)} == {"a 2x4", "b 2x4"}
    # All chips of both are reserved: a third replica finds no slice.
    deploy.apply(nodes.region, [application(3)])
    until(lambda: "is not whole" in message(nodes), 60, lambda: message(nodes), every_s=0.2)
    assert len(nodes.replicas(MODEL)) == 2
