"""The console's pages and data: what is served, to whom, and what it says."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from nearfield.core.errors import Forbidden, Unauthenticated
from nearfield.core.federation import GatewayFile, RegionFile
from nearfield.edge.console import assets, broadcast
from nearfield.edge.console.access import Viewer
from nearfield.edge.console.documents import state, telling
from nearfield.edge.console.traffic import TURNS, Traffic
from nearfield.edge.pages_console import Access, Console, Here, KeyAccess, LocalAccess
from nearfield.edge.proxy.ports import Request, Trace
from nearfield.edge.site import Site
from nearfield.edge.world import World

from tests.support.accounts import Accounts, accounts
from tests.support.console import HERE, Stage, offer
from tests.support.edge import Answered, Client, Forwarding, forwarding, get
from tests.support.hosting import until
from tests.support.regions import Plan, Table, regions

STATIC = Path(str(files("nearfield.edge"))) / "console" / "static"
HOSTILE = "<img src=x onerror=alert(1)>\u202e\u0000\n\ndata: forged"
TICK_S = 0.005  # for these tests: a "second" of the console's is then ten of them


@pytest.fixture
def known(tmp_path: Path) -> Iterator[Accounts]:
    made = accounts(tmp_path)
    yield made
    made.store.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broadcast, "TICK_S", TICK_S)


@dataclass
class Running:
    stage: Stage
    console: Console
    forwarding: Forwarding

    async def get(self, target: str, **headers: str) -> Answered:
        return await self.forwarding.ask(request(target, **headers), "GET")

    async def feed(self, **headers: str) -> Feed:
        client = await self.forwarding.client()
        client.send(request("/console/data/feed", **headers))
        feed = Feed(client)
        feed.head = (await client.until(b"\r\n\r\n")).decode("latin-1")
        return feed


@dataclass
class Feed:
    """The client's end of a feed, over a socket."""

    client: Client
    head: str = ""

    async def next(self) -> tuple[str, Any]:
        size = int(await self.client.until(b"\r\n"), 16)
        if size == 0:
            return "", None
        event = (await self.client.reader.readexactly(size + 2)).decode()
        found = re.fullmatch(r"event: (\w+)\ndata: (.*)\n\n\r\n", event)
        assert found is not None, event
        return found[1], json.loads(found[2])

    async def find(self, kind: str) -> Any:
        while True:
            found, document = await self.next()
            assert found, f"the feed ended without {kind}"
            if found == kind:
                return document


def request(target: str, **headers: str) -> bytes:
    return get(target, **headers).replace(b"Host: x", b"Host: localhost")


@asynccontextmanager
async def running(
    access: Access | None = None, stage: Stage | None = None
) -> AsyncIterator[Running]:
    stage = stage or Stage()
    async with (
        Console(HERE, stage, stage.recent, access or LocalAccess()) as console,
        forwarding([], pages=Table(console.routes())) as front,
    ):
        yield Running(stage, console, front)
        console.close()


def asked(peer: str = "127.0.0.1", **headers: str) -> Request:
    given = {name.replace("_", "-").encode(): value.encode() for name, value in headers.items()}
    given.setdefault(b"host", b"localhost:8080")
    trace = Trace(b"0" * 32, b"0" * 16, b"", False)
    return Request(b"GET", b"/", b"/", "openai", given, b"r", trace, 0.0, 1.0, peer=peer)


# ---- the page -----------------------------------------------------------------------------------


