"""`Idempotency-Key` over real sockets and a real database: executed once, answered every time."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from nearfield.api.keys import Tenant
from nearfield.core.errors import Unavailable
from nearfield.edge.idempotency import LEASE_S
from nearfield.edge.proxy.ports import Target
from nearfield.store.ports import Claimed, InFlight
from nearfield.store.sql import Store

from tests.support.edge import (
    CHAT,
    STREAM,
    Answered,
    Client,
    Heard,
    Upstream,
    answer,
    chunk,
    post,
)
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
    key, header = key_of()
    store.directory.add_key(key)
    return header.decode()


class Counting(Upstream):
    """Answers with how many it has executed, when it is told to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.executed = 0
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.status = 200
        self.padding = b""

    async def echo(self, heard: Heard, reader: Reader, writer: Writer) -> None:
        gone = asyncio.ensure_future(self.gone(reader))
        going = asyncio.ensure_future(self.go_on.wait())
        await asyncio.wait({gone, going}, return_when=asyncio.FIRST_COMPLETED)
        going.cancel()
        if self.left.is_set():
            raise ConnectionError
        gone.cancel()
        self.executed += 1
        body = json.dumps({"executed": self.executed}).encode() + self.padding
        writer.write(
            answer(body, self.status, content_type="application/json", x_nearfield_endpoint="here")
        )


@pytest.fixture
async def upstream() -> AsyncIterator[Counting]:
    replica = Counting()
    await replica.start()
    yield replica
    await replica.close()


Ask = Callable[..., Awaitable[Answered]]


def asking(own: Gateway, authorization: str) -> Ask:
    async def ask(
        body: object = None, key: str = "i1", target: str = CHAT, **headers: str
    ) -> Answered:
        headers = {"authorization": authorization, "idempotency-key": key, **headers}
        return await own.running.ask(post(body, target, **headers))

    return ask


def replayed(found: Answered) -> bool:
    return found.headers.get("idempotent-replayed") == "true"


async def test_the_second_one_gets_the_answer_of_the_first(
    store: Store, upstream: Counting, authorization: str
) -> None:
    async with gateway(store, [upstream.target]) as own:
        ask = asking(own, authorization)
        first = await ask()
        assert (first.status, first.json()) == (200, {"executed": 1})
        assert not replayed(first)
        again = await ask()
        assert (again.status, again.body, again.complete) == (200, first.body, True)
        assert replayed(again)
        assert again.headers["content-type"] == "application/json"
        assert again.headers["x-nearfield-endpoint"] == "here"
        assert again.headers["x-request-id"] != first.headers["x-request-id"]
        assert (await ask(key="i2")).json() == {"executed": 2}
        assert upstream.executed == 2


async def test_twenty_at_once_are_one_execution(
    store: Store, upstream: Counting, authorization: str
) -> None:
    upstream.go_on.clear()
    async with gateway(store, [upstream.target]) as own:
        ask = asking(own, authorization)
        asked = [asyncio.ensure_future(ask()) for _ in range(20)]
        await until(lambda: len(upstream.heard) == 1)
        await until(lambda: own.keyed.unbalanced == 20)
        upstream.go_on.set()
        found = await asyncio.gather(*asked)
        assert upstream.executed == 1
        assert {each.body for each in found} == {b'{"executed": 1}'}
        assert sum(not replayed(each) for each in found) == 1


async def test_another_request_with_the_same_key(
    store: Store, upstream: Counting, authorization: str
) -> None:
    upstream.go_on.clear()
    async with gateway(store, [upstream.target]) as own:
        ask = asking(own, authorization)
        first = asyncio.ensure_future(ask())
        await until(lambda: upstream.heard)
        for _ in range(2):  # while the first one runs, and after it
            other = await ask({"model": "chat", "n": 2})
            assert (other.status, other.error["code"]) == (422, "idempotency_key_reused")
            assert other.error["param"] == "idempotency-key"
            upstream.go_on.set()
            assert (await first).status == 200
        assert upstream.executed == 1


async def test_keys_are_the_tenants_own(
    store: Store, upstream: Counting, authorization: str
) -> None:
    store.directory.add_tenant(Tenant("zeta"))
    key, header = key_of("zeta")
    store.directory.add_key(key)
    async with gateway(store, [upstream.target]) as own:
        assert (await asking(own, authorization)()).json() == {"executed": 1}
        assert (await asking(own, header.decode())()).json() == {"executed": 2}


