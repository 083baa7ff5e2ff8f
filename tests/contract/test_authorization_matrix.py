"""Every route × everything that may stand in a request's headers, on a gateway and in a region.

The routes are taken from the tables that are really served: one that is new has no row here, and
fails the test until somebody has written down who may call it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
import pytest_asyncio
from nearfield.api.keys import save_keys
from nearfield.api.load import LOAD_PATH, REGION_PATH, gateways_passport
from nearfield.api.passport import Passport, PassportKeys
from nearfield.core.settings import Settings
from nearfield.edge.files import read
from nearfield.edge.gateway import Gateway, Place
from nearfield.edge.pages_console import DATA
from nearfield.edge.pages_models import ROUTE_PATH, STATUS_PATH
from nearfield.edge.proxy.listener import bind
from nearfield.edge.recent import Entry
from nearfield.serving.access import Access
from nearfield.store.forms import NewKey, parse

from tests.support.accounts import PEPPER, Accounts, accounts
from tests.support.edge import closed_port
from tests.support.hosting import PROGRAMS
from tests.support.serving import served, spec_of

Who = Literal[
    "nobody", "garbage", "unknown", "bad secret", "injection", "expired", "revoked",
    "suspended tenant", "good", "other tenant", "model not allowed", "admin", "other admin",
    "expired admin", "platform", "revoked platform", "passport garbage", "passport forged",
    "passport expired", "passport of others", "passport", "gateway's passport",
]  # fmt: skip
IN = 0
"""In place of a status: neither 401 nor 403, nor, where it says who may see what, 404."""

NO_KEY: dict[Who, int] = dict.fromkeys(
    ("nobody", "garbage", "unknown", "bad secret", "injection", "expired", "revoked",
     "expired admin", "revoked platform"), 401,
)  # fmt: skip
BAD_PASSPORT: dict[Who, int] = dict.fromkeys(
    ("passport garbage", "passport forged", "passport expired", "passport of others"), 401
)
NO_PASSPORT: dict[Who, int] = {**BAD_PASSPORT, "passport": 401, "gateway's passport": 401}
KEYS: tuple[Who, ...] = (
    "suspended tenant", "good", "other tenant", "model not allowed", "admin", "other admin",
    "platform",
)  # fmt: skip

ANYBODY: dict[Who, int] = dict.fromkeys((*NO_KEY, *NO_PASSPORT, *KEYS), IN)
CALLERS: dict[Who, int] = {**ANYBODY, **NO_KEY, **NO_PASSPORT, "suspended tenant": 403}
PLATFORM: dict[Who, int] = {
    **CALLERS, **dict.fromkeys(KEYS, 403), "platform": IN
}  # fmt: skip
GATEWAYS: dict[Who, int] = {
    **NO_KEY, **dict.fromkeys(KEYS, 401), **BAD_PASSPORT, "passport": 403, "gateway's passport": IN
}  # fmt: skip
INFERENCE: dict[Who, int] = {
    **PLATFORM, "platform": 403, "good": IN, "other tenant": IN, "passport": IN,
    "gateway's passport": IN,
}  # fmt: skip
OPERATION: dict[Who, int] = {**PLATFORM, "passport": 403, "gateway's passport": IN}
ADMINS: dict[Who, int] = {**PLATFORM, "admin": IN, "other admin": IN}
"""What everybody gets their own part of."""
OWN_ADMIN: dict[Who, int] = {**ADMINS, "other admin": 404}
"""What is one tenant's."""
PLATFORM_OF_TENANT: dict[Who, int] = {**PLATFORM, "other admin": 404}
"""What may be known to a tenant's admin, and changed by the platform."""

