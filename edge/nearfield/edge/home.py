"""The region this gateway stands in: its applications as endpoints, its replicas one by one.

The agent says which replicas there are, each replica says what it has to do. Here both become
what the policy ranks. Nothing is asked here: see `follow`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from nearfield.api.load import (
    Application,
    ReplicaLoad,
    Targets,
    kind_of,
    slots_of,
)
from nearfield.api.load import Target as Told
from nearfield.core.spec import ModelSpec
from nearfield.edge.beliefs import Beliefs, Peer
from nearfield.edge.known import Books, Key, Known
from nearfield.edge.proxy.ports import REPLICA, Target
from nearfield.edge.speed import ASSUMED, Meter, together
from nearfield.policy.endpoints import Endpoint, EndpointState, Health
from nearfield.policy.rank import Place, ReplicaState, places
from pydantic import ValidationError

log = logging.getLogger("nearfield.edge.world")

WAY_S = 0.0005
"""Round trip to a replica at home. Assumed: a network within one building."""
COLD_START_S = 6.0
"""From zero replicas to a first answer, until one was seen. A small model in Serve needs 5.8 to
6.2 s, most of it imports."""
LEARN_COLD = 0.5
"""Weight of the newest cold start: there are few of them, and the next is like the last."""
KEEP_LAST_S = 5.0
"""How long replicas are used that are no longer named while no other is. A controller that was
restarted names none until it has found them again; replicas that really stop can be reached for
longer than this (`RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S`)."""
AGENT_FAILS = 2
"""Questions in a row that the agent leaves unanswered: then nothing can be started at home."""
CONTROLLER_AGE_S = 15.0
"""Age of the controller's word from which nothing can be started either."""
HALF_DONE = 0.5
"""Share of its work that a running request still needs, on average."""

_NOT_STARTING = ("DEPLOY_FAILED",)
_LEAVING = ("DELETING",)


Address = tuple[str, str, int, str]
"""Of a replica: its id, host, port and prefix."""


class Replica(Peer):
    """One replica.

    Attributes:
        number: its position in the gateway's lists of requests and work at replicas.
        prefix: of its application. load: its last word. own_at, work_at: this gateway's requests
            there, and their tokens, when it was asked.
        gone_s: since when it is no longer named; None: it is.
        speed: what is to be expected of it. trials: requests on trial there.
        shown_name: its id as header fields have it. shown: the header fields that name it.
    """

    __slots__ = (
        "address", "endpoint", "gone_s", "id", "load", "meter", "number", "own_at", "shown",
        "shown_name", "speed", "trials", "work_at",
    )  # fmt: skip
    target: Target

    def __init__(self, endpoint: HomeEndpoint, address: Address, number: int) -> None:
        self.id, host, port, prefix = self.address = address
        target = Target(host, port, prefix.encode("ascii"))
        super().__init__(f"{self.id} at {host}:{port}", target)
        self.endpoint = endpoint
        self.number = number
        self.load: ReplicaLoad | None = None
        self.own_at = 0
        self.work_at = 0.0
        self.meter = Meter()
        self.speed = endpoint.speed
        self.gone_s: float | None = None
        self.trials = 0
        self.shown_name = re.sub(r"[^!-~]", "?", self.id).encode("ascii")
        self.shown = (*endpoint.shown, (REPLICA, self.shown_name))

    @property
    def stops(self) -> bool:
        """Whether it finishes what it has, and takes nothing new."""
        return self.gone_s is not None or (self.load is not None and self.load.leaving)

    def state(self, health: Health, weight: float, *, open_: bool) -> ReplicaState:
        """As the policy ranks it."""
        load, speed = self.load, self.speed
        assert load is not None
        total = load.running + load.waiting
        others = max(0, total - self.own_at)
        work = self.work_at + others * speed.request_tokens
        if total:
            work *= (load.waiting + HALF_DONE * load.running) / total
        return ReplicaState(
            number=self.number,
            name=self.name,
            tokens_s=speed.tokens_s,
            alone_tokens_s=speed.alone_tokens_s,
            slots=load.slots,
            max_queued=max(0, total + load.room - load.slots),
            health=health,
            weight=weight,
            draining=not open_,
            load=total,
            work=work,
            own=self.own_at,
            own_work=self.work_at,
            queue_age_s=load.queue_age_s,
            kv_used=int(load.kv_usage * load.kv_total),
            kv_total=load.kv_total,
        )


