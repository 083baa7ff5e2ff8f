"""Gateways over one store: what one does the others know, and what all of them may is one limit."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from nearfield.api.keys import (
    Key,
    KeyTable,
    Principal,
    Snapshot,
    Tenant,
    key_mac,
    new_key,
    new_key_id,
)
from nearfield.core.errors import NearfieldError, RateLimited, Unavailable
from nearfield.policy.quota import LEASE_S, RENEW_S, Claim, Grant, Lack, Limits, Reservation
from nearfield.store.follow import KeyFollower
from nearfield.store.shares import ShareKeeper
from nearfield.store.sql import Store

PEPPER = b"p" * 32


def add_key(store: Store, limits: Limits | None = None) -> tuple[Key, bytes]:
    """A key in the store, and the header of its owner."""
    key_id = new_key_id()
    presented = new_key(key_id)
    key = Key(
        key_id,
        "acme",
        None,
        "",
        frozenset({"inference"}),
        None,
        key_mac(PEPPER)(presented.encode()).hex(),
        limits or Limits(),
    )
    store.directory.add_key(key)
    return key, b"Bearer " + presented.encode()


def refusal(table: KeyTable, header: bytes) -> str | None:
    try:
        table.authenticate(header, time.time())
    except NearfieldError as error:
        return error.code
    return None


async def until(condition: Any, timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come true in time"
        await asyncio.sleep(0.01)


class Moody:
    """A port that can be gone, or answer after a while, and counts what it is asked."""

    def __init__(self, port: Any) -> None:
        self._port = port
        self.gone = False
        self.go_on = threading.Event()
        self.go_on.set()
        self.asked = 0

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self.asked += 1
            self.go_on.wait(10)
            if self.gone:
                raise Unavailable("gone")
            return getattr(self._port, name)(*arguments)

        return call


class TestKeys:
    async def test_what_one_changes_the_others_know_within_seconds(self, store: Store) -> None:
        store.directory.add_tenant(Tenant("acme"))
        async with (
            KeyFollower(store.directory, PEPPER) as one,
            KeyFollower(store.directory, PEPPER) as other,
        ):
            key, header = add_key(store)
            started_s = time.monotonic()
            await until(lambda: refusal(one.table, header) is None)
            store.directory.revoke_key(key.id, now_s=time.time())
            for follower in (one, other):
                await until(lambda f=follower: refusal(f.table, header) == "key_revoked")
            assert time.monotonic() - started_s < 5.0
            store.directory.change_tenant("acme", lambda t: replace(t, suspended=True))
            _, second = add_key(store)
            await until(lambda: refusal(other.table, second) == "tenant_suspended")

    async def test_without_the_store_the_last_good_state_is_served(self, local: Store) -> None:
        local.directory.add_tenant(Tenant("acme"))
        key, header = add_key(local)
        directory = Moody(local.directory)
        async with KeyFollower(directory, PEPPER, poll_s=0.01) as follower:
            directory.gone = True
            asked = directory.asked
            await until(lambda: directory.asked > asked + 3)
            assert refusal(follower.table, header) is None
            assert follower.silent_s > 0.02
            local.directory.revoke_key(key.id, now_s=time.time())
            directory.gone = False
            await until(lambda: refusal(follower.table, header) == "key_revoked")

    async def test_but_not_for_ever(self, local: Store) -> None:
        local.directory.add_tenant(Tenant("acme"))
        _, header = add_key(local)
        directory = Moody(local.directory)
        async with KeyFollower(directory, PEPPER, poll_s=0.01, grace_s=0.1) as follower:
            directory.gone = True
            await until(lambda: refusal(follower.table, header) == "keys_unverified")
            directory.gone = False
            await until(lambda: refusal(follower.table, header) is None)

    async def test_asking_costs_the_same_however_many_keys_there_are(self, local: Store) -> None:
        local.directory.add_tenant(Tenant("acme"))
        for _ in range(20):
            add_key(local)
        calls: list[str] = []

        class Counting(Moody):
            def __getattr__(self, name: str) -> Any:
                calls.append(name)
                return super().__getattr__(name)

        async with KeyFollower(Counting(local.directory), PEPPER, poll_s=0.01) as follower:
            assert len(follower.table) == 20
            await until(lambda: len(calls) > 10)
        assert calls[:2] == ["revision", "changes"]
        assert set(calls[2:]) == {"revision"}

    async def test_it_starts_from_its_file_when_the_store_is_gone(
        self, local: Store, tmp_path: Path
    ) -> None:
        local.directory.add_tenant(Tenant("acme"))
        key, header = add_key(local)
        last_good = tmp_path / "keys.json"
        async with KeyFollower(local.directory, PEPPER, last_good=last_good):
            assert last_good.stat().st_mode & 0o777 == 0o600
        assert b"pepper" not in last_good.read_bytes()
        directory = Moody(local.directory)
        directory.gone = True
        async with KeyFollower(directory, PEPPER, last_good=last_good, poll_s=0.01) as follower:
            assert refusal(follower.table, header) is None
            local.directory.revoke_key(key.id, now_s=time.time())
            directory.gone = False
            await until(lambda: refusal(follower.table, header) == "key_revoked")

    async def test_a_restart_does_not_begin_the_grace_anew(
        self, local: Store, tmp_path: Path
    ) -> None:
        import os

        local.directory.add_tenant(Tenant("acme"))
        _, header = add_key(local)
        last_good = tmp_path / "keys.json"
        async with KeyFollower(local.directory, PEPPER, last_good=last_good):
            pass
        long_ago_s = time.time() - 3600
        os.utime(last_good, (long_ago_s, long_ago_s))
        directory = Moody(local.directory)
        directory.gone = True
        async with KeyFollower(directory, PEPPER, last_good=last_good, grace_s=3000) as follower:
            assert refusal(follower.table, header) == "keys_unverified"

    async def test_without_store_and_file_it_does_not_start(
        self, local: Store, tmp_path: Path
    ) -> None:
        directory = Moody(local.directory)
        directory.gone = True
        for last_good in (None, tmp_path / "none.json"):
            with pytest.raises(Unavailable):
                async with KeyFollower(directory, PEPPER, last_good=last_good):
                    pass

    async def test_a_database_that_was_put_back_counts_anew(self, local: Store) -> None:
        local.directory.add_tenant(Tenant("acme"))
        _, header = add_key(local)

        class PutBack:
            back = False

            def revision(self) -> int:
                return 1 if self.back else local.directory.revision()

            def changes(self, since: int) -> Snapshot:
                return Snapshot(1) if self.back else local.directory.changes(since)

        directory: Any = PutBack()
        async with KeyFollower(directory, PEPPER, poll_s=0.01) as follower:
            assert refusal(follower.table, header) is None
            directory.back = True
            await until(lambda: refusal(follower.table, header) == "invalid_api_key")
            assert len(follower.table) == 0


def principal(store: Store, **limits: int) -> Principal:
    """A caller with limits on its key."""
    bounds = Limits(**limits)
    if not store.directory.tenants():
        store.directory.add_tenant(Tenant("acme"))
    key, header = add_key(store, bounds)
    table = KeyTable(PEPPER)
    table.apply(store.directory.changes(0))
    found = table.authenticate(header, time.time())
    assert found.limits == ((f"key:{key.id}", bounds),)
    return found


async def attempt(keeper: ShareKeeper, who: Principal, **fields: Any) -> Reservation | RateLimited:
    try:
        return await keeper.reserve(who, **{"tokens": 1, "stream": False, **fields})
    except RateLimited as error:
        return error


class TestQuotas:
    async def test_two_hundred_in_parallel_on_a_quota_of_fifty(self, store: Store) -> None:
        who = principal(store, requests_per_minute=50)
        async with (
            ShareKeeper(store.quotas, wait_s=5.0) as one,
            ShareKeeper(store.quotas, wait_s=5.0) as other,
        ):
            started_s = time.monotonic()
            done = await asyncio.gather(*(attempt((one, other)[n % 2], who) for n in range(200)))
            refilled = (time.monotonic() - started_s) * 50 / 60
            admitted = sum(isinstance(each, Reservation) for each in done)
            assert 50 <= admitted <= 50 + refilled
            refused = next(each for each in done if isinstance(each, RateLimited))
            assert refused.code == "rate_limit_exceeded"
            assert refused.retry_after_s is not None
            headers = dict(one.headers(who))
            assert headers[b"x-ratelimit-limit-requests"] == b"50"
            assert headers[b"x-ratelimit-remaining-requests"] == b"0"

    async def test_tokens_are_settled_and_shared(self, local: Store) -> None:
        who = principal(local, tokens_per_minute=1000)
        async with ShareKeeper(local.quotas) as one, ShareKeeper(local.quotas) as other:
            first = await attempt(one, who, tokens=900)
            assert isinstance(first, Reservation)
            assert isinstance(await attempt(other, who, tokens=900), RateLimited)
            first.settle(50)
            await until(lambda: not one._shares, timeout_s=3 * LEASE_S)
            await asyncio.sleep(RENEW_S)
            assert isinstance(await attempt(other, who, tokens=900), Reservation)

    async def test_memory_answers_once_a_caller_is_known(self, local: Store) -> None:
        who = principal(local, requests_per_minute=100_000)
        quotas = Moody(local.quotas)
        async with ShareKeeper(quotas) as keeper:
            assert isinstance(keeper.reserve_now(who, tokens=1, stream=False), Lack)
            for _ in range(5):
                await attempt(keeper, who)
            await asyncio.sleep(2 * RENEW_S)
            asked = quotas.asked
            done = [keeper.reserve_now(who, tokens=1, stream=False) for _ in range(2)]
            assert all(isinstance(each, Reservation) for each in done)
            assert quotas.asked == asked

    async def test_whoever_has_no_limit_never_asks(self, local: Store) -> None:
        who = replace(principal(local, requests_per_minute=1), limits=())
        quotas = Moody(local.quotas)
        async with ShareKeeper(quotas) as keeper:
            for _ in range(100):
                (await keeper.reserve(who, tokens=10**9, stream=True)).settle(10**9)
            assert keeper.headers(who) == []
        assert quotas.asked == 0

    async def test_a_storm_of_refused_requests_is_no_storm_on_the_store(self, local: Store) -> None:
        who = principal(local, requests_per_minute=6)
        quotas = Moody(local.quotas)
        async with ShareKeeper(quotas) as keeper:
            started_s = time.monotonic()
            while time.monotonic() < started_s + 1.0:
                await asyncio.gather(*(attempt(keeper, who) for _ in range(50)))
                await asyncio.sleep(0)
        assert quotas.asked < 20

    async def test_streams_are_counted_while_they_run(self, local: Store) -> None:
        who = principal(local, concurrent_streams=2)
        async with ShareKeeper(local.quotas) as keeper:
            running = [await attempt(keeper, who, stream=True) for _ in range(2)]
            assert isinstance(await attempt(keeper, who, stream=True), RateLimited)
            assert isinstance(await attempt(keeper, who, stream=False), Reservation)
            for each in running:
                assert isinstance(each, Reservation)
                each.settle(3)
                each.settle(3)
            assert isinstance(await attempt(keeper, who, stream=True), Reservation)

    async def test_what_is_left_is_given_back_at_the_end(self, store: Store) -> None:
        who = principal(store, requests_per_minute=100)
        async with ShareKeeper(store.quotas) as one:
            await asyncio.gather(*(attempt(one, who) for _ in range(30)))
            await asyncio.sleep(2 * RENEW_S)
            held = sum(share.available(time.monotonic()) for share in one._shares.values())
            assert held > 0
        async with ShareKeeper(store.quotas) as other:
            done = await asyncio.gather(*(attempt(other, who) for _ in range(100)))
        assert 70 <= sum(isinstance(each, Reservation) for each in done) <= 75

    async def test_without_the_store_it_goes_on_with_its_part(self, local: Store) -> None:
        who, stranger = (principal(local, requests_per_minute=600) for _ in range(2))
        quotas = Moody(local.quotas)
        async with ShareKeeper(quotas) as keeper, ShareKeeper(local.quotas) as other:
            for each in (keeper, other, keeper, other):
                await attempt(each, who)
            await asyncio.sleep(2 * RENEW_S)
            quotas.gone = True
            await asyncio.sleep(LEASE_S + 2 * RENEW_S)
            done = await asyncio.gather(*(attempt(keeper, who) for _ in range(700)))
            assert 250 <= sum(isinstance(each, Reservation) for each in done) <= 400
            assert isinstance(await attempt(keeper, stranger), Reservation)
            quotas.gone = False
            await until(lambda: all(s.offline_since_s is None for s in keeper._shares.values()))

    async def test_a_store_that_hangs_holds_nobody_up(self, local: Store) -> None:
        who = principal(local, requests_per_minute=60)
        quotas = Moody(local.quotas)
        quotas.go_on.clear()
        try:
            async with ShareKeeper(quotas, wait_s=0.2) as keeper:
                started_s = time.monotonic()
                done = await asyncio.gather(*(attempt(keeper, who) for _ in range(70)))
                assert time.monotonic() - started_s < 1.0
                assert sum(isinstance(each, Reservation) for each in done) == 60
                await asyncio.sleep(2.5)
                assert quotas.asked == 1, "one call hangs; no more are piled upon it"
                assert isinstance(await attempt(keeper, who), Reservation), "its part comes back"
        finally:
            quotas.go_on.set()

    async def test_a_limit_that_is_lifted_and_set_again(self, local: Store) -> None:
        """The caller's record still has it: the keys are followed a moment later."""
        who = principal(local, requests_per_minute=3)
        (key,) = local.directory.keys("acme")
        async with ShareKeeper(local.quotas) as keeper:
            assert isinstance(await attempt(keeper, who), Reservation)
            lifted = Moody(local.quotas)
            keeper._quotas = lifted
            lifted._port = _WithoutLimits()
            await until(lambda: isinstance(keeper.reserve_now(who, tokens=1, stream=False), Lack))
            done = [await attempt(keeper, who) for _ in range(100)]
            assert all(isinstance(each, Reservation) for each in done)
            keeper._quotas = local.quotas
            await asyncio.sleep(LEASE_S)
            done = [await attempt(keeper, who) for _ in range(100)]
            assert sum(isinstance(each, Reservation) for each in done) <= 3
            assert key.id in who.limits[0][0]


class _WithoutLimits:
    def renew(self, claims: Sequence[Claim]) -> list[Grant]:
        return [Grant(claim.subject, claim.dimension, None) for claim in claims]

    def sweep(self) -> int:
        return 0
