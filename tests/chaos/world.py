"""Real Ray clusters as regions, real gateways, and the distance between them, on one machine.

           clients
              │
        edge-1, edge-2         gateways that stand in no region
         │20 ms   │90 ms       wires: see `wire`
     eu-west     us-east       gateways of the regions
         │          │
    Ray + Serve   Ray + Serve  stub replicas: see `stub`

One store is shared by all gateways, passports by all gateways and regions. Requests enter at an
edge, so that whatever happens to a region there is somebody left to see it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx
import psutil
from nearfield.api.passport import PassportKeys
from nearfield.cli import deploy, processes
from nearfield.cli import region as regions
from nearfield.cli.federation import AGENT
from nearfield.cli.gateways import GatewayProcess
from nearfield.cli.ports import Reservations
from nearfield.core.serve_config import MODEL_BUILDER
from nearfield.edge.pages_models import STATUS_PATH
from nearfield.store.administration import Administration, open_pepper
from nearfield.store.forms import NewKey, NewTenant, TenantChange, parse
from nearfield.store.sql import Store

from tests.chaos.ledger import BOUND, Execution
from tests.chaos.load import ANYBODY, MODEL
from tests.chaos.stub import executions, orders_file
from tests.chaos.wire import Hold
from tests.support.processes import until

ROOT = Path(__file__).resolve().parents[2]
DEPLOY_S = 180.0
SETTLE_S = 90.0
"""From the worst fault until everything is believed healthy: a cluster starts anew in it."""
LEDGER_S = 10.0
"""Usage on its way into the ledger."""
POLL_S = 0.1
"""Between looks: each asks every gateway."""
OPERATOR = "operator"
GATEWAYS = 8
"""Ports for them: those of two worlds are the same or have nothing in common."""


@dataclass(frozen=True, slots=True)
class Place:
    """A region to be.

    Attributes:
        rtt_s: from the edge. replicas: of the model.
        handicap_ms: how much rather requests go to the first region: on a busy machine what a first
            byte takes differs by more than the distances.
    """

    name: str
    jurisdiction: str
    city: str
    latitude: float
    longitude: float
    rtt_s: float
    replicas: int = 2
    handicap_ms: float = 200.0


EU_WEST = Place("eu-west", BOUND, "Dublin", 53.33, -6.25, 0.02, replicas=3, handicap_ms=0.0)
EU_NORTH = Place("eu-north", BOUND, "Stockholm", 59.33, 18.07, 0.04)
US_EAST = Place("us-east", "us", "Ashburn", 39.04, -77.49, 0.09)
EDGES = ("edge-1", "edge-2")


@dataclass
class Cluster:
    """A region that runs, and its gateway."""

    place: Place
    region: regions.Region
    gateway: GatewayProcess

    @property
    def name(self) -> str:
        return self.place.name

    def pids(self, *words: str) -> list[int]:
        """Processes of the cluster, or those whose command line has one of these words."""
        pids = [process.pid for process in processes.of_region(self.region.state.region_id)]
        return [pid for pid in pids if not words or any(word in _command(pid) for word in words)]

    def everything(self) -> list[int]:
        """Processes of the cluster and of its gateway."""
        return [*self.pids(), *(process.pid for process in self.gateway.processes())]


def _command(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


class World:
    """See the module. A context: leaving it ends everything.

    Attributes:
        clusters: by name, the nearest first. doors: the edges' base URLs. keys: of each tenant.
        runs: where engines write. report: told what happens.
    """

    clusters: dict[str, Cluster]
    keys: dict[str, str]

    def __init__(
        self, folder: Path, places: Sequence[Place], report: Callable[[str], None]
    ) -> None:
        self.folder = folder
        self.places = places
        self.report = report
        self.runs = folder / "runs"
        self.clusters = {}
        self.edges: dict[str, GatewayProcess] = {}
        self._ports = Reservations()
        self._port_of: dict[str, int] = {}
        self._passports = folder / "passports.json"
        self._database = f"sqlite:///{folder / 'store.sqlite3'}"
        self._client = httpx.Client(trust_env=False, timeout=5.0)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.callback(self._end)
            self._prepare()
            self._start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # ---- beginning --------------------------------------------------------------------------

    def _prepare(self) -> None:
        self.runs.mkdir(parents=True)
        PassportKeys.generate().save(self._passports)
        self.store = Store(self._database)
        office = Administration(self.store, open_pepper(self.store, self.folder / "key-pepper"))
        for tenant in (BOUND, ANYBODY, OPERATOR):
            office.create_tenant(parse(NewTenant, {"name": tenant}))
        office.change_tenant(BOUND, parse(TenantChange, {"jurisdictions": [BOUND]}))
        self.keys = {}
        for tenant in (BOUND, ANYBODY, OPERATOR):
            scope = "platform" if tenant == OPERATOR else "inference"
            form = parse(NewKey, {"tenant": tenant, "scopes": [scope]})
            self.keys[tenant] = office.create_key(form)[1]
        names = [*(place.name for place in self.places), *EDGES]
        first = self._ports.block(GATEWAYS)
        self._port_of = {name: first + number for number, name in enumerate(names)}
        self._wires = Wires({place.name: self._port_of[place.name] for place in self.places})
        for place in self.places:
            self.wire(place.name)
            self._write_region(place)

    def _start(self) -> None:
        began_s = time.monotonic()
        for place in self.places:  # one after another: on few cores one of two would not start
            self._deploy(self._start_cluster(place))
        gateways = [cluster.gateway for cluster in self.clusters.values()]
        for name in EDGES:
            self.edges[name] = self._gateway(name, None)
        self._start_gateways([*gateways, *self.edges.values()])
        self.settle()
        self.report(f"everything runs after {time.monotonic() - began_s:.0f} s")

    def _start_cluster(self, place: Place) -> Cluster:
        serve = f"{place.name} serve"
        options = regions.RegionOptions(
            port=self._port_of.get(serve, 18_001),
            num_cpus=4,
            environ={
                "PYTHONPATH": str(ROOT),
                "RAY_raylet_start_wait_time_s": "120",  # whatever else the machine does
                "NEARFIELD_PASSPORT_KEYS_FILE": str(self._passports),
                "NEARFIELD_JURISDICTION": place.jurisdiction,
            },
        )
        region = regions.start(self.folder / "regions" / place.name, options, self.report)
        self._port_of[serve] = region.state.port
        cluster = Cluster(place, region, self._gateway(place.name, place))
        self.clusters[place.name] = cluster
        return cluster

    def _deploy(self, cluster: Cluster, version: str = "1") -> None:
        apps = [AGENT, self._model(cluster.place, version)]
        deploy.apply(cluster.region, apps)
        names = [app["name"] for app in apps]
        for outcome in deploy.wait_until_running(
            cluster.region, names, timeout_s=DEPLOY_S, report=self.report
        ):
            assert outcome.ready, f"{cluster.name}, {outcome.name}: {outcome.reason}"

    def _model(self, place: Place, version: str) -> dict[str, Any]:
        options = {"region": place.name, "folder": str(self.runs)}
        return {
            "name": MODEL,
            "route_prefix": f"/{MODEL}",
            "import_path": MODEL_BUILDER,
            "args": {
                "model": MODEL,
                "version": version,
                "pool": {"name": "default", "handicap_ms": place.handicap_ms},
                "threads": 1,
                "engine": {
                    "kind": "custom",
                    "import_path": "tests.chaos.stub:Stub",
                    "options": options,
                },
            },
            "deployments": [
                {
                    "name": "replica",
                    "num_replicas": place.replicas,
                    "ray_actor_options": {"num_cpus": 0.2},
                }
            ],
        }

    def _write_region(self, place: Place) -> None:
        file = {
            "region": place.name,
            "jurisdiction": place.jurisdiction,
            "city": place.city,
            "location": {"latitude": place.latitude, "longitude": place.longitude},
            "gateway_url": f"http://127.0.0.1:{self._wires.ports[place.name]}",
        }
        (self.folder / f"{place.name}.region.yaml").write_text(json.dumps(file))

    def _gateway(self, name: str, home: Place | None) -> GatewayProcess:
        file: dict[str, Any] = {
            "gateway": name,
            "regions": [f"{place.name}.region.yaml" for place in self.places],
            "listen": {"port": self._port_of[name]},
            "store": self._database,
            "passport_keys": str(self._passports),
        }
        if home is None:
            place = self.places[0]
            file["jurisdiction"], file["city"] = place.jurisdiction, "Frankfurt am Main"
            file["location"] = {"latitude": 50.11, "longitude": 8.68}
        else:
            serve = f"http://127.0.0.1:{self._port_of[f'{name} serve']}"
            file["home"] = {"region": name, "serve": serve}
        path = self.folder / f"{name}.gateway.yaml"
        path.write_text(json.dumps(file))
        state, log = self.folder / "gateways" / name, self.folder / "logs" / f"{name}.log"
        return GatewayProcess(name, path, state, log, f"chaos-{os.getpid()}-{name}")

    def _start_gateways(self, gateways: Collection[GatewayProcess]) -> None:
        environ = {**os.environ, "NEARFIELD_HOME": str(self.folder)}
        started = [(gateway, gateway.start(environ)) for gateway in gateways]
        for gateway, process in started:
            gateway.wait_ready(process)

    # ---- while it runs ----------------------------------------------------------------------

    @property
    def doors(self) -> list[str]:
        return [f"http://127.0.0.1:{self._port_of[name]}" for name in EDGES]

    @property
    def jurisdictions(self) -> dict[str, str]:
        return {place.name: place.jurisdiction for place in self.places}

    def executions(self) -> list[Execution]:
        return executions(self.runs)

    def wire_port(self, region: str) -> int:
        """Where the edges meet a region."""
        return self._wires.ports[region]

    def wire(self, region: str, *, delay_s: float = 0.0, hold: Hold = "none") -> None:
        """Make a region so much farther than it is, or cut it off."""
        rtt_s = next(place.rtt_s for place in self.places if place.name == region)
        self._wires.order(region, rtt_s / 2 + delay_s, hold)

    def status(self, gateway: str) -> dict[str, Any]:
        """What a gateway believes."""
        headers = {"authorization": f"Bearer {self.keys[OPERATOR]}"}
        url = f"http://127.0.0.1:{self._port_of[gateway]}{STATUS_PATH}"
        status: dict[str, Any] = self._client.get(url, headers=headers).json()
        return status

    def upgrade(self, region: str, version: str) -> None:
        """Deploy another version of the model; returns once it runs."""
        self._deploy(self.clusters[region], version)

    def billed(self, since_s: float) -> int:
        """Good answers that somebody was charged for; since: Unix time."""
        totals = self.store.ledger.totals(["outcome"], since_s=since_s)
        return sum(total.requests for total in totals if total.group == ("ok",))

    # ---- between experiments ----------------------------------------------------------------

    def recover(self) -> None:
        """Make everything as it was at the beginning, whatever has happened."""
        for cluster in list(self.clusters.values()):
            self.wire(cluster.name)
            orders_file(self.runs, cluster.name).unlink(missing_ok=True)
            if not cluster.pids():
                self._start_again(cluster)
        # Gateways remember who was ill, and trust it again little by little; new ones do not.
        stale = [cluster.gateway for cluster in self.clusters.values() if self._doubts(cluster)]
        stale += self.edges.values()
        for gateway in stale:
            gateway.end(drain_timeout_s=0)
        self._start_gateways(stale)
        self.settle()

    def _start_again(self, cluster: Cluster) -> None:
        cluster.gateway.end(drain_timeout_s=0)
        regions.end(cluster.region, drain_timeout_s=0)
        fresh = self._start_cluster(cluster.place)
        self._deploy(fresh)
        self._start_gateways([fresh.gateway])

    def settle(self) -> None:
        """Wait until everybody believes that everything is well."""
        until(lambda: not self.unwell(), SETTLE_S, self.unwell, every_s=POLL_S)

    def unwell(self) -> list[str]:
        """What is not as it should be, as the gateways see it."""
        found = []
        for cluster in self.clusters.values():
            endpoints = self._endpoints(cluster.name, cluster.name)
            replicas = [each for endpoint in endpoints for each in endpoint["each"]]
            well = [r for r in replicas if r["health"] == "up" and not r["leaving"]]
            if len(well) != cluster.place.replicas or len(replicas) != len(well):
                found.append(f"{cluster.name} has {len(well)} of {len(replicas)} replicas")
        for edge in self.edges:
            for cluster in self.clusters.values():
                endpoints = self._endpoints(edge, cluster.name)
                states = [(e["health"], e["weight"], e["replicas"]) for e in endpoints]
                if states != [("up", 1.0, cluster.place.replicas)]:
                    found.append(f"{edge} believes {cluster.name}: {states}")
        return found

    def _doubts(self, cluster: Cluster) -> bool:
        """Whether a region's gateway does not trust all of its replicas fully."""
        endpoints = self._endpoints(cluster.name, cluster.name)
        each = [replica for endpoint in endpoints for replica in endpoint["each"]]
        return not each or any(r["health"] != "up" or r["weight"] < 1.0 for r in each)

    def _endpoints(self, gateway: str, region: str) -> list[dict[str, Any]]:
        try:
            status = self.status(gateway)
        except (httpx.TransportError, ValueError):
            return []
        found = next(each for each in status["regions"] if each["name"] == region)
        endpoints: list[dict[str, Any]] = found["endpoints"] if found["health"] == "up" else []
        return endpoints

    def _end(self) -> None:
        for gateway in (*self.edges.values(), *(c.gateway for c in self.clusters.values())):
            gateway.end(drain_timeout_s=0)
        for cluster in self.clusters.values():
            regions.end(cluster.region, drain_timeout_s=0)
            cluster.region.api.close()
        if hasattr(self, "_wires"):
            self._wires.close()
        if hasattr(self, "store"):
            self.store.close()
        self._ports.close()
        self._client.close()


class Wires:
    """The process of `wire`. `ports`: where it listens for each region."""

    def __init__(self, targets: Mapping[str, int]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.wire", *(f"{n}={p}" for n, p in targets.items())],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.ports: dict[str, int] = json.loads(self._answer())

    def order(self, wire: str, delay_s: float, hold: Hold) -> None:
        assert self._process.stdin is not None
        order = {"wire": wire, "delay_s": delay_s, "hold": hold}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
