"""Nodes that are processes of this machine: a node provider for Ray's node autoscaler.

    provider: {type: external, module: nearfield.control.fake_nodes.FakeNodes}

Each node is a raylet with the resources and labels that its node type states, whatever the machine
has. `nearfield up --cluster` starts it (cluster_configs/clusters/local-fake.yaml), and what Ray
does with real clouds can be watched on a laptop: node types come for replicas that wait, and go
when idle.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray._common.network_utils import build_address  # type: ignore[attr-defined]
from ray._private.services import get_node_ip_address
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider
from ray.autoscaler.tags import TAG_RAY_USER_NODE_TYPE


class OutOfCapacity(Exception):
    """The cloud has none of these machines now."""


class FakeNodes(FakeMultiNodeProvider):
    """Ray's fake multi-node provider, and a cloud that can run out of a node type.

    `unavailable_file` in the provider's section names a file with node types, one a line; their
    launches fail for as long as they stand in it.
    """

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        ip = get_node_ip_address()  # type: ignore[no-untyped-call]
        here = build_address(ip, provider_config["gcs_port"])
        super().__init__({**provider_config, "gcs_address": here}, cluster_name)
        head = self._nodes[provider_config["head_node_id"]]
        head["tags"][TAG_RAY_USER_NODE_TYPE] = provider_config["head_node_type"]
        self._unavailable = Path(provider_config["unavailable_file"])

    def create_node_with_resources_and_labels(
        self,
        node_config: dict[str, Any],
        tags: dict[str, str],
        count: int,
        resources: dict[str, float],
        labels: dict[str, str],
    ) -> None:
        """Start `count` raylets.

        Raises:
            OutOfCapacity: the node type is said to be unavailable.
        """
        node_type = tags[TAG_RAY_USER_NODE_TYPE]
        if node_type in self._read_unavailable():
            raise OutOfCapacity(f"no {node_type} can be had: {self._unavailable} says so")
        labels = {**labels, "ray.io/node-group": node_type}  # as every real node has it
        super().create_node_with_resources_and_labels(node_config, tags, count, resources, labels)  # type: ignore[no-untyped-call]

    def _read_unavailable(self) -> list[str]:
        return self._unavailable.read_text().split() if self._unavailable.exists() else []
