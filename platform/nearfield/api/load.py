"""What a region tells its gateway: where its replicas are, and how much each has to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter

LOAD_PATH = "/-/nearfield/load"
"""Of a replica, below its application's route prefix."""
AGENT_PREFIX = "/-/nearfield"
TARGETS_PATH = f"{AGENT_PREFIX}/targets"
"""Of a region: its agent answers."""


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """One replica at one moment.

    Attributes:
        running: requests inside the engine. waiting: those behind them.
        room: how many more it would accept before it refuses.
        queue_age_s: how long the oldest waiting request waits.
        kv_usage: share of the KV cache in use, 0..1; 0 where there is none.
        tokens: computed since the replica started; two readings give its speed.
        crashes: of its engine, since the replica started.
    """

    model: str
    version: str
    running: int
    waiting: int
    room: int
    queue_age_s: float
    kv_usage: float
    tokens: int
    crashes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Target:
    """Where a replica answers by itself."""

    replica_id: str
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Application:
    """An application of the region's Serve: one model in one pool.

    Attributes:
        spec: the model's spec as it was deployed (the application's `args`).
        targets: its running replicas; none while it is at zero.
    """

    name: str
    route_prefix: str
    status: str
    spec: Mapping[str, Any]
    targets: tuple[Target, ...]


@dataclass(frozen=True, slots=True)
class Targets:
    """All applications of a region.

    Attributes:
        age_s: how long ago the region's controller said so; grows while it is gone.
    """

    applications: tuple[Application, ...]
    age_s: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


_LOAD: TypeAdapter[ReplicaLoad] = TypeAdapter(ReplicaLoad)
_TARGETS: TypeAdapter[Targets] = TypeAdapter(Targets)


def parse_load(body: bytes) -> ReplicaLoad:
    """A replica's answer to `LOAD_PATH`.

    Raises:
        ValueError: it is not one.
    """
    return _LOAD.validate_json(body)


def parse_targets(body: bytes) -> Targets:
    """An agent's answer to `TARGETS_PATH`.

    Raises:
        ValueError: it is not one.
    """
    return _TARGETS.validate_json(body)
