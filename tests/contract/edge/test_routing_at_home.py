"""Inside a region, over real sockets: replicas that appear, leave, die, hang and start."""

from __future__ import annotations

import asyncio
import json
import time

from nearfield.edge.proxy.ports import Attempt

from tests.support.edge import get, post
from tests.support.hosting import until
from tests.support.regions import Plan, Replica, Running, application, regions

WITHIN_S = 1.0
"""Whatever happens to a replica is known by then."""


def served_by(body: bytes) -> str:
    name: str = json.loads(body)["replica"]
    return name


async def ask(region: Running, **headers: str) -> str:
    found = await region.ask(post({"model": "chat"}, **headers))
    assert found.status == 200, found
    return served_by(found.body)


def places(region: Running) -> set[str]:
    assert region.world.home is not None
    return {
        replica.id
        for known in region.world.home.endpoints.values()
        for replica in known.by_number.values()
    }


async def test_a_request_goes_straight_to_a_replica_and_says_where_and_why() -> None:
    async with regions(Plan("eu", replicas=1)) as running:
        eu = running["eu"]
        found = await eu.ask(post({"model": "chat"}))
        told = found.json()
        assert (told["replica"], told["target"]) == ("eu-0", "/chat/v1/chat/completions")
        assert found.headers["x-nearfield-region"] == "eu"
        assert found.headers["x-nearfield-endpoint"] == "eu/chat@1/default"
        assert found.headers["x-nearfield-replica"] == "eu-0"
        assert found.headers["x-nearfield-reason"].startswith("nearest; ")
        assert not any(name.startswith("x-nearfield-") for name in told["headers"])
        assert eu.agent.started == []


async def test_a_model_in_the_path_leads_there_too() -> None:
    async with regions(Plan("eu", replicas=1)) as running:
        found = await running["eu"].ask(get("/chat/v1/things"), "GET")
        assert found.json()["target"] == "/chat/v1/things"
        found = await running["eu"].ask(get("/v2/models/chat"), "GET")
        assert found.json()["target"] == "/chat/v2/models/chat"


async def test_what_no_model_is_named_for_is_refused() -> None:
    async with regions(Plan("eu", replicas=1)) as running:
        eu = running["eu"]
        assert (await eu.ask(post({"messages": []}))).error["code"] == "model_missing"
        assert (await eu.ask(post({"model": "x"}))).error["code"] == "model_not_found"
        found = await eu.ask(get("/v1/nothing"), "GET")
        assert (found.status, found.error["code"]) == (404, "path_not_found")


async def test_a_replica_that_appears_or_leaves_is_known_within_a_second() -> None:
    async with regions(Plan("eu", replicas=1)) as running:
        eu = running["eu"]
        began_s = time.monotonic()
        await eu.add("late")
        await until(lambda: "late" in places(eu), WITHIN_S)
        eu.name(eu.replicas[1:])
        await until(lambda: places(eu) == {"late"}, WITHIN_S)
        assert time.monotonic() - began_s < 2 * WITHIN_S
        assert {await ask(eu) for _ in range(5)} == {"late"}


async def test_load_is_shared_by_what_runs_where() -> None:
    async with regions(Plan("eu", replicas=2)) as running:
        eu = running["eu"]
        for replica in eu.replicas:
            replica.hold_s = 0.05
        names = await asyncio.gather(*(ask(eu) for _ in range(16)))
        assert sorted(names) == ["eu-0"] * 8 + ["eu-1"] * 8


async def test_a_replica_that_is_busy_with_others_work_is_left_alone() -> None:
    async with regions(Plan("eu", replicas=2)) as running:
        eu = running["eu"]
        eu.replicas[0].load = {"running": 4, "waiting": 10, "room": 6, "queue_age_s": 3.0}
        await until(lambda: eu.world.models["chat"][0].state.load == 14, WITHIN_S)
        assert {await ask(eu) for _ in range(6)} == {"eu-1"}


