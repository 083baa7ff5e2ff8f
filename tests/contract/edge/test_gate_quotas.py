"""Quotas over real sockets and a real database: right across gateways, told in every answer."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import uvloop
from nearfield.api.keys import Tenant
from nearfield.policy.quota import Limits
from nearfield.store.sql import Store

from tests.support.edge import STREAM, Answered, Heard, Upstream, answer, chunk, post
from tests.support.gates import key_of
from tests.support.gateways import gateway
from tests.support.hosting import until

Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter
USAGE = {"prompt_tokens": 30, "completion_tokens": 20, "total_tokens": 50}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(f"sqlite:///{tmp_path / 'store.sqlite3'}")


def add_key(store: Store, limits: Limits, **fields: Any) -> str:
    """A key of acme's; returns the header's value."""
    if not store.directory.tenants():
        store.directory.add_tenant(Tenant("acme"))
    key, authorization = key_of(limits=limits, **fields)
    store.directory.add_key(key)
    return authorization.decode()


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    replica = Upstream()
    await replica.start()
    yield replica
    await replica.close()


class Site(threading.Thread):
    """A gateway with an event loop of its own, in a thread."""

    def __init__(self, store: Store, upstream: Upstream) -> None:
        super().__init__(daemon=True)
        self._store = store
        self._upstream = upstream
        self.address: tuple[str, int] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._leave = asyncio.Event()
        self.started = threading.Event()

    def run(self) -> None:
        uvloop.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._leave = asyncio.Event()
        try:
            async with gateway(self._store, [self._upstream.target]) as own:
                self.address = own.running.address
                self.started.set()
                await self._leave.wait()
        finally:
            self.started.set()

    def stop(self) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._leave.set)
        self.join(20)
        assert not self.is_alive()


async def status_of(address: tuple[str, int], request: bytes) -> tuple[int, bytes]:
    reader, writer = await asyncio.open_connection(*address)
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    writer.close()
    return int(head.split(b" ")[1]), head


async def test_two_hundred_in_parallel_at_a_quota_of_fifty_over_two_gateways(
    store: Store, upstream: Upstream
) -> None:
    authorization = add_key(store, Limits(requests_per_minute=50))
    sites = [Site(store, upstream) for _ in range(2)]
    for site in sites:
        site.start()
    try:
        for site in sites:
            await asyncio.to_thread(site.started.wait, 20)
        addresses = [site.address for site in sites]
        started_s = time.monotonic()
        request = post(authorization=authorization)
        asked = []
        for n in range(200):
            address = addresses[n % 2]
            assert address is not None
            asked.append(status_of(address, request))
        found = await asyncio.gather(*asked)
        refilled = int((time.monotonic() - started_s) * 50 / 60)
    finally:
        for site in sites:
            await asyncio.to_thread(site.stop)
    statuses = [status for status, _ in found]
    assert set(statuses) == {200, 429}
    assert 50 <= statuses.count(200) <= 50 + refilled
    assert len(upstream.heard) == statuses.count(200)
    refused = next(head for status, head in found if status == 429)
    assert b"\r\nretry-after: " in refused
    assert b"\r\nx-ratelimit-limit-requests: 50\r\n" in refused
    assert b"\r\nx-ratelimit-remaining-requests: 0\r\n" in refused


async def test_what_is_left_is_told_in_every_answer(store: Store, upstream: Upstream) -> None:
    authorization = add_key(store, Limits(requests_per_minute=100, tokens_per_minute=10_000))

    async def handler(heard: Heard, reader: Reader, writer: Writer) -> None:
        writer.write(answer(json.dumps({"usage": USAGE}).encode(), content_type="application/json"))

    upstream.handler = handler
    async with gateway(store, [upstream.target]) as own:

        async def ask(body: object = None, **headers: str) -> Answered:
            return await own.running.ask(post(body, authorization=authorization, **headers))

        def remaining(found: Answered, what: str) -> int:
            return int(found.headers[f"x-ratelimit-remaining-{what}"])

        first = await ask()
        assert first.headers["x-ratelimit-limit-requests"] == "100"
        assert first.headers["x-ratelimit-limit-tokens"] == "10000"
        assert set(first.headers) >= {"x-ratelimit-reset-requests", "x-ratelimit-reset-tokens"}
        assert remaining(first, "requests") == 99
        reserved = 10_000 - remaining(first, "tokens")
        assert reserved > 500, "what may come is reserved"
        second = await ask()
        spent = 10_000 - remaining(second, "tokens") - reserved
        # 167 tokens a second come back meanwhile, and are told with what is left.
        assert spent <= 100, "the first one was settled by what it used"
        bad = await ask(x_nearfield_mode="warp")
        assert (bad.status, bad.error["param"]) == (400, "x-nearfield-mode")
        assert remaining(bad, "requests") == 98, "refused before it was counted"
        wrong = await ask({"model": "a/b"})
        assert (wrong.status, wrong.error["code"]) == (404, "model_not_found")
        assert "x-ratelimit-limit-tokens" in wrong.headers
        large = await ask({"model": "chat", "max_tokens": 20_000})
        assert (large.status, large.error["code"]) == (429, "rate_limit_exceeded")
        assert large.error["type"] == "rate_limit_error"
        assert "retry-after" not in large.headers, "it would never fit"
        assert remaining(large, "tokens") > 9_000
        assert own.running.outcome.error == "rate_limit_exceeded", "the Recorder hears of it"


async def test_streams_are_counted_while_they_run(store: Store, upstream: Upstream) -> None:
    authorization = add_key(store, Limits(concurrent_streams=1))
    go_on = asyncio.Event()

    async def handler(heard: Heard, reader: Reader, writer: Writer) -> None:
        writer.write(STREAM + chunk(b"data: 1\n\n"))
        await writer.drain()
        await go_on.wait()
        writer.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")

    upstream.handler = handler
    body = {"model": "chat", "stream": True}
    async with gateway(store, [upstream.target]) as own:
        one = await own.running.client()
        one.send(post(body, authorization=authorization))
        await one.until(b"data: 1\n\n")
        second = await own.running.ask(post(body, authorization=authorization))
        assert second.status == 429
        one.reset()
        await until(lambda: not own.running.proxy.live)
        go_on.set()
        third = await own.running.ask(post(body, authorization=authorization))
        assert (third.status, third.complete) == (200, True)
        fourth = await own.running.ask(post(body, authorization=authorization))
        assert fourth.status == 200, "one that has ended is free at once"


async def test_a_client_that_leaves_while_its_share_is_fetched(
    store: Store, upstream: Upstream
) -> None:
    authorization = add_key(store, Limits(concurrent_streams=2))
    body = {"model": "chat", "stream": True}
    async with gateway(store, [upstream.target]) as own:
        for _ in range(8):
            client = await own.running.client()
            client.send(post(body, authorization=authorization))
            await asyncio.sleep(0.001)
            client.reset()
        await until(lambda: not own.running.proxy.live)
        found = await own.running.ask(post(body, authorization=authorization))
        assert found.status == 200


async def test_keys_are_refused_within_seconds_of_being_revoked(
    store: Store, upstream: Upstream
) -> None:
    authorization = add_key(store, Limits())
    async with gateway(store, [upstream.target]) as own:
        assert (await own.running.ask(post(authorization=authorization))).status == 200
        (key,) = store.directory.keys("acme")
        store.directory.revoke_key(key.id, now_s=time.time())
        deadline_s = time.monotonic() + 5.0
        while True:
            found = await own.running.ask(post(authorization=authorization))
            if found.status == 401:
                break
            assert time.monotonic() < deadline_s
        assert found.error["code"] == "key_revoked"
        assert found.headers["www-authenticate"] == "Bearer"
        none = await own.running.ask(post())
        assert (none.status, none.error["code"]) == (401, "missing_api_key")
