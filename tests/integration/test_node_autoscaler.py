"""Ray's own node autoscaler under our pools: it starts and stops node types of a cluster file.

The nodes are real raylets on this machine (`nearfield.control.fake_nodes`); the region is started
as `nearfield up --cluster` starts it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from nearfield.cli import deploy, processes
from nearfield.cli import region as regions
from nearfield.cli.ray_nodes import UNAVAILABLE

from tests.support.processes import until
from tests.support.scaled import callers
from tests.support.seen import Seen

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster_configs" / "clusters" / "local-fake.yaml"
POOLS = ROOT / "examples" / "pools" / "assistant.yaml"
SPOT, ON_DEMAND = "assistant-spot", "assistant"


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    root = tmp_path_factory.mktemp("fake") / "regions" / "fake"
    cluster = yaml.safe_load(CLUSTER.read_text())
    region = regions.start(root, regions.RegionOptions(cluster=cluster), print)
    found = Seen(region)
    try:
        yield found
    finally:
        found.close()
        regions.end(region, drain_timeout_s=0)
        assert processes.of_region(region.state.region_id) == []  # no raylet outlives its region


def pools(nodes: Seen) -> list[dict[str, Any]]:
    """The example's applications, with an engine that starts at once."""
    path = f"{ROOT}{os.pathsep}{nodes.region.state.pythonpath}"
    apps = copy.deepcopy(yaml.safe_load(POOLS.read_text())["applications"])
    for app in apps:
        del app["args"]["source"]
        app["args"] |= {
            "engine": {"kind": "custom", "import_path": "tests.support.programs:Programs"},
            "limits": {"drain_s": 2},
            "threads": 1,
        }
        app["runtime_env"] = {"env_vars": {"PYTHONPATH": path}}
    return apps


def ask(nodes: Seen) -> int | None:
    """As a gateway does, a caller asks the first pool that has a replica, else the first; and again
    if no answer comes within 10 s."""
    body = {"model": "assistant", "messages": [{"role": "user", "content": "sleep:0.5 say:x"}]}
    app = next((name for name in (SPOT, ON_DEMAND) if nodes.replicas(name)), SPOT)
    url = f"{nodes.region.base_url}/{app}/v1/chat/completions"
    try:
        return httpx.post(url, json=body, timeout=10, trust_env=False).status_code
    except httpx.TimeoutException:
        return None


def test_the_right_node_type_comes_for_a_replica_and_goes_when_idle(nodes: Seen) -> None:
    app = pools(nodes)[1]
    replica = app["deployments"][0]
    del replica["autoscaling_config"]
    replica["ray_actor_options"] = {"num_cpus": 1, "resources": {"TPU": 8}}
    deploy.apply(nodes.region, [app])
    until(lambda: nodes.replicas(ON_DEMAND), 60, nodes.types, every_s=0.1)
    assert nodes.types() == ["tpu-v5e-8"]  # by its resources
    labels = {"ray.io/market-type": "on-demand"}
    replica["ray_actor_options"] = {"num_cpus": 1, "num_gpus": 1, "label_selector": labels}
    deploy.apply(nodes.region, [app])
    until(lambda: nodes.types() == ["l4"], 90, nodes.types, every_s=0.1)  # by its labels
    deploy.apply(nodes.region, [], remove=[ON_DEMAND])
    until(lambda: nodes.types() == [], 60, nodes.types, every_s=0.1)


def test_on_demand_takes_over_while_there_is_no_spot_and_gives_back(nodes: Seen) -> None:
    unavailable = nodes.region.root / UNAVAILABLE
    unavailable.write_text("l4-spot\n")
    deploy.apply(nodes.region, pools(nodes))
    routes = {f"/{SPOT}", f"/{ON_DEMAND}"}
    until(lambda: routes <= nodes.region.api.routes().keys(), 60, every_s=0.1)
    assert nodes.types() == []  # at zero, and no node was needed to find out
    with callers(2, lambda: ask(nodes)) as statuses:
        # The pool waits for a machine that does not come; within seconds the other one is asked.
        until(lambda: nodes.replicas(ON_DEMAND), 30, nodes.types, every_s=0.1)
        until(lambda: statuses, 30)
        assert nodes.types() == ["l4"]
        unavailable.unlink()
        until(lambda: nodes.replicas(SPOT), 30, nodes.types, every_s=0.1)
        until(lambda: set(nodes.types()) == {"l4-spot"}, 90, nodes.types, every_s=0.1)
    assert set(statuses) == {200}
    deploy.apply(nodes.region, [], remove=[SPOT, ON_DEMAND])
