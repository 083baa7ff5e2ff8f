"""The experiments: a load, a fault in the middle of it, and what must be true afterwards.

The same code runs with a few hundred requests in CI and with a thousand, three times over, for the
report. An experiment is one line in `EXPERIMENTS`.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx
from nearfield.edge.idempotency import LEASE_S
from nearfield.store.idempotency import DOUBT_S

from tests.chaos import faults
from tests.chaos.ledger import BOUND, Answer, Bars, Execution, Fault, Tally, account, misses
from tests.chaos.load import ANYBODY, Load, Planned, planned, with_all
from tests.chaos.stub import trouble
from tests.chaos.world import LEDGER_S, World

BEFORE, UNTIL = 0.3, 0.75
"""Shares of the requests that are sent before the fault, and before what can be healed is."""
RATE = 40.0
DEADLY = 50
MOST_BELIEFS = 6
BEHIND_S = 0.2
"""A client that is so late itself measures itself."""
LATE_S = 1.0
"""A client that is late itself sends after a request was due, and its deadline counts from then; a
replica that stood still begins what it had not read before it hears that its gateway has left."""
UPGRADE_S = 60.0
"""A load is to last longer than an upgrade."""
Act = Callable[[Load], Awaitable[Fault]]


@dataclass(frozen=True, slots=True)
class Size:
    """requests: of each run. seed: another one for each repetition. timed: hold it to the times.
    name: begins the ids of its requests.
    """

    requests: int
    seed: int = 1
    timed: bool = False
    name: str = field(default_factory=lambda: f"r{time.time_ns() % 10**10:010d}")


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one run. notes: figures that only this experiment has."""

    experiment: str
    tally: Tally
    missed: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Run:
    """One run as it is put together: its books, and what was missed so far."""

    world: World
    size: Size
    answers: list[Answer] = field(default_factory=list)
    executions: list[Execution] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    fault: Fault = field(default=Fault(0.0))

    async def under_load(
        self, requests: Sequence[Planned], act: Act, bars: Bars, *, gateway_killed: bool = False
    ) -> Tally:
        """Send the requests, `act` once some of them are sent, and close the books.

        Args:
            gateway_killed: it is started again before its usage is counted: what it had written
                down then goes to the ledger, and what it had not is lost.
        """
        load = Load(self.world.doors, self.world.keys)
        since_s = time.time()
        running = asyncio.create_task(load.run(requests))
        try:
            await load.reached(int(BEFORE * len(requests)))
            fault = self.fault = await act(load)
        except BaseException:
            running.cancel()
            raise
        self.answers = await running
        await load.close()
        self.executions = await asyncio.to_thread(self.world.executions)
        tally = account(self.answers, self.executions, fault, self.world.jurisdictions)
        self.missed += misses(tally, self.answers, bars, timed=self.size.timed)
        if load.late_s > BEHIND_S:
            self.notes.append(
                f"the client was up to {load.late_s:.1f} s late: the machine is too busy"
            )
        self.notes += await asyncio.to_thread(self._beliefs)
        if gateway_killed:
            await asyncio.to_thread(self.world.recover)
        await self._bill(tally, since_s, may_miss=gateway_killed)
        return tally

    def _beliefs(self) -> list[str]:
        """What an edge came to believe from the fault on, and when."""
        now_s = time.monotonic()
        try:
            changes = self.world.status("edge-1")["changes"]
        except httpx.TransportError:  # it was killed
            changes = self.world.status("edge-2")["changes"]
        after = [(now_s - change["ago_s"] - self.fault.began_s, change) for change in changes]
        return [
            f"after {after_s:.1f} s {change['name']} {change['after']}: {change['reason']}"
            for after_s, change in reversed(after[:MOST_BELIEFS])
            if after_s > -1.0
        ]

    async def _bill(self, tally: Tally, since_s: float, *, may_miss: bool) -> None:
        """Every good answer is charged once. What a client did not wait for may be charged too."""
        good, deadline_s = tally.of("ok"), time.monotonic() + LEDGER_S
        while True:
            charged = await asyncio.to_thread(self.world.billed, since_s)
            if charged >= good or time.monotonic() > deadline_s:
                break
            await asyncio.sleep(0.2)
        if charged > good + tally.of("lost"):
            self.missed.append(f"{charged} charged for {good} good answers")
        if charged < good and not may_miss:
            self.missed.append(f"{charged} charged of {good} good answers")
        elif charged < good:
            self.notes.append(f"{good - charged} usage records went with the gateway")

    def went(self, tenant: str) -> str:
        """Where a tenant's requests were answered during the fault."""
        fault = self.fault
        regions = Counter(
            answer.region or answer.kind
            for answer in self.answers
            if answer.tenant == tenant and fault.began_s <= answer.due_s < fault.over_s
        )
        return f"{tenant}: " + ", ".join(f"{n} {where}" for where, n in regions.most_common())


