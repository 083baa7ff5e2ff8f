"""What Ray's head (its GCS) says of the cluster, and keeps for us: the one place that asks it.

Everything here blocks for about a millisecond, and longer while the head is away: call it from a
thread. What the head calls a node is a machine to us.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import ray
from nearfield.api.scaling import NAMESPACE
from ray._raylet import (  # type: ignore[attr-defined]
    GcsClient,
    GcsClientOptions,
    GlobalStateAccessor,
)
from ray.core.generated import autoscaler_pb2, gcs_pb2
from ray.exceptions import RayError
from ray.serve._private.common import ReplicaID

TIMEOUT_S = 2.0
_V1_STATUS = b"__autoscaling_status"
"""Where Ray's first autoscaler leaves word of itself."""


@contextmanager
def asking() -> Iterator[None]:
    """Turns Ray's errors into one.

    Raises:
        RuntimeError: the head does not answer.
    """
    try:
        yield
    except (RayError, TimeoutError) as error:
        raise RuntimeError(f"the head does not answer: {error}") from None


class Waiting(NamedTuple):
    """Replicas that have been asked for, by application.

    Attributes:
        starting: their processes are not up yet. unplaced: those of them that no machine has room
            for now. up: processes that are up, serving or not.
        elastic: a node autoscaler is at work, which may bring machines.
        failed_s: when launches of machines failed last, Unix time, by node type.
    """

    starting: Counter[str]
    unplaced: Counter[str]
    up: Counter[str]
    elastic: bool
    failed_s: dict[str, float]


class Cluster:
    """The cluster with its head at `address` (`host:port`)."""

    def __init__(self, address: str) -> None:
        """
        Raises:
            RuntimeError: the head does not answer.
        """
        self._address = address
        with asking():
            self._gcs = GcsClient(address=address)
        self._accessor: Any = None

    @classmethod
    def own(cls) -> Cluster:
        """The one that this process belongs to.

        Raises:
            RuntimeError: the head does not answer.
        """
        return cls(ray.get_runtime_context().gcs_address)

    @asking()
    def leaving(self) -> dict[str, float]:
        """Nodes that are drained, by id, and when they will be gone: Unix time, or infinite.

        Raises:
            RuntimeError: the head does not answer.
        """
        due_ms: dict[str, int] = self._gcs.get_draining_nodes(timeout=TIMEOUT_S)
        return {node: ms / 1000 if ms else math.inf for node, ms in due_ms.items()}

    @asking()
    def drain(self, node_id: str, due_s: float, message: str) -> None:
        """Have a node drained, since its machine will be taken away then (Unix time).

        Raises:
            RuntimeError: the head does not answer, or refuses.
        """
        reason = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION  # type: ignore[attr-defined]
        accepted, why = self._gcs.drain_node(
            node_id, reason, message, int(due_s * 1000), timeout=TIMEOUT_S
        )
        if not accepted:
            raise RuntimeError(f"Ray does not drain the node {node_id}: {why}")

    @asking()
    def nodes_at(self, ip: str) -> list[str]:
        """Ids of the nodes that are alive at this address.

        Raises:
            RuntimeError: the head does not answer.
        """
        nodes = self._gcs.get_all_node_info(timeout=TIMEOUT_S)
        alive = gcs_pb2.GcsNodeInfo.ALIVE  # type: ignore[attr-defined]
        return sorted(
            node_id.hex()
            for node_id, node in nodes.items()
            if node.state == alive and node.node_manager_address == ip
        )

    @asking()
    def waiting(self) -> Waiting:
        """Which replicas wait for what.

        Raises:
            RuntimeError: the head does not answer.
        """
        status = autoscaler_pb2.GetClusterStatusReply.FromString(  # type: ignore[attr-defined]
            self._gcs.get_cluster_status(timeout_s=TIMEOUT_S)
        )
        demanded = Counter[_Shape]()
        for pending in status.cluster_resource_state.pending_resource_requests:
            demanded[_demanded(pending.request)] += pending.count
        starting, unplaced = Counter[str](), Counter[str]()
        for application, actor in self._replicas("PENDING_CREATION"):
            starting[application] += 1
            shape = _asked(actor, demanded)
            if shape is not None:
                demanded[shape] -= 1
                unplaced[application] += 1
        failed_s: dict[str, float] = {}
        for launch in status.autoscaling_state.failed_instance_requests:
            name = launch.ray_node_type_name
            failed_s[name] = max(failed_s.get(name, -math.inf), float(launch.failed_ts))
        return Waiting(
            starting,
            unplaced,
            Counter(application for application, _ in self._replicas("ALIVE")),
            elastic=status.autoscaling_state.autoscaler_state_version > 0
            or bool(self._gcs.internal_kv_get(_V1_STATUS, None, timeout=TIMEOUT_S)),
            failed_s=failed_s,
        )

    def _replicas(self, state: str) -> list[tuple[str, Any]]:
        """Application and actor of each of Serve's replicas in this state of an actor."""
        if self._accessor is None:
            options = GcsClientOptions.create(
                self._address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False
            )
            accessor = GlobalStateAccessor(options)
            if not accessor.connect():
                raise RuntimeError("the head does not answer")
            self._accessor = accessor
        found = []
        for packed in self._accessor.get_actor_table(None, state):
            actor = gcs_pb2.ActorTableData.FromString(packed)  # type: ignore[attr-defined]
            if ReplicaID.is_full_id_str(actor.name):
                found.append((ReplicaID.from_full_id_str(actor.name).deployment_id.app_name, actor))
        return found

    @asking()
    def keep(self, key: str, value: bytes) -> None:
        """Keep this under the key, for as long as the head's store lives.

        Raises:
            RuntimeError: the head does not answer.
        """
        self._gcs.internal_kv_put(key.encode(), value, True, NAMESPACE, timeout=TIMEOUT_S)

    @asking()
    def kept(self, key: str) -> bytes | None:
        """What is kept under the key.

        Raises:
            RuntimeError: the head does not answer.
        """
        found: bytes | None = self._gcs.internal_kv_get(key.encode(), NAMESPACE, timeout=TIMEOUT_S)
        return found


_Shape = tuple[frozenset[tuple[str, float]], frozenset[tuple[str, str]]]
"""What is asked of a machine: resources, and its labels with the values that will do."""


def _demanded(request: Any) -> _Shape:
    selectors = list(request.label_selectors)[:1]  # behind the first are only its alternatives
    labels = {
        (constraint.label_key, ",".join(sorted(constraint.label_values)))
        for selector in selectors
        for constraint in selector.label_constraints
    }
    return frozenset(request.resources_bundle.items()), frozenset(labels)


def _asked(actor: Any, demanded: Counter[_Shape]) -> _Shape | None:
    """The demand that is this actor's; None: it has been given a machine."""
    resources = frozenset(actor.required_resources.items())
    selector = dict(actor.label_selector)
    for shape, count in demanded.items():
        wanted, labels = shape
        same = wanted == resources and len(labels) == len(selector)
        if count and same and all(_names(selector.get(key, ""), values) for key, values in labels):
            return shape
    return None


def _names(condition: str, values: str) -> bool:
    """Whether the condition on a label (`l4`, `in(l4,a10)`, `!h100`) has these values."""
    return all(value in condition for value in values.split(","))