class HomeEndpoint(Known):
    """One (model, version, pool) at home.

    Attributes:
        replicas: by where they are, those that are leaving included.
        places: the replicas that may have requests, as the policy reads them.
        by_number: the same replicas.
        ingress: Serve's own, which starts what is at zero.
        beliefs: about the replicas.
        speed: of a replica, as last known.
    """

    def __init__(self, endpoint: Endpoint, number: int, ingress: Target, beliefs: Beliefs) -> None:
        super().__init__(endpoint, number)
        self.ingress = Peer("ingress", ingress)
        self.beliefs = beliefs
        self.replicas: dict[Address, Replica] = {}
        self.places: tuple[Place, ...] = ()
        self.by_number: dict[int, Replica] = {}
        self.speed = ASSUMED["other"]
        self.cold_start_s = COLD_START_S
        self.slots = 1
        self.max_queued = 0
        self.status = ""
        self.named = True

    def learn_cold_start(self, took_s: float) -> None:
        """The first request that came while nothing ran was answered after so long."""
        self.cold_start_s += LEARN_COLD * (took_s - self.cold_start_s)

    def rebuild(
        self, now_s: float, books: Books, running: Books, region: tuple[Health, float, float],
        *, can_start: bool,
    ) -> None:  # fmt: skip
        """Make `places` and `state` from what is known now.

        Args:
            books, running: this gateway's requests at endpoints and at replicas.
            region: health, weight and `back_s` of the region.
        """
        states = []
        for replica in self.replicas.values():
            if replica.load is None:
                continue
            replica.speed = replica.meter.speed(self.speed, replica.load.slots)
            believed = self.beliefs.of(replica.name)
            states.append(
                replica.state(
                    believed.health,
                    self.beliefs.weight(replica.name, now_s),
                    open_=self.takes_requests(replica, now_s),
                )
            )
        self.places = places(states)
        numbers = {place.number for place in self.places}
        self.by_number = {r.number: r for r in self.replicas.values() if r.number in numbers}
        health, weight, back_s = region
        elsewhere = books.own[self.number] - sum(running.own[number] for number in numbers)
        speeds = [(r.speed, r.load.slots) for r in self.by_number.values() if r.load is not None]
        if measured := [pair for pair in speeds if pair[0].measured]:
            self.speed = together(measured)
        if not self.places:
            self.state = EndpointState(
                self.endpoint,
                self.number,
                WAY_S,
                health=health,
                weight=weight,
                back_s=back_s,
                draining=self.draining,
                replicas=0,
                slots=self.slots,
                max_queued=self.max_queued,
                load=elsewhere,
                own=elsewhere,
                first_byte_s=self.speed.first_byte_s,
                hold_s=self.speed.hold_s,
                cold_start_s=self.cold_start_s if can_start and self._can_start else None,
                prefill_token_s=self.speed.prefill_token_s,
            )
            return
        mean = together(speeds)
        ours = [place.state for place in self.places]
        self.state = EndpointState(
            self.endpoint,
            self.number,
            WAY_S,
            health=health,
            weight=weight,
            back_s=back_s,
            draining=self.draining,
            replicas=len(ours),
            slots=sum(state.slots for state in ours),
            max_queued=sum(state.max_queued for state in ours),
            load=sum(state.load for state in ours) + elsewhere,
            own=sum(state.own for state in ours) + elsewhere,
            first_byte_s=mean.first_byte_s,
            hold_s=mean.hold_s,
            # The next request goes where the queue moves: the slowest queue is not its concern.
            queue_age_s=min(state.queue_age_s for state in ours),
            cold_start_s=self.cold_start_s,
            prefill_token_s=mean.prefill_token_s,
        )

    @property
    def draining(self) -> bool:
        return not self.named or self.status in _LEAVING

    @property
    def _can_start(self) -> bool:
        return self.named and self.status not in _NOT_STARTING

    def may_send_to(self, other: HomeEndpoint) -> bool:
        """Whether it has nobody, and the other one may have its requests."""
        mine, its = self.endpoint, other.endpoint
        same = (mine.model, mine.version) == (its.model, its.version)
        return same and not self.places and its.products in (None, mine.products)

    def takes_requests(self, replica: Replica, now_s: float) -> bool:
        """Whether new ones may go there, as far as the agent's word and its own goes."""
        if replica.load is not None and replica.load.leaving:
            return False
        if replica.gone_s is None:
            return True
        last = all(other.gone_s is not None for other in self.replicas.values())
        return last and now_s < replica.gone_s + KEEP_LAST_S