def _bound_if_alone(world: World, *lost: str) -> tuple[str, ...]:
    """The tenant that has nowhere else to go when these regions are lost."""
    left = [p for p in world.places if p.name not in lost and p.jurisdiction == BOUND]
    return () if left else (BOUND,)


async def _healed(context: AbstractContextManager[Any], load: Load, total: int) -> Fault:
    """A fault that begins now and is over when most of the load has been sent."""
    with ExitStack() as stack:
        began_s = time.monotonic()
        await asyncio.to_thread(stack.enter_context, context)
        await load.reached(int(UNTIL * total))
    return Fault(began_s, time.monotonic())


class Wired(AbstractContextManager[None]):
    """A wire that is longer, or held."""

    def __init__(self, world: World, region: str, **how: Any) -> None:
        self._world, self._region, self._how = world, region, how

    def __enter__(self) -> None:
        self._world.wire(self._region, **self._how)

    def __exit__(self, *_: object) -> None:
        self._world.wire(self._region)


# ---- inside a region ----------------------------------------------------------------------------


async def kill_replica(world: World, size: Size) -> Result:
    """F1: kill -9 of a replica with at least 20 requests in flight."""
    run, cluster = Run(world, size), world.clusters["eu-west"]

    async def act(load: Load) -> Fault:
        pid, inside = await asyncio.to_thread(faults.busiest_replica, world, cluster, least=20)
        run.notes.append(f"{inside} in flight in it")
        return Fault(faults.send([pid], signal.SIGKILL))

    # So long that enough are inside at once; who is run again takes as long as anybody.
    hold_s = 1.5
    requests = planned(size.requests, 60.0, name=size.name, seed=size.seed, hold_s=hold_s)
    tally = await run.under_load(requests, act, Bars(failover_s=hold_s + 1.5))
    return Result("replica killed", tally, tuple(run.missed), tuple(run.notes))


async def kill_controller(world: World, size: Size) -> Result:
    """F21: kill -9 of Serve's controller, once and again."""
    run, cluster = Run(world, size), world.clusters["eu-west"]

    async def act(load: Load) -> Fault:
        began_s, kills = time.monotonic(), 0
        while load.sent < UNTIL * size.requests:
            pids = await asyncio.to_thread(faults.controller, cluster)
            if pids:
                faults.send(pids, signal.SIGKILL)
                kills += 1
            await asyncio.sleep(1.0)
        run.notes.append(f"{kills} kills")
        return Fault(began_s)

    requests = planned(size.requests, RATE, name=size.name, seed=size.seed)
    tally = await run.under_load(requests, act, Bars())
    return Result("controller killed", tally, tuple(run.missed), tuple(run.notes))


async def kill_proxy(world: World, size: Size) -> Result:
    """F22: kill -9 of Serve's HAProxy, and of the actor that keeps it."""
    run, cluster = Run(world, size), world.clusters["eu-west"]
    pids = await asyncio.to_thread(faults.proxies, cluster)
    run.notes.append(f"{len(pids)} processes")

    async def act(load: Load) -> Fault:
        return Fault(faults.send(pids, signal.SIGKILL))

    requests = planned(size.requests, RATE, name=size.name, seed=size.seed)
    tally = await run.under_load(requests, act, Bars())
    return Result("proxy killed", tally, tuple(run.missed), tuple(run.notes))


async def upgrade(world: World, size: Size) -> Result:
    """F18: another version, replica by replica, under load."""
    run = Run(world, size)

    async def act(load: Load) -> Fault:
        began_s = time.monotonic()
        await asyncio.to_thread(world.upgrade, "eu-west", f"2-{size.name}")
        took_s = time.monotonic() - began_s
        run.notes.append(f"took {took_s:.0f} s, {load.sent} of {size.requests} sent by then")
        return Fault(began_s)

    rate = min(RATE, size.requests / UPGRADE_S)
    requests = planned(size.requests, rate, name=size.name, seed=size.seed)
    tally = await run.under_load(requests, act, Bars(told=False, p99_times=1.5))
    return Result("upgrade", tally, tuple(run.missed), tuple(run.notes))


