"""Replicas that die, refuse and drown, behind the real Gate, Retries and limiter."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from nearfield.api.keys import Tenant
from nearfield.policy.limit import Limit
from nearfield.store.sql import Store

from tests.support.edge import Answered, Heard, Upstream, answer, post
from tests.support.gates import key_of
from tests.support.gateways import Gateway, gateway
from tests.support.hosting import until

Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(f"sqlite:///{tmp_path / 'store.sqlite3'}")
    store.directory.add_tenant(Tenant("acme"))
    return store


@pytest.fixture
def authorization(store: Store) -> str:
    key, header = key_of(product=None)
    store.directory.add_key(key)
    return header.decode()


class Replica(Upstream):
    """Executes what it is sent; poison kills it: every connection is cut, and nobody listens."""

    def __init__(self) -> None:
        super().__init__()
        self.executed: list[str] = []
        self.hold = asyncio.Event()
        self.hold.set()
        self.dead = False
        self.writers: set[Writer] = set()

    async def echo(self, heard: Heard, reader: Reader, writer: Writer) -> None:
        body = json.loads(heard.body)
        if self.dead:
            raise ConnectionError
        self.writers.add(writer)
        try:
            if body.get("poison"):
                await asyncio.sleep(0.06)  # it is computed for a while
                self.die()
                raise ConnectionError
            await self.hold.wait()
            if self.dead:
                raise ConnectionError
        finally:
            self.writers.discard(writer)
        self.executed.append(body.get("id", ""))
        writer.write(answer(b"{}", content_type="application/json"))

    def die(self) -> None:
        self.dead = True
        assert self._server is not None
        self._server.close()
        for writer in self.writers:
            writer.transport.abort()
        self.hold.set()


@asynccontextmanager
async def replicas(count: int) -> AsyncIterator[list[Replica]]:
    running = [Replica() for _ in range(count)]
    for each in running:
        await each.start()
    try:
        yield running
    finally:
        for each in running:
            await each.close()


async def ask(own: Gateway, authorization: str, **body: object) -> Answered:
    return await own.running.ask(post({"model": "chat", **body}, authorization=authorization))


async def test_a_replica_dies_with_twenty_inside_and_nobody_notices(
    store: Store, authorization: str
) -> None:
    async with replicas(3) as (one, two, three):
        for each in (one, two, three):
            each.hold.clear()
        async with gateway(store, [each.target for each in (one, two, three)]) as own:
            asked = [asyncio.ensure_future(ask(own, authorization, id=str(n))) for n in range(60)]
            await until(lambda: len(one.writers) >= 15)
            one.die()
            two.hold.set()
            three.hold.set()
            found = await asyncio.gather(*asked)
        assert [each.status for each in found] == [200] * 60
        executed = one.executed + two.executed + three.executed
        assert sorted(executed) == sorted(str(n) for n in range(60)), "each of them once"


async def test_the_query_of_death_kills_two_and_is_refused_from_then_on(
    store: Store, authorization: str
) -> None:
    async with replicas(4) as running, gateway(store, [each.target for each in running]) as own:
        first = await ask(own, authorization, poison=1)
        assert (first.status, first.error["code"]) == (422, "request_quarantined")
        assert sum(each.dead for each in running) == 2
        for _ in range(50):
            refused = await ask(own, authorization, poison=1)
            assert (refused.status, refused.error["code"]) == (422, "request_quarantined")
            harmless = await ask(own, authorization, id="x")
            assert harmless.status == 200
        assert sum(each.dead for each in running) == 2


async def test_when_everything_refuses_hardly_more_is_asked_than_was_sent(
    store: Store, authorization: str
) -> None:
    async def handler(heard: Heard, reader: Reader, writer: Writer) -> None:
        writer.write(answer(b"{}", 503, retry_after="1"))

    async with replicas(3) as running:
        for each in running:
            each.handler = handler
        async with gateway(store, [each.target for each in running]) as own:
            for _ in range(15):
                found = await asyncio.gather(*(ask(own, authorization) for _ in range(20)))
                assert {each.status for each in found} == {503}
        assert 300 < sum(len(each.heard) for each in running) <= 1.2 * 300 + 3


async def test_a_full_upstream_sheds_the_least_critical_first(
    store: Store, authorization: str
) -> None:
    async with replicas(1) as (one,):
        one.hold.clear()
        async with gateway(store, [one.target], limit=Limit(value=10, most=10)) as own:

            async def say(level: str) -> Answered:
                request = post(authorization=authorization, x_nearfield_criticality=level)
                return await own.running.ask(request)

            running = [asyncio.ensure_future(say("sheddable")) for _ in range(6)]
            await until(lambda: len(one.heard) == 6)
            refused = await say("sheddable")
            assert (refused.status, refused.error["code"]) == (503, "overloaded")
            assert int(refused.headers["retry-after"]) >= 1
            running += [asyncio.ensure_future(say("default")) for _ in range(3)]
            await until(lambda: len(one.heard) == 9)
            assert (await say("default")).status == 503
            one.hold.set()
            assert {each.status for each in await asyncio.gather(*running)} == {200}


async def test_a_second_try_wins_where_it_was_asked_for(store: Store, authorization: str) -> None:
    async with replicas(2) as (slow, quick), gateway(store, [slow.target, quick.target]) as own:

        async def embed(**headers: str) -> Answered:
            headers = {"authorization": authorization, **headers}
            return await own.running.ask(post({"model": "chat"}, "/v1/embeddings", **headers))

        for _ in range(120):
            assert (await embed()).status == 200
        slow.hold.clear()
        outcomes = own.running.recorder.outcomes
        while len(outcomes[-1].attempts) == 1 or outcomes[-1].attempts[1].status != 200:
            # Until one is sent to the slow one first: it would wait there for ever.
            assert (await embed(x_nearfield_hedge="1")).status == 200
        first, second = outcomes[-1].attempts
        assert (first.leg.target, first.failure) == (slow.target, "cancelled")
        assert (second.leg.target, second.failure) == (quick.target, None)
        slow.hold.set()
