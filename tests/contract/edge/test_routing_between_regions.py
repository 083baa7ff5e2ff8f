"""Between regions, over real sockets: to another one when home cannot, never where one may not."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from nearfield.api.load import REGION_PATH, gateways_passport, parse_region
from nearfield.api.passport import Passport, PassportKeys
from nearfield.edge import follow
from nearfield.edge.proxy.listener import bind
from nearfield.policy.health import Rules
from nearfield.policy.limit import Limit

from tests.support.edge import Answered, Heard, answer, get, post
from tests.support.hosting import until
from tests.support.regions import Elsewhere, Plan, Running, edge, listen, regions

EU, US = Plan("eu", "eu"), Plan("us", "us")


@asynccontextmanager
async def told(*others: Elsewhere) -> AsyncIterator[None]:
    """These gateways run."""
    for other in others:
        await other.start()
    try:
        yield
    finally:
        for other in others:
            await other.close()


def place(found: Answered) -> str:
    assert found.status == 200, found
    return found.headers["x-nearfield-region"]


async def lose(region: Running) -> None:
    """All of the region but its gateway."""
    for replica in region.replicas:
        await replica.kill()
    await region.agent.close()


async def test_when_home_is_lost_another_region_answers() -> None:
    async with regions(EU, US) as running:
        eu, us = running["eu"], running["us"]
        await lose(eu)
        found = await asyncio.gather(*(eu.ask() for _ in range(20)))
        assert {place(each) for each in found} == {"us"}
        assert found[0].json()["replica"].startswith("us-")
        names = [name for name in found[0].headers if name.startswith("x-nearfield-")]
        assert "x-nearfield-reason" in names
        assert sum(us.world.books.own) == 0


async def _gone(region: Running, how: str) -> None:
    """Everything of a region but its gateway dies, as it may look from there."""

    async def nobody_behind(heard: Heard, reader: Any, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b"<html>no server is available</html>", 503))

    if how == "an ingress is left":  # HAProxy outlives a killed cluster
        region.agent.handler = nobody_behind
    for replica in region.replicas:
        await replica.kill()
    if how == "the replicas first":
        await asyncio.sleep(0.03)
    if how != "an ingress is left":
        await region.agent.close()


@pytest.mark.parametrize("how", ["at once", "the replicas first", "an ingress is left"])
@pytest.mark.parametrize("door", ["eu", "us", "edge"])
@pytest.mark.parametrize("replicas", [1, 2])
async def test_what_is_inside_a_region_that_dies_is_answered_by_another(
    door: str, how: str, replicas: int
) -> None:
    """Also by one that dies with its only replica, which might have died of a request."""
    plans = Plan("eu", replicas=replicas), US, Plan("edge", edge=True)
    async with regions(*plans, limit=Limit()) as running:
        eu, us = running["eu"], running["us"]
        for replica in eu.replicas:
            replica.hold_s = 30.0
        for replica in us.replicas:
            replica.hold_s = 0.1
        asked = [
            asyncio.create_task(running[door].ask(post({"model": "chat", "n": n})))
            for n in range(8)
        ]
        await until(
            lambda: sum(eu.world.books.own) + sum(us.world.books.own) > 0 or asked[0].done()
        )
        fresh = [asyncio.create_task(eu.ask(post({"model": "chat", "m": n}))) for n in range(4)]
        await until(lambda: sum(eu.world.running.own) >= 1)
        began_s = time.monotonic()
        await _gone(eu, how)
        found = await asyncio.gather(*asked, *fresh)
        # An ingress that lives a moment longer may start a replica for some.
        assert {place(each) for each in found} <= {"us", "eu"}
        assert sum(place(each) == "us" for each in found) >= 4
        assert time.monotonic() - began_s < 1.0


async def test_a_suspect_of_a_region_that_lives_does_not_leave_it() -> None:
    """Its only replica has died, of this request for all that is known; its agent answers."""
    plans = Plan("eu", replicas=1), US
    async with regions(*plans, limit=Limit()) as running:
        eu, us = running["eu"], running["us"]
        (only,) = eu.replicas
        only.hold_s = 30.0
        asked = []
        while not only.asked:
            body = {"model": "chat", "n": len(asked)}
            asked.append(asyncio.create_task(eu.ask(post(body, x_request_timeout_ms="800"))))
            await until(lambda: only.asked or asked[-1].done())
        await only.kill()
        found = await asyncio.gather(*asked)
        assert [each.status for each in found] == [200] * (len(asked) - 1) + [504]
        elsewhere = [heard.body for replica in us.replicas for heard in replica.asked]
        assert only.asked[0].body not in elsewhere


async def test_a_request_that_kills_takes_no_other_regions_replicas() -> None:
    async with regions(EU, US, Plan("edge", edge=True), limit=Limit()) as running:
        replicas = [*running["eu"].replicas, *running["us"].replicas]
        for replica in replicas:
            replica.dies_of = "poison"
        found = await running["edge"].ask(post({"model": "chat", "user": "poison"}))
        assert (found.status, found.error["code"]) == (422, "request_quarantined")
        dead = {replica.name[:2] for replica in replicas if not replica.alive}
        assert len(dead) == 1
        assert sum(not replica.alive for replica in replicas) == 2


async def test_a_regions_other_replica_is_tried_where_there_is_no_other_region() -> None:
    async with regions(EU, US, Plan("edge", edge=True), limit=Limit()) as running:
        eu, us = running["eu"], running["us"]
        eu.replicas[0].status = 500
        for n in range(12):
            found = await running["edge"].ask(post({"model": "chat", "n": n}, x_bound="eu"))
            assert (found.status, found.json()["replica"]) == (200, "eu-1")
            if eu.replicas[0].asked:
                break
        assert eu.replicas[0].asked
        assert all(not replica.asked for replica in us.replicas)


async def test_two_gateways_do_not_multiply_their_tries() -> None:
    async with regions(EU, Plan("edge", edge=True), limit=Limit()) as running:
        eu, edge_site = running["eu"], running["edge"]
        for replica in eu.replicas:
            replica.status = 500
        for n in range(10):
            asked = (edge_site.ask(post({"model": "chat", "n": [n, k]})) for k in range(20))
            assert {each.status for each in await asyncio.gather(*asked)} <= {500, 503}
        runs = sum(len(replica.asked) for replica in eu.replicas)
        assert runs <= 1.2 * 200 + 3


async def test_what_is_bound_stays_and_is_told_to_come_back() -> None:
    async with regions(EU, US) as running:
        eu, us = running["eu"], running["us"]
        assert place(await eu.ask(post({"model": "chat"}, x_bound="eu"))) == "eu"
        await lose(eu)
        for _ in range(5):
            found = await eu.ask(post({"model": "chat"}, x_bound="eu"))
            assert found.status == 503, found
            assert int(found.headers["retry-after"]) >= 1
        assert all(not replica.asked for replica in us.replicas)
        found = await eu.ask(post({"model": "chat"}, x_bound="cn"))
        assert (found.status, found.error["code"]) == (403, "outside_jurisdiction")


async def test_a_region_that_is_cut_off_loses_nothing() -> None:
    async with regions(EU, US, Plan("edge", "eu", edge=True)) as running:
        site = running["edge"]
        for region in ("eu", "us"):
            for replica in running[region].replicas:
                replica.hold_s = 0.1
        asked = [asyncio.create_task(site.ask()) for _ in range(30)]
        await until(lambda: sum(site.world.books.own) == 30)
        began_s = time.monotonic()
        await running["eu"].stop()
        del running["eu"]
        found = await asyncio.gather(*asked)
        assert all(each.status == 200 for each in found)
        assert place(await site.ask()) == "us"
        assert time.monotonic() - began_s < 5.0  # how fast it is, is measured in tests/chaos


async def test_a_request_from_a_gateway_is_served_at_home_or_not_at_all() -> None:
    async with regions(EU, US) as running:
        eu, us = running["eu"], running["us"]
        found = await eu.ask(post({"model": "chat"}, x_nearfield_from="us"))
        assert place(found) == "eu"
        assert "x-nearfield-reason" not in found.headers
        await lose(eu)
        await until(lambda: not eu.world.can_start)
        found = await eu.ask(post({"model": "chat"}, x_nearfield_from="us"))
        assert (found.status, found.headers["retry-after"] != "") == (503, True)
        assert all(not replica.asked for replica in us.replicas)
        found = await eu.ask(post({"model": "other"}, x_nearfield_from="us"))
        assert (found.status, found.error["code"]) == (503, "not_here")


async def test_the_model_in_the_path_is_named_to_the_next_gateway() -> None:
    async with regions(EU, US) as running:
        eu = running["eu"]
        await lose(eu)
        found = await eu.ask(get("/chat/v1/things?a=b"), "GET")
        assert found.json()["target"] == "/chat/v1/things?a=b"


async def test_one_retry_crosses_and_no_second_one() -> None:
    near, far, farther = (
        Elsewhere(n, "x", first_byte_s=s) for n, s in (("eu", 0.01), ("us", 0.1), ("in", 1))
    )
    async with (
        told(near, far, farther),
        edge(near, far, farther, eu="x", us="x", **{"in": "x"}) as site,
    ):
        near.status = 502
        assert place(await site.ask()) == "us"
        far.status = 502
        found = await site.ask()
        assert found.status == 502
        assert farther.asked == []
        assert sum(site.world.books.own) == 0


async def test_who_is_in_two_regions_as_they_die_is_answered_by_the_third() -> None:
    near, far, farther = (
        Elsewhere(n, "x", first_byte_s=s) for n, s in (("eu", 0.01), ("us", 0.1), ("in", 1))
    )
    async with (
        told(near, far, farther),
        edge(near, far, farther, eu="x", us="x", **{"in": "x"}) as site,
    ):
        near.hangs = far.hangs = True
        asked = asyncio.create_task(site.ask())
        for dying in (near, far):
            await until(lambda dying=dying: len(site.world.region(dying.name).running) == 1)
            await dying.close()
        assert place(await asked) == "in"


async def test_a_busy_region_sends_to_another_one() -> None:
    near, far = Elsewhere("eu", "x"), Elsewhere("us", "x", first_byte_s=0.2)
    async with told(near, far), edge(near, far, eu="x", us="x") as site:
        assert place(await site.ask()) == "eu"
        near.status = 429
        assert place(await site.ask()) == "us"


async def test_a_frozen_region_is_left_after_one_silent_probe() -> None:
    near, far = Elsewhere("eu", "x"), Elsewhere("us", "x", first_byte_s=0.2)
    async with told(near, far), edge(near, far, eu="x", us="x") as site:
        assert place(await site.ask()) == "eu"
        near.frozen = True
        began_s = time.monotonic()
        found = await asyncio.gather(*(site.ask() for _ in range(10)))
        assert {place(each) for each in found} == {"us"}
        assert time.monotonic() - began_s < 1.5  # late by 0.25 s, asked, and no answer in 0.7 s
        began_s = time.monotonic()
        assert place(await site.ask()) == "us"
        assert time.monotonic() - began_s < 0.1


async def test_a_region_that_hangs_on_requests_is_found_by_a_tiny_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quick = Rules(probe_s=0.1, deep_probe_s=0.1)
    monkeypatch.setattr(follow, "REGION_RULES", quick)
    monkeypatch.setattr(follow, "DEEP_LEAST_S", 0.2)
    monkeypatch.setattr(follow, "SWEEP_S", 0.05)
    near, far = Elsewhere("eu", "x"), Elsewhere("us", "x", first_byte_s=0.2)
    async with told(near, far), edge(near, far, eu="x", us="x") as site:
        assert place(await site.ask()) == "eu"
        near.hangs = True
        assert place(await site.ask()) == "us"
        near.hangs = False
        (known,) = site.world.region("eu").endpoints.values()
        assert known.state.health == "down"
        await until(lambda: known.state.health == "up")
        tiny = next(each for each in near.asked if each.target == "/v1/completions")
        assert json.loads(tiny.body) == {"model": "chat", "prompt": "1", "max_tokens": 1}


async def test_a_model_that_nobody_uses_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "REGION_RULES", Rules(probe_s=0.05, deep_probe_s=0.05))
    monkeypatch.setattr(follow, "SWEEP_S", 0.05)
    near = Elsewhere("eu", "x")
    async with told(near), edge(near, eu="x"):
        await until(lambda: len(near.heard) > 20)
        assert near.asked == []


async def test_a_region_that_lies_about_its_place_gets_nothing() -> None:
    near = Elsewhere("eu", "cn")
    async with told(near), edge(near, eu="eu") as site:
        found = await site.ask()
        assert found.status == 503, found
        assert near.asked == []


async def test_only_gateways_are_told_of_a_region() -> None:
    keys = PassportKeys.generate()
    async with regions(EU, US, passports=keys) as running:
        eu = running["eu"]
        assert eu.world.region("us").report is not None
        found = await eu.ask(get(REGION_PATH), "GET")
        assert (found.status, found.error["code"]) == (401, "passport_missing")
        now_ms = int(time.time() * 1000)
        ours = gateways_passport("q", now_ms=now_ms, timeout_ms=1000)
        tenants = Passport("t", None, "gateway", None, None, "q", "default", now_ms, now_ms, now_ms)
        for passport, status in ((ours, 200), (tenants, 403)):
            sent = keys.sign(passport).decode()
            found = await eu.ask(get(REGION_PATH, x_nearfield_passport=sent), "GET")
            assert found.status == status
        (told_of,) = parse_region((await _asked(eu, keys)).body).endpoints
        assert (told_of.model, told_of.replicas, told_of.slots) == ("chat", 2, 8)


async def _asked(region: Running, keys: PassportKeys) -> Answered:
    passport = gateways_passport("q", now_ms=int(time.time() * 1000), timeout_ms=1000)
    sent = keys.sign(passport).decode()
    return await region.ask(get(REGION_PATH, x_nearfield_passport=sent), "GET")


async def test_a_gateway_starts_while_the_control_plane_is_silent(tmp_path: Path) -> None:
    file = tmp_path / "world.json"
    async with regions(EU, last_good=file) as running:
        eu = running["eu"]
        await eu.follower.__aexit__()
        await eu.agent.close()
        assert file.exists()
        again = Running(EU, eu.agent, [], eu.site, ("", 0))
        socket = bind("127.0.0.1", 0)
        again.address = socket.getsockname()
        async with again.stack:
            await listen(again, socket)
            await again.follow()
            try:
                found = await again.ask()
                assert found.json()["replica"].startswith("eu-")
            finally:
                await again.hush()


@pytest.mark.parametrize("drains", [False, True])
async def test_ready_while_there_is_somewhere_to_send_to(drains: bool) -> None:
    near = Elsewhere("eu", "x")
    async with told(near), edge(near, eu="x") as site:
        assert (await site.ask(get("/readyz"), "GET")).status == 200
        if drains:
            site.world.draining = True
        else:
            await near.close()
            await until(lambda: not site.world.ready)
        for path in ("/readyz", "/v2/health/ready"):
            assert (await site.ask(get(path), "GET")).status == 503
        for path in ("/healthz", "/livez", "/v2/health/live"):
            assert (await site.ask(get(path), "GET")).status == 200
