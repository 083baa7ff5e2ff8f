"""The admin API as administrators meet it: over a socket, against a real store."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from nearfield.core.errors import NearfieldError, Unavailable
from nearfield.edge.pages_admin import (
    MOST_AT_ONCE,
    PAGE_ITEMS,
    AdminPages,
    Routes,
    metrics_routes,
)
from nearfield.edge.proxy.ports import Page, Request
from nearfield.edge.recent import Entry, Tried
from nearfield.edge.recorder import GatewayRecorder
from nearfield.policy.explain import Explanation
from nearfield.store.forms import NewProduct, parse
from nearfield.store.ports import Usage

from tests.support.accounts import Accounts, accounts
from tests.support.edge import forwarding
from tests.support.hosting import until

SECRET = re.compile(r"nf_[a-z2-7]{12}_[A-Za-z0-9]{43}")


class Table:
    """Pages by a table."""

    def __init__(self, routes: Routes) -> None:
        self._routes = [
            (method.encode(), re.compile(re.sub(r"\{\w+\}", "[^/]+", pattern).encode()), page)
            for (method, pattern), page in routes.items()
        ]

    def find(self, request: Request) -> Page | None:
        path = request.target.partition(b"?")[0]
        for method, pattern, page in self._routes:
            if method == request.method and pattern.fullmatch(path):
                return page
        return None


@dataclass
class Admin:
    """A gateway with an admin API, and who may call it."""

    accounts: Accounts
    recorder: GatewayRecorder
    client: httpx.AsyncClient

    async def call(
        self, who: str | None, method: str, path: str, body: Any = None, **options: Any
    ) -> httpx.Response:
        """As the owner of a key (see `tests.support.accounts.KEYS`), with a JSON body."""
        self.accounts.follow()
        headers = {} if who is None else self.accounts.headers(who)
        return await self.client.request(
            method, f"/admin/v1{path}", json=body, headers=headers, **options
        )

    async def ok(self, who: str, method: str, path: str, body: Any = None) -> Any:
        answer = await self.call(who, method, path, body)
        assert answer.status_code in (200, 201), answer.text
        assert answer.headers["cache-control"] == "no-store"
        return answer.json()

    async def refused(
        self, who: str | None, method: str, path: str, body: Any = None, **options: Any
    ) -> tuple[int, str, str | None]:
        """Status, code and field of an error."""
        answer = await self.call(who, method, path, body, **options)
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        return answer.status_code, error["code"], error["param"]


@asynccontextmanager
async def administered(known: Accounts, store: Any = None) -> AsyncIterator[Admin]:
    async with GatewayRecorder("here", {}, log_to=None) as recorder:
        pages = AdminPages(known.table, store or known.administration, recorder)
        table = Table(pages.routes() | metrics_routes(recorder, known.table))
        async with forwarding([], pages=table) as running:
            url = f"http://{running.address[0]}:{running.address[1]}"
            async with httpx.AsyncClient(base_url=url, timeout=20, trust_env=False) as client:
                yield Admin(known, recorder, client)
        pages.close()


@pytest.fixture
def known(tmp_path: Path) -> Iterator[Accounts]:
    made = accounts(tmp_path)
    yield made
    made.store.close()


@pytest_asyncio.fixture
async def admin(known: Accounts) -> AsyncIterator[Admin]:
    async with administered(known) as running:
        yield running


class TestTenants:
    async def test_the_platform_creates_changes_suspends_and_lists(self, admin: Admin) -> None:
        body = {"name": "new", "jurisdictions": ["eu"], "limits": {"requests_per_minute": 5}}
        made = await admin.ok("platform", "POST", "/tenants", body)
        assert made["jurisdictions"] == ["eu"]
        assert made["limits"] == {
            "requests_per_minute": 5, "tokens_per_minute": None, "concurrent_streams": None
        }  # fmt: skip
        change = {"suspended": True, "limits": {"tokens_per_minute": 7}}
        changed = await admin.ok("platform", "PATCH", "/tenants/new", change)
        assert changed["suspended"]
        assert changed["jurisdictions"] == ["eu"], "what is not named stays"
        assert changed["limits"]["requests_per_minute"] == 5
        assert changed["limits"]["tokens_per_minute"] == 7
        lifted = {"jurisdictions": None, "suspended": False, "limits": {"tokens_per_minute": None}}
        changed = await admin.ok("platform", "PATCH", "/tenants/new", lifted)
        assert (changed["jurisdictions"], changed["suspended"]) == (None, False)
        assert changed["limits"]["tokens_per_minute"] is None
        assert await admin.ok("platform", "GET", "/tenants/new") == changed
        listed = await admin.ok("platform", "GET", "/tenants")
        assert [one["name"] for one in listed["data"]] == ["acme", "late", "new", "ops", "other"]

    async def test_a_tenants_admin_reads_its_own_and_lifts_no_limit(self, admin: Admin) -> None:
        assert (await admin.ok("admin", "GET", "/tenants/acme"))["name"] == "acme"
        listed = await admin.ok("admin", "GET", "/tenants")
        assert [one["name"] for one in listed["data"]] == ["acme"]
        change = {"limits": {"requests_per_minute": None}}
        told = await admin.refused("admin", "PATCH", "/tenants/acme", change)
        assert told == (403, "scope_missing", None)
        assert (await admin.refused("admin", "POST", "/tenants", {"name": "mine"}))[0] == 403

    async def test_what_is_others_looks_like_what_is_not(self, admin: Admin) -> None:
        for method, path, body in (
            ("GET", "/tenants/{}", None),
            ("PATCH", "/tenants/{}", {"suspended": True}),
            ("GET", "/tenants/{}/products", None),
            ("POST", "/tenants/{}/products", {"name": "x"}),
            ("GET", "/tenants/{}/products/web", None),
            ("PATCH", "/tenants/{}/products/web", {}),
            ("GET", "/keys?tenant={}", None),
            ("GET", "/usage?tenant={}", None),
        ):
            others, none = [
                await admin.call("admin", method, path.format(name), body)
                for name in ("other", "none1")
            ]
            assert others.status_code == none.status_code == 404
            assert others.text.replace("other", "none1") == none.text
        mine = await admin.call("admin", "GET", f"/keys/{admin.accounts.ids['other tenant']}")
        none = await admin.call("admin", "GET", "/keys/aaaaaaaaaaaa")
        assert mine.status_code == none.status_code == 404
        assert mine.text.replace(admin.accounts.ids["other tenant"], "aaaaaaaaaaaa") == none.text
        others = {"tenant": "other"}
        assert (await admin.refused("admin", "POST", "/keys", others))[1] == "tenant_not_found"

    async def test_a_name_that_is_taken_is_a_conflict(self, admin: Admin) -> None:
        told = await admin.refused("platform", "POST", "/tenants", {"name": "acme"})
        assert told == (409, "tenant_exists", None)
        told = await admin.refused("admin", "POST", "/tenants/acme/products", {"name": "web"})
        assert told == (409, "product_exists", None)


class TestProducts:
    async def test_a_tenants_admin_has_its_own(self, admin: Admin) -> None:
        body = {"name": "search", "limits": {"concurrent_streams": 3}}
        made = await admin.ok("admin", "POST", "/tenants/acme/products", body)
        assert (made["tenant"], made["limits"]["concurrent_streams"]) == ("acme", 3)
        change = {"limits": {"requests_per_minute": 9}}
        changed = await admin.ok("admin", "PATCH", "/tenants/acme/products/search", change)
        assert changed["limits"]["concurrent_streams"] == 3
        assert await admin.ok("admin", "GET", "/tenants/acme/products/search") == changed
        listed = await admin.ok("platform", "GET", "/tenants/acme/products")
        assert [one["name"] for one in listed["data"]] == ["search", "web"]
        assert (await admin.refused("platform", "GET", "/tenants/none/products"))[0] == 404


class TestKeys:
    async def test_a_key_is_shown_once_and_works_within_a_second(self, admin: Admin) -> None:
        body = {"tenant": "acme", "product": "web", "label": "ci", "models": ["chat"]}
        made = await admin.ok("admin", "POST", "/keys", body)
        presented = made.pop("key")
        assert SECRET.fullmatch(presented)
        assert made.items() >= {
            "tenant": "acme", "product": "web", "label": "ci", "models": ["chat"],
            "scopes": ["inference"], "state": "active", "expires_s": None,
        }.items()  # fmt: skip
        admin.accounts.follow()
        bearer = b"Bearer " + presented.encode()
        principal = admin.accounts.table.authenticate(bearer, time.time())
        assert (principal.tenant, principal.product) == ("acme", "web")
        assert await admin.ok("admin", "GET", f"/keys/{made['id']}") == made
        for who in ("admin", "platform"):
            listed = await admin.call(who, "GET", "/keys?limit=1000")
            assert made in listed.json()["data"]
            assert not SECRET.search(listed.text)
            assert "digest" not in listed.text

    async def test_rotation_with_grace_then_revocation(self, admin: Admin) -> None:
        made = await admin.ok("admin", "POST", "/keys", {"tenant": "acme"})
        path = f"/keys/{made['id']}"
        rotated = await admin.ok("admin", "POST", f"{path}/rotate", {"grace_s": 60})
        assert rotated["key"] != made["key"]
        assert rotated["former_secret_until_s"] == pytest.approx(time.time() + 60, abs=10)
        table, now_s = admin.accounts.table, time.time()
        admin.accounts.follow()
        for presented in (made["key"], rotated["key"]):
            assert table.authenticate(b"Bearer " + presented.encode(), now_s).key_id == made["id"]
        with pytest.raises(NearfieldError, match="replaced"):
            table.authenticate(b"Bearer " + made["key"].encode(), now_s + 61)
        revoked = await admin.ok("admin", "POST", f"{path}/revoke")
        assert revoked["state"] == "revoked"
        again = await admin.ok("admin", "POST", f"{path}/revoke", {})
        assert again["revoked_s"] == revoked["revoked_s"]
        admin.accounts.follow()
        with pytest.raises(NearfieldError, match="revoked"):
            table.authenticate(b"Bearer " + rotated["key"].encode(), now_s)
        told = await admin.refused("admin", "POST", f"{path}/rotate", {})
        assert told == (409, "key_revoked", None)

    async def test_nobody_makes_or_takes_a_key_that_may_do_more_than_their_own(
        self, admin: Admin
    ) -> None:
        wanted = {"tenant": "acme", "scopes": ["inference", "platform"]}
        assert (await admin.refused("admin", "POST", "/keys", wanted))[:2] == (403, "scope_missing")
        stronger = f"/keys/{admin.accounts.ids['platform of a tenant']}"
        for path, body in (("rotate", {}), ("revoke", None)):
            told = await admin.refused("admin", "POST", f"{stronger}/{path}", body)
            assert told == (403, "scope_missing", None)
        assert (await admin.ok("admin", "GET", stronger))["state"] == "active"
        assert "key" in await admin.ok("platform", "POST", f"{stronger}/rotate", {})
        own = {"tenant": "acme", "scopes": ["admin"]}
        assert (await admin.ok("admin", "POST", "/keys", own))["scopes"] == ["admin"]


def usage(number: int, tenant: str, model: str, at_s: float = 1e9, *, region: str = "eu") -> Usage:
    """Of one request; of the first the tokens are guessed."""
    return Usage(
        f"r{number}", tenant, None, "k", model, "1", region, "eu/chat@1/x", "chat", "ok",
        10, 2, 5, at_s, 0.5, guessed=number == 0,
    )  # fmt: skip


class TestPages:
    @pytest.mark.parametrize(
        ("path", "identity", "count"),
        [
            ("/tenants", "name", 4),
            ("/tenants/acme/products", "name", 4),
            ("/keys?tenant=acme", "id", 7),
            ("/keys", "id", 12),
            ("/usage?by=model,region", "row", 6),
        ],
    )
    async def test_lists_come_in_pages(
        self, known: Accounts, admin: Admin, path: str, identity: str, count: int
    ) -> None:
        for number in range(3):
            made = parse(NewProduct, {"name": f"p{number}"})
            known.administration.create_product("acme", made)
        known.store.ledger.append(
            [usage(n, "acme", f"m{n % 3}", region=f"eu-{n % 2}") for n in range(12)]
        )
        whole = await admin.ok("platform", "GET", path)
        path += "&" if "?" in path else "?"
        assert len(whole["data"]) == count
        assert not whole["has_more"]
        for limit in (1, 3, count):
            found, after = [], ""
            for _ in range(count):
                page = await admin.ok("platform", "GET", f"{path}limit={limit}{after}")
                assert len(page["data"]) <= limit
                found += page["data"]
                if not page["has_more"]:
                    break
                after = f"&after={page['last_id']}"
            assert found == whole["data"]
            beyond = await admin.ok("platform", "GET", f"{path}after={whole['last_id']}")
            assert (beyond["data"], beyond["has_more"], beyond["last_id"]) == ([], False, None)
        assert {identity} <= found[0].keys()

    async def test_the_store_reads_no_more_than_the_page(self, known: Accounts) -> None:
        asked: list[dict[str, Any]] = []

        class Watched:
            def __getattr__(self, name: str) -> Any:
                def call(*given: Any, **how: Any) -> Any:
                    if "limit" in how:
                        asked.append(how)
                    return getattr(known.administration, name)(*given, **how)

                return call

        async with administered(known, Watched()) as admin:
            for path in ("/tenants", "/tenants/acme/products", "/keys", "/usage"):
                await admin.ok("platform", "GET", f"{path}?limit=2")
                await admin.ok("platform", "GET", path)
        assert [how["limit"] for how in asked] == [3, PAGE_ITEMS + 1] * 4

    async def test_a_page_after_nothing_that_is_there_is_refused(self, admin: Admin) -> None:
        others = admin.accounts.ids["other tenant"]
        for who, path in (
            ("platform", "/keys?after=none"),
            ("platform", f"/keys?tenant=acme&after={others}"),
            ("admin", f"/keys?after={others}"),
            ("platform", "/keys?after=%00"),
            ("platform", "/tenants?after=a%20b"),
            ("platform", "/usage?after=last"),
            ("platform", "/usage?after=9999999999"),
        ):
            assert (await admin.refused(who, "GET", path))[::2] == (400, "after")
        assert (await admin.refused("platform", "GET", "/keys?tenant=%00"))[0] == 404
        own = await admin.ok("admin", "GET", "/tenants?after=acme")
        assert own["data"] == []


class TestUsage:
    @pytest.fixture
    def used(self, known: Accounts) -> Accounts:
        days = [1_762_000_000.0 + 86_400 * day for day in range(3)]
        rows = [(t, m, d) for t in ("acme", "other") for m in ("chat", "embed") for d in days]
        known.store.ledger.append([usage(n, *row) for n, row in enumerate(rows)])
        return known

    async def test_sums_by_what_is_asked(self, used: Accounts, admin: Admin) -> None:
        totals = (await admin.ok("platform", "GET", "/usage?by=tenant,model"))["data"]
        assert [(one["tenant"], one["model"], one["requests"]) for one in totals] == [
            ("acme", "chat", 3), ("acme", "embed", 3), ("other", "chat", 3), ("other", "embed", 3)
        ]  # fmt: skip
        assert totals[0].items() >= {
            "input_tokens": 30, "cached_tokens": 6, "output_tokens": 15, "duration_s": 1.5,
            "guessed_requests": 1,
        }.items()  # fmt: skip
        since = "since=2025-11-02&until=1762172800"
        (one,) = (await admin.ok("platform", "GET", f"/usage?by=tenant&tenant=other&{since}"))[
            "data"
        ]
        assert one["requests"] == 2

    async def test_a_tenants_admin_sees_its_own(self, used: Accounts, admin: Admin) -> None:
        (own,) = (await admin.ok("admin", "GET", "/usage?by=tenant"))["data"]
        assert (own["tenant"], own["requests"]) == ("acme", 6)

    @pytest.mark.parametrize(
        ("query", "param"),
        [
            ("by=colour", "by"), ("by=model,model", "by"), ("by=", "by"), ("since=soon", "since"),
            ("until=nan", "until"), ("limit=0", "limit"), ("limit=1e3", "limit"),
            ("limit=99999", "limit"), ("sinc=1", "sinc"), ("limit=%C2%B2", "limit"),
        ],
    )  # fmt: skip
    async def test_what_it_does_not_understand_it_names(
        self, admin: Admin, query: str, param: str
    ) -> None:
        assert (await admin.refused("platform", "GET", f"/usage?{query}"))[::2] == (400, param)


class TestRequests:
    @staticmethod
    def entry(request_id: str, tenant: str, status: int = 200) -> Entry:
        tried = Tried(
            "eu/chat@1/x", "eu", "r-1", "nearest", "nearest; 9 ms", 0.009, 0.01, 0.05, 0.1, status,
            None, lambda: Explanation("eu: nearest", ()),
        )  # fmt: skip
        return Entry(
            request_id, "ab" * 16, "cd" * 8, "", False, 1e9, 0.0, 0.1, 0.2, "POST", "chat", False,
            tenant, None, "k", False, 1, "chat", "1", "eu", "eu/chat@1/x", status, None, 1, 1, None,
            (tried,),
        )  # fmt: skip

    async def test_drill_down_by_id(self, admin: Admin) -> None:
        admin.recorder.recent.add(self.entry("req-1", "acme"))
        shown = await admin.ok("admin", "GET", "/requests/req-1")
        assert (shown["endpoint"], shown["attempts"][0]["reason"]) == (
            "eu/chat@1/x", "nearest; 9 ms"
        )  # fmt: skip
        assert "decision" not in shown, "it tells of the whole fleet"
        shown = await admin.ok("platform", "GET", "/requests/req-1")
        assert shown["decision"]["outcome"] == "eu: nearest"

    async def test_others_requests_are_not_there(self, admin: Admin) -> None:
        admin.recorder.recent.add(self.entry("req-1", "other"))
        told = await admin.refused("admin", "GET", "/requests/req-1")
        assert told == (404, "request_not_found", None)
        assert (await admin.ok("admin", "GET", "/requests"))["data"] == []

    async def test_the_last_ones_the_newest_first(self, admin: Admin) -> None:
        for number in range(5):
            status = 500 if number == 2 else 200
            admin.recorder.recent.add(self.entry(f"r{number}", "acme", status))
        listed = await admin.ok("platform", "GET", "/requests?limit=2")
        assert [one["request_id"] for one in listed["data"]] == ["r4", "r3"]
        listed = await admin.ok("admin", "GET", "/requests?notable=true")
        assert [one["request_id"] for one in listed["data"]] == ["r2"]
        assert (await admin.refused("admin", "GET", "/requests?notable=1"))[::2] == (400, "notable")


class TestBodies:
    @pytest.mark.parametrize(
        ("content", "kind", "status", "code", "param"),
        [
            (b"", "application/json", 400, "invalid_json", None),
            (b"{", "application/json", 400, "invalid_json", None),
            (b"[" * 100_000, "application/json", 400, "invalid_json", None),
            (b"[]", "application/json", 400, "invalid_json", None),
            (b'{"name": "x"}', "text/plain", 415, "unsupported_media_type", "content-type"),
            (b'{"name": 7}', "application/json", 400, None, "name"),
            (b'{"name": "../x"}', "application/json", 400, None, "name"),
            (b"{}", "application/json", 400, "missing_parameter", "name"),
            (b'{"name": "x", "juristictions": []}', "application/json", 400, "unknown_parameter",
             "juristictions"),
            (b'{"name": "x", "limits": {"requests": 1}}', "application/json", 400,
             "unknown_parameter", "limits.requests"),
            (b'{"name": "x", "limits": {"requests_per_minute": -1}}', "application/json", 400, None,
             "limits.requests_per_minute"),
            (b'{"name": "x", "limits": {"requests_per_minute": true}}', "application/json", 400,
             None, "limits.requests_per_minute"),
            (b" " * 300_000, "application/json", 413, "payload_too_large", None),
        ],
    )  # fmt: skip
    async def test_they_are_strict_and_errors_name_the_field(
        self,
        admin: Admin,
        content: bytes,
        kind: str,
        status: int,
        code: str | None,
        param: str | None,
    ) -> None:
        headers = {**admin.accounts.headers("platform"), "content-type": kind}
        answer = await admin.client.post("/admin/v1/tenants", content=content, headers=headers)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (status, code, param)

    async def test_the_remedy_is_named(self, admin: Admin) -> None:
        wrong = {"name": "x", "juristictions": []}
        answer = await admin.call("platform", "POST", "/tenants", wrong)
        assert "Did you mean jurisdictions?" in answer.json()["error"]["message"]

    async def test_a_revocation_says_nothing_else(self, admin: Admin) -> None:
        path = f"/keys/{admin.accounts.ids['good']}/revoke"
        assert (await admin.refused("admin", "POST", path, {"grace_s": 1}))[::2] == (400, "grace_s")

    @pytest.mark.parametrize(
        "path", ["/tenants/a%20b", "/tenants/" + "x" * 129, "/keys/%27or%271", "/requests/a~b"]
    )
    async def test_names_in_paths_are_names(self, admin: Admin, path: str) -> None:
        assert (await admin.refused("platform", "GET", path))[0] == 404

    @pytest.mark.parametrize("query", ["tenant", "limit=1&limit=2", "&&", "limit=%ff"])
    async def test_queries_are_strict(self, admin: Admin, query: str) -> None:
        assert (await admin.refused("platform", "GET", f"/keys?{query}"))[0] == 400


class TestTrouble:
    async def test_without_the_database_it_says_so_and_what_is_in_memory_works(
        self, known: Accounts
    ) -> None:
        class Gone:
            def __getattr__(self, name: str) -> Any:
                def call(*_: Any, **__: Any) -> Any:
                    raise Unavailable("gone", code="database_unavailable", retry_after_s=2)

                return call

        async with administered(known, Gone()) as admin:
            for method, path, body in (
                ("GET", "/tenants", None),
                ("POST", "/keys", {"tenant": "acme"}),
                ("GET", "/usage", None),
            ):
                answer = await admin.call("platform", method, path, body)
                assert answer.status_code == 503
                assert answer.headers["retry-after"] == "2"
                assert answer.json()["error"]["code"] == "database_unavailable"
            assert (await admin.ok("platform", "GET", "/requests"))["data"] == []

    async def test_a_slow_database_holds_up_nobody_else(self, known: Accounts) -> None:
        class Slow:
            asked = 0
            go_on = threading.Event()

            def tenants(self, **_: Any) -> list[Any]:
                Slow.asked += 1
                assert Slow.go_on.wait(20)
                return []

        async with administered(known, Slow()) as admin:
            calls = [
                asyncio.create_task(admin.call("platform", "GET", "/tenants"))
                for _ in range(MOST_AT_ONCE + 5)
            ]
            await until(lambda: sum(call.done() for call in calls) == 5)
            assert [c.result().status_code for c in calls if c.done()] == [503] * 5
            assert (await admin.ok("platform", "GET", "/requests"))["data"] == []
            for call in calls[:3]:  # whoever leaves gives their place back
                call.cancel()
            Slow.go_on.set()
            done = await asyncio.gather(*calls, return_exceptions=True)
            assert sum(isinstance(one, httpx.Response) for one in done) >= MOST_AT_ONCE
            answers = await asyncio.gather(
                *(admin.call("platform", "GET", "/tenants") for _ in range(MOST_AT_ONCE))
            )
            assert {answer.status_code for answer in answers} == {200}

    async def test_what_is_changed_is_noted_with_who_did_and_without_secrets(
        self, admin: Admin, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.INFO, logger="nearfield.audit"):
            made = await admin.ok("admin", "POST", "/keys", {"tenant": "acme", "label": "mine"})
            await admin.ok("admin", "POST", f"/keys/{made['id']}/revoke")
            await admin.refused("admin", "PATCH", "/tenants/acme", {})
            await admin.ok("admin", "GET", "/keys")
        noted = [record.getMessage() for record in caplog.records]
        who = f"by key {admin.accounts.ids['admin']} of acme"
        assert noted == [
            f"POST /admin/v1/keys  {who}: 201",
            f"POST /admin/v1/keys/{{key}}/revoke {made['id']} {who}: 200",
            f"PATCH /admin/v1/tenants/{{tenant}} acme {who}: 403",
        ]
        assert not SECRET.search(json.dumps(noted))

    async def test_metrics_are_the_platforms(self, admin: Admin) -> None:
        for who, status in (("platform", 200), ("admin", 403), ("good", 403), ("unknown", 401)):
            answer = await admin.client.get("/metrics", headers=admin.accounts.headers(who))
            assert answer.status_code == status
        answer = await admin.client.get("/metrics", headers=admin.accounts.headers("platform"))
        assert answer.headers["content-type"].startswith("text/plain")
        assert "nearfield_errors" in answer.text