async def deadly(world: World, size: Size, how: str) -> Result:
    """F14: one body that kills whatever runs it, amid others; its client never gives up."""
    run = Run(world, size)
    poison = Planned(f"{size.name}-poison", 0.0, ANYBODY, words=f"die:{how}", deadline_s=30.0)
    answers: list[Answer] = []

    async def act(load: Load) -> Fault:
        began_s = time.monotonic()
        while len(answers) < DEADLY:
            answers.append(await load.ask(poison, time.monotonic()))
        return Fault(began_s)

    requests = planned(size.requests, RATE, name=size.name, seed=size.seed)
    tally = await run.under_load(requests, act, Bars(failover_s=None, p99_times=None))
    deaths = [each for each in run.executions if each.id == poison.id]
    statuses = Counter(f"{answer.status or answer.kind}" for answer in answers)
    said = ", ".join(f"{count} × {status}" for status, count in statuses.most_common())
    run.notes.append(f"{len(deaths)} runs of the poison; answered {said}")
    # An engine that dies is started once more inside its replica before the request is blamed.
    most = 2 if how == "replica" else 4
    if len(deaths) > most:
        run.missed.append(f"the poison ran {len(deaths)} times")
    if len({each.region for each in deaths}) > 1:
        run.missed.append("the poison was tried in another region")
    if statuses["422"] < DEADLY - 2:
        run.missed.append(f"only {statuses['422']} of {DEADLY} were refused with 422")
    return Result(f"query of death, kills its {how}", tally, tuple(run.missed), tuple(run.notes))


async def deadly_for_engines(world: World, size: Size) -> Result:
    return await deadly(world, size, "engine")


async def deadly_for_replicas(world: World, size: Size) -> Result:
    return await deadly(world, size, "replica")


# ---- a whole region -----------------------------------------------------------------------------


async def kill_region(world: World, size: Size) -> Result:
    """F3: kill -9 of everything in the nearest region, its gateway included."""
    return await _lose(world, size, "region killed", "eu-west")


async def kill_jurisdiction(world: World, size: Size) -> Result:
    """F3: kill -9 of every region of the EU: its tenants go nowhere, the others elsewhere."""
    lost = [place.name for place in world.places if place.jurisdiction == BOUND]
    return await _lose(world, size, "all of the EU killed", *lost)


async def _lose(world: World, size: Size, title: str, *lost: str) -> Result:
    run = Run(world, size)

    async def act(load: Load) -> Fault:
        pids = [
            pid for name in lost for pid in await asyncio.to_thread(world.clusters[name].everything)
        ]
        fault = Fault(faults.send(pids, signal.SIGKILL))
        await load.reached(size.requests)
        return fault

    bars = Bars(may_refuse=_bound_if_alone(world, *lost), failover_s=1.5)
    requests = planned(size.requests, RATE, name=size.name, seed=size.seed)
    tally = await run.under_load(requests, act, bars)
    if bars.may_refuse:
        refused = Counter(a.status for a in run.answers if a.tenant == BOUND and a.kind != "ok")
        run.notes.append(f"EU: {', '.join(f'{n} × {s}' for s, n in refused.most_common())}")
    return Result(title, tally, tuple(run.missed), tuple(run.notes))


async def freeze_region(world: World, size: Size) -> Result:
    """F4: SIGSTOP of everything in the nearest region, SIGCONT later."""
    run, cluster = Run(world, size), world.clusters["eu-west"]
    pids = await asyncio.to_thread(cluster.everything)

    async def act(load: Load) -> Fault:
        return await _healed(faults.frozen(pids), load, size.requests)

    bars = Bars(
        may_refuse=_bound_if_alone(world, "eu-west"), runs_twice=True, failover_s=3.0, p99_s=2.0
    )
    requests = planned(size.requests, RATE, name=size.name, seed=size.seed)
    tally = await run.under_load(requests, act, bars)
    run.notes += [run.went(BOUND), run.went(ANYBODY)]
    return Result("region frozen", tally, tuple(run.missed), tuple(run.notes))


