"""The composition root: a whole gateway in this process, and a region that does as it is told."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from nearfield.api.keys import Tenant
from nearfield.api.passport import HEADER, PassportKeys
from nearfield.core.errors import BadRequest, Unavailable
from nearfield.core.settings import Settings
from nearfield.edge.files import read
from nearfield.edge.gateway import Gateway, Place
from nearfield.edge.proxy.listener import bind
from nearfield.store.administration import Administration, open_pepper
from nearfield.store.forms import NewKey
from nearfield.store.sql import Store

from tests.support.hosting import until
from tests.support.processes import write_files
from tests.support.regions import Agent, Replica, application

QUESTION = {"model": "chat", "messages": [{"role": "user", "content": "hello"}]}


@asynccontextmanager
async def region() -> AsyncIterator[tuple[Agent, Replica]]:
    """An agent, and one replica of `chat`."""
    agent, replica = Agent(), Replica("r1")
    await agent.start()
    await replica.start()
    agent.applications = [application([replica])]
    try:
        yield agent, replica
    finally:
        await replica.close()
        await agent.close()


class Site:
    """A gateway's files and its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = Settings.from_env({"NEARFIELD_HOME": str(folder)})
        PassportKeys.generate().save(folder / "passports.json")

    @asynccontextmanager
    async def gateway(self, agent: Agent, **file: Any) -> AsyncIterator[tuple[Gateway, str]]:
        path = write_files(self.folder, agent.target.port, **file)
        place = Place(self.folder / "state", self.settings, {}, log_to=None)
        listening = bind("127.0.0.1", 0)
        async with Gateway(read(path), place) as gateway:
            await gateway.listen([listening])
            yield gateway, f"http://127.0.0.1:{listening.getsockname()[1]}"
            await gateway.drain(5.0)
            assert gateway.proxy.unbalanced() == []

    @property
    def with_store(self) -> dict[str, Any]:
        return {"store": self.settings.database_url, "passport_keys": "passports.json"}

    def key(self, *scopes: Any) -> dict[str, str]:
        """A new tenant's key, as a header."""
        store = Store(self.settings.database_url)
        administration = Administration(store, open_pepper(store, self.settings.key_pepper_file))
        if not store.directory.tenants():
            store.directory.add_tenant(Tenant("acme"))
        _, presented = administration.create_key(NewKey(tenant="acme", scopes=list(scopes)))
        store.close()
        return {"authorization": f"Bearer {presented}"}


@pytest.fixture
def site(tmp_path: Path) -> Site:
    (tmp_path / "state").mkdir()
    return Site(tmp_path)


async def test_without_a_store_anybody_may_call(site: Site) -> None:
    async with region() as (agent, replica), site.gateway(agent) as (_, url):
        async with httpx.AsyncClient(base_url=url) as client:
            answer = await client.post("/v1/chat/completions", json=QUESTION)
            assert answer.status_code == 200
            assert answer.headers["x-nearfield-endpoint"] == "eu-west/chat@1/default"
            assert answer.json()["replica"] == "r1"
            assert [model["id"] for model in (await client.get("/v1/models")).json()["data"]] == [
                "chat"
            ]
            assert (await client.get("/readyz")).status_code == 200
            assert (await client.get("/console")).status_code == 200
            state = (await client.get("/console/data/state")).json()
            assert [each["name"] for each in state["regions"]] == ["eu-west"]
            assert "gen_ai_server_request_duration" in (await client.get("/metrics")).text
            route = await client.get("/-/nearfield/route", params={"model": "chat"})
            assert route.json()["endpoint"] == "eu-west/chat@1/default"
            assert (await client.get("/admin/v1/keys")).status_code == 404
        assert len(replica.asked) == 1
        assert HEADER.decode() not in replica.asked[0].headers


