"""Nodes of a local region that are processes of this machine and say what they are.

`nearfield.control.fake_nodes` is what Ray's node autoscaler starts them with; here a test does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
from nearfield.cli import ray_head
from nearfield.cli.region import Region
from ray._private.services import get_node_ip_address


class Nodes:
    """A region and its nodes, but for the head."""

    def __init__(self, region: Region) -> None:
        self.region = region
        self._state = httpx.Client(
            base_url=region.dashboard_url,
            headers={"Authorization": f"Bearer {region.token_file.read_text().strip()}"},
            trust_env=False,
        )

    def close(self) -> None:
        self._state.close()
        self.region.api.close()

    def alive(self) -> list[dict[str, str]]:
        """The labels of each that is alive; its id is under `id`."""
        found = self._state.get("/api/v0/nodes").json()["data"]["result"]["result"]
        return [
            {**node["labels"], "id": node["node_id"]}
            for node in found
            if node["state"] == "ALIVE" and not node["is_head_node"]
        ]

    def types(self) -> list[str]:
        """Their node types."""
        return sorted(labels["ray.io/node-group"] for labels in self.alive())

    def replicas(self, app: str) -> list[str]:
        """The nodes that the application's running replicas are on."""
        told = self.region.api.details()["applications"].get(app, {}).get("deployments", {})
        replicas = told.get("replica", {}).get("replicas", [])
        return [each["node_id"] for each in replicas if each["state"] == "RUNNING"]

    def start(self, resources: dict[str, float], **environ: str) -> None:
        """One more, with these in its environment."""
        state = self.region.state
        environment = ray_head.environment(
            {**os.environ, **environ},
            region_id=state.region_id,
            token_file=self.region.token_file,
            runtime_dir=Path(state.runtime_dir),
            ports=state.ports,
            ingress=state.ingress,
        )
        subprocess.run(
            [
                *(sys.executable, "-m", "ray.scripts.scripts", "start"),
                f"--address={get_node_ip_address()}:{state.ports.gcs}",
                "--num-cpus=4",
                f"--resources={json.dumps(resources)}",
                f"--object-store-memory={80 * 2**20}",
                "--include-log-monitor=false",
                "--disable-usage-stats",
            ],
            env=environment,
            check=True,
            capture_output=True,
            start_new_session=True,
        )
