"""Regions over real sockets: agents, replicas that do as they are told, and real gateways.

async with regions(Plan("eu", jurisdiction="eu"), Plan("us", jurisdiction="us")) as running:
    running["eu"].replicas[0].kill()
    await running["us"].ask(...)
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nearfield.api.keys import Principal
from nearfield.api.load import LOAD_PATH, REGION_PATH, TARGETS_PATH
from nearfield.api.passport import PassportKeys
from nearfield.core.federation import GatewayFile, RegionFile
from nearfield.edge.decisions import Admission
from nearfield.edge.follow import Follower
from nearfield.edge.limiter import LimitedRouter
from nearfield.edge.pages_models import ModelPages
from nearfield.edge.proxy.listener import bind
from nearfield.edge.proxy.plain import Careful
from nearfield.edge.proxy.ports import Grant, Page, Request, Retries, Router
from nearfield.edge.retries import BudgetRetries
from nearfield.edge.router import WorldRouter
from nearfield.edge.site import Site
from nearfield.edge.suspects import Suspects
from nearfield.edge.world import World
from nearfield.policy.endpoints import CRITICALITIES, DEFAULT, Caller
from nearfield.policy.limit import Limit

from tests.support.edge import (
    Answered,
    Client,
    Forwarding,
    Heard,
    Upstream,
    answer,
    forwarding,
    post,
)
from tests.support.hosting import until

CITIES = {"eu": ("Dublin", 53.35, -6.26), "us": ("Ashburn", 39.04, -77.49)}


class Replica(Upstream):
    """A replica of one model.

    Attributes:
        load: what it tells of itself, as far as it differs from an idle one.
        frozen: it takes connections and answers nothing. status: what it answers requests with.
        hold_s: how long it computes. asked: the requests it got, without questions.
        dies_of: it is killed by a request that has this in it.
    """

    def __init__(self, name: str, *, model: str = "chat", version: str = "1") -> None:
        super().__init__(self._act)
        self.name = name
        self.model, self.version = model, version
        self.prefix = f"/{model}"
        self.load: dict[str, Any] = {}
        self.frozen = False
        self.hold_s = 0.0
        self.status = 200
        self.dies_of: str | None = None
        self.asked: list[Heard] = []
        self.alive = True

    async def kill(self) -> None:
        """As `kill -9` does: the port refuses, and open connections end."""
        self.alive = False
        await self.close()

    def told(self) -> dict[str, Any]:
        return {"replica_id": self.name, "host": "127.0.0.1", "port": self.target.port}

    async def _act(
        self, heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if self.frozen:
            await self.gone(reader)
            raise ConnectionError
        if heard.target == self.prefix + LOAD_PATH:
            idle = {"model": self.model, "version": self.version, "running": 0, "waiting": 0}
            idle |= {"room": 64, "queue_age_s": 0, "kv_usage": 0, "tokens": 0, "crashes": 0}
            writer.write(answer(json.dumps({**idle, "slots": 4, **self.load}).encode()))
            return
        if heard.target == f"{self.prefix}/v1/completions":  # a gateway's tiny inference
            writer.write(answer(b"{}", self.status))
            return
        self.asked.append(heard)
        if self.dies_of is not None and self.dies_of in heard.body.decode():
            self._death = asyncio.ensure_future(self.kill())
            await asyncio.Event().wait()  # it ends this task as well
        if self.hold_s:
            computing = asyncio.ensure_future(asyncio.sleep(self.hold_s))
            leaving = asyncio.ensure_future(reader.read(1))
            await asyncio.wait((computing, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not computing.done():
                computing.cancel()
                raise ConnectionError
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
        said = {"replica": self.name, "target": heard.target, "body": heard.body.decode()}
        said["headers"] = heard.headers
        writer.write(answer(json.dumps(said).encode(), self.status))


class Agent(Upstream):
    """A region's agent, behind the region's ingress, which starts what is at zero.

    Attributes:
        applications: what it tells. silent: it answers nothing. age_s: of its word.
        started: requests that the ingress got.
    """

    def __init__(self) -> None:
        super().__init__(self._act)
        self.applications: list[dict[str, Any]] = []
        self.silent = False
        self.age_s = 0.1
        self.started: list[Heard] = []

    async def _act(
        self, heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if self.silent:
            await self.gone(reader)
            raise ConnectionError
        if heard.target == TARGETS_PATH:
            told = {"applications": self.applications, "age_s": self.age_s}
            writer.write(answer(json.dumps(told).encode()))
            return
        self.started.append(heard)
        said = {"replica": "started", "target": heard.target, "body": heard.body.decode()}
        writer.write(answer(json.dumps({**said, "headers": heard.headers}).encode()))


class Elsewhere(Upstream):
    """Another region's gateway that does as it is told.

    Attributes:
        report: what it tells. frozen: it answers nothing. hangs: it answers all but requests.
        asked: the requests it got. status: what it answers them with.
    """

    def __init__(self, name: str, jurisdiction: str, **endpoint: Any) -> None:
        super().__init__(self._act)
        self.name = name
        self.frozen = self.hangs = False
        self.status = 200
        self.asked: list[Heard] = []
        told = {"model": "chat", "version": "1", "pool": "default", "kind": "generate"}
        told |= {"free": True, "current": True, "products": None, "fallbacks": [], "unit_usd": 0}
        told |= {"handicap_s": 0, "replicas": 1, "slots": 4, "max_queued": 8, "load": 0}
        told |= {"first_byte_s": 0.01, "hold_s": 0.01, "queue_age_s": 0, "cold_start_s": None}
        told |= {"prefill_token_s": 0, "draining": False}
        self.report: dict[str, Any] = {
            "region": name,
            "jurisdiction": jurisdiction,
            "draining": False,
            "age_s": 0.1,
            "spent_s": 0.0,
            "endpoints": [told | endpoint],
        }

    def file(self, jurisdiction: str) -> RegionFile:
        """What the operator says of it."""
        return _region_file(Plan(self.name, jurisdiction), self.target.port)

    async def _act(
        self, heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        question = heard.target == REGION_PATH
        if self.frozen or (self.hangs and not question):
            await self.gone(reader)
            raise ConnectionError
        if question:
            writer.write(answer(json.dumps(self.report).encode()))
            return
        self.asked.append(heard)
        said = {"region": self.name, "target": heard.target, "headers": heard.headers}
        writer.write(answer(json.dumps(said).encode(), self.status, x_nearfield_region=self.name))


@asynccontextmanager
async def edge(*others: Elsewhere, **jurisdictions: str) -> AsyncIterator[Running]:
    """An edge site before these regions, which run already.

    Args:
        jurisdictions: of each by its name, as its file has it.
    """
    plan = Plan("edge", edge=True)
    files = [other.file(jurisdictions[other.name]) for other in others]
    socket = bind("127.0.0.1", 0)
    site = Site.of(_gateway_file(plan, 0), files)
    running = Running(plan, Agent(), [], site, socket.getsockname())
    async with running.stack:
        await listen(running, socket)
        await running.follow()
        try:
            yield running
        finally:
            await running.hush()


def application(
    replicas: Sequence[Replica], *, model: str = "chat", version: str = "1", **spec: Any
) -> dict[str, Any]:
    """An application as the agent tells of it."""
    engine = {"kind": "generate"}
    return {
        "name": f"{model}-{version}",
        "route_prefix": f"/{model}",
        "status": "RUNNING",
        "spec": {
            "model": model,
            "version": version,
            "engine": engine,
            "source": "builtin://abacus",
            **spec,
        },
        "targets": [replica.told() for replica in replicas],
    }


class Bound:
    """A Gate that lets everybody pass, as the class of callers that their headers name."""

    def enter(self, request: Request) -> None:
        return None

    def admit(self, request: Request) -> Grant:
        bound = request.headers.get(b"x-bound")
        jurisdictions = None if bound is None else frozenset(bound.decode().split(","))
        principal = Principal("t", None, "k", frozenset({"inference"}), None, jurisdictions)
        caller = Caller(jurisdictions)
        session = request.headers.get(b"x-session-id")
        trial = request.headers.get(b"x-trial")
        trial_s = request.headers.get(b"x-trial-s")
        claimed = request.headers.get(b"x-claims")
        criticality = DEFAULT if claimed is None else CRITICALITIES.index(claimed.decode())
        about = Admission(
            principal,
            caller,
            kind="generate",
            criticality=criticality,
            tokens=100,
            prompt_tokens=50,
            session=session,
            trial=trial,
            trial_s=None if trial_s is None else float(trial_s),
        )
        return Grant(replayable=True, about=about)


class Table:
    """Pages by method and path, as the gateway's page table finds them."""

    def __init__(self, routes: Mapping[tuple[str, str], Page]) -> None:
        self._routes = [
            (method.encode(), re.compile(re.sub(r"\{\w+\}", "[^/]+", path).encode()), page)
            for (method, path), page in routes.items()
        ]

    def find(self, request: Request) -> Page | None:
        path = request.path.partition(b"?")[0]
        for method, pattern, page in self._routes:
            if method == request.method and pattern.fullmatch(path):
                return page
        return None