class Home:
    """All endpoints at home, by (model, version, pool).

    Attributes:
        targets: the agent's last word, and told_s: when it came; None: never.
        fails: questions that it has left unanswered since.
    """

    def __init__(
        self, region: str, jurisdiction: str, serve: Target, books: Books, running: Books
    ) -> None:
        """
        Args:
            serve: the region's ingress.
            books, running: this gateway's requests at endpoints and at replicas.
        """
        self.region = region
        self.jurisdiction = jurisdiction
        self.serve = serve
        self.targets: Targets | None = None
        self.told_s: float | None = None
        self.fails = 0
        self.endpoints: dict[Key, HomeEndpoint] = {}
        self._books = books
        self._running = running
        self._versions: dict[Address, str] = {}
        self._specs: dict[str, tuple[Any, ModelSpec | None]] = {}
        self._ingresses: dict[str, Target] = {}

    def can_start(self, now_s: float) -> bool:
        """Whether a replica would come up for a request that finds none."""
        if self.targets is None or self.told_s is None or self.fails >= AGENT_FAILS:
            return False
        return self.targets.age_s + now_s - self.told_s < CONTROLLER_AGE_S

    def age_s(self, now_s: float) -> float:
        """How long ago the region's controller was heard of; infinite: never."""
        if self.targets is None or self.told_s is None:
            return float("inf")
        return self.targets.age_s + now_s - self.told_s

    def apply(self, targets: Targets, now_s: float, new_beliefs: Callable[[], Beliefs]) -> None:
        """The agent has said which applications and replicas there are.

        Args:
            new_beliefs: makes the `Beliefs` of an endpoint that is new.
        """
        self.targets, self.told_s, self.fails = targets, now_s, 0
        apps = [
            (app, spec) for app in targets.applications if (spec := self._spec(app)) is not None
        ]
        current = _current(apps)
        parts: dict[Key, list[tuple[Application, ModelSpec]]] = {}
        for app, spec in apps:
            for version, named in self._by_version(app, spec).items():
                part = (replace(app, targets=named), spec.model_copy(update={"version": version}))
                parts.setdefault((spec.model, version, spec.pool.name), []).append(part)
        there = {_address(app, told) for app, _ in apps for told in app.targets}
        self._versions = {a: version for a, version in self._versions.items() if a in there}
        for key, ours in parts.items():
            known = self.endpoints.get(key)
            if known is None:
                known = self._add(key, ours[0][0], new_beliefs)
            self._update(known, ours, now_s, current=any(app.name in current for app, _ in ours))
        for key, known in self.endpoints.items():
            if key not in parts:
                known.named = False
                self._leave(known, known.replicas, now_s)
        self._specs = {app.name: self._specs[app.name] for app in targets.applications}

    def serves(self, replica: Replica, version: str) -> bool:
        """A replica has told its version: whether it is that of its endpoint.

        It need not be: an application that is upgraded has replicas of both for a while. Then it
        belongs to another endpoint from the agent's next word on.
        """
        self._versions[replica.address] = version
        return version == replica.endpoint.endpoint.version

    def _by_version(self, app: Application, spec: ModelSpec) -> dict[str, tuple[Told, ...]]:
        """The application's replicas by the version that each has told; its own one where none."""
        found: dict[str, tuple[Told, ...]] = {spec.version: ()}
        for told in app.targets:
            version = self._versions.get(_address(app, told), spec.version)
            found[version] = (*found.get(version, ()), told)
        return found

    def forget(self, now_s: float) -> list[Replica]:
        """Drop what is gone and has no request of ours any more; those replicas."""
        dropped: list[Replica] = []
        for key, known in list(self.endpoints.items()):
            for address, replica in list(known.replicas.items()):
                if replica.gone_s is not None and not replica.running:
                    used = replica.load is not None and known.takes_requests(replica, now_s)
                    if known.named and used:
                        continue  # it is one of the last
                    del known.replicas[address]
                    dropped.append(replica)
            if not known.named and not known.replicas and not self._books.own[known.number]:
                del self.endpoints[key]
                self._books.give_back(known.number)
        for replica in dropped:
            self._running.give_back(replica.number)
        return dropped

    def replicas(self) -> Iterable[Replica]:
        for known in self.endpoints.values():
            yield from known.replicas.values()

    def _spec(self, app: Application) -> ModelSpec | None:
        seen = self._specs.get(app.name)
        if seen is not None and seen[0] == app.spec:
            return seen[1]
        spec: ModelSpec | None = None
        try:
            spec = ModelSpec.model_validate(dict(app.spec))
        except ValidationError as error:
            log.error("the spec of %s cannot be read, and it is left out: %s", app.name, error)
        self._specs[app.name] = (app.spec, spec)
        return spec

    def _add(self, key: Key, app: Application, new_beliefs: Callable[[], Beliefs]) -> HomeEndpoint:
        model, version, pool = key
        endpoint = Endpoint(self.region, model, version, pool, self.jurisdiction)
        ingress = Target(
            self.serve.host,
            self.serve.port,
            app.route_prefix.encode("ascii"),
            tls=self.serve.tls,
            server_name=self.serve.server_name,
        )
        known = HomeEndpoint(endpoint, self._books.take(), ingress, new_beliefs())
        self.endpoints[key] = known
        return known

    def _update(
        self, known: HomeEndpoint, apps: list[tuple[Application, ModelSpec]], now_s: float,
        *, current: bool,
    ) -> None:  # fmt: skip
        app, spec = apps[0]
        model, version, pool = spec.model, spec.version, spec.pool
        known.endpoint = Endpoint(
            self.region,
            model,
            version,
            pool.name,
            self.jurisdiction,
            products=None if pool.products is None else frozenset(pool.products),
            current=current,
            unit_usd=pool.unit_usd,
            handicap_s=pool.handicap_ms / 1000,
        )
        known.kind = kind_of(spec)
        known.free = spec.engine.kind != "remote"
        known.fallbacks = tuple(spec.fallback_models)
        known.slots, known.max_queued = slots_of(spec), spec.limits.max_queued
        known.status = app.status
        known.scaling = app.scaling
        known.named = True
        if not known.speed.measured:
            known.speed = ASSUMED[known.kind]
        prefix = app.route_prefix.encode("ascii")
        if known.ingress.target is None or known.ingress.target.prefix != prefix:
            serve = self.serve
            known.ingress.target = Target(
                serve.host, serve.port, prefix, tls=serve.tls, server_name=serve.server_name
            )
        named = set()
        for each, _ in apps:
            for told in each.targets:
                address = _address(each, told)
                named.add(address)
                replica = known.replicas.get(address)
                if replica is None:
                    number = self._running.take()
                    known.replicas[address] = Replica(known, address, number)
                else:
                    replica.gone_s = None
        self._leave(known, known.replicas.keys() - named, now_s)

    def _leave(self, known: HomeEndpoint, gone: Iterable[Address], now_s: float) -> None:
        for address in gone:
            replica = known.replicas[address]
            if replica.gone_s is None:
                replica.gone_s = now_s


def _address(app: Application, told: Told) -> Address:
    return told.replica_id, told.host, told.port, app.route_prefix


def _current(apps: Iterable[tuple[Application, ModelSpec]]) -> set[str]:
    """The applications that serve callers who name no version: of each model the newest that runs.

    One that is still being deployed, or cannot be, takes nothing from the version before it. While
    one application is upgraded, its old replicas serve as well as its new ones.
    """
    newest: dict[str, tuple[bool, list[tuple[int, int, str]]]] = {}
    ranks = {}
    for app, spec in apps:
        rank = bool(app.targets) or app.status == "RUNNING", _natural(spec.version)
        ranks[app.name] = spec.model, rank
        newest[spec.model] = max(newest.get(spec.model, rank), rank)
    return {name for name, (model, rank) in ranks.items() if rank == newest[model]}


def _natural(version: str) -> list[tuple[int, int, str]]:
    """So that 10 comes after 9, and 1.10 after 1.9."""
    return [
        (1, int(part), "") if part.isdigit() else (0, 0, part)
        for part in re.split(r"(\d+)", version)
        if part
    ]
