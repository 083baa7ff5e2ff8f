"""What the gateway answers of itself, and `nearfield route`, which asks it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from nearfield.api.keys import Key, KeyTable, Scope, Snapshot, Tenant, key_mac, new_key, new_key_id
from nearfield.cli.main import main
from nearfield.edge.pages_models import ROUTE_PATH, STATUS_PATH, ModelPages

from tests.support.edge import Answered, get
from tests.support.regions import Plan, Running, Table, regions

PEPPER = b"p" * 32


@asynccontextmanager
async def two_regions() -> AsyncIterator[Running]:
    async with regions(Plan("eu", "eu"), Plan("us", "us")) as running:
        yield running["eu"]


async def page(region: Running, path: str, **headers: str) -> Answered:
    return await region.ask(get(path, **headers), "GET")


@dataclass
class Keys:
    """A table of keys, and what their owners hold."""

    table: KeyTable
    presented: dict[str, str]

    def sent(self, label: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.presented[label]}"}


def keys_of(**made: tuple[Sequence[Scope], dict[str, Any]]) -> Keys:
    """Keys by their label: scopes, and models, jurisdictions or product."""
    mac, keys, tenants, presented = key_mac(PEPPER), [], [], {}
    for label, (scopes, facts) in made.items():
        key_id = new_key_id()
        presented[label] = new_key(key_id)
        tenants.append(Tenant(label, facts.get("jurisdictions")))
        digest = mac(presented[label].encode()).hex()
        keys.append(
            Key(
                key_id,
                label,
                facts.get("product"),
                label,
                frozenset(scopes),
                facts.get("models"),
                digest,
            )
        )
    table = KeyTable(PEPPER)
    table.apply(Snapshot(1, tuple(tenants), (), tuple(keys)))
    return Keys(table, presented)


def closed(region: Running, keys: Keys) -> None:
    """From now on the pages ask for keys."""
    region.gateway.proxy.pages = Table(ModelPages(region.world, keys.table).routes())


async def test_models_are_listed_as_openai_does() -> None:
    async with two_regions() as eu:
        found = await page(eu, "/v1/models")
        told = found.json()
        assert told["object"] == "list"
        (model,) = told["data"]
        assert (model["id"], model["object"], model["owned_by"]) == ("chat", "model", "nearfield")
        assert abs(model["created"] - time.time()) < 60
        assert (await page(eu, "/v1/models/chat")).json() == model
        assert (await page(eu, "/chat/v1/models")).json() == told
        found = await page(eu, "/v1/models/other")
        assert (found.status, found.error["code"]) == (404, "model_not_found")
        assert (await page(eu, "/other/v1/models")).status == 404


async def test_the_open_inference_protocol_is_answered_where_it_can_be() -> None:
    async with two_regions() as eu:
        assert (await page(eu, "/v2")).json()["name"] == "nearfield"
        assert (await page(eu, "/v2/health/live")).json() == {"live": True}
        assert (await page(eu, "/v2/health/ready")).json() == {"ready": True}
        ready = {"name": "chat", "ready": True}
        for path in ("/v2/models/chat/ready", "/v2/models/chat/versions/1/ready"):
            assert (await page(eu, path)).json() == ready
        found = await page(eu, "/v2/models/chat/versions/7/ready")
        assert (found.status, list(found.json())) == (404, ["error"])
        assert (await page(eu, "/v2/models/other/ready")).status == 404


async def test_a_caller_sees_the_models_it_may_ask() -> None:
    keys = keys_of(
        all=(["inference"], {}),
        none=(["inference"], {"models": frozenset({"other"})}),
        elsewhere=(["inference"], {"jurisdictions": frozenset({"cn"})}),
    )
    async with two_regions() as eu:
        closed(eu, keys)
        assert (await page(eu, "/v1/models")).error["code"] == "missing_api_key"
        assert (await page(eu, "/v2/models/chat/ready")).status == 401
        assert len((await page(eu, "/v1/models", **keys.sent("all"))).json()["data"]) == 1
        for label in ("none", "elsewhere"):
            assert (await page(eu, "/v1/models", **keys.sent(label))).json()["data"] == []
            assert (await page(eu, "/v1/models/chat", **keys.sent(label))).status == 404
        assert (await page(eu, "/readyz")).status == 200


async def test_status_and_route_are_the_platforms() -> None:
    keys = keys_of(some=(["inference"], {}), tenant=(["admin"], {}), ops=(["platform"], {}))
    async with two_regions() as eu:
        closed(eu, keys)
        for path in (STATUS_PATH, f"{ROUTE_PATH}?model=chat"):
            assert (await page(eu, path)).status == 401
            for label, status in (("some", 403), ("tenant", 403), ("ops", 200)):
                assert (await page(eu, path, **keys.sent(label))).status == status


async def test_status_tells_of_every_region_endpoint_and_replica() -> None:
    async with two_regions() as eu:
        told = (await page(eu, STATUS_PATH)).json()
        assert (told["gateway"], told["home"], told["ready"]) == ("eu", "eu", True)
        ours, theirs = told["regions"]
        assert (ours["health"], theirs["health"], ours["rtt_s"]) == ("up", "up", None)
        assert 0 < theirs["rtt_s"] < 1
        (endpoint,) = ours["endpoints"]
        assert (endpoint["name"], endpoint["replicas"]) == ("eu/chat@1/default", 2)
        assert {each["health"] for each in endpoint["each"]} == {"up"}
        assert theirs["endpoints"][0]["each"] == []
        assert any(change["after"] == "up" for change in told["changes"])


async def test_a_decision_is_explained() -> None:
    async with two_regions() as eu:
        told = (await page(eu, f"{ROUTE_PATH}?model=chat&from=New%20York")).json()
        assert (told["region"], told["endpoint"]) == ("us", "us/chat@1/default")
        assert told["distances"] == "assumed"
        assert {line["endpoint"] for line in told["endpoints"]} == {
            "eu/chat@1/default", "us/chat@1/default",
        }  # fmt: skip
        told = (await page(eu, f"{ROUTE_PATH}?model=chat&from=New%20York&jurisdiction=eu")).json()
        assert told["region"] == "eu"
        told = (await page(eu, f"{ROUTE_PATH}?model=chat&jurisdiction=cn")).json()
        assert (told["endpoint"], told["refused"]["filter"]) == (None, "jurisdiction")
        told = (await page(eu, f"{ROUTE_PATH}?model=nothing")).json()
        assert told["refused"]["filter"] == "model"
        for wrong in ("", "model=chat&from=Atlantis", "model=chat&mode=fast", "model=chat&x=1",
                      "model=chat&slo_ms=-1", "model=chat&criticality=most"):  # fmt: skip
            assert (await page(eu, f"{ROUTE_PATH}?{wrong}")).status == 400


async def run(*arguments: str) -> int:
    """The command, beside the gateway that it asks."""
    return await asyncio.to_thread(main, ["route", *arguments])


async def test_the_command_prints_the_decision(capsys: pytest.CaptureFixture[str]) -> None:
    async with two_regions() as eu:
        gateway = ("--gateway", "http://{}:{}".format(*eu.address))
        assert await run("chat", "--from", "Boston", *gateway) == 0
        assert capsys.readouterr().out.startswith("us/chat@1/default: nearest; ")
        assert await run("chat", "--from", "Boston", "--explain", *gateway) == 0
        shown = capsys.readouterr().out
        assert "→" in shown
        assert "eu/chat@1/default" in shown
        assert "assumed" in shown
        assert await run("chat", "--json", *gateway) == 0
        assert json.loads(capsys.readouterr().out)["model"] == "chat"
        assert await run("chat", "--jurisdiction", "cn", *gateway) == 1
        assert "Refused (jurisdiction)" in capsys.readouterr().out
        assert await run("chat", "--from", "Atlantis", *gateway) == 2
        assert "not known" in capsys.readouterr().err


async def test_the_command_says_what_it_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = keys_of(ops=(["platform"], {}))
    async with two_regions() as eu:
        closed(eu, keys)
        gateway = ("--gateway", "http://{}:{}".format(*eu.address))
        assert await run("chat", *gateway) == 2
        assert "--key-file" in capsys.readouterr().err
        file = tmp_path / "key"
        file.write_text(keys.presented["ops"] + "\n")
        assert await run("chat", "--key-file", str(file), *gateway) == 0
    assert await run("chat", *gateway) == 1
    assert "does not answer" in capsys.readouterr().err
    assert await run("chat", "--gateway", "nonsense") == 1
