"""One model in four pools on a cluster of several nodes: order, fallback, return, and machines that
are taken away. Accelerators and labels are made up; Ray, Serve, HAProxy and the gateway are real.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

import httpx
import psutil
import pytest
from nearfield.api.load import TARGETS_PATH, parse_targets
from nearfield.api.scaling import SCALING_PATH, ModelScaling, parse_scaling
from nearfield.cli import deploy, processes
from nearfield.cli.federation import AGENT
from nearfield.core.serve_config import MODEL_BUILDER

from tests.support import nodes
from tests.support.metadata import AWS, Metadata, metadata_server
from tests.support.processes import GatewayProcess, until
from tests.support.scaled import autoscaling

ROOT = Path(__file__).parents[2]
MODEL = "assistant"
FALLBACK_S = 40.0
"""From the first request, whose pool has no machine, to its answer from the next one. Of this, a
replica without room counts as stuck after 4 to 5 s; the rest is what Serve takes to start one."""
ADMISSION_S = 1.0
NOTICE_S = 15.0
"""What the cloud gives. Real ones give 30 s or more."""
TPU = {"ray.io/accelerator-type": "TPU-V5LITEPOD"}
H100 = {"ray.io/accelerator-type": "H100", "ray.io/market-type": "spot"}
L4 = {"ray.io/accelerator-type": "L4"}
# What a replica asks of a node, its price, and the requests it should have at once.
POOLS: dict[str, tuple[dict[str, Any], float, int]] = {
    "tpu-v5e": ({"num_cpus": 0, "resources": {"TPU": 1}, "label_selector": TPU}, 1.0, 4),
    "h100-spot": ({"num_cpus": 0, "num_gpus": 1, "label_selector": H100}, 2.0, 4),
    "l4": ({"num_cpus": 0, "num_gpus": 1, "label_selector": L4}, 3.0, 4),
    "cpu": ({"num_cpus": 1, "label_selector": {"class": "cpu"}}, 4.0, 4),
}


def application(pool: str) -> dict[str, Any]:
    needs, usd_per_hour, at_once = POOLS[pool]
    # Without its own labels as the fallback Ray would build the application on such a node.
    needs = {**needs, "fallback_strategy": [{"label_selector": needs["label_selector"]}]}
    spot = {"kind": "spot"} if "spot" in pool else {}
    return {
        "name": f"{MODEL}-{pool}",
        "route_prefix": f"/{MODEL}-{pool}",
        "import_path": MODEL_BUILDER,
        "args": {
            "model": MODEL,
            "threads": 1,
            "pool": {
                "name": pool,
                "unit_usd": usd_per_hour,
                "handicap_ms": 1000 * (usd_per_hour - 1),
            },
            "engine": {"kind": "custom", "import_path": "tests.support.programs:Programs"},
            "limits": {"max_running": 8, "max_queued": 64, "drain_s": 4},
        },
        "deployments": [
            {
                "name": "replica",
                "ray_actor_options": needs,
                "autoscaling_config": autoscaling(
                    0,
                    2,
                    at_once,
                    model=MODEL,
                    pool=pool,
                    usd_per_hour=usd_per_hour,
                    boot_s=5,
                    hold_s=5,
                    idle_s=600,
                    **spot,
                ),
            }
        ],
    }


@dataclass
class Region:
    """The cluster, its gateway, and who runs where."""

    nodes: nodes.Nodes
    gateway: str
    home: Path
    there: dict[str, nodes.Node] = field(default_factory=dict)

    def states(self) -> dict[str, list[tuple[str, str | None]]]:
        """State and node of each replica, by pool."""
        applications = self.nodes.region.api.details()["applications"]
        return {
            pool: [
                (replica["state"], replica.get("node_id"))
                for deployment in applications[f"{MODEL}-{pool}"]["deployments"].values()
                for replica in deployment["replicas"]
            ]
            for pool in POOLS
        }

    def running(self, pool: str) -> int:
        return sum(state == "RUNNING" for state, _ in self.states()[pool])

    def targets(self, pool: str) -> list[tuple[str, str, int]]:
        """Prefix, host and port of each replica, as the agent tells."""
        answer = httpx.get(self.nodes.region.base_url + TARGETS_PATH).raise_for_status()
        applications = parse_targets(answer.content).applications
        app = next(app for app in applications if app.name == f"{MODEL}-{pool}")
        return [(app.route_prefix, target.host, target.port) for target in app.targets]

    def scaling(self) -> ModelScaling:
        """The last decision, as the agent tells."""
        answer = httpx.get(self.nodes.region.base_url + SCALING_PATH).raise_for_status()
        (found,) = parse_scaling(answer.content)
        return found

    @contextmanager
    def notices(self, node: nodes.Node, cloud: str) -> Iterator[None]:
        """`nearfield notices` runs beside the node. Afterwards it has drained it, and ended."""
        command = [sys.executable, "-m", "nearfield.cli.main", "notices", "aws", "--url", cloud]
        head = self.nodes.region.gcs_address
        watching = subprocess.Popen(
            [*command, "--address", head, "--node-id", node.id, "--json"],
            env=nodes.environment(self.nodes.region),
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            until(lambda: Metadata.asked, 60)
            yield
            said, _ = watching.communicate(timeout=30)
            assert json.loads(said)["node_id"] == node.id
        finally:
            watching.kill()
            watching.wait()

    def ask(self, program: str, timeout_s: float = 120.0) -> httpx.Response:
        url = f"{self.gateway}/v1/chat/completions"
        return httpx.post(url, json=body(program), timeout=timeout_s, trust_env=False)


def body(program: str, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": program}], **fields}


@pytest.fixture(scope="module")
def region(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Region]:
    """A head and two nodes: L4 and CPUs. There is no TPU, and no H100."""
    folder = tmp_path_factory.mktemp("pools")
    with nodes.cluster(folder / "regions" / "eu-west", {"PYTHONPATH": str(ROOT)}) as made:
        l4 = made.add("l4", {"GPU": 2}, L4)
        cpu = made.add("cpu", {"CPU": 2}, {"class": "cpu"})
        applications = [AGENT, *(application(pool) for pool in POOLS)]
        deploy.apply(made.region, applications)
        names = [app["name"] for app in applications]
        for outcome in deploy.wait_until_running(made.region, names, timeout_s=90, report=print):
            assert outcome.ready, outcome.reason
        file = nodes.write_gateway(folder, made.region)
        gateway = GatewayProcess(file, folder / "home")
        try:
            told = gateway.wait_ready()
            address = told.url
            until(lambda: MODEL in httpx.get(f"{address}/v1/models").text, 60)
            until(lambda: httpx.get(f"{address}/readyz").status_code == 200, 60)
            yield Region(made, address.rstrip("/"), folder, {"l4": l4, "cpu": cpu})
        finally:
            gateway.kill()


class Load:
    """So many callers through the gateway, each asking again when it is answered.

    Attributes:
        answers: when each was asked and answered (time.monotonic()), its status, and which pool
            and replica answered.
    """

    def __init__(self, region: Region, callers: int) -> None:
        self.answers: list[tuple[float, float, int, str, str]] = []
        self._region = region
        self._ended = threading.Event()
        self._callers = [threading.Thread(target=self._call) for _ in range(callers)]

    def __enter__(self) -> Self:
        for caller in self._callers:
            caller.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for caller in self._callers:
            caller.join(timeout=120)

    def _call(self) -> None:
        while not self._ended.is_set():
            asked_s = time.monotonic()
            answer = self._region.ask("sleep:0.2 say:x")
            named = answer.headers.get("x-nearfield-endpoint", "/")
            replica = answer.headers.get("x-nearfield-replica", "")
            pool = named.rpartition("/")[2]
            done = (asked_s, time.monotonic(), answer.status_code, pool, replica)
            self.answers.append(done)

    @property
    def statuses(self) -> set[int]:
        return {status for _, _, status, _, _ in self.answers}

    def pools(self, since_s: float) -> set[str]:
        """Who answered what was asked since then."""
        return {pool for asked_s, _, _, pool, _ in self.answers if asked_s >= since_s}


def test_absent_pools_are_passed_over_and_preferred_when_they_come(region: Region) -> None:
    """No TPU and no H100: the L4 serves. The H100 comes, and the L4 is given back."""
    asked_s = time.monotonic()
    answer = region.ask("say:first")
    took_s = time.monotonic() - asked_s
    assert (answer.status_code, answer.headers["x-nearfield-endpoint"]) == (200, served_by("l4"))
    print(f"measured: {took_s:.1f} s from the first request to its answer by the fallback pool")
    assert took_s < FALLBACK_S
    assert region.running("tpu-v5e") == region.running("h100-spot") == region.running("cpu") == 0
    with Load(region, callers=2) as load:
        until(lambda: len(load.answers) > 20, 60)
        region.there["h100"] = region.nodes.add("h100", {"GPU": 2}, H100)
        came_s = time.monotonic()
        until(lambda: region.running("h100-spot") and not region.running("l4"), 150, region.states)
        back_s = time.monotonic()
        print(f"measured: {back_s - came_s:.1f} s from the node's coming to the L4's end")
        until(lambda: load.pools(back_s) == {"h100-spot"}, 20)
    assert load.statuses == {200}
    assert all(done_s - began_s < FALLBACK_S for began_s, done_s, *_ in load.answers)


def served_by(pool: str) -> str:
    return f"eu-west/{MODEL}@1/{pool}"


def test_a_spot_machine_is_emptied_before_it_goes(region: Region) -> None:
    """Its cloud's notice, played by a local metadata server, then the end at the deadline."""
    node = region.there["h100"]
    (prefix, host, port), *others = region.targets("h100-spot")
    assert not others
    direct = f"http://{host}:{port}{prefix}/v1/chat/completions"
    with metadata_server() as cloud, Load(region, callers=2) as load, region.notices(node, cloud):
        until(lambda: len(load.answers) > 10, 60)
        stream = Stream(region.gateway)
        stream.start()
        until(lambda: stream.events, 30)
        due = datetime.now(UTC) + timedelta(seconds=NOTICE_S)
        Metadata.answers[AWS] = json.dumps({"action": "terminate", "time": due.isoformat()})
        noticed_s = time.monotonic()
        refused = until(lambda: _refusal(direct), 10, every_s=0.02)
        refused_s = time.monotonic() - noticed_s
        assert refused == "draining"
        print(f"measured: {refused_s:.2f} s from the notice to the first refusal")
        assert refused_s <= ADMISSION_S
        stream.join(timeout=30)
        assert stream.error == "interrupted", stream.events
        until(lambda: load.pools(noticed_s) & {"l4"}, 60, region.states)
        until(lambda: datetime.now(UTC) >= due, NOTICE_S + 5)
        node.kill()
        killed_s = time.monotonic()
        until(lambda: len([a for a in load.answers if a[0] > killed_s]) > 10, 60, region.states)
    assert load.statuses == {200}
    late_s = noticed_s + ADMISSION_S
    assert "h100-spot" not in load.pools(late_s)


