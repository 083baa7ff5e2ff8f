"""What a region tells of its scaling: the last decision for each model, and why.

    GET /-/nearfield/scaling     a region's agent

The controller that decides keeps it in the cluster's head, one JSON document a model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nearfield.api.load import AGENT_PREFIX
from pydantic import TypeAdapter

SCALING_PATH = f"{AGENT_PREFIX}/scaling"
"""Of a region: its agent answers."""
NAMESPACE = b"nearfield"
"""Of everything that is kept in the head's key-value store."""
KEY = "scaling/told/"
"""Where a model's document is kept, before its name."""


@dataclass(frozen=True, slots=True)
class PoolScaling:
    """One pool's target.

    Attributes:
        application, pool: whose. replicas: that it should have, since `since_s` (Unix time).
        reason: why, in words and numbers, at the last decision.
        leaving: replicas besides that have a notice.
    """

    application: str
    pool: str
    replicas: int
    since_s: float
    reason: str
    leaving: int = 0


@dataclass(frozen=True, slots=True)
class Change:
    """A target that became another one.

    Attributes:
        at_s: when, Unix time. before: None: it is the first that is known.
    """

    at_s: float
    application: str
    before: int | None
    after: int
    reason: str


@dataclass(frozen=True, slots=True)
class ModelScaling:
    """The last decision for all pools of a model.

    Attributes:
        decided_s: when, Unix time: about once a second, whether anything changes or not.
        terms: the numbers behind it. changes: of targets, the newest first.
    """

    model: str
    decided_s: float
    reason: str
    terms: Mapping[str, float]
    pools: tuple[PoolScaling, ...]
    changes: tuple[Change, ...] = ()

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), allow_nan=False).encode()

    def shown(self) -> dict[str, Any]:
        return asdict(self)


_MODEL: TypeAdapter[ModelScaling] = TypeAdapter(ModelScaling)
_MODELS: TypeAdapter[tuple[ModelScaling, ...]] = TypeAdapter(tuple[ModelScaling, ...])


def parse_model(body: bytes) -> ModelScaling:
    """What `ModelScaling.to_json` made.

    Raises:
        ValueError: it did not.
    """
    return _MODEL.validate_json(body)


def parse_scaling(body: bytes) -> tuple[ModelScaling, ...]:
    """An agent's answer to `SCALING_PATH`.

    Raises:
        ValueError: it is not one.
    """
    return _MODELS.validate_json(body)
