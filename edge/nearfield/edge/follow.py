"""Asks everybody how they are, at a constant pace whatever happens, and tells the World.

    home's agent        four times a second    which replicas are there
    home's replicas     four times a second    what each has to do
    other regions       once a second, ± 20 %  their endpoints; how far they are; at once, if
                                               requests there are overdue or the way seems longer
    what is in use      every five seconds     a tiny inference, if none has been answered since

and at once whoever has just failed a request's connection; if that was a replica, all of home: did
a request kill it, or is the region lost? A question that is not answered is
evidence, unless it was this process that stood still. A tiny inference goes only to what requests
are sent to: a model that nobody uses is left alone, or it would never scale to zero.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Self, TypeVar

from nearfield.api.load import (
    LOAD_PATH,
    REGION_PATH,
    TARGETS_PATH,
    gateways_passport,
    parse_load,
    parse_region,
    parse_targets,
)
from nearfield.api.passport import HEADER
from nearfield.edge import last_good
from nearfield.edge.beliefs import Peer
from nearfield.edge.decisions import FROM
from nearfield.edge.elsewhere import Region
from nearfield.edge.home import HomeEndpoint, Replica
from nearfield.edge.known import Known
from nearfield.edge.proxy.ports import Target
from nearfield.edge.questions import LATE_S, Questions, Reply, Silent
from nearfield.edge.world import HOME_RULES, World
from nearfield.policy.health import Rules, patience_s, probe_after_s

log = logging.getLogger("nearfield.edge.follow")

ROUND_S = 0.1
"""How often what was heard becomes what requests are routed by."""
GAP_S = 0.05
"""Shortest time between two questions to the same, however doubtful it is."""
START_S = 0.5
"""How long the start waits for first answers. Whoever is silent then is heard later."""
SWEEP_S = 1.0
SAVE_S = 10.0
"""The last good state is written down no more often than this."""
IN_USE_S = 60.0
"""What has had a request of ours within so long is in use."""
DEEP_TIMES = 10.0
"""A tiny inference may take this many times what a request's first byte takes, ..."""
DEEP_LEAST_S, DEEP_MOST_S = 2.0, 10.0
"""... but no less, and no more than this."""
SIGNED_S = 20.0
"""How long one passport serves for questions: a third of its life."""

REGION_RULES = Rules()
Told = TypeVar("Told")


