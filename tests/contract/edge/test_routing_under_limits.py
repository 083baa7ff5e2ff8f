"""The limiter before the real Router: others first, the limit is found, the least critical go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from nearfield.policy.limit import Limit

from tests.support.edge import Client, post
from tests.support.hosting import until
from tests.support.regions import Plan, Running, regions

CRITICAL, DEFAULT, SHEDDABLE = "critical", "default", "sheddable"
TEN = Limit(value=10.0, most=10.0)
"""Ten critical requests at once; nine, or six, of the others."""
LONG_S = 60.0
CALLERS = 40
LATE_S = 0.8


class Crowd:
    """Requests at one region's gateway, which stay until they are sent home."""

    def __init__(self, region: Running, all_regions: Sequence[Running]) -> None:
        self.taken = 0
        self._region = region
        self._replicas = [replica for each in all_regions for replica in each.replicas]
        self._clients: list[Client] = []
        for replica in self._replicas:
            replica.hold_s = LONG_S

    async def join(self, level: str, **headers: str) -> bool:
        """One more of that level; False: it was refused as `overloaded`."""
        outcomes = self._region.gateway.recorder.outcomes
        before, refused = self._asked(), len(outcomes)
        client = await self._region.client()
        client.send(post({"model": "chat"}, x_claims=level, **headers))
        await until(lambda: self._asked() > before or len(outcomes) > refused)
        if self._asked() > before:
            self._clients.append(client)
            self.taken += 1
            return True
        found = await client.answer()
        assert (found.status, found.error["code"]) == (503, "overloaded")
        assert int(found.headers["retry-after"]) >= 1
        return False

    async def fill(self, level: str, **headers: str) -> int:
        """As many of that level as are taken; how many there are then, of all levels."""
        while await self.join(level, **headers):
            pass
        return self.taken

    async def leave(self) -> None:
        for replica in self._replicas:
            replica.hold_s = 0.0
        for client in self._clients:
            client.reset()
        await until(lambda: not self._region.limited.unbalanced)

    def _asked(self) -> int:
        return sum(len(replica.asked) for replica in self._replicas)


async def test_all_replicas_are_filled_and_then_the_least_critical_refused_first() -> None:
    async with regions(Plan("eu", replicas=2), limit=TEN) as running:
        eu = running["eu"]
        crowd = Crowd(eu, [eu])
        assert await crowd.fill(SHEDDABLE) == 2 * 6
        assert await crowd.fill(DEFAULT) == 2 * 9
        assert await crowd.fill(CRITICAL) == 2 * 10
        assert [len(replica.asked) for replica in eu.replicas] == [10, 10]
        for level in (CRITICAL, DEFAULT, SHEDDABLE):
            assert not await crowd.join(level)
        await crowd.leave()
        found = await eu.ask(post({"model": "chat"}, x_claims=SHEDDABLE))
        assert found.status == 200


async def test_another_region_is_filled_before_anybody_is_refused() -> None:
    async with regions(Plan("eu", replicas=1), Plan("us", "us", 1), limit=TEN) as running:
        eu, us = running["eu"], running["us"]
        crowd = Crowd(eu, [eu, us])
        assert await crowd.fill(DEFAULT) == 9 + 9
        assert [len(each.replicas[0].asked) for each in (eu, us)] == [9, 9]
        assert await crowd.fill(CRITICAL) == 10 + 10
        await crowd.leave()


async def test_whoever_must_stay_here_is_refused_although_there_is_room_elsewhere() -> None:
    async with regions(Plan("eu", replicas=1), Plan("us", "us", 1), limit=TEN) as running:
        eu, us = running["eu"], running["us"]
        crowd = Crowd(eu, [eu, us])
        assert await crowd.fill(DEFAULT, x_bound="eu") == 9
        assert us.replicas[0].asked == []
        assert await crowd.join(DEFAULT), "nobody else is held to that"
        await crowd.leave()


@asynccontextmanager
async def callers(region: Running, count: int) -> AsyncIterator[list[int]]:
    """So many who ask for a stream again and again; the statuses that they get."""
    statuses: list[int] = []

    async def call() -> None:
        client = await region.client()
        while True:
            client.send(post({"model": "chat", "stream": True}))
            found = await client.answer()
            statuses.append(found.status)
            if found.status != 200:
                await asyncio.sleep(0.02)  # its Retry-After, for somebody in a hurry

    tasks = [asyncio.create_task(call()) for _ in range(count)]
    try:
        yield statuses
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for client in region.gateway.clients:
            client.reset()


async def test_first_tokens_that_come_late_lower_the_limit_until_somebody_is_shed() -> None:
    async with regions(Plan("eu", replicas=1), limit=Limit()) as running:
        eu = running["eu"]
        (replica,) = eu.replicas
        async with callers(eu, 4):
            await until(lambda: any(each.baseline_s for each in eu.limited.limits()))
        (known,) = eu.limited.limits()
        assert known.limit == Limit().most, "what is not late tells of no limit"
        replica.hold_s = LATE_S
        async with callers(eu, CALLERS) as statuses:
            await until(lambda: 503 in statuses, timeout_s=30.0)
            (known,) = eu.limited.limits()
            assert known.limit * 0.9 < CALLERS + 1
            assert known.in_flight <= known.limit
            least, most = await asyncio.gather(
                *(
                    eu.ask(post({"model": "chat"}, x_claims=level))
                    for level in (SHEDDABLE, CRITICAL)
                )
            )
        assert (least.status, least.error["code"]) == (503, "overloaded")
        assert most.status == 200
