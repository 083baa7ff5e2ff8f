"""What a region tells gateways: where its replicas are, and how much each part of it has to do.

    GET /-/nearfield/targets          a region's agent: its applications and their replicas
    GET {prefix}/-/nearfield/load     a replica: what it has to do, what it has done
    GET /-/nearfield/region           a region's gateway: its endpoints, for other gateways

What a replica has done is told in totals that only grow: any two readings give the means between
them, whoever else reads as well. A replica that starts anew starts at zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from nearfield.api.passport import LIFETIME_MS, Passport
from nearfield.core.spec import ModelSpec, Name
from pydantic import Field, TypeAdapter

LOAD_PATH = "/-/nearfield/load"
"""Of a replica, below its application's route prefix."""
AGENT_PREFIX = "/-/nearfield"
TARGETS_PATH = f"{AGENT_PREFIX}/targets"
"""Of a region: its agent answers."""
REGION_PATH = f"{AGENT_PREFIX}/region"
"""Of a region: its gateway answers, to other gateways."""

Kind = Literal["generate", "embed", "tensor", "other"]
"""Of a model's work: what a tiny request for it looks like, and what may be hedged."""

_Count = Annotated[int, Field(ge=0, le=2**53)]
_Words = Annotated[str, Field(max_length=2000)]
_Amount = Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]


GATEWAY_ID = "gateway"
"""In place of a key's id, and with no tenant: a gateway that asks for itself."""


def gateways_passport(request_id: str, *, now_ms: int, timeout_ms: int) -> Passport:
    """What a gateway signs for its own questions: no tenant's, and nobody is billed.

    Args:
        now_ms: Unix time.
    """
    return Passport(
        tenant="",
        product=None,
        key_id=GATEWAY_ID,
        models=None,
        jurisdictions=None,
        request_id=request_id,
        criticality="critical",
        issued_ms=now_ms,
        expires_ms=now_ms + LIFETIME_MS,
        deadline_ms=now_ms + timeout_ms,
    )


def is_gateways(passport: Passport) -> bool:
    """Whether it is one that a gateway signed for itself. No tenant's has an empty name."""
    return passport.tenant == "" and passport.key_id == GATEWAY_ID


def kind_of(spec: ModelSpec) -> Kind:
    """What the model does, as far as its spec tells."""
    engine = spec.engine
    if engine.kind == "remote":
        return engine.task
    if engine.kind in ("generate", "vllm"):
        return "generate"
    if engine.kind in ("embed", "tensor"):
        return engine.kind
    return "other"


def slots_of(spec: ModelSpec) -> int:
    """Requests that one replica computes at once: its engine's batch, if it lets in as many."""
    engine = spec.engine
    if engine.kind in ("generate", "embed", "tensor"):
        return min(spec.limits.max_running, engine.max_batch)
    return spec.limits.max_running


# ---- a replica ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """One replica at one moment.

    Attributes:
        running: requests inside the engine. waiting: those behind them.
        room: how many more it would accept before it refuses.
        queue_age_s: how long the oldest waiting request waits.
        kv_usage: share of the KV cache in use, 0..1; 0 where there is none.
        tokens: computed by its engine since that started.
        crashes: of its engine, since the replica started.
        slots: requests it computes at once.
        kv_total: tokens that the KV cache holds; 0 where there is none.
        answered: requests answered since the replica started. These are totals as well:
        answered_tokens: of those requests, of prompts (without what the cache held) and answers;
            one for a request that has no tokens. prompt_tokens, cached_tokens: of their prompts.
        first_byte_s: from a request's turn to its first token, or to its result.
        request_s: time that requests spent inside the engine. busy_s: time with any inside.
        leaving: its machine will be taken away: it takes nothing new.
    """

    model: str
    version: str
    running: _Count
    waiting: _Count
    room: _Count
    queue_age_s: _Amount
    kv_usage: _Amount
    tokens: _Count
    crashes: _Count
    slots: Annotated[int, Field(ge=1, le=2**20)] = 1
    kv_total: _Count = 0
    answered: _Count = 0
    answered_tokens: _Count = 0
    prompt_tokens: _Count = 0
    cached_tokens: _Count = 0
    first_byte_s: _Amount = 0.0
    request_s: _Amount = 0.0
    busy_s: _Amount = 0.0
    leaving: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


# ---- a region's agent ---------------------------------------------------------------------------


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
        scaling: why it has as many as it should have; empty: nobody says.
    """

    name: str
    route_prefix: str
    status: str
    spec: Mapping[str, Any]
    targets: tuple[Target, ...]
    scaling: _Words = ""


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


# ---- a region's gateway -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EndpointReport:
    """One endpoint of a region as its gateway sees it: see `policy.endpoints.EndpointState`.

    Attributes:
        free: asking it costs nothing but time: a tiny question does no harm.
        products: whose pool it is; None: everybody's. current: serves whoever names no version.
        fallbacks: the models that may stand in for this one.
        replicas: those that take requests. slots: requests they compute at once, together.
        load: requests they have, running and waiting.
        cold_start_s: None: it cannot start.
        scaling: why it has as many replicas as it should have; empty: nobody says.
    """

    model: Name
    version: Name
    pool: Name
    kind: Kind
    free: bool
    current: bool
    products: tuple[Name, ...] | None
    fallbacks: tuple[Name, ...]
    unit_usd: _Amount
    handicap_s: _Amount
    replicas: _Count
    slots: _Count
    max_queued: _Count
    load: _Count
    first_byte_s: _Amount
    hold_s: _Amount
    queue_age_s: _Amount
    cold_start_s: _Amount | None
    prefill_token_s: _Amount
    draining: bool
    scaling: _Words = ""


@dataclass(frozen=True, slots=True)
class RegionReport:
    """A region as its gateway sees it.

    Attributes:
        draining: the gateway finishes what it has and takes nothing new.
        age_s: how long ago the region's controller was heard of.
        spent_s: what the gateway spent on this answer: no part of the way to it.
    """

    region: Name
    jurisdiction: Name
    draining: bool
    age_s: _Amount
    spent_s: _Amount
    endpoints: tuple[EndpointReport, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


_LOAD: TypeAdapter[ReplicaLoad] = TypeAdapter(ReplicaLoad)
_TARGETS: TypeAdapter[Targets] = TypeAdapter(Targets)
_REGION: TypeAdapter[RegionReport] = TypeAdapter(RegionReport)


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


def parse_region(body: bytes) -> RegionReport:
    """A gateway's answer to `REGION_PATH`.

    Raises:
        ValueError: it is not one.
    """
    return _REGION.validate_json(body)