async def test_streams_are_kept_too(store: Store, upstream: Counting, authorization: str) -> None:
    async def handler(heard: Heard, reader: Reader, writer: Writer) -> None:
        upstream.executed += 1
        writer.write(STREAM + chunk(b"data: 1\n\n") + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")

    upstream.handler = handler
    async with gateway(store, [upstream.target]) as own:
        ask = asking(own, authorization)
        body = {"model": "chat", "stream": True}
        first, again = await ask(body), await ask(body)
        assert first.body == again.body == b"data: 1\n\ndata: [DONE]\n\n"
        assert replayed(again)
        assert again.headers["content-type"] == "text/event-stream"
        assert upstream.executed == 1


async def test_what_is_too_large_is_not_kept_and_not_executed_again(
    store: Store, upstream: Counting, authorization: str
) -> None:
    upstream.padding = b" " * 5000
    async with gateway(store, [upstream.target], most_bytes=4096) as own:
        ask = asking(own, authorization)
        first = await ask()
        assert (first.status, len(first.body)) == (200, 5015)
        again = await ask()
        assert (again.status, again.error["code"]) == (409, "idempotent_answer_not_kept")
        assert upstream.executed == 1


@pytest.mark.parametrize(("status", "executed"), [(400, 1), (404, 1), (429, 2), (500, 2), (503, 2)])
async def test_what_is_an_execution(
    store: Store, upstream: Counting, authorization: str, status: int, executed: int
) -> None:
    upstream.status = status
    async with gateway(store, [upstream.target]) as own:
        ask = asking(own, authorization)
        first = await ask()
        assert first.status == status
        upstream.status = 200
        upstream.executed = 1
        again = await ask()
        assert upstream.executed == executed
        assert again.status == (status if executed == 1 else 200)


async def test_a_refusal_leaves_the_key_as_it_was(
    store: Store, upstream: Counting, authorization: str
) -> None:
    async with gateway(store, [Target("127.0.0.1", 1)]) as own:
        ask = asking(own, authorization)
        for _ in range(2):
            assert (await ask()).status == 503
    async with gateway(store, [upstream.target]) as own:
        assert (await asking(own, authorization)()).json() == {"executed": 1}


async def test_a_client_that_leaves_finds_its_answer_when_it_comes_back(
    store: Store, upstream: Counting, authorization: str
) -> None:
    upstream.go_on.clear()
    async with gateway(store, [upstream.target]) as own:
        client = await own.running.client()
        client.send(post(authorization=authorization, idempotency_key="i1"))
        await until(lambda: upstream.heard)
        client.reset()
        await until(lambda: not own.running.proxy.clients)
        again = asyncio.ensure_future(asking(own, authorization)())
        await until(lambda: own.keyed.unbalanced == 2)
        upstream.go_on.set()
        found = await again
        assert (found.json(), replayed(found)) == ({"executed": 1}, True)
        assert upstream.executed == 1
        assert own.running.recorder.outcomes[0].error is None


async def test_a_run_without_a_client_does_not_outlive_its_gateway(
    store: Store, upstream: Counting, authorization: str
) -> None:
    upstream.go_on.clear()
    async with gateway(store, [upstream.target]) as own:
        client = await own.running.client()
        client.send(post(authorization=authorization, idempotency_key="i1"))
        await until(lambda: upstream.heard)
        client.reset()
        await until(lambda: not own.running.proxy.clients)
    assert upstream.executed == 0
    upstream.go_on.set()
    async with gateway(store, [upstream.target]) as own:
        upstream.left.clear()
        assert (await asking(own, authorization)()).json() == {"executed": 1}


async def test_who_waits_too_long_is_told_so(
    store: Store, upstream: Counting, authorization: str
) -> None:
    upstream.go_on.clear()
    async with gateway(store, [upstream.target]) as own:
        ask = asking(own, authorization)
        first = asyncio.ensure_future(ask())
        await until(lambda: upstream.heard)
        second = await ask(x_request_timeout_ms="200")
        assert (second.status, second.error["code"]) == (409, "idempotency_in_flight")
        assert second.headers["retry-after"] == "1"
        upstream.go_on.set()
        assert (await first).status == 200


async def test_gateways_that_share_a_store_execute_it_once(
    store: Store, upstream: Counting, authorization: str
) -> None:
    upstream.go_on.clear()
    async with (
        gateway(store, [upstream.target], lease_s=0.4) as one,
        gateway(store, [upstream.target], lease_s=0.4) as other,
    ):
        asked = [asyncio.ensure_future(asking(g, authorization)()) for g in (one, other) * 3]
        await until(lambda: upstream.heard)
        await asyncio.sleep(1.0)  # leases have ended twice by now, and were extended
        upstream.go_on.set()
        found = await asyncio.gather(*asked)
        assert upstream.executed == len(upstream.heard) == 1
        assert {each.body for each in found} == {b'{"executed": 1}'}


async def test_a_gateway_that_is_killed_is_succeeded_by_another(
    store: Store, upstream: Counting, authorization: str, tmp_path: Path
) -> None:
    upstream.go_on.clear()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.support.gateways",
        f"sqlite:///{tmp_path / 'store.sqlite3'}", str(upstream.target.port), str(LEASE_S),
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        port = int(await asyncio.wait_for(process.stdout.readline(), 30))
        client = Client(*await asyncio.open_connection("127.0.0.1", port))
        client.send(post(authorization=authorization, idempotency_key="i1"))
        await until(lambda: upstream.heard)
    finally:
        process.kill()
        killed_s = time.monotonic()
        await process.wait()
    await asyncio.wait_for(upstream.left.wait(), 5)  # what ran for it was cancelled
    upstream.left.clear()
    client.close()
    upstream.go_on.set()
    async with gateway(store, [upstream.target]) as own:
        found = await asking(own, authorization)()
        assert (found.status, found.json()) == (200, {"executed": 1})
        assert not replayed(found)
        assert time.monotonic() - killed_s < 1.5
        again = await asking(own, authorization)()
        assert replayed(again)
    assert upstream.executed == 1


async def test_a_gateway_that_stands_still_for_less_is_not_taken_for_dead(
    store: Store, upstream: Counting, authorization: str
) -> None:
    """Its event loop does nothing for longer than a lease: another thread says that it lives."""
    upstream.go_on.clear()
    async with gateway(store, [upstream.target], lease_s=0.2) as own:
        first = asyncio.ensure_future(asking(own, authorization)())
        await until(lambda: upstream.heard)
        time.sleep(0.5)  # noqa: ASYNC251 - that is the fault
        (row,) = own.keyed._claims
        found = await asyncio.to_thread(
            store.idempotency.claim, "acme", "i1",
            fingerprint=str(row.line.fingerprint), owner="other", lease_s=1.0,
        )  # fmt: skip
        assert isinstance(found, InFlight)
        assert found.lease_left_s <= 0.2, "it has said so just now"
        upstream.go_on.set()
        assert (await first).status == 200


async def test_what_may_have_had_effects_is_not_run_again(
    store: Store, upstream: Counting, authorization: str
) -> None:
    async with gateway(store, [upstream.target]) as own:
        ask = asking(own, authorization)
        target = "/chat/v1/things"
        first = await ask(target=target, key="i1")
        assert first.json() == {"executed": 1}
        assert replayed(await ask(target=target, key="i1"))
        # Another gateway died over this one.
        body = json.dumps({"model": "chat"}).encode()
        import hashlib

        fingerprint = hashlib.blake2b(b"POST /chat/v1/things\n" + body, digest_size=16).hexdigest()
        claimed = store.idempotency.claim(
            "acme", "i2", fingerprint=fingerprint, owner="dead", lease_s=0.0
        )
        assert isinstance(claimed, Claimed)
        for _ in range(2):
            found = await ask(target=target, key="i2")
            assert found.status == 409
            assert found.error["code"] == "idempotency_outcome_unknown"
        assert upstream.executed == 1


class Gone:
    """A store's part that can be gone."""

    def __init__(self, store: Store) -> None:
        self._port = store.idempotency
        self.gone = False

    def __getattr__(self, name: str) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            if self.gone:
                raise Unavailable("gone", code="database_unavailable", retry_after_s=2.0)
            found: object = getattr(self._port, name)(*arguments, **named)
            return found

        return call


async def test_while_the_store_is_gone_no_promise_is_made(
    store: Store, upstream: Counting, authorization: str
) -> None:
    gone = Gone(store)
    async with gateway(store, [upstream.target], idempotency=gone) as own:  # type: ignore[arg-type]
        ask = asking(own, authorization)
        gone.gone = True
        refused = await ask()
        assert (refused.status, refused.error["code"]) == (503, "database_unavailable")
        assert refused.headers["retry-after"] == "2"
        unkeyed = await own.running.ask(post(authorization=authorization))
        assert unkeyed.status == 200
        gone.gone = False
        assert (await ask()).json() == {"executed": 2}


async def test_a_store_that_hangs_holds_nobody_up(
    store: Store, upstream: Counting, authorization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nearfield.edge.idempotency.ASK_S", 0.1)
    go_on = threading.Event()

    class Hangs(Gone):
        def __getattr__(self, name: str) -> Callable[..., object]:
            go_on.wait(10)
            return super().__getattr__(name)

    port: Any = Hangs(store)
    async with gateway(store, [upstream.target], idempotency=port) as own:
        ask = asking(own, authorization)
        try:
            found = await ask()
            assert (found.status, found.error["code"]) == (503, "database_unavailable")
            client = await own.running.client()  # and one that does not even wait so long
            client.send(post(authorization=authorization, idempotency_key="i2"))
            await until(lambda: own.keyed.unbalanced == 2)
            client.reset()
        finally:
            go_on.set()
        await until(lambda: not own.keyed.unbalanced)
        assert upstream.executed == 0
        for key in ("i1", "i2"):  # what was claimed after all was given back
            assert not replayed(await ask(key=key))
        assert upstream.executed == 2


async def test_an_answer_that_cannot_be_kept_is_kept_when_the_store_is_back(
    store: Store, upstream: Counting, authorization: str
) -> None:
    gone = Gone(store)
    upstream.go_on.clear()
    async with gateway(store, [upstream.target], idempotency=gone) as own:  # type: ignore[arg-type]
        ask = asking(own, authorization)
        first = asyncio.ensure_future(ask())
        await until(lambda: upstream.heard)
        gone.gone = True
        upstream.go_on.set()
        assert (await first).status == 200
        meanwhile = await ask()
        assert replayed(meanwhile), "this process knows it"
        gone.gone = False
        await until(lambda: not own.keyed.unbalanced)
    async with gateway(store, [upstream.target]) as own:
        assert replayed(await asking(own, authorization)())
    assert upstream.executed == 1


async def test_a_stream_that_ends_with_an_error_is_no_answer(
    store: Store, upstream: Counting, authorization: str
) -> None:
    async def handler(heard: Heard, reader: Reader, writer: Writer) -> None:
        upstream.executed += 1
        last = b"data: [DONE]\n\n"
        if upstream.executed == 1:
            last = b'data: {"error":{"message":"x","type":"server_error","code":"x"}}\n\n'
        writer.write(STREAM + chunk(b"data: 1\n\n") + chunk(last) + b"0\r\n\r\n")

    upstream.handler = handler
    async with gateway(store, [upstream.target]) as own:
        ask = asking(own, authorization)
        body = {"model": "chat", "stream": True}
        assert b"error" in (await ask(body)).body
        assert b"[DONE]" in (await ask(body)).body
        assert replayed(await ask(body))
        assert upstream.executed == 2


async def test_duplicates_cost_the_store_little(
    store: Store, upstream: Counting, authorization: str
) -> None:
    """Who waits in this process waits for it, not by asking the store."""
    calls: list[str] = []

    class Counted(Gone):
        def __getattr__(self, name: str) -> Callable[..., object]:
            calls.append(name)
            return super().__getattr__(name)

    upstream.go_on.clear()
    counted = Counted(store)
    async with gateway(store, [upstream.target], idempotency=counted) as own:  # type: ignore[arg-type]
        ask = asking(own, authorization)
        asked = [asyncio.ensure_future(ask()) for _ in range(30)]
        await until(lambda: own.keyed.unbalanced == 30)
        await asyncio.sleep(0.2)
        upstream.go_on.set()
        await asyncio.gather(*asked)
        await until(lambda: not own.keyed.unbalanced)
    assert calls.count("claim") == 1
    assert calls.count("complete") == 1


async def test_too_many_duplicates_are_turned_away(
    store: Store, upstream: Counting, authorization: str
) -> None:
    upstream.go_on.clear()
    async with gateway(store, [upstream.target]) as own:
        ask = asking(own, authorization)
        asked = [asyncio.ensure_future(ask()) for _ in range(70)]
        started_s = time.monotonic()
        await until(lambda: sum(each.done() for each in asked) == 6)
        assert time.monotonic() - started_s < 5.0
        upstream.go_on.set()
        statuses = [each.status for each in await asyncio.gather(*asked)]
        assert (statuses.count(200), statuses.count(409)) == (64, 6)