def test_why_is_told(region: Region) -> None:
    """Every pool's last decision, in words, for whoever may ask."""
    environ = {**os.environ, "NEARFIELD_HOME": str(region.home)}
    command = [sys.executable, "-m", "nearfield.cli.main", "status", "--json"]
    shown = subprocess.run(
        [*command, "--region", "eu-west"], env=environ, capture_output=True, text=True, check=True
    )
    (told,) = json.loads(shown.stdout)["scaling"]
    assert region.scaling().model == MODEL
    assert told["model"] == MODEL
    assert {pool["pool"] for pool in told["pools"]} == set(POOLS)
    assert all(pool["reason"].startswith(f"{pool['replicas']}: ") for pool in told["pools"])
    assert time.time() - told["decided_s"] < 30
    assert told["changes"][0]["at_s"] <= told["decided_s"]


def test_what_was_learnt_survives_the_controller(region: Region) -> None:
    """Nobody asks for anything any more: a new one could not find out how fast a replica is."""
    before = region.scaling()
    assert before.terms["lead_s"] > 0
    killed_s = time.time()
    for process in processes.of_region(region.nodes.region.state.region_id):
        if "ServeController" in " ".join(psutil.Process(process.pid).cmdline()):
            psutil.Process(process.pid).kill()
    until(lambda: region.scaling().decided_s > killed_s, 60, region.scaling, every_s=0.2)
    until(lambda: "lead_s" in region.scaling().terms, 30, region.scaling, every_s=0.2)
    assert region.scaling().terms["lead_s"] == pytest.approx(before.terms["lead_s"], rel=0.2)


class Stream(threading.Thread):
    """One long stream through the gateway.

    Attributes:
        events: what came. error: the code of the error event that ended it.
    """

    def __init__(self, gateway: str) -> None:
        super().__init__(daemon=True)
        self._url = f"{gateway}/v1/chat/completions"
        self.events: list[dict[str, Any]] = []
        self.error: str | None = None

    def run(self) -> None:
        request = body("say:a sleep:60 say:b", stream=True)
        with httpx.stream("POST", self._url, json=request, timeout=90, trust_env=False) as answer:
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                self.events.append(event)
                if "error" in event:
                    self.error = event["error"]["code"]


def _refusal(url: str) -> str | None:
    """The code with which the replica refuses; None: it answers."""
    answer = httpx.post(url, json=body("say:x"), timeout=10, trust_env=False)
    return None if answer.status_code == 200 else str(answer.json()["error"]["code"])