class Follower:
    """Follows the world. Enter it to begin; it has asked everybody once by then.

    async with Follower(world):
        ...
    """

    def __init__(self, world: World, *, seed: int | None = None) -> None:
        self._world = world
        self._draw = random.Random(seed).random
        self._tasks: dict[object, asyncio.Task[None]] = {}
        self._hurries: dict[Peer, asyncio.Event] = {}
        self._deep: set[asyncio.Task[None]] = set()
        self._signed: tuple[float, object, bytes] = (0.0, None, b"")
        self._from = b"%b: %b\r\n" % (FROM, world.site.gateway.encode("ascii"))

    async def __aenter__(self) -> Self:
        self._questions = Questions()
        world = self._world
        try:
            async with asyncio.timeout(START_S):
                await asyncio.gather(
                    self._ask_home(), *(self._ask_region(region) for region in world.others)
                )
        except TimeoutError:
            log.warning("not everybody was heard before the start")
        world.round()
        world.doubt = self._hurry
        if world.home is not None:
            home = world.region(world.home.region)
            self._start("home", self._repeat(self._ask_agent, HOME_RULES, home))
        for region in world.others:
            work = self._repeat(partial(self._ask_region, region), REGION_RULES, region)
            self._start(region, work)
        self._attend()
        self._start("round", self._rounds())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._world.doubt = _nobody
        tasks = [*self._tasks.values(), *self._deep]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks.clear()
        self._questions.close()
        await self._save()

    # ---- the clockwork ----------------------------------------------------------------------

    def _start(self, key: object, work: Coroutine[Any, Any, None]) -> None:
        self._tasks[key] = asyncio.create_task(work, name=f"follow {key}")

    async def _repeat(self, ask: Callable[[], Awaitable[None]], rules: Rules, peer: Peer) -> None:
        """Ask, wait, ask; sooner where `peer` is in doubt."""
        loop = asyncio.get_running_loop()
        due = self._hurries[peer] = asyncio.Event()
        try:
            while True:
                began_s = loop.time()
                after_s = probe_after_s(rules, self._draw())
                timer = loop.call_at(began_s + after_s, due.set)
                try:
                    await ask()
                except Exception:
                    # A mistake of ours must not end the following: the next round may do.
                    log.exception("a question failed unexpectedly")
                await due.wait()
                timer.cancel()
                due.clear()
                early_s = began_s + GAP_S - loop.time()
                if early_s > 0:
                    await asyncio.sleep(early_s)
        finally:
            self._hurries.pop(peer, None)

    def _hurry(self, peer: Peer) -> None:
        due = self._hurries.get(peer)
        if due is not None:
            due.set()

    async def _rounds(self) -> None:
        loop = asyncio.get_running_loop()
        swept_s = saved_s = loop.time()
        while True:
            await asyncio.sleep(ROUND_S)
            try:
                self._world.round()
                self._attend()
                now_s = loop.time()
                if now_s >= swept_s + SWEEP_S:
                    swept_s = now_s
                    self._questions.sweep()
                    self._ask_deeply()
                if now_s >= saved_s + SAVE_S:
                    saved_s = now_s
                    await self._save()
            except Exception:
                log.exception("a round of following failed unexpectedly")

    def _attend(self) -> None:
        """One watcher for every replica that is there, and none for the others."""
        there = set(self._world.replicas())
        for replica in there:
            if replica not in self._tasks:
                work = self._repeat(partial(self._ask_replica, replica), HOME_RULES, replica)
                self._start(replica, work)
        for key in [k for k in self._tasks if isinstance(k, Replica) and k not in there]:
            self._tasks.pop(key).cancel()

    async def _save(self) -> None:
        path = self._world.site.last_good
        if path is None or not self._world.models:
            return  # nothing is known: what was kept before is better
        try:
            await asyncio.to_thread(last_good.save, path, self._world.last_good())
        except OSError as error:
            log.warning("the last good state could not be written: %s", error)

    # ---- questions --------------------------------------------------------------------------

    async def _ask_home(self) -> None:
        if self._world.home is None:
            return
        await self._ask_agent()
        await asyncio.gather(*(self._ask_replica(each) for each in self._world.replicas()))

    async def _ask_agent(self) -> None:
        world = self._world
        assert world.home is not None
        sent_s = world.clock()
        try:
            reply = await self._get(world.home.serve, TARGETS_PATH, HOME_RULES.probe_timeout_s)
            targets = _read(reply, parse_targets)
        except Silent as silent:
            if not silent.void:
                world.agent_silent(silent.reason, sent_s)
            return
        world.agent_answered(targets, sent_s)
        self._attend_soon()

    def _attend_soon(self) -> None:
        if "round" in self._tasks:  # else it is the start, which asks them itself
            self._attend()

    async def _ask_replica(self, replica: Replica) -> None:
        world, number = self._world, replica.number
        own_at, work_at = world.running.own[number], world.running.work[number]
        sent_s = world.clock()
        try:
            reply = await self._get(replica.target, LOAD_PATH, HOME_RULES.probe_timeout_s)
            load = _read(reply, parse_load)
        except Silent as silent:
            if not silent.void:
                world.replica_silent(replica, silent.reason, sent_s)
            return
        world.replica_answered(replica, load, own_at, work_at, sent_s)

    async def _ask_region(self, region: Region) -> None:
        world = self._world
        assert region.target is not None
        own = world.books.own
        own_at = {known.number: own[known.number] for known in region.endpoints.values()}
        sent_s = region.asked_s = world.clock()
        try:
            reply = await self._get_region(region, region.target)
            report = _read(reply, parse_region)
        except Silent as silent:
            if not silent.void:
                world.region_silent(region, silent.reason, sent_s)
            return
        world.region_answered(region, report, reply.took_s, own_at, sent_s)

    async def _get_region(self, region: Region, target: Target) -> Reply:
        """Its answer.

        Raises:
            Silent: there is none in time; that comes sooner where requests are overdue too.
        """
        loop, rules = asyncio.get_running_loop(), REGION_RULES
        asking = loop.create_task(self._get(target, REGION_PATH, rules.probe_timeout_s))
        after_s = patience_s(rules, way_s=region.rtt.level_s)
        due_s = loop.time() + after_s
        try:
            await asyncio.wait((asking,), timeout=after_s)
            if not asking.done() and loop.time() < due_s + LATE_S and self._world.overdue(region):
                raise Silent("no answer in time, as to requests")
            return await asking
        finally:
            asking.cancel()

    async def _get(self, target: Target, path: str, timeout_s: float) -> Reply:
        headers = self._signature()
        return await self._questions.ask(target, path.encode("ascii"), timeout_s, headers=headers)

    def _signature(self) -> bytes:
        """The header lines that say who asks."""
        keys = self._world.passports
        if keys is None:
            return self._from
        made_s, with_keys, line = self._signed
        now_s = self._world.clock()
        if with_keys is keys and now_s < made_s + SIGNED_S:
            return line
        passport = gateways_passport(
            "question", now_ms=int(time.time() * 1000), timeout_ms=int(DEEP_MOST_S * 1000)
        )
        line = self._from + b"%b: %b\r\n" % (HEADER, keys.sign(passport))
        self._signed = (now_s, keys, line)
        return line

    # ---- tiny inferences --------------------------------------------------------------------

    def _ask_deeply(self) -> None:
        """Start those that are due."""
        world = self._world
        for endpoints in world.models.values():
            for known in endpoints:
                if not known.free:
                    continue
                if isinstance(known, HomeEndpoint):
                    for replica in known.replicas.values():
                        if replica.gone_s is None and self._due(replica, known, replica):
                            self._start_deep(replica, known, [replica])
                elif known.state.replicas and self._due(known.answers, known, known):
                    pools = [k for k in endpoints if _same_but_for_pool(k, known)]
                    self._start_deep(known.answers, known, pools)

    def _due(self, peer: Peer, known: Known, asked: Replica | Known) -> bool:
        now_s = self._world.clock()
        if now_s < peer.deep_s or not known.endpoint.current:
            return False
        if self._world.deep_down(asked):
            return True
        if isinstance(asked, Replica):
            load = asked.load
            if load is None or load.running + load.waiting >= load.slots:
                return False  # it would wait behind requests, and tell of nothing but them
        in_use = now_s < known.answers.used_s + IN_USE_S
        return in_use and now_s >= peer.good_s + REGION_RULES.deep_probe_s

    def _start_deep(self, peer: Peer, known: Known, about: Sequence[Replica | Known]) -> None:
        question = _tiny(known)
        target = peer.target if isinstance(peer, Replica) else known.target
        if question is None or target is None:
            return
        peer.deep_s = self._world.clock() + probe_after_s(REGION_RULES, self._draw(), deep=True)
        task = asyncio.create_task(self._deeply(target, known, question, about), name="deep")
        self._deep.add(task)
        task.add_done_callback(self._deep.discard)

    async def _deeply(
        self, target: Target, known: Known, question: tuple[bytes, bytes],
        about: Sequence[Replica | Known],
    ) -> None:  # fmt: skip
        path, body = question
        patience_s = max(DEEP_LEAST_S, min(DEEP_MOST_S, DEEP_TIMES * known.state.first_byte_s))
        sent_s = self._world.clock()
        headers = self._signature() + b"x-request-timeout-ms: %d\r\n" % int(patience_s * 1000)
        reason, passed = "", True
        try:
            reply = await self._questions.ask(
                target, path, patience_s, method=b"POST", headers=headers, body=body
            )
        except Silent as silent:
            if silent.void:
                return
            reason, passed = silent.reason, False
        else:
            if reply.status in (401, 403, 429) or (reply.status == 503 and reply.retry_after):
                return  # we may not ask, or it is busy: that says nothing about its health
            reason, passed = f"answered {reply.status}", reply.status < 500
        for each in about:
            self._world.deep_probed(each, passed, sent_s, reason)


def _tiny(known: Known) -> tuple[bytes, bytes] | None:
    """Path and body of the smallest inference; None where what the model takes is not known."""
    model = known.endpoint.model
    if known.kind == "generate":
        return b"/v1/completions", _json({"model": model, "prompt": "1", "max_tokens": 1})
    if known.kind == "embed":
        return b"/v1/embeddings", _json({"model": model, "input": "1"})
    return None


def _json(data: dict[str, object]) -> bytes:
    return json.dumps(data).encode()


def _same_but_for_pool(one: Known, other: Known) -> bool:
    """A question for the one may be answered by the other."""
    a, b = one.endpoint, other.endpoint
    return (a.region, a.model, a.version) == (b.region, b.model, b.version)


def _read(reply: Reply, parse: Callable[[bytes], Told]) -> Told:
    """
    Raises:
        Silent: it is no answer to the question.
    """
    if reply.status != 200:
        raise Silent(f"answered {reply.status}")
    try:
        return parse(reply.body)
    except ValueError as error:
        raise Silent(f"its answer cannot be read: {str(error).splitlines()[0]}") from None


def _nobody(_: Peer) -> None:
    """Nobody follows."""
