"""Who may call a replica: every route against everything that may stand in its headers."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from nearfield.api.keys import (
    Key,
    KeyTable,
    Snapshot,
    Tenant,
    key_mac,
    new_key,
    new_key_id,
    save_keys,
)
from nearfield.api.load import LOAD_PATH, gateways_passport
from nearfield.api.passport import Passport, PassportKeys
from nearfield.core.errors import BadRequest, Forbidden, NearfieldError, Unauthenticated
from nearfield.core.settings import Settings
from nearfield.policy.endpoints import CRITICALITIES, QUEUE_SHARES
from nearfield.serving.access import LOOK_S, Access, Door

from tests.support.hosting import PROGRAMS, until
from tests.support.serving import Served, served, spec_of

PEPPER = b"p" * 32
GATEWAYS = PassportKeys.generate()


def passport(**changes: Any) -> Passport:
    now_ms = int(time.time() * 1000)
    made = Passport(
        tenant="acme",
        product="web",
        key_id="k",
        models=("test",),
        jurisdictions=("eu",),
        request_id="req-1",
        criticality="default",
        issued_ms=now_ms,
        expires_ms=now_ms + 60_000,
        deadline_ms=now_ms + 30_000,
    )
    return replace(made, **changes)


def key(**fields: Any) -> tuple[Key, str]:
    key_id = new_key_id()
    presented = new_key(key_id)
    made: dict[str, Any] = {
        "id": key_id,
        "tenant": "acme",
        "product": None,
        "label": "",
        "scopes": frozenset({"inference"}),
        "models": None,
        "digest": key_mac(PEPPER)(presented.encode()).hex(),
        **fields,
    }
    return Key(**made), presented


def write_keys(path: Path, *keys: Key) -> None:
    tenants = (Tenant("acme"), Tenant("bad", suspended=True), Tenant("us", frozenset({"us"})))
    save_keys(path, Snapshot(1, tenants, (), keys), pepper=PEPPER)


IN = 0
CREDENTIALS: dict[str, tuple[dict[str, str], dict[Door, int]]] = {}
"""By name: headers, and the status that each door answers them with; `IN`: let in."""


def _credentials(folder: Path) -> None:
    now_s = time.time()
    made = {
        "good key": (key(), IN, 403),
        "revoked key": (key(revoked_s=now_s - 1), 401, 401),
        "expired key": (key(expires_s=now_s - 1), 401, 401),
        "suspended tenant's key": (key(tenant="bad"), 403, 403),
        "key for the US": (key(tenant="us"), 403, 403),
        "admin's key": (key(scopes=frozenset({"admin"})), 403, 403),
        "platform's key": (key(scopes=frozenset({"platform"})), 403, IN),
        "other model's key": (key(models=frozenset({"other"})), 403, 403),
        "unknown key": (key(), 401, 401),
    }
    write_keys(
        folder / "keys.json", *(k for name, ((k, _), *_) in made.items() if "unknown" not in name)
    )
    for name, ((_, presented), inference, operation) in made.items():
        headers = {"authorization": f"Bearer {presented}"}
        CREDENTIALS[name] = (headers, {"inference": inference, "operation": operation})
    now_ms = int(now_s * 1000)
    gateways_own = gateways_passport("req-1", now_ms=now_ms, timeout_ms=30_000)
    passports = {
        "good passport": (GATEWAYS.sign(passport()), IN, 403),
        "passport for any": (GATEWAYS.sign(passport(models=None, jurisdictions=None)), IN, 403),
        "gateway's own passport": (GATEWAYS.sign(gateways_own), IN, IN),
        "expired passport": (GATEWAYS.sign(passport(expires_ms=now_ms - 3_600_000)), 401, 401),
        "future passport": (GATEWAYS.sign(passport(issued_ms=now_ms + 3_600_000)), 401, 401),
        "others' passport": (PassportKeys.generate().sign(passport()), 401, 401),
        "rubbish passport": (b"1.2.3.4", 401, 401),
        "other model's passport": (GATEWAYS.sign(passport(models=("other",))), 403, 403),
        "no model's passport": (GATEWAYS.sign(passport(models=())), 403, 403),
        "passport for the US": (GATEWAYS.sign(passport(jurisdictions=("us",))), 403, 403),
    }
    for name, (signed, inference, operation) in passports.items():
        headers = {"x-nearfield-passport": signed.decode()}
        CREDENTIALS[name] = (headers, {"inference": inference, "operation": operation})
    nobody: dict[Door, int] = {"inference": 401, "operation": 401}
    CREDENTIALS["nothing"] = ({}, nobody)
    basic = "Basic " + base64.b64encode(b"a:b").decode()
    CREDENTIALS["basic"] = ({"authorization": basic}, nobody)
    CREDENTIALS["injection"] = ({"authorization": "Bearer ' OR '1'='1"}, nobody)
    good, bad = CREDENTIALS["good key"][0], CREDENTIALS["rubbish passport"][0]
    CREDENTIALS["good key, rubbish passport"] = ({**good, **bad}, nobody)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def closed(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    folder = tmp_path_factory.mktemp("access")
    _credentials(folder)
    GATEWAYS.save(folder / "passports.json")
    access = Access(
        "test",
        passport_keys_file=folder / "passports.json",
        keys_file=folder / "keys.json",
        jurisdiction="eu",
    )
    limits = {"max_running": 1, "max_queued": 2}
    async with served(spec_of(PROGRAMS, limits=limits), access=access) as running:
        yield running


PUBLIC = {"/healthz", "/livez", "/readyz", "/v2/health/live", "/v2/health/ready"}
OPERATION = {"/metrics", LOAD_PATH}
CHAT = "/v1/chat/completions"


def request_to(path: str, method: str) -> dict[str, Any]:
    body = {"model": "test", "messages": [{"role": "user", "content": "say:x"}]}
    return {"json": body} if (method, path) == ("POST", CHAT) else {}


@pytest.mark.asyncio(loop_scope="module")
class TestMatrix:
    async def test_every_route_times_every_credential(self, closed: Served) -> None:
        """The routes are those that are really there, so that no new one can be forgotten."""
        routes = [
            (method, route.path)
            for route in closed.router.routes
            for method in ("GET", "POST", "DELETE", "HEAD", "OPTIONS")
        ]
        assert len(routes) > 80
        routes += [("GET", "/no/such/path"), ("POST", "/v2/none")]
        without_sockets = httpx.AsyncClient(
            transport=httpx.ASGITransport(closed.router), base_url="http://replica"
        )
        for name, (headers, expected) in CREDENTIALS.items():
            for method, pattern in routes:
                path = pattern.replace("{model:path}", "test").replace("{model}", "test")
                path = path.replace("{version}", "1")
                answer = await without_sockets.request(
                    method, path, headers=headers, **request_to(path, method)
                )
                told = (name, method, path, answer.status_code, answer.text)
                status = expected["operation" if path in OPERATION else "inference"]
                if path in PUBLIC or status == IN:
                    assert answer.status_code not in (401, 403), told
                    continue
                assert answer.status_code == status, told
                assert ("www-authenticate" in answer.headers) == (status == 401), told
                if method != "HEAD":
                    error = answer.json()["error"]
                    assert isinstance(error, str) == path.startswith("/v2"), told

    async def test_what_is_let_in_is_served(self, closed: Served) -> None:
        for name in ("good key", "good passport", "passport for any"):
            answer = await closed.client.post(
                CHAT, headers=CREDENTIALS[name][0], **request_to(CHAT, "POST")
            )
            assert answer.json()["choices"][0]["message"]["content"] == "x"

    async def test_the_body_of_a_refused_request_is_not_read(self, closed: Served) -> None:
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n"
        reader, writer = await closed.raw(head.encode())
        assert (await reader.readline()).split()[1] == b"401"
        writer.close()

    async def test_the_document_says_so(self, closed: Served) -> None:
        headers = CREDENTIALS["good key"][0]
        document = (await closed.client.get("/openapi.json", headers=headers)).json()
        for path, operations in document["paths"].items():
            for operation in operations.values():
                assert ("401" in operation["responses"]) == (path not in PUBLIC)
                assert (operation.get("security") == []) == (path in PUBLIC)

    async def test_a_passports_deadline_holds(self, closed: Served) -> None:
        now_ms = int(time.time() * 1000)
        short = GATEWAYS.sign(passport(deadline_ms=now_ms + 300)).decode()
        body = {"model": "test", "messages": [{"role": "user", "content": "sleep:20"}]}
        for more in ({}, {"x-request-timeout-ms": "60000"}):
            started_s = time.monotonic()
            headers = {"x-nearfield-passport": short, **more}
            answer = await closed.client.post(CHAT, json=body, headers=headers)
            assert answer.status_code == 504
            assert time.monotonic() - started_s < 5
        more = {"x-request-timeout-ms": "100"}
        long = {"x-nearfield-passport": GATEWAYS.sign(passport()).decode(), **more}
        assert (await closed.client.post(CHAT, json=body, headers=long)).status_code == 504

    async def test_what_can_wait_is_refused_first(self, closed: Served, tmp_path: Path) -> None:
        """One request runs, half of the two places in the queue are taken."""
        door = tmp_path / "door"
        body = {"model": "test", "messages": [{"role": "user", "content": f"wait:{door}"}]}

        def as_(criticality: str) -> dict[str, str]:
            return {
                "x-nearfield-passport": GATEWAYS.sign(passport(criticality=criticality)).decode()
            }

        gate = closed.service.gate
        waiting = []
        for taken in (1, 2):
            asked = closed.client.post(CHAT, json=body, headers=as_("critical"))
            waiting.append(asyncio.create_task(asked))
            await until(lambda taken=taken: gate.running + gate.waiting == taken)
        try:
            refused = await closed.client.post(CHAT, json=body, headers=as_("sheddable"))
            assert refused.status_code == 429
            asked = closed.client.post(CHAT, json=body, headers=as_("critical"))
            waiting.append(asyncio.create_task(asked))
            await until(lambda: gate.waiting == 2)
        finally:
            door.touch()
        assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [200] * 3

    async def test_products_are_served_in_turn(self, closed: Served, tmp_path: Path) -> None:
        """The second request of one waits for the first of another, which came after it."""
        gate, door, asked = closed.service.gate, tmp_path / "door", []
        for number, product in enumerate(("reports", "reports", "chat"), start=1):
            mark = tmp_path / f"{number}-{product}"
            program = f"touch:{mark} wait:{door}" if number == 1 else f"touch:{mark}"
            body = {"model": "test", "messages": [{"role": "user", "content": program}]}
            whose = passport(product=product, criticality="critical")
            given = {"x-nearfield-passport": GATEWAYS.sign(whose).decode()}
            asked.append(asyncio.create_task(closed.client.post(CHAT, json=body, headers=given)))
            await until(lambda number=number: gate.running + gate.waiting == number)
        door.touch()
        assert [answer.status_code for answer in await asyncio.gather(*asked)] == [200] * 3
        assert _in_order_of_writing(tmp_path, "*-*") == ["1-reports", "3-chat", "2-reports"]

    async def test_telemetry_knows_the_tenant_and_not_the_key(
        self, closed: Served, caplog: pytest.LogCaptureFixture
    ) -> None:
        headers = CREDENTIALS["good key"][0]
        with caplog.at_level(logging.INFO, logger="nearfield.http"):
            await closed.client.post(CHAT, headers=headers, **request_to(CHAT, "POST"))
        assert caplog.records[-1].__dict__["tenant"] == "acme"
        secret = headers["authorization"].rpartition("_")[2]
        assert all(secret not in str(record.__dict__) for record in caplog.records)


def _in_order_of_writing(folder: Path, pattern: str) -> list[str]:
    paths = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime_ns)
    return [path.name for path in paths]


def admitted(access: Access, headers: dict[bytes, bytes]) -> bool:
    try:
        access.admit(headers, "inference")
    except NearfieldError:
        return False
    return True


class TestOpening:
    def test_a_region_without_any_of_it_is_open(self, tmp_path: Path) -> None:
        settings = Settings.from_env(
            {"NEARFIELD_HOME": str(tmp_path), "NEARFIELD_JURISDICTION": "eu"}
        )
        assert Access.from_settings(settings, "test") is None

    @pytest.mark.parametrize("name", ["NEARFIELD_PASSPORT_KEYS_FILE", "NEARFIELD_KEYS_FILE"])
    def test_one_that_should_be_closed_does_not_open_by_a_missing_file(
        self, tmp_path: Path, name: str
    ) -> None:
        settings = Settings.from_env({name: str(tmp_path / "none.json")})
        with pytest.raises(BadRequest, match="cannot be read"):
            Access.from_settings(settings, "test")

    def test_passports_alone_let_no_key_in(self, tmp_path: Path) -> None:
        GATEWAYS.save(tmp_path / "p.json")
        access = Access("test", passport_keys_file=tmp_path / "p.json", jurisdiction="eu")
        assert admitted(access, {b"x-nearfield-passport": GATEWAYS.sign(passport())})
        with pytest.raises(Unauthenticated, match="from its gateways only"):
            access.admit({b"authorization": b"Bearer " + key()[1].encode()}, "inference")

    def test_keys_alone_let_no_passport_in(self, tmp_path: Path) -> None:
        good, presented = key(product="web")
        write_keys(tmp_path / "k.json", good)
        access = Access("test", keys_file=tmp_path / "k.json")
        caller = access.admit({b"authorization": b"Bearer " + presented.encode()}, "inference")
        assert (caller.tenant, caller.product, caller.key_id) == ("acme", "web", good.id)
        assert caller.timeout_s is None
        with pytest.raises(Unauthenticated, match="takes no passports"):
            access.admit({b"x-nearfield-passport": GATEWAYS.sign(passport())}, "inference")

    @pytest.mark.parametrize(
        ("here", "code"), [("us", "jurisdiction_not_allowed"), (None, "jurisdiction_unknown")]
    )
    def test_what_is_bound_to_a_place_is_served_only_there(
        self, tmp_path: Path, here: str | None, code: str
    ) -> None:
        GATEWAYS.save(tmp_path / "p.json")
        bound, presented = key(tenant="eu")
        snapshot = Snapshot(1, (Tenant("eu", frozenset({"eu"})),), (), (bound,))
        save_keys(tmp_path / "k.json", snapshot, pepper=PEPPER)
        files = {"passport_keys_file": tmp_path / "p.json", "keys_file": tmp_path / "k.json"}
        access = Access("test", **files, jurisdiction=here)
        by_passport = {b"x-nearfield-passport": GATEWAYS.sign(passport())}
        by_key = {b"authorization": b"Bearer " + presented.encode()}
        for headers in (by_passport, by_key):
            assert admitted(Access("test", **files, jurisdiction="eu"), headers)
            with pytest.raises(Forbidden, match="may not leave eu") as refused:
                access.admit(headers, "inference")
            assert refused.value.code == code
        unbound = GATEWAYS.sign(passport(jurisdictions=None))
        assert admitted(access, {b"x-nearfield-passport": unbound})

    def test_what_can_wait_may_fill_less_of_the_queue(self, tmp_path: Path) -> None:
        GATEWAYS.save(tmp_path / "p.json")
        access = Access("test", passport_keys_file=tmp_path / "p.json", jurisdiction="eu")
        shares = [
            access.admit(
                {b"x-nearfield-passport": GATEWAYS.sign(passport(criticality=criticality))},
                "inference",
            ).queue_share
            for criticality in (*CRITICALITIES, "of the future")
        ]
        assert shares == [*QUEUE_SHARES, QUEUE_SHARES[-1]]

    def test_a_last_good_state_is_no_export(self, tmp_path: Path) -> None:
        save_keys(tmp_path / "k.json", Snapshot(), pepper=None)
        with pytest.raises(BadRequest, match="nearfield keys export"):
            Access("test", keys_file=tmp_path / "k.json")


class TestChanges:
    def test_a_key_that_is_revoked_in_the_file_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = tmp_path / "k.json"
        good, presented = key()
        write_keys(path, good)
        access = Access("test", keys_file=path)
        headers = {b"authorization": b"Bearer " + presented.encode()}
        now_s = [time.monotonic()]
        monkeypatch.setattr("nearfield.serving.access.time.monotonic", lambda: now_s[0])

        def later() -> bool:
            now_s[0] += LOOK_S
            return admitted(access, headers)

        assert later()
        path.write_text("half a fi")  # not how we write, but somebody may
        assert later(), "what was read before still counts"
        assert "not JSON" in caplog.text
        path.unlink()
        assert later()
        write_keys(path)
        assert not later()
        write_keys(path, good)
        os.utime(path, (1, 1))
        assert later()

    def test_passport_secrets_are_rotated_without_a_restart(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "p.json"
        GATEWAYS.save(path)
        access = Access("test", passport_keys_file=path, jurisdiction="eu")
        new = GATEWAYS.with_next().promoted()
        headers = {b"x-nearfield-passport": new.sign(passport())}
        assert not admitted(access, headers)
        new.save(path)
        later_s = time.monotonic() + LOOK_S
        monkeypatch.setattr("nearfield.serving.access.time.monotonic", lambda: later_s)
        assert admitted(access, headers)


def test_the_table_of_a_file_is_checked_as_a_gateways(tmp_path: Path) -> None:
    good, presented = key()
    write_keys(tmp_path / "k.json", good)
    saved = json.loads((tmp_path / "k.json").read_text())
    table = KeyTable(bytes.fromhex(saved["pepper"]))
    table.apply(Snapshot(1, (Tenant("acme"),), (), (good,)))
    assert table.authenticate(b"Bearer " + presented.encode(), time.time()).key_id == good.id
