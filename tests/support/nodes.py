"""A local region of several Ray nodes, with accelerators and labels that the machine does not have.

    with cluster(folder) as region:                       # a head that has no CPUs for models
        spot = region.add("h100", {"GPU": 1}, {"ray.io/market-type": "spot"})
        spot.drain(in_s=30)                                # the cloud has sent its notice
        spot.kill()                                        # and takes the machine

Each node is a raylet of its own. They start one after another: on few cores one of two that start
at once may die. Only processes with the region's own mark are ever ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from nearfield.cli import processes, ray_head
from nearfield.cli import region as regions
from nearfield.cli.ports import Reservations

from tests.support.processes import write_files

START_S = 120.0
GPU_KEYS = ("CPU", "GPU")


@dataclass
class Node:
    """A worker node. `id` is Ray's, `pids` those of its processes."""

    name: str
    id: str
    mark: str
    region: regions.Region

    @property
    def pids(self) -> list[int]:
        mark = f"{_MARK}={self.mark}".encode()
        return [p.pid for p in processes.of_region(self.region.state.region_id) if _has(p, mark)]

    def drain(self, in_s: float) -> float:
        """Have Ray drain it, as a notice does. Returns when it is due, Unix time."""
        due_s = time.time() + in_s
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "drain-node"),
            *("--address", self.region.gcs_address, "--node-id", self.id),
            *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test"),
            *("--deadline-remaining-seconds", str(int(in_s))),
        ]
        subprocess.run(command, env=environment(self.region), check=True, capture_output=True)
        return due_s

    def kill(self) -> None:
        """All its processes at once, as when a machine is switched off."""
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)


_MARK = "NEARFIELD_TEST_NODE"


class Nodes:
    """A region that nodes can be added to."""

    def __init__(self, region: regions.Region) -> None:
        self.region = region
        self._ports = Reservations()

    def add(
        self,
        name: str,
        resources: Mapping[str, float],
        labels: Mapping[str, str],
        **environ: str,
    ) -> Node:
        """Start a node with these resources (`CPU`, `GPU`, `TPU`, ...), labels and variables."""
        first = self._ports.block(8)
        node = Node(name, secrets.token_hex(28), f"{name}-{secrets.token_hex(4)}", self.region)
        others = {key: value for key, value in resources.items() if key not in GPU_KEYS}
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start"),
            f"--address={self.region.gcs_address}",
            f"--num-cpus={int(resources.get('CPU', 0))}",
            f"--num-gpus={int(resources.get('GPU', 0))}",
            f"--resources={json.dumps(others)}",
            f"--object-store-memory={80 * 2**20}",
            f"--dashboard-agent-listen-port={first}",
            f"--dashboard-agent-grpc-port={first + 1}",
            f"--runtime-env-agent-port={first + 2}",
            f"--metrics-export-port={first + 3}",
            "--include-log-monitor=false",
            "--disable-usage-stats",
        ]
        variables = {
            **environment(self.region),
            **environ,
            _MARK: node.mark,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": node.id,
            "RAY_OVERRIDE_LABELS": json.dumps(dict(labels)),
        }
        started = subprocess.run(
            command,
            env=variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=START_S,
            start_new_session=True,
        )
        assert started.returncode == 0, started.stdout + started.stderr
        return node

    def close(self) -> None:
        self._ports.close()


def environment(region: regions.Region) -> dict[str, str]:
    """What the region's head was started with."""
    state = region.state
    return ray_head.environment(
        {**os.environ, **state.environ},
        region_id=state.region_id,
        token_file=region.token_file,
        runtime_dir=Path(state.runtime_dir),
        ports=state.ports,
        ingress=state.ingress,
    )


@contextlib.contextmanager
def cluster(root: Path, environ: Mapping[str, str]) -> Iterator[Nodes]:
    """A region whose head runs Serve and has no CPU for models."""
    options = regions.RegionOptions(num_cpus=1, environ=environ)
    running = regions.start(root, options, print)
    nodes = Nodes(running)
    try:
        yield nodes
    finally:
        running.api.close()
        nodes.close()
        regions.end(running, drain_timeout_s=0)


def _has(process: processes.Process, mark: bytes) -> bool:
    with contextlib.suppress(OSError):
        return mark in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
    return False


def write_gateway(folder: Path, region: regions.Region) -> Path:
    """A gateway's file for this region, and its region's."""
    return write_files(folder, serve_port=region.state.port)