async def test_with_a_store_a_key_is_needed_and_replicas_get_passports(site: Site) -> None:
    ours, admins = site.key("inference"), site.key("platform")
    async with (
        region() as (agent, replica),
        site.gateway(agent, **site.with_store) as (_, url),
        httpx.AsyncClient(base_url=url) as client,
    ):
        assert (await client.post("/v1/chat/completions", json=QUESTION)).status_code == 401
        answer = await client.post("/v1/chat/completions", json=QUESTION, headers=ours)
        assert answer.status_code == 200
        assert (await client.get("/admin/v1/keys", headers=ours)).status_code == 403
        listed = await client.get("/admin/v1/keys", headers=admins)
        assert len(listed.json()["data"]) == 2
        seen = await client.get("/admin/v1/requests", headers=admins)
        assert {each["status"] for each in seen.json()["data"]} == {200, 401}
        assert (await client.get("/console/data/state", headers=ours)).status_code == 403
        assert (await client.get("/console/data/state", headers=admins)).status_code == 200
        sent = replica.asked[0].headers[HEADER.decode()]
    keys = PassportKeys.load(site.folder / "passports.json")
    passport = keys.verify(sent.encode(), now_ms=_now_ms())
    assert (passport.tenant, passport.models) == ("acme", None)
    store = Store(site.settings.database_url)
    totals = store.ledger.totals(["outcome"])
    store.close()
    assert [(each.group, each.requests) for each in totals] == [(("ok",), 1)], "billed at the end"


async def test_new_passport_keys_are_taken_over_while_it_runs(site: Site) -> None:
    async with (
        region() as (agent, replica),
        site.gateway(agent, passport_keys="passports.json") as (gateway, url),
        httpx.AsyncClient(base_url=url) as client,
    ):
        before = gateway.world.passports
        (site.folder / "passports.json").write_text("no json")
        await until(lambda: gateway.world.passports is before)
        new = PassportKeys.generate()
        new.save(site.folder / "passports.json")
        await until(lambda: gateway.world.passports is not before)
        assert (await client.post("/v1/chat/completions", json=QUESTION)).status_code == 200
        new.verify(replica.asked[-1].headers[HEADER.decode()].encode(), now_ms=_now_ms())


async def test_it_starts_without_the_store_if_it_has_met_it(site: Site) -> None:
    ours = site.key("inference")
    broken = {**site.with_store, "store": f"sqlite:///{site.folder}/passports.json/x.sqlite3"}
    async with region() as (agent, _):
        with pytest.raises(Unavailable):
            async with site.gateway(agent, **broken):
                pass
        async with site.gateway(agent, **site.with_store):
            pass
        async with site.gateway(agent, **broken) as (_, url), httpx.AsyncClient() as client:
            answer = await client.post(f"{url}/v1/chat/completions", json=QUESTION, headers=ours)
            assert answer.status_code == 200


async def test_the_last_good_state_carries_over_a_silent_region(site: Site) -> None:
    async with region() as (agent, replica):
        async with site.gateway(agent):
            pass
        assert json.loads((site.folder / "state" / "world.json").read_text())["targets"]
        agent.silent = True
        async with site.gateway(agent) as (gateway, url), httpx.AsyncClient() as client:
            await until(lambda: gateway.world.ready)
            answer = await client.post(f"{url}/v1/chat/completions", json=QUESTION)
            assert answer.status_code == 200
        assert len(replica.asked) == 1


async def test_a_drain_is_seen_by_probes_and_ends_feeds(site: Site) -> None:
    async with (
        region() as (agent, _),
        site.gateway(agent) as (gateway, url),
        httpx.AsyncClient(base_url=url) as client,
        client.stream("GET", "/console/data/feed") as feed,
    ):
        assert feed.status_code == 200
        assert await gateway.drain(5.0) == 0
        async for _ in feed.aiter_bytes():
            pass
        with pytest.raises(httpx.ConnectError):
            await client.get("/healthz")


async def test_a_certificate_that_cannot_be_used_is_named(site: Site) -> None:
    tls = {"port": 0, "tls": {"certificate": "none.pem", "key": "none.key"}}
    async with region() as (agent, _):
        with pytest.raises(BadRequest, match=r"none\.pem"):
            async with site.gateway(agent, listen=tls):
                pass


def _now_ms() -> int:
    return int(time.time() * 1000)