async def far_region(world: World, size: Size) -> Result:
    """F5: the nearest region is 500 ms farther for a while."""
    run = Run(world, size)

    async def act(load: Load) -> Fault:
        longer = Wired(world, "eu-west", delay_s=0.25)
        fault = await _healed(longer, load, size.requests)
        edges = await asyncio.to_thread(world.status, "edge-1")
        run.notes.append(f"{len(edges['changes'])} changes of health")
        return fault

    bars = Bars(failover_s=None, p99_times=None, p99_s=1.5)
    requests = planned(size.requests, RATE, name=size.name, seed=size.seed)
    tally = await run.under_load(requests, act, bars)
    run.notes += [run.went(BOUND), run.went(ANYBODY)]
    return Result("500 ms farther", tally, tuple(run.missed), tuple(run.notes))


async def _failing(world: World, size: Size, status: int) -> Result:
    run = Run(world, size)

    async def act(load: Load) -> Fault:
        began_s = time.monotonic()
        trouble(world.runs, "eu-west", share=0.3, status=status)
        await load.reached(size.requests)
        return Fault(began_s)

    bars = Bars(
        errors=0.01,
        may_refuse=_bound_if_alone(world, "eu-west"),
        says_when=False,
        failover_s=None,
    )
    requests = planned(size.requests, RATE, name=size.name, seed=size.seed)
    tally = await run.under_load(requests, act, bars)
    run.notes += [run.went(BOUND), run.went(ANYBODY)]
    return Result(f"30 % answered {status}", tally, tuple(run.missed), tuple(run.notes))


async def failing_region(world: World, size: Size) -> Result:
    """F6: 30 % of the nearest region's runs fail: out of order (503)."""
    return await _failing(world, size, 503)


async def failing_model(world: World, size: Size) -> Result:
    """F6: 30 % of the nearest region's runs fail: the model itself does (500)."""
    return await _failing(world, size, 500)


async def _cut_off(
    world: World, size: Size, title: str, context: AbstractContextManager[Any]
) -> Result:
    run = Run(world, size)

    async def act(load: Load) -> Fault:
        return await _healed(context, load, size.requests)

    bars = Bars(
        may_refuse=_bound_if_alone(world, "eu-west"), runs_twice=True, failover_s=3.0, p99_s=3.0
    )
    requests = planned(size.requests, RATE, name=size.name, seed=size.seed)
    tally = await run.under_load(requests, act, bars)
    run.notes += [run.went(BOUND), run.went(ANYBODY)]
    return Result(title, tally, tuple(run.missed), tuple(run.notes))


async def hold_requests(world: World, size: Size) -> Result:
    """F7: nothing reaches the nearest region any more."""
    return await _cut_off(
        world, size, "partition, requests held", Wired(world, "eu-west", hold="to")
    )


async def hold_answers(world: World, size: Size) -> Result:
    """F7: nothing comes back from the nearest region any more."""
    return await _cut_off(
        world, size, "partition, answers held", Wired(world, "eu-west", hold="from")
    )


async def drop_requests(world: World, size: Size) -> Result:
    """F7: the kernel drops what goes to the nearest region."""
    cut = faults.Partition(world.wire_port("eu-west"), "to")
    return await _cut_off(world, size, "partition, requests dropped", cut)


async def drop_answers(world: World, size: Size) -> Result:
    """F7: the kernel drops what comes from the nearest region."""
    cut = faults.Partition(world.wire_port("eu-west"), "from")
    return await _cut_off(world, size, "partition, answers dropped", cut)


# ---- everything at once -------------------------------------------------------------------------


async def outage(world: World, size: Size) -> Result:
    """F8: every run fails everywhere. Retries must not make it worse."""
    run = Run(world, size)

    async def act(load: Load) -> Fault:
        began_s = time.monotonic()
        for name in world.clusters:
            trouble(world.runs, name, share=1.0, status=503)
        await load.reached(size.requests)
        return Fault(began_s)

    bars = Bars(errors=1.0, load_times=1.2, failover_s=None, p99_times=None)
    requests = planned(size.requests, RATE, name=size.name, seed=size.seed)
    tally = await run.under_load(requests, act, bars)
    run.notes.append(f"{tally.begun / tally.sent:.2f} runs a request")
    return Result("everything fails", tally, tuple(run.missed), tuple(run.notes))