ADMIN = "/admin/v1"
GATEWAY_PAGES: dict[tuple[str, str], dict[Who, int]] = {
    ("GET", "/healthz"): ANYBODY,
    ("GET", "/livez"): ANYBODY,
    ("GET", "/readyz"): ANYBODY,
    ("GET", "/v2/health/live"): ANYBODY,
    ("GET", "/v2/health/ready"): ANYBODY,
    ("GET", "/v1/models"): CALLERS,
    ("GET", "/v1/models/{model}"): CALLERS,
    ("GET", "/v2"): CALLERS,
    ("GET", "/v2/models/{model}/ready"): CALLERS,
    ("GET", "/v2/models/{model}/versions/{version}/ready"): CALLERS,
    ("GET", REGION_PATH): GATEWAYS,
    ("GET", STATUS_PATH): PLATFORM,
    ("GET", ROUTE_PATH): PLATFORM,
    ("GET", "/metrics"): PLATFORM,
    ("GET", f"{DATA}/state"): ADMINS,
    ("GET", f"{DATA}/feed"): ADMINS,
    ("GET", f"{DATA}/requests/{{request}}"): OWN_ADMIN,
    ("GET", f"{ADMIN}/tenants"): ADMINS,
    ("POST", f"{ADMIN}/tenants"): PLATFORM,
    ("GET", f"{ADMIN}/tenants/{{tenant}}"): OWN_ADMIN,
    ("PATCH", f"{ADMIN}/tenants/{{tenant}}"): PLATFORM_OF_TENANT,
    ("GET", f"{ADMIN}/tenants/{{tenant}}/products"): OWN_ADMIN,
    ("POST", f"{ADMIN}/tenants/{{tenant}}/products"): OWN_ADMIN,
    ("GET", f"{ADMIN}/tenants/{{tenant}}/products/{{product}}"): OWN_ADMIN,
    ("PATCH", f"{ADMIN}/tenants/{{tenant}}/products/{{product}}"): OWN_ADMIN,
    ("GET", f"{ADMIN}/keys"): ADMINS,
    ("POST", f"{ADMIN}/keys"): OWN_ADMIN,
    ("GET", f"{ADMIN}/keys/{{key}}"): OWN_ADMIN,
    ("POST", f"{ADMIN}/keys/{{key}}/rotate"): OWN_ADMIN,
    ("POST", f"{ADMIN}/keys/{{key}}/revoke"): OWN_ADMIN,
    ("GET", f"{ADMIN}/usage"): ADMINS,
    ("GET", f"{ADMIN}/requests"): ADMINS,
    ("GET", f"{ADMIN}/requests/{{request}}"): OWN_ADMIN,
}
FORWARDED: dict[tuple[str, str], dict[Who, int]] = {
    # what is no page goes to a region, if the Gate lets it pass
    ("POST", "/v1/chat/completions"): INFERENCE,
    ("POST", "/test/v1/chat/completions"): INFERENCE,
    ("POST", "/v1/completions"): INFERENCE,
    ("POST", "/v1/embeddings"): INFERENCE,
    ("POST", "/v2/models/test/infer"): INFERENCE,
    ("POST", "/v2/models/test/versions/1/generate"): INFERENCE,
    ("GET", "/v2/models/test"): INFERENCE,
    ("DELETE", "/test/v1/anything"): INFERENCE,
}
REGION: dict[tuple[str, str], dict[Who, int]] = {
    ("GET", "/healthz"): ANYBODY,
    ("GET", "/livez"): ANYBODY,
    ("GET", "/readyz"): ANYBODY,
    ("GET", "/v2/health/live"): ANYBODY,
    ("GET", "/v2/health/ready"): ANYBODY,
    ("GET", "/metrics"): OPERATION,
    ("GET", LOAD_PATH): OPERATION,
    ("GET", "/openapi.json"): INFERENCE,
    ("GET", "/v1/models"): INFERENCE,
    ("GET", "/v1/models/{model}"): INFERENCE,
    ("POST", "/v1/chat/completions"): INFERENCE,
    ("POST", "/v1/completions"): INFERENCE,
    ("POST", "/v1/embeddings"): INFERENCE,
    ("GET", "/v2"): INFERENCE,
    **{
        (method, f"/v2/models/{{model}}{version}{path}"): INFERENCE
        for version in ("", "/versions/{version}")
        for method, path in (
            ("GET", ""),
            ("GET", "/ready"),
            ("POST", "/infer"),
            ("POST", "/generate"),
            ("POST", "/generate_stream"),
        )
    },
}
"""The region's OpenAPI document; `tests/unit/test_access.py` has what it does not list."""

FORGERS = PassportKeys.generate()


