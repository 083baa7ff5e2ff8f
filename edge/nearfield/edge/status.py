"""What is believed of every region, endpoint and replica, for people and for programs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from nearfield.edge.home import HomeEndpoint, Replica
from nearfield.policy.endpoints import Health

if TYPE_CHECKING:
    from nearfield.edge.elsewhere import Region
    from nearfield.edge.known import Known
    from nearfield.edge.world import World


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """A replica at home, for people."""

    id: str
    host: str
    port: int
    health: Health
    reason: str
    weight: float
    leaving: bool
    in_flight: int
    running: int
    waiting: int
    slots: int
    queue_age_s: float
    kv_usage: float
    tokens_s: float
    alone_tokens_s: float
    measured: bool


@dataclass(frozen=True, slots=True)
class EndpointStatus:
    """An endpoint, for people.

    `load`: everybody's requests there; `in_flight`: ours. `scaling`: why it has its replicas;
    empty: nobody says.
    """

    name: str
    model: str
    version: str
    pool: str
    kind: str
    products: list[str] | None
    current: bool
    unit_usd: float
    handicap_s: float
    fallbacks: tuple[str, ...]
    health: Health
    weight: float
    draining: bool
    replicas: int
    slots: int
    max_queued: int
    load: int
    in_flight: int
    first_byte_s: float
    hold_s: float
    queue_age_s: float
    cold_start_s: float | None
    scaling: str
    each: tuple[ReplicaStatus, ...]


@dataclass(frozen=True, slots=True)
class RegionStatus:
    """A region, for people. `for_s`: since when its health is so; `age_s`: of what is known."""

    name: str
    jurisdiction: str
    city: str
    latitude: float
    longitude: float
    home: bool
    health: Health
    reason: str
    for_s: float
    weight: float
    rtt_s: float | None
    age_s: float | None
    draining: bool
    in_flight: int
    endpoints: tuple[EndpointStatus, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def statuses(world: World, regions: Iterable[Region]) -> list[RegionStatus]:
    """Of these regions, as of now."""
    now_s = world.clock()
    return [_status(world, region, now_s) for region in regions]


def _status(world: World, region: Region, now_s: float) -> RegionStatus:
    believed = world.alive.of(region.name)
    home = world.home if region.is_home else None
    if home is not None:
        age_s = home.age_s(now_s)
    else:
        age_s = math.inf if region.told_s is None else now_s - region.told_s
    return RegionStatus(
        name=region.name,
        jurisdiction=region.file.jurisdiction,
        city=region.file.city,
        latitude=region.file.location.latitude,
        longitude=region.file.location.longitude,
        home=region.is_home,
        health="down" if region.wrong is not None else believed.health,
        reason=region.wrong or believed.reason,
        for_s=now_s - believed.since_s,
        weight=world.alive.weight(region.name, now_s),
        rtt_s=region.rtt.level_s if region.rtt.probes else None,
        age_s=age_s if math.isfinite(age_s) else None,
        draining=bool(region.report and region.report.draining),
        in_flight=sum(world.books.own[known.number] for known in region.endpoints.values()),
        endpoints=tuple(_endpoint_status(world, known) for known in region.endpoints.values()),
    )


def _endpoint_status(world: World, known: Known) -> EndpointStatus:
    state, endpoint = known.state, known.endpoint
    own = world.books.own[known.number]
    replicas: Iterable[Replica] = ()
    if isinstance(known, HomeEndpoint):
        replicas = known.replicas.values()
    return EndpointStatus(
        name=endpoint.name,
        model=endpoint.model,
        version=endpoint.version,
        pool=endpoint.pool,
        kind=known.kind,
        products=None if endpoint.products is None else sorted(endpoint.products),
        current=endpoint.current,
        unit_usd=endpoint.unit_usd,
        handicap_s=endpoint.handicap_s,
        fallbacks=known.fallbacks,
        health=state.health,
        weight=state.weight,
        draining=state.draining,
        replicas=state.replicas,
        slots=state.slots,
        max_queued=state.max_queued,
        load=max(0, state.load - state.own + own),
        in_flight=own,
        first_byte_s=state.first_byte_s,
        hold_s=state.hold_s,
        queue_age_s=state.queue_age_s,
        cold_start_s=state.cold_start_s,
        scaling=known.scaling,
        each=tuple(_replica_status(world, replica) for replica in replicas),
    )


def _replica_status(world: World, replica: Replica) -> ReplicaStatus:
    beliefs = replica.endpoint.beliefs
    believed = beliefs.of(replica.name)
    load, speed = replica.load, replica.speed
    return ReplicaStatus(
        id=replica.id,
        host=replica.target.host,
        port=replica.target.port,
        health=believed.health,
        reason=believed.reason,
        weight=beliefs.weight(replica.name, world.clock()),
        leaving=replica.gone_s is not None,
        in_flight=world.running.own[replica.number],
        running=0 if load is None else load.running,
        waiting=0 if load is None else load.waiting,
        slots=0 if load is None else load.slots,
        queue_age_s=0.0 if load is None else load.queue_age_s,
        kv_usage=0.0 if load is None else load.kv_usage,
        tokens_s=speed.tokens_s,
        alone_tokens_s=speed.alone_tokens_s,
        measured=speed.measured,
    )
