"""What a local region with a node autoscaler starts Ray with: nodes come and go on one machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

PROVIDER = "nearfield.control.fake_nodes.FakeNodes"
HEAD_ID = "f" * 51 + "00000"
"""Ray's fake provider knows its head by this id."""
UNAVAILABLE = "unavailable"
"""In the region's directory: node types that the pretended cloud has none of, one a line."""
LAUNCHER: Mapping[str, Any] = {
    "cluster_synced_files": [],
    "docker": {},
    "file_mounts": {},
    "head_setup_commands": [],
    "head_start_ray_commands": [],
    "initialization_commands": [],
    "setup_commands": [],
    "worker_setup_commands": [],
    "worker_start_ray_commands": [],
}
"""Keys that Ray's launcher wants, and that a provider which is not its own gets no defaults of."""


def is_local(cluster: Mapping[str, Any]) -> bool:
    """Whether the file's nodes are processes of this machine."""
    provider = cluster.get("provider")
    return isinstance(provider, dict) and provider.get("module") == PROVIDER


def head_cpus(cluster: Mapping[str, Any]) -> int:
    """What models may ask for of the head."""
    head = cluster["available_node_types"][cluster["head_node_type"]]
    return int(head["resources"].get("CPU", 1))


def autoscaling_config(
    cluster: Mapping[str, Any], *, gcs_port: int, unavailable_file: Path
) -> dict[str, Any]:
    """The cluster file as Ray's autoscaler reads it, for a head on this machine."""
    provider = {
        **cluster["provider"],
        "gcs_port": gcs_port,
        "head_node_id": HEAD_ID,
        "head_node_type": cluster["head_node_type"],
        "launch_multiple": True,
        "disable_node_updaters": True,  # a raylet is up when it was started: nothing to install
        "unavailable_file": str(unavailable_file),
    }
    return {**LAUNCHER, **cluster, "provider": provider}


def write_autoscaling_config(path: Path, cluster: Mapping[str, Any], **where: Any) -> None:
    """`autoscaling_config`, into a file."""
    path.write_text(yaml.safe_dump(autoscaling_config(cluster, **where)))


def environment() -> dict[str, str]:
    """Ray's autoscaler v2: v1 does not see labels, and was not seen to stop idle fake nodes."""
    return {
        "RAY_enable_autoscaler_v2": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