class TestPage:
    async def test_its_files(self) -> None:
        async with running() as console:
            index = await console.get("/console")
            assert index.status == 200
            assert index.headers["content-type"] == "text/html; charset=utf-8"
            names = re.findall(r'(?:src|href)="([^"#]+)[^"]*"', index.body.decode())
            assert set(names) == {"console/icon.svg", "console/console.css", "console/console.js"}
            for name in names:
                assert (await console.get(f"/{name}")).status == 200, name
            for path in STATIC.glob("*.js"):
                for name in re.findall(r'from "\./([^"]+)"', path.read_text()):
                    found = await console.get(f"/console/{name}")
                    assert found.headers["content-type"] == "text/javascript; charset=utf-8", name

    async def test_kept_until_it_changes(self) -> None:
        async with running() as console:
            first = await console.get("/console/console.js")
            etag = first.headers["etag"]
            assert first.headers["cache-control"] == "no-cache"
            for named in (etag, f"W/{etag}", f'"other", {etag}', "*"):
                again = await console.get("/console/console.js", if_none_match=named)
                assert (again.status, again.body) == (304, b""), named
                assert again.headers["etag"] == etag
            other = await console.get("/console/console.js", if_none_match='"other"')
            assert other.status == 200
            assert (await console.get("/console/dom.js")).headers["etag"] != etag

    async def test_it_is_fenced_in(self) -> None:
        async with running() as console:
            headers = (await console.get("/console")).headers
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'self';")
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert "require-trusted-types-for 'script'" in policy
        assert headers["x-content-type-options"] == "nosniff"

    def test_it_needs_nothing_from_elsewhere(self) -> None:
        for path in STATIC.iterdir():
            text = path.read_text()
            urls = re.findall(r"https?://[^\s\"']+", text)
            assert set(urls) <= {"http://www.w3.org/2000/svg"}, path.name
            assert "@import" not in text
            assert path.name.rpartition(".")[2] in assets.TYPES

    def test_nothing_in_it_makes_markup_of_text(self) -> None:
        for path in STATIC.glob("*.js"):
            found = re.findall(
                r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|eval\(|"
                r"new Function|setHTML|createContextualFragment",
                path.read_text(),
            )
            assert found == [], path.name
        index = (STATIC / "index.html").read_text()
        assert re.findall(r"<style|<script(?! type=\"module\" src=)|style=|\son\w+=", index) == []

    def test_it_is_light(self) -> None:
        sizes = {path.name: path.stat().st_size for path in STATIC.iterdir()}
        assert sum(sizes.values()) < 150_000, sizes
        assert sizes["land.json"] < 40_000

    def test_land_is_where_land_is(self) -> None:
        rings = []
        for flat in json.loads((STATIC / "land.json").read_text())["rings"]:
            x = y = 0
            ring = []
            for dx, dy in zip(flat[::2], flat[1::2], strict=True):
                x, y = x + dx, y + dy
                ring.append((x / 10, y / 10))
            rings.append(ring)

        def inside(longitude: float, latitude: float) -> bool:
            crossed = 0
            for ring in rings:
                for (x0, y0), (x1, y1) in zip(ring, ring[1:] + ring[:1], strict=True):
                    if (y0 > latitude) != (y1 > latitude):
                        crossed += x0 + (latitude - y0) / (y1 - y0) * (x1 - x0) < longitude
            return crossed % 2 == 1

        def land(longitude: float, latitude: float) -> bool:
            return sum(inside(longitude + turn, latitude) for turn in (-360, 0, 360)) % 2 == 1

        for place in (
            (10, 50),
            (-100, 40),
            (25, 0),
            (80, 20),
            (135, -25),
            (-60, -15),
            (100, 60),
            (-175, 66),
        ):
            assert land(*place), place
        for place in ((-30, 40), (-150, 0), (80, -30), (0, -40), (160, 30), (50, 42)):
            assert not land(*place), place


# ---- who may look -------------------------------------------------------------------------------


class TestKeys:
    def test_platform_sees_everything(self, known: Accounts) -> None:
        access = KeyAccess(known.table)
        assert access.viewer(asked(**known.headers("platform"))) == Viewer()
        assert access.viewer(asked(**known.headers("platform of a tenant"))) == Viewer()

    def test_an_admin_sees_its_tenant(self, known: Accounts) -> None:
        viewer = KeyAccess(known.table).viewer(asked(**known.headers("admin")))
        assert viewer == Viewer("acme", frozenset({"web"}))

    @pytest.mark.parametrize(
        "name", ["unknown", "bad secret", "expired admin", "revoked platform", "revoked"]
    )
    def test_keys_that_are_none(self, known: Accounts, name: str) -> None:
        with pytest.raises(Unauthenticated):
            KeyAccess(known.table).viewer(asked(**known.headers(name)))

    def test_none_and_one_for_inference(self, known: Accounts) -> None:
        access = KeyAccess(known.table)
        with pytest.raises(Unauthenticated):
            access.viewer(asked())
        with pytest.raises(Forbidden, match="scope admin or platform"):
            access.viewer(asked(**known.headers("good")))

    async def test_every_page_of_data_asks(self, known: Accounts) -> None:
        async with running(KeyAccess(known.table)) as console:
            for path in ("state", "feed", "requests/req-1"):
                assert (await console.get(f"/console/data/{path}")).status == 401, path
                refused = await console.get(f"/console/data/{path}", **known.headers("good"))
                assert refused.status == 403, path
                assert refused.error["code"] == "scope_missing"
            assert (await console.get("/console")).status == 200

    async def test_an_admin_is_shown_its_own_requests_only(self, known: Accounts) -> None:
        stage = Stage()
        mine = stage.request(tenant="acme", request_id="same")
        stage.request(tenant="other", request_id="same")
        theirs = stage.request(tenant="other")
        async with running(KeyAccess(known.table), stage) as console:
            headers = known.headers("admin")
            feed = await console.feed(**headers)
            past = await feed.find("past")
            assert [row["tenant"] for row in past["requests"]] == ["acme"]
            found = await console.get("/console/data/requests/same", **headers)
            assert found.json()["trace_id"] == mine.trace_id
            assert "decision" not in found.json()
            hidden = await console.get(f"/console/data/requests/{theirs.request_id}", **headers)
            assert (hidden.status, hidden.error["code"]) == (404, "request_not_found")
            everybody = known.headers("platform")
            seen = await console.get(f"/console/data/requests/{theirs.request_id}", **everybody)
            assert seen.json()["decision"]["lines"]
            feed.client.close()

    async def test_how_full_the_fleet_is_is_the_platforms_business(self, known: Accounts) -> None:
        async with running(KeyAccess(known.table)) as console:
            shown = (await console.get("/console/data/state", **known.headers("admin"))).json()
            assert shown["viewer"] == {"tenant": "acme"}
            assert {each["load"] for each in shown["endpoints"]} == {None}
            assert {each["predicted_s"] for each in shown["endpoints"]} == {None}
            assert {each["health"] for each in shown["endpoints"]} == {"up"}
            assert {each["in_flight"] for each in shown["regions"]} == {None}
            # `rerank` is the product search's, which is another tenant's.
            assert {each["model"] for each in shown["endpoints"]} == {"chat", "embed"}
            whole = (await console.get("/console/data/state", **known.headers("platform"))).json()
            assert {each["model"] for each in whole["endpoints"]} == {"chat", "embed", "rerank"}


class TestLocal:
    @pytest.mark.parametrize("peer", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
    @pytest.mark.parametrize(
        "host", ["localhost:8080", "127.0.0.1:80", "[::1]:8080", "eu.localhost"]
    )
    def test_this_machine(self, peer: str, host: str) -> None:
        assert LocalAccess().viewer(asked(peer, host=host)) == Viewer()

    @pytest.mark.parametrize(
        "peer", ["10.0.0.7", "192.0.2.1", "2001:db8::1", "::ffff:10.0.0.1", ""]
    )
    def test_another_one(self, peer: str) -> None:
        with pytest.raises(Forbidden, match="another machine"):
            LocalAccess().viewer(asked(peer))

    @pytest.mark.parametrize("name", ["forwarded", "via", "x_forwarded_for", "x_real_ip"])
    def test_a_proxy_on_this_machine(self, name: str) -> None:
        with pytest.raises(Forbidden, match="proxy"):
            LocalAccess().viewer(asked(**{name: "203.0.113.9"}))

    @pytest.mark.parametrize(
        "host", ["evil.example:8080", "localhost.evil.example", "10.0.0.7", ""]
    )
    def test_a_name_that_was_made_to_point_here(self, host: str) -> None:
        with pytest.raises(Forbidden, match="not called"):
            LocalAccess().viewer(asked(host=host))

    def test_unless_configured(self) -> None:
        assert LocalAccess(anybody=True).viewer(asked("10.0.0.7", host="gateway:80")) == Viewer()


# ---- what is shown ------------------------------------------------------------------------------


class TestState:
    async def test_it_is_what_the_policy_says(self) -> None:
        async with running() as console:
            shown = (await console.get("/console/data/state")).json()
            line = console.stage.explain("chat")[0].lines[0]
        assert shown["gateway"]["name"] == "eu-west"
        by_name = {each["name"]: each for each in shown["endpoints"]}
        best = by_name[line.endpoint]
        assert best["verdict"] == "chosen"
        assert best["predicted_s"] == pytest.approx(line.predicted_s)
        cold = by_name["asia-northeast/chat@1/l4"]
        assert (cold["replicas"], cold["cold_start_s"]) == (0, 1.9)
        other = by_name["eu-west/rerank@1/search"]
        assert (other["verdict"], other["predicted_s"]) == ("pool", None)
        assert len(shown["regions"]) == 7

    def test_names_are_text(self) -> None:
        stage = Stage(has=[offer("eu-west", HOSTILE)])
        flow = Traffic(0.0).flow()
        document = state(HERE, stage, stage.regions, flow, Viewer())
        sent = broadcast._event("state", document)
        assert sent.count(b"\n\n") == 1
        assert sent.count(b"\n") == 3
        shown = json.loads(sent.partition(b"data: ")[2])
        assert shown["endpoints"][0]["model"] == HOSTILE

    def test_the_real_world_is_a_source(self) -> None:
        region = {
            "region": "eu-west",
            "jurisdiction": "eu",
            "city": "Dublin",
            "location": {"latitude": 53.3, "longitude": -6.2},
        }
        files = [
            RegionFile.model_validate(region),
            RegionFile.model_validate(
                {**region, "region": "eu-north", "gateway_url": "http://h:1"}
            ),
        ]
        file = GatewayFile.model_validate(
            {
                "gateway": "eu-west",
                "home": {"region": "eu-west", "serve": "http://127.0.0.1:1"},
                "regions": ["a.yaml", "b.yaml"],
            }
        )
        world = World(Site.of(file, files))
        here = Here.of(file, files, "0.1.0")
        assert (here.city, here.latitude, here.jurisdiction) == ("Dublin", 53.3, "eu")
        shown = state(here, world, world.regions, Traffic(0.0).flow(), Viewer())
        assert [each["health"] for each in shown["regions"]] == ["unknown", "unknown"]
        assert shown["endpoints"] == []

    async def test_real_regions(self) -> None:
        """What a gateway has really been told, and a request that it has really sent."""
        async with regions(Plan("eu"), Plan("us", "us")) as made:
            here = made["eu"]
            await until(lambda: all(region.health == "up" for region in here.world.regions))
            await until(lambda: len(here.world.models["chat"]) == 2)
            assert (await here.ask()).status == 200
            flow = Traffic(0.0).flow()
            shown = state(HERE, here.world, here.world.regions, flow, Viewer())
            assert {each["region"]: each["health"] for each in shown["endpoints"]} == {
                "eu": "up",
                "us": "up",
            }
            chosen = [each for each in shown["endpoints"] if each["verdict"] == "chosen"]
            assert [each["region"] for each in chosen] == ["eu"]
            assert all(each["predicted_s"] > 0 for each in shown["endpoints"])
            assert all(each["replicas"] == 2 for each in shown["endpoints"])
            json.dumps(shown, allow_nan=False)

    def test_where_a_gateway_is(self) -> None:
        edge: dict[str, Any] = {"gateway": "cdn-7", "jurisdiction": "eu", "regions": ["a.yaml"]}
        lost = Here.of(GatewayFile.model_validate(edge), [], "0.1.0")
        assert (lost.region, lost.city, lost.latitude) == (None, None, None)
        edge |= {"city": "Vienna", "location": {"latitude": 48.2, "longitude": 16.4}}
        found = Here.of(GatewayFile.model_validate(edge), [], "0.1.0", workers=4)
        assert (found.city, found.latitude, found.workers) == ("Vienna", 48.2, 4)


class TestTraffic:
    def test_rates(self) -> None:
        stage, traffic = Stage(), Traffic(0.0)
        assert traffic.flow().rps == 0.0
        ok = [stage.request("chat") for _ in range(6)]
        bad = [stage.request("chat", status=503, error="unavailable", region="", endpoint="")]
        traffic.add(ok + bad)
        traffic.turn(1.0)
        flow = traffic.flow()
        assert (flow.seconds, flow.rps, flow.failed_rps) == (1.0, 7.0, 1.0)
        assert sum(flow.at_rps.values()) == 6.0
        times_s = sorted((each.first_byte_s or 0) - each.started_s for each in ok)
        assert flow.first_byte_p50_s == times_s[2]
        assert flow.first_byte_p99_s == times_s[5]

    def test_what_is_long_past_is_forgotten(self) -> None:
        traffic = Traffic(0.0)
        traffic.add([Stage().request("chat")])
        for second in range(1, TURNS + 1):
            traffic.turn(float(second))
        assert traffic.flow().rps == pytest.approx(1 / TURNS)
        traffic.turn(TURNS + 1.0)
        assert traffic.flow().rps == 0.0


class TestTelling:
    def test_trouble_first_then_one_of_each_kind(self) -> None:
        stage = Stage()
        usual = [stage.request("embed") for _ in range(50)]
        retried = stage.request("chat", fails=1)
        failed = stage.request("chat", status=503, error="unavailable")
        more = [stage.request("embed") for _ in range(50)]
        everything = [*usual, retried, failed, *more]
        told = telling(everything, 4)
        assert len(told) == 4
        assert retried in told
        assert failed in told
        assert more[-1] in told
        assert told == [each for each in everything if each in told]
        assert telling([], 4) == []
        assert telling(usual[:2], 4) == usual[:2]


# ---- the feed -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
class TestFeed:
    async def test_past_then_state_then_news(self) -> None:
        stage = Stage()
        before = stage.request("chat")
        async with running(stage=stage) as console:
            feed = await console.feed()
            assert "text/event-stream" in feed.head
            assert (await feed.next())[0] == "past"
            assert (await feed.next())[0] == "state"
            after = stage.request("chat", fails=1)
            news = await feed.find("news")
            assert [row["id"] for row in news["requests"]] == [after.request_id]
            assert news["requests"][0]["tries"] == 2
            assert before.request_id not in json.dumps(news)
            feed.client.close()

    async def test_few_of_many_are_told(self) -> None:
        async with running() as console:
            feed = await console.feed()
            await feed.find("state")
            for _ in range(500):
                console.stage.request("embed")
            news = await feed.find("news")
            assert 1 <= len(news["requests"]) <= broadcast.MOST_ROWS
            told = len(news["requests"]) + news["untold"]
            while told < 500:
                news = await feed.find("news")
                told += len(news["requests"]) + news["untold"]
            assert told == 500
            busy = await feed.find("state")
            while not busy["traffic"]["rps"]:
                busy = await feed.find("state")
            assert busy["traffic"]["failed_rps"] == 0
            feed.client.close()

    async def test_changes_are_told_also_to_whoever_comes_later(self) -> None:
        async with running() as console:
            console.stage.change("us-east", "down", "2 probes failed")
            console.stage.offered("eu-west/embed@1/default").replicas = 3
            feed = await console.feed()
            seen: list[Any] = []

            async def told(count: int) -> None:
                while len(seen) < count:
                    kind, document = await feed.next()
                    assert kind
                    if kind in ("past", "news"):
                        seen.extend(document["changes"])

            await told(2)
            by_kind = {change["kind"]: change for change in seen}
            health, scaling = by_kind["health"], by_kind["scaling"]
            assert (health["subject"], health["before"], health["after"]) == (
                "us-east",
                "up",
                "down",
            )
            assert abs(health["at_s"] - time.time()) < 5
            assert (scaling["before"], scaling["after"]) == ("2 replicas", "3 replicas")
            assert "of 64 slots were taken" in scaling["reason"]
            why = "5: 11.8 work/s come, 11.8 expected in 15 s"
            console.stage.offered("eu-west/embed@1/default").scaling = why
            console.stage.offered("eu-west/embed@1/default").replicas = 5
            await told(3)
            assert (seen[-1]["after"], seen[-1]["reason"]) == ("5 replicas", why)
            late = await console.feed()
            past = await late.find("past")
            assert [change["kind"] for change in past["changes"]] == [c["kind"] for c in seen]
            console.stage.change("us-east", "up", "3 probes passed")
            await told(4)
            assert seen[-1]["after"] == "up"
            feed.client.close()
            late.client.close()

    async def test_a_key_that_is_revoked_sees_no_more(self, known: Accounts) -> None:
        async with running(KeyAccess(known.table)) as console:
            feed = await console.feed(**known.headers("admin"))
            other = await console.feed(**known.headers("platform"))
            await feed.find("state")
            known.store.directory.revoke_key(known.ids["admin"], now_s=time.time())
            known.follow()
            assert (await feed.find("end"))["code"] == "key_revoked"
            assert await feed.next() == ("", None)
            await other.find("state")
            other.client.close()

    async def test_one_who_does_not_read_holds_up_nobody(self) -> None:
        async with running() as console:
            stuck = await console.feed()
            stuck.client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            feed = await console.feed()
            for _ in range(12):
                for _ in range(20):
                    console.stage.request("chat")
                await feed.find("state")
            stuck.client.reset()
            feed.client.close()

    async def test_too_many(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(broadcast, "MOST_FEEDS", 2)
        async with running() as console:
            feeds = [await console.feed(), await console.feed()]
            refused = await console.get("/console/data/feed")
            assert (refused.status, refused.error["code"]) == (503, "too_many_feeds")
            assert refused.headers["retry-after"] == "30"
            assert (await console.get("/console/data/state")).status == 200
            feeds[0].client.close()
            await until(
                lambda: (
                    not all(scope.feeds for scope in _scopes(console))
                    or sum(len(scope.feeds) for scope in _scopes(console)) < 2
                )
            )
            again = await console.feed()
            assert "200" in again.head

    async def test_a_stop_does_not_wait_for_those_who_only_look(self) -> None:
        async with running() as console:
            feed = await console.feed()
            await feed.find("state")
            console.console.close()
            assert (await feed.find("end"))["code"] == "stopping"
            assert await feed.next() == ("", None)
            assert (await console.get("/console/data/feed")).status == 503

    async def test_nothing_is_counted_when_nobody_looks(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(broadcast, "LINGER_S", 0.05)
        async with running() as console:
            recent = console.stage.recent
            feed = await console.feed()
            await feed.find("state")
            assert len(recent._subscriptions) == 1
            feed.client.close()
            await until(lambda: not recent._subscriptions)

    async def test_a_poller_is_told_rates_too(self) -> None:
        async with running() as console:
            await console.get("/console/data/state")
            for _ in range(30):
                console.stage.request("embed")
            shown: Any = {}
            for _ in range(200):
                shown = (await console.get("/console/data/state")).json()
                if shown["traffic"]["rps"]:
                    break
            assert sum(each["rps"] for each in shown["endpoints"]) > 0

    async def test_one_who_falls_far_behind_goes_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(broadcast, "MOST_BEHIND", 10)
        async with running() as console:
            feed = await console.feed()
            await feed.find("state")
            for _ in range(50):
                console.stage.request("embed")
            await feed.find("state")
            await feed.find("state")
            last = console.stage.request("chat")
            while True:
                news = await feed.find("news")
                if any(row["id"] == last.request_id for row in news["requests"]):
                    break
            feed.client.close()

    async def test_a_world_that_cannot_be_read_for_a_while(self) -> None:
        async with running() as console:
            feed = await console.feed()
            await feed.find("state")
            console.stage.broken = True
            assert (await console.get("/console/data/state")).status == 500
            await asyncio.sleep(TICK_S * broadcast.SECOND_TICKS * 2)
            console.stage.broken = False
            await feed.find("state")
            feed.client.close()


async def test_a_request_that_is_not_known() -> None:
    async with running() as console:
        for name in ("nothing", "%3Cimg%3E"):
            found = await console.get(f"/console/data/requests/{name}")
            assert found.status == 404, name
            assert found.headers["content-type"] == "application/json"


async def test_a_request_and_its_decision() -> None:
    async with running() as console:
        entry = console.stage.request("chat", fails=1, failure="refused")
        found = (await console.get(f"/console/data/requests/{entry.request_id}")).json()
    assert [tried["failure"] for tried in found["attempts"]] == ["refused", None]
    lines = found["decision"]["lines"]
    assert lines[0]["verdict"] == "chosen"
    assert {"rtt_s", "wait_s", "first_byte_s", "predicted_s", "load"} <= set(lines[0])


def _scopes(console: Running) -> list[Any]:
    return list(console.console._broadcast._scopes.values())


def test_stage_entries_are_as_the_recorder_makes_them() -> None:
    entry = Stage().request("chat", fails=1)
    assert replace(entry, status=500).failed
    assert entry.tries[0].ended_s <= entry.tries[1].started_s
    assert entry.tries[-1].ended_s <= entry.ended_s
