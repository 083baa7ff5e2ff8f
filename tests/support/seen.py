"""What Ray and Serve say of a local region's nodes, and of what runs on them."""

from __future__ import annotations

import httpx
from nearfield.cli.region import Region


class Seen:
    """A region's nodes, but for the head."""

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

    def waiting(self, app: str) -> bool:
        """Whether a replica finds no node."""
        told = self.region.api.details()["applications"][app]["deployments"]["replica"]
        return any(each["state"] == "STARTING" for each in told["replicas"]) and (
            "waiting" in told["message"] or "scheduled" in told["message"]
        )

    def reserved(self) -> list[list[str]]:
        """The nodes of each placement group that is there, by bundle."""
        found = self._state.get("/api/v0/placement_groups?detail=1").json()
        return [
            [bundle["node_id"] for bundle in group["bundles"]]
            for group in found["data"]["result"]["result"]
            if group["state"] == "CREATED"
        ]