async def test_a_replica_that_is_killed_under_load_loses_nothing() -> None:
    async with regions(Plan("eu", replicas=3)) as running:
        eu = running["eu"]
        for replica in eu.replicas:
            replica.hold_s = 0.2
        asked = [asyncio.create_task(ask(eu)) for _ in range(30)]
        victim = eu.replicas[0]
        await until(lambda: len(victim.asked) >= 10)
        began_s = time.monotonic()
        await victim.kill()
        names = await asyncio.gather(*asked)
        assert len(names) == 30
        assert "eu-0" not in names
        assert places(eu) == {"eu-1", "eu-2"}  # although the agent still names it
        assert time.monotonic() - began_s < 1.5


async def test_a_replica_that_hangs_is_found_by_its_silence() -> None:
    async with regions(Plan("eu", replicas=2)) as running:
        eu = running["eu"]
        victim = eu.replicas[0]
        for replica in eu.replicas:
            replica.hold_s = 0.01
        victim.frozen = True
        began_s = time.monotonic()
        names = await asyncio.gather(*(ask(eu) for _ in range(12)))
        assert set(names) == {"eu-1"}
        assert time.monotonic() - began_s < 2.0
        victim.frozen = False
        await until(lambda: places(eu) == {"eu-0", "eu-1"}, 3.0)


async def test_one_whose_answers_are_errors_is_ejected() -> None:
    async with regions(Plan("eu", replicas=2)) as running:
        eu = running["eu"]
        eu.replicas[0].status = 502
        for _ in range(100):  # each is drawn: three in a row may take a while to come together
            assert await ask(eu) == "eu-1"
            if places(eu) == {"eu-1"}:
                break
        assert len(eu.replicas[0].asked) == 3
        assert {await ask(eu) for _ in range(12)} == {"eu-1"}
        assert len(eu.replicas[0].asked) == 3


async def test_the_only_replica_is_asked_again_when_a_kept_connection_had_died() -> None:
    async with regions(Plan("eu", replicas=1)) as running:
        eu = running["eu"]
        assert await ask(eu) == "eu-0"

        async def dies_once(heard, reader, writer):  # type: ignore[no-untyped-def]
            if heard.target.endswith("completions") and not eu.replicas[0].asked[1:]:
                eu.replicas[0].asked.append(heard)
                raise ConnectionError
            await replica_acts(heard, reader, writer)

        replica_acts, eu.replicas[0].handler = eu.replicas[0].handler, dies_once
        assert await ask(eu) == "eu-0"


async def test_a_model_at_zero_is_started_by_the_ingress() -> None:
    async with regions(Plan("eu", replicas=0)) as running:
        eu = running["eu"]
        found = await eu.ask(post({"model": "chat"}))
        assert served_by(found.body) == "started"
        assert "x-nearfield-replica" not in found.headers
        assert found.headers["x-nearfield-endpoint"] == "eu/chat@1/default"
        assert eu.agent.started[0].target == "/chat/v1/chat/completions"
        await eu.add("first")
        await until(lambda: places(eu) == {"first"}, WITHIN_S)
        assert await ask(eu) == "first"


async def test_when_the_last_replica_dies_its_requests_wait_for_the_next_one() -> None:
    async with regions(Plan("eu", replicas=1)) as running:
        eu = running["eu"]
        eu.replicas[0].hold_s = 5.0
        asked = asyncio.create_task(ask(eu))
        await until(lambda: eu.replicas[0].asked)
        await eu.replicas[0].kill()
        assert await asked == "started"


async def test_replicas_outlive_their_agent() -> None:
    async with regions(Plan("eu", replicas=1)) as running:
        eu = running["eu"]
        await eu.agent.close()
        await until(lambda: eu.world.home is not None and eu.world.home.fails >= 2)
        assert await ask(eu) == "eu-0"
        assert (await eu.ask(get("/readyz"), "GET")).status == 200


async def test_a_full_region_says_when_to_come_back() -> None:
    async with regions(Plan("eu", replicas=1)) as running:
        eu = running["eu"]
        eu.replicas[0].load = {"running": 4, "waiting": 16, "room": 0, "queue_age_s": 9.0}
        await until(lambda: eu.world.models["chat"][0].state.load == 20, WITHIN_S)
        found = await eu.ask(post({"model": "chat"}))
        assert (found.status, found.error["code"]) == (429, "queue_full")
        assert int(found.headers["retry-after"]) >= 1