def passports(keys: PassportKeys) -> dict[Who, str]:
    now_ms = int(time.time() * 1000)
    good = Passport(
        tenant="acme",
        product=None,
        key_id="k",
        models=("test",),
        jurisdictions=("eu",),
        request_id="req-1",
        criticality="default",
        issued_ms=now_ms,
        expires_ms=now_ms + 60_000,
        deadline_ms=now_ms + 30_000,
    )
    signed = keys.sign(good).decode()
    own = gateways_passport("req-1", now_ms=now_ms, timeout_ms=30_000)
    expired = replace(good, issued_ms=now_ms - 7_200_000, expires_ms=now_ms - 3_600_000)
    return {
        "passport": signed,
        "passport garbage": "1.2.3.4",
        "passport forged": signed[:-2] + ("AA" if signed[-2:] != "AA" else "BB"),
        "passport expired": keys.sign(expired).decode(),
        "passport of others": FORGERS.sign(good).decode(),
        "gateway's passport": keys.sign(own).decode(),
    }


def credentials(known: Accounts, keys: PassportKeys) -> dict[Who, dict[str, str]]:
    """The headers of everybody."""
    made: dict[Who, dict[str, str]] = {
        "nobody": {},
        "garbage": {"authorization": "Bearer nf_garbage"},
        "injection": {"authorization": "Bearer ' OR '1'='1"},
    }
    for who in (*NO_KEY, *KEYS):
        if who in known.presented:
            made[who] = known.headers(who)
    for who, passport in passports(keys).items():
        made[who] = {"x-nearfield-passport": passport}
    assert set(made) == set(ANYBODY)
    return made


def judge(told: tuple[Any, ...], status: int, expected: int, *, exists: bool) -> str | None:
    """What is wrong with an answer; None: nothing."""
    if expected == IN:
        return (
            f"{told}: {status}" if status in ((401, 403, 404) if exists else (401, 403)) else None
        )
    return None if status == expected else f"{told}: {status}, not {expected}"


# ---- a gateway ----------------------------------------------------------------------------------


@dataclass
class Running:
    gateway: Gateway
    url: str
    accounts: Accounts
    keys: PassportKeys
    names: Mapping[str, str]

    def path(self, pattern: str) -> str:
        """A path of that pattern, to something of the tenant acme's."""
        return re.sub(r"\{(\w+)\}", lambda found: self.names[found[1]], pattern)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    folder = tmp_path_factory.mktemp("gateway")
    known = accounts(folder)
    victim, _ = known.administration.create_key(parse(NewKey, {"tenant": "acme"}))
    (folder / "pepper").write_text(PEPPER.hex())
    (folder / "pepper").chmod(0o600)
    keys = PassportKeys.generate()
    keys.save(folder / "passports.json")
    (folder / "eu.yaml").write_text(
        "region: eu\njurisdiction: eu\ncity: Dublin\nlocation: {latitude: 53.3, longitude: -6.3}\n"
        f"gateway_url: http://127.0.0.1:{closed_port()}\n"
    )
    (folder / "gateway.yaml").write_text(
        "gateway: here\njurisdiction: eu\nregions: [eu.yaml]\n"
        "passport_keys: passports.json\n"
        f"store: sqlite:///{folder / 'accounts.sqlite3'}\n"
    )
    settings = Settings.from_env(
        {"NEARFIELD_HOME": str(folder), "NEARFIELD_KEY_PEPPER_FILE": str(folder / "pepper")}
    )
    place = Place(folder / "state", settings, {}, log_to=None)
    async with Gateway(read(folder / "gateway.yaml"), place) as gateway:
        listening = bind("127.0.0.1", 0)
        await gateway.listen([listening])
        url = "http://{}:{}".format(*listening.getsockname())
        gateway.recorder.recent.add(
            Entry(
                "req-1", "ab" * 16, "cd" * 8, "", False, 1e9, 0.0, 0.1, 0.2, "POST", "chat", False,
                "acme", None, "k", False, 1, "test", "1", "eu", "eu/test@1/x", 200, None, 1, 1,
                None, (),
            )
        )  # fmt: skip
        names = {
            "tenant": "acme", "product": "web", "key": victim.id, "request": "req-1",
            "model": "test", "version": "1",
        }  # fmt: skip
        yield Running(gateway, url, known, keys, names)
        await gateway.drain(0.0)
    known.store.close()


