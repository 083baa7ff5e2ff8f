"""A replica has a whole TPU slice, or none: raylets that say they are TPU hosts, up to the engine.

Each says so as a TPU VM does, in its environment; what Ray makes of that is Ray's own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from nearfield.cli import deploy, processes
from nearfield.cli import region as regions

from tests.support.nodes import Nodes
from tests.support.processes import until
from tests.support.seen import Seen

ROOT = Path(__file__).parents[2]
MODEL = "on-slice"
HEAD = "TPU-v4-16-head"


class Region(Nodes):
    """A region whose nodes are hosts of TPU slices."""

    def __init__(self, region: regions.Region) -> None:
        super().__init__(region)
        self.seen = Seen(region)

    def host(self, name: str, worker: int) -> None:
        """One more: this worker of the slice of this name, of two hosts with four chips each."""
        self.add(
            f"{name}-{worker}",
            {"CPU": 4, "TPU": 4},
            {},
            TPU_ACCELERATOR_TYPE="v4-16",
            TPU_NAME=name,
            TPU_WORKER_ID=str(worker),
            TPU_TOPOLOGY="2x2x2",
        )

    def deploy(self, replicas: int) -> None:
        path = f"{ROOT}{os.pathsep}{self.region.state.pythonpath}"
        deploy.apply(self.region, [application(replicas, path)])

    @property
    def message(self) -> str:
        """What Serve says is wrong."""
        app = self.region.api.details()["applications"].get(MODEL, {})
        return " ".join(str(d["message"]) for d in app.get("deployments", {}).values())


@pytest.fixture(scope="module")
def region(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Region]:
    root = tmp_path_factory.mktemp("tpu") / "regions" / "tpu"
    soon = {"RAY_SERVE_SLOW_STARTUP_WARNING_S": "5"}  # a replica without a node is told of
    started = regions.start(root, regions.RegionOptions(num_cpus=2, environ=soon), print)
    found = Region(started)
    try:
        yield found
    finally:
        found.seen.close()
        found.close()
        regions.end(started, drain_timeout_s=0)
        assert processes.of_region(started.state.region_id) == []


def application(replicas: int, pythonpath: str) -> dict[str, Any]:
    return {
        "name": MODEL,
        "route_prefix": f"/{MODEL}",
        "import_path": "nearfield.serving:app",
        "runtime_env": {"env_vars": {"PYTHONPATH": pythonpath}},
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


def test_a_slice_with_a_missing_host_is_not_used_and_a_whole_one_is_not_shared(
    region: Region,
) -> None:
    seen = region.seen
    region.host("broken", 0)
    region.deploy(1)
    until(lambda: "is not whole after 1 s: 4 of 8 chips" in region.message, 60, every_s=0.2)
    until(lambda: seen.alive() == [], 30, seen.alive, every_s=0.2)  # drained: not tried again
    for worker in (1, 0):  # the replica waits for the first, and a second for the others
        region.host("whole", worker)
    until(lambda: seen.replicas(MODEL), 60, lambda: region.message, every_s=0.2)
    hosts = {labels["ray.io/tpu-worker-id"]: labels["id"] for labels in seen.alive()}
    assert seen.replicas(MODEL) == [hosts["0"]]
    url = f"{region.region.base_url}/{MODEL}/v1/completions"
    answer = httpx.post(url, json={"model": MODEL, "prompt": "?"}, timeout=30, trust_env=False)
    assert answer.json()["choices"][0]["text"] == "whole 2x4"
    assert seen.reserved() == [[hosts["0"], hosts["1"]]]
    region.deploy(2)
    until(lambda: seen.waiting(MODEL), 60, lambda: region.message, every_s=0.2)
    assert seen.replicas(MODEL) == [hosts["0"]]