async def herd(world: World, size: Size) -> Result:
    """F15: all regions stand still, clients come again and again, then everything moves at once."""
    run = Run(world, size)
    pids = [
        pid
        for cluster in world.clusters.values()
        for pid in await asyncio.to_thread(cluster.everything)
    ]

    async def act(load: Load) -> Fault:
        fault = await _healed(faults.frozen(pids), load, size.requests)
        run.notes.append(f"{load.in_flight} waited when it was over")
        return fault

    requests = planned(size.requests, RATE, name=size.name, seed=size.seed)
    patient = with_all(requests, deadline_s=45.0, again="refused")
    hasty = [number % 5 == 0 for number in range(len(patient))]
    mixed = [
        with_all([each], deadline_s=2.0, again="never")[0] if is_hasty else each
        for each, is_hasty in zip(patient, hasty, strict=True)
    ]
    bars = Bars(errors=0.2, runs_twice=True, failover_s=None, p99_times=None)
    tally = await run.under_load(mixed, act, bars)
    due_by = {each.id: each.deadline_s for each in mixed}
    dues = {answer.id: answer.due_s + due_by[answer.id] for answer in run.answers}
    lates_s = [e.begun_s - dues[e.id] for e in run.executions if e.id in dues]
    late = sum(late_s > LATE_S for late_s in lates_s)
    if late:
        run.missed.append(f"{late} were begun long after their deadline")
    run.notes.append(f"{sum(late_s > 0 for late_s in lates_s)} runs began after their deadline")
    last_s = max((a.ended_s for a in run.answers if a.kind == "ok"), default=0.0)
    first_s = min(answer.due_s for answer in run.answers)
    run.notes.append(f"{max(a.sendings for a in run.answers)} sendings at most")
    run.notes.append(f"the last good answer after {last_s - first_s:.0f} s")
    return Result("recovery herd", tally, tuple(run.missed), tuple(run.notes))


# ---- a gateway ----------------------------------------------------------------------------------


async def kill_gateway(world: World, size: Size) -> Result:
    """F25: kill -9 of the gateway with all its requests; their clients ask another one."""
    run, edge = Run(world, size), world.edges["edge-1"]
    pids = [process.pid for process in edge.processes()]

    async def act(load: Load) -> Fault:
        async with asyncio.timeout(faults.FIND_S):
            while load.in_flight < 20:
                await load.reached(load.sent + 1)
        run.notes.append(f"{load.in_flight} in flight")
        return Fault(faults.send(pids, signal.SIGKILL))

    hold_s = 0.6
    requests = with_all(
        planned(size.requests, RATE, name=size.name, seed=size.seed, hold_s=hold_s, streams=0.0),
        deadline_s=30.0,
        again="broken",
        keyed=True,
    )
    # Another gateway sees that a claim has no owner, then the request runs as long as any.
    bars = Bars(failover_s=LEASE_S + DOUBT_S + hold_s + 0.5, p99_times=None)
    tally = await run.under_load(requests, act, bars, gateway_killed=True)
    return Result("gateway killed", tally, tuple(run.missed), tuple(run.notes))


@dataclass(frozen=True, slots=True)
class Experiment:
    """One line of the table.

    Attributes:
        quick: part of CI. destroys: a region has to be started anew afterwards.
        filters: it needs the kernel's packet filter. regions: it needs so many.
    """

    run: Callable[[World, Size], Awaitable[Result]]
    quick: bool = True
    destroys: bool = False
    filters: bool = False
    regions: int = 2


EXPERIMENTS: dict[str, Experiment] = {
    "replica": Experiment(kill_replica),
    "proxy": Experiment(kill_proxy),
    "controller": Experiment(kill_controller),
    "upgrade": Experiment(upgrade, quick=False),
    "death-engine": Experiment(deadly_for_engines, quick=False),
    "death-replica": Experiment(deadly_for_replicas),
    "far": Experiment(far_region, quick=False),
    "failing": Experiment(failing_region),
    "failing-model": Experiment(failing_model, quick=False),
    "hold-requests": Experiment(hold_requests, quick=False),
    "hold-answers": Experiment(hold_answers),
    "drop-requests": Experiment(drop_requests, quick=False, filters=True),
    "drop-answers": Experiment(drop_answers, filters=True),
    "frozen": Experiment(freeze_region),
    "outage": Experiment(outage),
    "herd": Experiment(herd),
    "gateway": Experiment(kill_gateway),
    "region": Experiment(kill_region, destroys=True),
    "jurisdiction": Experiment(kill_jurisdiction, quick=False, destroys=True, regions=3),
}
