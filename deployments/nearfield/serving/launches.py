"""Launches of nodes that failed, as Ray's node autoscaler tells.

A replica whose node cannot be had waits, and looks like any replica that starts. The autoscaler
knows at once what the policy would else only find out from its being overdue.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping

log = logging.getLogger("ray.serve.nearfield.launches")

READ_S = 2.0
"""Reading is a call to Ray's GCS from Serve's controller: not more often than this."""
TIMEOUT_S = 1
RECENT_S = 30.0
"""The autoscaler tries again every few seconds: no failure for so long, and it is getting the node."""


class Launches:
    """When launches failed last, by node type. `read` is called no more often than `READ_S`."""

    def __init__(self, read: Callable[[], Mapping[str, float]] | None = None) -> None:
        self._read = read or _failed
        self._failed_s: Mapping[str, float] = {}
        self._read_s = -math.inf

    def refused(self, node_types: Collection[str], now_s: float) -> bool:
        """Whether a launch of one of these node types failed just now, and none came after.

        Args:
            now_s: wall-clock time.
        """
        if not node_types:
            return False
        if not 0.0 <= now_s - self._read_s < READ_S:
            self._failed_s, self._read_s = self._read(), now_s
        last_s = max(self._failed_s.get(name, -math.inf) for name in node_types)
        return now_s - last_s <= RECENT_S


def _failed() -> dict[str, float]:
    """When launches failed last, by node type. Empty: none did, or nobody could say."""
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status

    try:
        status = get_cluster_status(ray.get_runtime_context().gcs_address, timeout=TIMEOUT_S)
    except (ray.exceptions.RayError, RuntimeError) as error:
        log.warning("the node autoscaler does not say which launches failed: %s", error)
        return {}
    failed: dict[str, float] = {}
    for launch in status.failed_launches:
        name = launch.ray_node_type_name
        failed[name] = max(failed.get(name, -math.inf), float(launch.failed_ts_s or 0))
    return failed