@dataclass
class Plan:
    """A region to be."""

    name: str
    jurisdiction: str = "eu"
    replicas: int = 2
    model: str = "chat"
    spec: dict[str, Any] = field(default_factory=dict)
    edge: bool = False


@dataclass
class Running:
    """A region that runs, and its gateway.

    Attributes:
        limited: what stands before the router, where `regions` was given a limit.
    """

    plan: Plan
    agent: Agent
    replicas: list[Replica]
    site: Site
    address: tuple[str, int]
    world: World = field(init=False)
    router: WorldRouter = field(init=False)
    limited: LimitedRouter = field(init=False)
    gateway: Forwarding = field(init=False)
    follower: Follower = field(init=False)
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def ask(self, request: bytes | None = None, method: str = "POST") -> Answered:
        return await self.gateway.ask(post() if request is None else request, method)

    async def client(self) -> Client:
        return await self.gateway.client()

    async def add(self, name: str, **options: Any) -> Replica:
        """One more replica, named by the agent at once."""
        replica = Replica(name, model=self.plan.model, **options)
        await replica.start()
        self.stack.push_async_callback(replica.close)
        self.replicas.append(replica)
        self.name(self.replicas)
        return replica

    def name(self, replicas: Sequence[Replica]) -> None:
        """The agent names these."""
        spec = self.plan.spec
        self.agent.applications = [application(replicas, model=self.plan.model, **spec)]

    async def stop(self) -> None:
        """All of the region, its gateway included, as if its power was cut."""
        await self.hush()
        await self.stack.aclose()

    async def follow(self) -> None:
        """Its gateway asks everybody from now on."""
        self.follower = await Follower(self.world, seed=1).__aenter__()

    async def hush(self) -> None:
        """Ask nobody any more, and cut every connection."""
        await self.follower.__aexit__()
        await self.gateway.listener.drain(0.0)