async def test_a_client_that_leaves_is_taken_off_the_books() -> None:
    async with regions(Plan("eu", replicas=2)) as running:
        eu = running["eu"]
        for replica in eu.replicas:
            replica.hold_s = 30.0
        clients = [await eu.client() for _ in range(8)]
        for client in clients:
            client.send(post({"model": "chat"}))
        await until(lambda: sum(eu.world.running.own) == 8)
        for client in clients:
            client.reset()
        await until(lambda: sum(eu.world.running.own) == 0)
        assert sum(eu.world.books.own) == 0


async def test_suspects_are_tried_one_by_one_on_each_replica() -> None:
    async with regions(Plan("eu", replicas=2)) as running:
        eu = running["eu"]
        for replica in eu.replicas:
            replica.hold_s = 0.05
        at_once: dict[str, int] = {}
        began = eu.router.began

        def watch(attempt: Attempt) -> None:
            began(attempt)
            for replica in eu.world.replicas():
                at_once[replica.id] = max(at_once.get(replica.id, 0), replica.trials)

        eu.router.began = watch  # type: ignore[method-assign]
        asked = [ask(eu, x_trial=f"body-{number}") for number in range(8)]
        assert len(await asyncio.gather(*asked)) == 8
        assert at_once == {"eu-0": 1, "eu-1": 1}


async def test_a_trial_may_be_shorter_than_its_request() -> None:
    async with regions(Plan("eu", replicas=1)) as running:
        eu = running["eu"]
        eu.replicas[0].hold_s = 0.5
        began_s = time.monotonic()
        asked = [ask(eu, x_trial=f"body-{n}", x_trial_s="0.05") for n in range(4)]
        assert len(await asyncio.gather(*asked)) == 4
        took_s = time.monotonic() - began_s
        assert 0.5 + 3 * 0.05 < took_s < 4 * 0.5
        assert eu.world.replicas()[0].trials == 0


async def test_a_suspect_that_leaves_while_it_waits_blocks_nobody() -> None:
    async with regions(Plan("eu", replicas=1)) as running:
        eu = running["eu"]
        eu.replicas[0].hold_s = 0.2
        first = asyncio.create_task(ask(eu, x_trial="a"))
        await until(lambda: eu.replicas[0].asked)
        leaver = await eu.client()
        leaver.send(post({"model": "chat"}, x_trial="b"))
        await until(lambda: len(eu.gateway.proxy.live) == 2)
        leaver.reset()
        last = asyncio.create_task(ask(eu, x_trial="c"))
        assert await asyncio.gather(first, last) == ["eu-0", "eu-0"]
        assert len(eu.replicas[0].asked) == 2


async def test_the_same_body_is_on_trial_once_at_a_time() -> None:
    async with regions(Plan("eu", replicas=2)) as running:
        eu = running["eu"]
        for replica in eu.replicas:
            replica.hold_s = 0.1
        began_s = time.monotonic()
        await asyncio.gather(ask(eu, x_trial="same"), ask(eu, x_trial="same"))
        assert time.monotonic() - began_s > 0.19


async def test_a_fallback_model_answers_when_the_asked_one_cannot() -> None:
    async with regions(Plan("eu", replicas=0)) as running:
        eu = running["eu"]
        small = Replica("small-0", model="small")
        await small.start()
        chat = application([], fallback_models=["small"])
        chat["status"] = "DEPLOY_FAILED"
        eu.agent.applications = [chat, application([small], model="small")]
        await until(lambda: eu.world.has("small") and places(eu) == {"small-0"})
        body = b'{"messages": [ 1.50 ], "model": "chat", "n": 1}'
        found = await eu.ask(post(body))
        told = found.json()
        assert told["target"] == "/small/v1/chat/completions"
        assert json.loads(told["body"]) == {"messages": [1.5], "model": "small", "n": 1}
        assert found.headers["x-nearfield-degraded"] == "small"
        found = await eu.ask(post(b"{}", "/v2/models/chat/versions/1/infer"))
        assert found.json()["target"] == "/small/v2/models/small/infer"
        await small.close()