BODIES: dict[str, Any] = {
    f"{ADMIN}/tenants": {"name": "made"},
    f"{ADMIN}/tenants/acme/products": {"name": "made"},
    f"{ADMIN}/keys": {"tenant": "acme"},
}


@pytest.mark.asyncio(loop_scope="module")
class TestGateway:
    async def test_every_page_has_a_row(self, running: Running) -> None:
        """Files of the console's page are anybody's: they hold no data."""
        pages = {
            route
            for route in running.gateway.pages.routes
            if not route[1].startswith("/console") or route[1].startswith(DATA)
        }
        assert pages == set(GATEWAY_PAGES)
        files = set(running.gateway.pages.routes) - pages
        assert files
        assert {method for method, _ in files} == {"GET"}

    async def test_every_page_times_everybody(self, running: Running) -> None:
        await self.check(running, GATEWAY_PAGES)

    async def test_what_is_forwarded_times_everybody(self, running: Running) -> None:
        await self.check(running, FORWARDED)

    async def test_the_consoles_files_are_anybodys(self, running: Running) -> None:
        files = [path for _, path in running.gateway.pages.routes if path.startswith("/console")]
        async with httpx.AsyncClient(base_url=running.url, trust_env=False) as client:
            for path in files:
                if not path.startswith(DATA):
                    assert (await client.get(path)).status_code in (200, 301, 302, 307, 308), path

    async def check(self, running: Running, rows: Mapping[tuple[str, str], dict[Who, int]]) -> None:
        wrong: list[str] = []
        everybody = credentials(running.accounts, running.keys)
        async with httpx.AsyncClient(base_url=running.url, timeout=20, trust_env=False) as client:
            for (method, pattern), expected in rows.items():
                path = running.path(pattern)
                body = BODIES.get(path, {"model": "test"} if "/admin/" not in path else {})
                data = json.dumps(body) if method in ("POST", "PATCH") else None
                for who, headers in everybody.items():
                    own = {**headers, "content-type": "application/json"}
                    async with client.stream(method, path, content=data, headers=own) as answer:
                        status = answer.status_code
                    exists = path.startswith((ADMIN, DATA))
                    problem = judge((method, pattern, who), status, expected[who], exists=exists)
                    if problem is not None:
                        wrong.append(problem)
                    if status == 401:
                        assert answer.headers["www-authenticate"] == "Bearer"
        assert wrong == []


# ---- a region -----------------------------------------------------------------------------------


@pytest.mark.asyncio(loop_scope="module")
async def test_a_regions_document_times_everybody(tmp_path: Path) -> None:
    known = accounts(tmp_path)
    keys = PassportKeys.generate()
    keys.save(tmp_path / "passports.json")
    save_keys(tmp_path / "keys.json", known.administration.snapshot(), pepper=PEPPER)
    access = Access(
        "test",
        passport_keys_file=tmp_path / "passports.json",
        keys_file=tmp_path / "keys.json",
        jurisdiction="eu",
    )
    wrong: list[str] = []
    everybody = credentials(known, keys)
    async with served(spec_of(PROGRAMS), access=access) as replica:
        own = everybody["gateway's passport"]
        document = (await replica.client.get("/openapi.json", headers=own)).json()
        listed = {
            (method.upper(), path)
            for path, operations in document["paths"].items()
            for method in operations
        }
        assert listed == set(REGION)
        transport = httpx.ASGITransport(replica.router)
        async with httpx.AsyncClient(transport=transport, base_url="http://replica") as client:
            for (method, pattern), expected in REGION.items():
                path = pattern.replace("{model}", "test").replace("{version}", "1")
                for who, headers in everybody.items():
                    answer = await client.request(method, path, headers=headers)
                    told = (method, pattern, who)
                    problem = judge(told, answer.status_code, expected[who], exists=False)
                    if problem is not None:
                        wrong.append(problem)
    known.store.close()
    assert wrong == []