@asynccontextmanager
async def regions(
    *plans: Plan,
    passports: PassportKeys | None = None,
    last_good: Path | None = None,
    max_attempts: int = 4,
    limit: Limit | None = None,
) -> AsyncIterator[dict[str, Running]]:
    """Regions that know of each other. Afterwards all books must balance.

    Args:
        limit: of an upstream that nothing is known of; None: there is no limiter.
    """
    sockets = {plan.name: bind("127.0.0.1", 0) for plan in plans}
    files = [_region_file(plan, sockets[plan.name].getsockname()[1]) for plan in plans]
    running: dict[str, Running] = {}
    async with AsyncExitStack() as everything:
        for plan in plans:
            agent = Agent()
            await agent.start()
            site = Site.of(
                _gateway_file(plan, agent.target.port),
                [file for file in files if not plan.edge or file.region != plan.name],
                passports=passports,
                last_good=last_good,
            )
            each = Running(plan, agent, [], site, sockets[plan.name].getsockname())
            running[plan.name] = each
            await everything.enter_async_context(each.stack)
            each.stack.push_async_callback(agent.close)
            for number in range(plan.replicas):
                await each.add(f"{plan.name}-{number}")
            each.name(each.replicas)
        for each in running.values():
            await listen(each, sockets[each.plan.name], max_attempts=max_attempts, limit=limit)
        for each in running.values():
            await each.follow()
        try:
            await _acquainted(running)
            yield running
        finally:
            for each in running.values():
                await each.hush()


async def _acquainted(running: Mapping[str, Running]) -> None:
    """Whoever was asked before it knew itself is asked again, now and not in a second."""
    at_home = [each for each in running.values() if not each.plan.edge]
    for each in running.values():
        for region in each.world.others:
            each.world.doubt(region)

    def know_all() -> bool:
        return all(
            len(each.world.models.get(other.plan.model, ())) == len(at_home)
            for each in running.values()
            for other in at_home
        )

    await until(know_all)


async def listen(
    each: Running, socket: Any, *, max_attempts: int = 4, limit: Limit | None = None
) -> None:
    """Its gateway, which knows of nothing yet."""
    each.world = World(each.site)
    each.router = WorldRouter(each.world)
    router: Router = each.router
    retries: Retries = Careful(max_attempts)
    if limit is not None:
        retries = BudgetRetries(Suspects(), region_lost=each.world.is_lost)
        router = each.limited = LimitedRouter(router, retries, limit=limit)
        each.stack.callback(check_tries, each.limited)
    pages = Table(ModelPages(each.world, None).routes())
    each.stack.callback(check_books, each.world)
    each.gateway = await each.stack.enter_async_context(
        forwarding(
            [],
            gate=Bound(),
            router=router,
            retries=retries,
            pages=pages,
            sockets=[socket],
        )
    )
    each.world.abandon = each.gateway.proxy.abandon


def check_books(world: World) -> None:
    """Nothing is counted that does not run."""
    assert set(world.books.own) <= {0}, world.books.own
    assert set(world.running.own) <= {0}, world.running.own
    assert set(world.running.work) <= {0.0}, world.running.work
    assert all(not replica.running for replica in world.replicas())
    assert all(not replica.trials for replica in world.replicas())


def check_tries(limited: LimitedRouter) -> None:
    assert limited.unbalanced == 0


def _region_file(plan: Plan, port: int) -> RegionFile:
    city, latitude, longitude = CITIES.get(plan.name, CITIES["eu"])
    return RegionFile.model_validate(
        {
            "region": plan.name,
            "jurisdiction": plan.jurisdiction,
            "city": city,
            "location": {"latitude": latitude, "longitude": longitude},
            "gateway_url": f"http://127.0.0.1:{port}",
        }
    )


def _gateway_file(plan: Plan, port: int) -> GatewayFile:
    home = {"region": plan.name, "serve": f"http://127.0.0.1:{port}"}
    return GatewayFile.model_validate(
        {
            "gateway": plan.name,
            "jurisdiction": plan.jurisdiction if plan.edge else None,
            "home": None if plan.edge else home,
            "regions": ["unused.yaml"],
        }
    )
