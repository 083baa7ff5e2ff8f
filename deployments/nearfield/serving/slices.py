"""A whole TPU slice for one replica, or none of it.

The replica runs at the slice's first host: `ray_actor_options.resources` asks for what each slice
has once, `TPU-v5litepod-16-head: 1`, so that no second replica gets in. From there it reserves
every chip of every host of this slice by name, through Ray's own TPU support (`ray.util.tpu`).
"""

from __future__ import annotations

import logging
import time
from typing import Any

import ray
from nearfield.core.cluster import SLICE, WORKER
from nearfield.core.errors import Unavailable
from nearfield.core.spec import TpuSlice
from nearfield.serving.cluster import Cluster
from nearfield.serving.engines.base import Slice
from ray.util.tpu import get_tpu_nodes_for_slice, slice_placement_group

log = logging.getLogger("nearfield.replica")

_LOOK_S = 1.0


class Reservation:
    """The slice, and what holds it for as long as the replica lives."""

    def __init__(self, wanted: TpuSlice) -> None:
        """Reserve the slice that this process runs on. Waits up to `wanted.wait_s`.

        Raises:
            Unavailable: it has not got all its hosts, or somebody has some of their chips.
        """
        deadline_s = time.monotonic() + wanted.wait_s
        here = ray.get_runtime_context().get_node_id()
        name = _slice_at(here, wanted)
        try:
            hosts = _hosts(name, wanted, deadline_s)
        except Unavailable as error:
            _leave(here, str(error))
            raise
        chips = wanted.chips // len(hosts)
        self._placed = slice_placement_group(
            wanted.topology,
            wanted.accelerator_type,
            chips_per_vm=chips,
            strategy="STRICT_SPREAD",
            bundle_label_selector=[{SLICE: name, WORKER: str(n)} for n in range(len(hosts))],
        )
        group = self._placed.placement_group
        assert group is not None
        try:
            ray.get(group.ready(), timeout=max(_LOOK_S, deadline_s - time.monotonic()))
        except ray.exceptions.GetTimeoutError:
            self._placed.shutdown()
            raise Unavailable(
                f"Chips of the TPU slice {name} are in use by others: models that need one host "
                "must select ray.io/tpu-topology, so that they do not take a slice's.",
                code="slice_in_use",
            ) from None
        self.slice = Slice(name, tuple(hosts), chips, group.id.hex())


def _slice_at(here: str, wanted: TpuSlice) -> str:
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    name = next(node["Labels"].get(SLICE) for node in nodes if node["NodeID"] == here)
    if not name:
        raise Unavailable(
            f"This replica is not on a TPU slice: ray_actor_options.resources must ask for "
            f"{wanted.head_resource}: 1.",
            code="slice_missing",
        )
    return str(name)


def _leave(here: str, why: str) -> None:
    """Have Ray drain this host, or the next replica would be sent here too. Ray ends on it, and
    whoever keeps the hosts starts it anew: the slice is whole then, or has gone."""
    try:
        Cluster.own().drain(here, time.time(), why)
    except RuntimeError as error:
        log.warning("the host of a broken TPU slice is not drained: %s", error)


def _hosts(name: str, wanted: TpuSlice, deadline_s: float) -> list[str]:
    """Addresses of all hosts, the first first. They come up one after another."""
    while True:
        found = {int(n["Labels"][WORKER]): n for n in get_tpu_nodes_for_slice(name)}
        chips = sum(node["Resources"].get("TPU", 0) for node in found.values())
        if chips >= wanted.chips and sorted(found) == list(range(len(found))):
            return [_address(found[worker]) for worker in sorted(found)]
        if time.monotonic() > deadline_s:
            there = ", ".join(str(worker) for worker in sorted(found)) or "none"
            raise Unavailable(
                f"The TPU slice {name} is not whole after {wanted.wait_s:g} s: {chips:g} of "
                f"{wanted.chips} chips, at its hosts {there}. It is not used, and Ray is drained "
                "from this host.",
                code="slice_not_whole",
            )
        time.sleep(_LOOK_S)


def _address(node: dict[str, Any]) -> str:
    return str(node["NodeManagerAddress"])
