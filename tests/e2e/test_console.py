"""The console in a real browser, before a gateway's real forwarding path.

Chromium is Debian's (`apt install chromium`), driven by playwright, which brings no browser. Set
NEARFIELD_SCREENSHOTS to a folder to keep pictures of what was seen.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from nearfield.edge.console import broadcast
from nearfield.edge.pages_console import Here, KeyAccess

from tests.support.accounts import Accounts, accounts
from tests.support.console import Gateway, Stage, offer, offers

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
Browser, Page, expect = playwright.Browser, playwright.Page, playwright.expect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = "<img src=x onerror=alert(1)>"
LIVE = "#link[data-link=live]"
SLOW_MS = 20_000  # for what takes the page a few seconds, on a machine with other work

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield running
        running.close()


class Look:
    """Opens pages, and keeps what went wrong in them."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        self._contexts: list[Any] = []
        self.wrong: list[str] = []
        self.asked: list[str] = []

    def __call__(self, gateway: Gateway, target: str = "/console", **options: Any) -> Page:
        options = {"viewport": {"width": 1440, "height": 900}, **options}
        context = self._browser.new_context(**options)
        self._contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("dialog", lambda dialog: self.wrong.append(f"a dialog: {dialog.message}"))
        page.on("console", self._said)
        page.on("request", lambda request: self.asked.append(request.url))
        page.goto(f"{gateway.url}{target}")
        return page

    def _said(self, message: Any) -> None:
        # A refusal or a lost gateway is said here by the browser itself.
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.wrong.append(message.text)

    def close(self) -> None:
        for context in self._contexts:
            context.close()


@pytest.fixture
def look(browser: Browser) -> Iterator[Look]:
    made = Look(browser)
    yield made
    made.close()
    assert made.wrong == []


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    with Gateway() as running:
        yield running


@pytest.fixture
def known(tmp_path: Path) -> Iterator[Accounts]:
    made = accounts(tmp_path)
    yield made
    made.store.close()


@pytest.fixture
def picture(request: pytest.FixtureRequest) -> Callable[[Page, str], None]:
    folder = os.environ.get("NEARFIELD_SCREENSHOTS")

    def take(page: Page, name: str) -> None:
        if folder is not None:
            page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)

    return take


# ---- what is seen -------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 390])
def test_it_shows_the_world(
    look: Look, gateway: Gateway, picture: Callable[[Page, str], None], scheme: str, width: int
) -> None:
    gateway.traffic(80.0)
    page = look(gateway, color_scheme=scheme, viewport={"width": width, "height": 900})
    expect(page.locator("h1")).to_have_text("All 7 regions answer")
    expect(page.locator("#regions tbody tr")).to_have_count(7)
    expect(page.locator("#world .mark")).to_have_count(7)
    expect(page.locator("#endpoints-table tbody tr:not(.group)")).to_have_count(12)
    expect(page.locator("#world .busy .flow").first).to_be_attached(timeout=SLOW_MS)
    expect(page.locator("#rows li").first).to_be_attached(timeout=SLOW_MS)
    dots = page.locator("#world .land").get_attribute("d")
    assert dots is not None
    assert dots.count("M") > 300
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it overflows"
    picture(page, f"console-{scheme}-{width}")


def test_the_map_is_where_the_world_is(look: Look, gateway: Gateway) -> None:
    page = look(gateway)
    page.wait_for_selector(LIVE)
    spots = page.evaluate(
        """async () => {
            const { place, ASPECT } = await import("/console/projection.js");
            const at = (latitude, longitude) => place(latitude, longitude, 1000);
            return { middle: at(0, 11), west: at(0, -168.9), east: at(0, 190.9), aspect: ASPECT,
                     dublin: at(53.33, -6.25), sydney: at(-33.9, 151.2) };
        }"""
    )
    assert spots["middle"][0] == pytest.approx(500, abs=0.1)
    assert spots["west"][0] == pytest.approx(0, abs=1)
    assert spots["east"][0] == pytest.approx(1000, abs=1)
    # Natural Earth's published table: at 55° parallels are 0.8679 of the equator's length, and
    # lie at 0.6176 of the pole's distance.
    assert spots["dublin"][0] < 500 < spots["sydney"][0]
    assert spots["dublin"][1] < spots["middle"][1] < spots["sydney"][1]
    assert 0.4 < spots["aspect"] < 0.45


def test_everything_comes_from_the_gateway(look: Look, gateway: Gateway) -> None:
    page = look(gateway)
    page.wait_for_selector(LIVE)
    assert all(url.startswith(gateway.url) for url in look.asked), look.asked
    assert any(url.endswith("/console/data/feed") for url in look.asked)


def test_a_region_goes_down_and_comes_back(
    look: Look, gateway: Gateway, picture: Callable[[Page, str], None]
) -> None:
    gateway.traffic(60.0)
    page = look(gateway)
    page.wait_for_selector(LIVE)
    gateway.change("us-east", "down", "2 probes failed: no answer in time")
    expect(page.locator("h1")).to_have_text("us-east is down", timeout=SLOW_MS)
    row = page.locator("#regions tbody tr", has_text="us-east")
    expect(row).to_contain_text("2 probes failed: no answer in time")
    expect(page.locator("#world .mark.is-down .words")).to_have_text("down")
    expect(page.locator("#announce")).to_contain_text("us-east is down", timeout=SLOW_MS)
    endpoint = page.locator("#endpoints-table tr.is-down").first
    expect(endpoint).to_contain_text("believed dead: probes fail")
    picture(page, "console-down")
    gateway.change("us-east", "up", "3 probes passed")
    expect(page.locator("h1")).to_have_text("All 7 regions answer", timeout=SLOW_MS)
    page.get_by_label("Health and scale").check()
    shown = page.locator("#rows li:not([hidden])")
    expect(shown.first).to_contain_text("us-east")
    assert all("→" in text for text in shown.all_inner_texts())


def test_scaling_is_told_with_what_was_true(look: Look, gateway: Gateway) -> None:
    page = look(gateway)
    page.wait_for_selector(LIVE)
    gateway.do(lambda: setattr(gateway.stage.offered("us-east/chat@1/l4"), "replicas", 5))
    change = page.locator("#rows li.change")
    expect(change).to_contain_text("4 replicas → 5 replicas", timeout=SLOW_MS)
    expect(change).to_contain_text("of 64 slots were taken")


# ---- one request --------------------------------------------------------------------------------


def test_a_request_that_needed_two_tries(
    look: Look, gateway: Gateway, picture: Callable[[Page, str], None]
) -> None:
    entry = gateway.do(lambda: gateway.stage.request("chat", fails=1, failure="refused"))
    page = look(gateway)
    page.locator("#rows a").first.click()
    sheet = page.locator("#request")
    expect(sheet).to_contain_text("Answered 200 after 2 tries")
    expect(sheet.locator(".id")).to_have_text(entry.request_id)
    expect(sheet.locator(".waterfall .in-vain")).to_contain_text("no connection")
    expect(sheet.locator(".decision tr.chosen")).to_have_count(1)
    expect(sheet.locator(".decision tbody tr")).not_to_have_count(1)
    expect(page).to_have_url(re.compile(f"#request={entry.request_id}$"))
    picture(page, "console-request")
    page.keyboard.press("Escape")
    expect(sheet).not_to_be_visible()
    expect(page).to_have_url(re.compile("/console$"))


def test_a_link_to_a_request_and_one_that_is_not_known(look: Look, gateway: Gateway) -> None:
    entry = gateway.do(lambda: gateway.stage.request("embed"))
    page = look(gateway, f"/console#request={entry.request_id}")
    expect(page.locator("#request h2")).to_contain_text("embed")
    page.keyboard.press("Escape")
    page.fill("#find-id", "never-was")
    page.keyboard.press("Enter")
    expect(page.locator("#request .problem")).to_contain_text("no such request")


# ---- by keyboard, and for those who hear it -----------------------------------------------------


def test_it_can_be_used_without_a_mouse(look: Look, gateway: Gateway) -> None:
    entry = gateway.do(lambda: gateway.stage.request("chat"))
    page = look(gateway)
    page.wait_for_selector(LIVE)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "endpoints"
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "find-id"
    page.keyboard.type(entry.request_id)
    page.keyboard.press("Enter")
    expect(page.locator("#request")).to_be_visible()
    page.keyboard.press("Escape")
    page.locator("#regions button", has_text="us-east").focus()
    page.keyboard.press("Space")
    expect(page.locator("#endpoints-note")).to_contain_text("Only those of us-east")
    expect(page.locator("#endpoints-table tbody tr:not(.group)")).to_have_count(2)
    page.keyboard.press("Enter")
    expect(page.locator("#endpoints-table tbody tr:not(.group)")).to_have_count(12)


def test_the_feed_stands_still_where_somebody_reads(look: Look, gateway: Gateway) -> None:
    gateway.do(lambda: [gateway.stage.request("chat") for _ in range(5)])
    page = look(gateway)
    page.locator("#rows a").nth(2).wait_for()
    page.locator("#choice input").first.focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.matches('#rows a')")
    before = page.locator("#rows a").first.get_attribute("href")
    gateway.do(lambda: gateway.stage.request("chat", fails=1))
    expect(page.locator("#log-note")).to_have_text("Held while you read: 1 new", timeout=SLOW_MS)
    assert page.locator("#rows a").first.get_attribute("href") == before
    page.locator("#find-id").focus()
    expect(page.locator("#rows li").first).to_have_class("retried")
    page.locator("#pause").click()
    gateway.do(lambda: gateway.stage.request("chat", status=500, error="engine_failed"))
    expect(page.locator("#log-note")).to_have_text("Paused: 1 new", timeout=SLOW_MS)
    expect(page.locator("#rows li.failed")).to_have_count(0)
    page.locator("#pause").click()
    expect(page.locator("#rows li.failed")).to_have_count(1)


def test_nothing_moves_for_those_who_do_not_want_it(look: Look, gateway: Gateway) -> None:
    gateway.traffic(50.0)
    page = look(gateway, reduced_motion="reduce")
    page.locator("#world .busy .flow").first.wait_for(state="attached", timeout=SLOW_MS)
    assert (
        page.evaluate("document.getAnimations().filter(a => a.playState === 'running').length") == 0
    )


CONTRASTS = """() => {
  const luminance = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const paint = (colors) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const color of colors) { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); }
    return canvas.getImageData(0, 0, 1, 1).data;
  };
  const poor = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility()) continue;
    if (element.closest(".unseen, .skip, noscript, option")) continue;
    const behind = [];
    for (let e = element; e; e = e.parentElement) {
      behind.unshift(getComputedStyle(e).backgroundColor);
    }
    const style = getComputedStyle(element);
    const ink = element.closest("svg") ? style.fill : style.color;
    const [a, b] = [luminance(paint(behind)), luminance(paint([...behind, ink]))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const said = `${ratio.toFixed(2)} ${element.className} ${walker.currentNode.data}`;
    if (ratio < 4.5) poor.push(said);
  }
  return poor;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(look: Look, gateway: Gateway, scheme: str) -> None:
    gateway.do(lambda: gateway.stage.request("chat", fails=1))
    gateway.do(lambda: gateway.stage.request("chat", status=500, error="engine_failed"))
    gateway.change("us-east", "down", "2 probes failed")
    gateway.change("us-west", "ejected", "3 requests in a row failed")
    page = look(gateway, color_scheme=scheme)
    expect(page.locator("#rows li.change")).to_have_count(2, timeout=SLOW_MS)
    expect(page.locator("#endpoints-table tr.is-down").first).to_be_visible(timeout=SLOW_MS)
    assert page.evaluate(CONTRASTS) == []
    page.locator("#rows li.failed a").click()
    expect(page.locator("#request .facts")).to_be_visible()
    assert page.evaluate(CONTRASTS) == []


def test_what_is_for_the_eye_has_words(look: Look, gateway: Gateway) -> None:
    page = look(gateway)
    page.wait_for_selector(LIVE)
    assert page.locator("#world").get_attribute("role") == "img"
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, a, [role=region], section, dialog")]
            .filter((e) => e.checkVisibility() && !(e.getAttribute("aria-label") || e.labels?.length
                || e.getAttribute("aria-labelledby") || e.textContent.trim()))
            .map((e) => e.outerHTML)"""
    )
    assert nameless == []
    heads = page.locator("th:not([scope])")
    expect(heads).to_have_count(0)
    names = page.locator("#regions tbody th button").all_inner_texts()
    assert names == page.locator("#world .mark .name").all_text_contents()


# ---- hostile names ------------------------------------------------------------------------------


def test_a_name_is_never_markup(
    look: Look, gateway: Gateway, picture: Callable[[Page, str], None]
) -> None:
    del gateway
    stage = Stage(has=[*offers(), offer("eu-west", HOSTILE, HOSTILE, HOSTILE, kind=HOSTILE)])
    names = {"tenant": HOSTILE, "model": HOSTILE, "endpoint": HOSTILE, "region": HOSTILE}
    stage.request("chat", error=HOSTILE, status=500, request_id="hostile", **names)
    here = Here(HOSTILE, None, HOSTILE, HOSTILE, HOSTILE, 10.0, 10.0)
    with Gateway(stage, here=here) as running:
        running.change("us-east", "down", HOSTILE)
        page = look(running)
        expect(page.locator("#where")).to_contain_text(HOSTILE)
        expect(page.locator("#endpoints-table .model").first).to_have_text(HOSTILE)
        expect(page.locator("#regions")).to_contain_text(HOSTILE, timeout=SLOW_MS)
        expect(page.locator("#world .is-gateway .name")).to_have_text(HOSTILE)
        page.locator("#rows li.failed a").click()
        expect(page.locator("#request h2")).to_contain_text(HOSTILE)
        picture(page, "console-hostile")
        expect(page.locator("img")).to_have_count(0)
        page.keyboard.press("Escape")
        page.fill("#find-id", HOSTILE)
        page.keyboard.press("Enter")
        expect(page.locator("#request .id")).to_have_text(HOSTILE)
        expect(page.locator("img")).to_have_count(0)


def test_the_page_itself_refuses_markup(look: Look, gateway: Gateway) -> None:
    page = look(gateway)
    page.wait_for_selector(LIVE)
    refused = page.evaluate(
        """(text) => {
            try { document.body.insertAdjacentHTML("beforeend", text); } catch { return true; }
            return false;
        }""",
        HOSTILE,
    )
    assert refused
    assert any("TrustedHTML" in said for said in look.wrong)
    look.wrong.clear()


# ---- a broken feed, a gateway that is gone ------------------------------------------------------


def test_the_gateway_goes_and_comes_back(
    look: Look, gateway: Gateway, picture: Callable[[Page, str], None]
) -> None:
    page = look(gateway)
    page.wait_for_selector(LIVE)
    gateway.shut()
    expect(page.locator("#link-text")).to_contain_text("No answer", timeout=SLOW_MS)
    expect(page.locator("h1")).to_have_text("The gateway does not answer")
    expect(page.locator("#subline")).to_contain_text("what was known at")
    expect(page.locator("#regions tbody tr")).to_have_count(7)
    picture(page, "console-lost")
    gateway.open()
    expect(page.locator("#link-text")).to_have_text("Live", timeout=SLOW_MS)
    expect(page.locator("h1")).to_have_text("All 7 regions answer")


def test_it_works_while_there_is_no_feed(
    look: Look, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broadcast, "MOST_FEEDS", 0)
    page = look(gateway)
    expect(page.locator("#link-text")).to_contain_text("Feed lost, again in", timeout=SLOW_MS)
    expect(page.locator("h1")).to_have_text("All 7 regions answer")
    gateway.change("us-west", "down", "2 probes failed")
    expect(page.locator("h1")).to_have_text("us-west is down", timeout=SLOW_MS)
    monkeypatch.undo()
    page.evaluate("dispatchEvent(new Event('online'))")
    expect(page.locator("#link-text")).to_have_text("Live", timeout=SLOW_MS)


# ---- keys ---------------------------------------------------------------------------------------


def test_it_asks_for_a_key(
    look: Look, known: Accounts, picture: Callable[[Page, str], None]
) -> None:
    stage = Stage()
    stage.request("chat", tenant="acme", request_id="mine")
    stage.request("chat", tenant="other", request_id="theirs")
    with Gateway(stage, KeyAccess(known.table)) as gateway:
        page = look(gateway)
        key = page.get_by_label("API key")
        expect(key).to_be_focused()
        for presented, problem in (
            ("nf_wrong", "not valid"),
            (known.presented["good"], "scope admin or platform"),
        ):
            key.fill(presented)
            page.keyboard.press("Enter")
            expect(page.locator("#ask-problem")).to_contain_text(problem)
        picture(page, "console-key")
        key.fill(known.presented["admin"])
        page.keyboard.press("Enter")
        page.wait_for_selector(LIVE)
        expect(page.locator("#where")).to_contain_text("requests of acme")
        expect(page.locator("#rows a")).to_have_count(1)
        expect(page.locator("#rows a")).to_have_attribute("href", "#request=mine")
        page.locator("#rows a").click()
        expect(page.locator("#request")).to_contain_text("keys of scope platform")
        page.keyboard.press("Escape")
        picture(page, "console-tenant")
        secret = known.presented["admin"]
        assert secret not in page.content()
        assert not any(secret in url for url in look.asked)
        assert page.evaluate("JSON.stringify(localStorage) + document.cookie") == "{}"
        page.reload()
        page.wait_for_selector(LIVE)

        known.store.directory.revoke_key(known.ids["admin"], now_s=1.0)
        gateway.do(known.follow)
        expect(page.locator("#ask")).to_be_visible(timeout=SLOW_MS)
        expect(page.locator("#ask-problem")).to_contain_text("revoked")
        expect(page.locator("#rows li")).to_have_count(0)
        expect(page.locator("#regions tbody tr")).to_have_count(0)
        key.fill(known.presented["platform"])
        page.keyboard.press("Enter")
        expect(page.locator("#rows a")).to_have_count(2)
        page.get_by_role("button", name="Forget key").click()
        expect(page.locator("#ask")).to_be_visible()
        expect(page.locator("#rows li")).to_have_count(0)
        assert page.evaluate("sessionStorage.length") == 0


def test_another_machine_is_told_why_not(look: Look, gateway: Gateway) -> None:
    page = look(gateway, extra_http_headers={"x-forwarded-for": "203.0.113.9"})
    expect(page.locator("h1")).to_have_text("Not for you to see")
    expect(page.locator("#subline")).to_contain_text(re.compile("A proxy passes this request on"))
    expect(page.locator("#regions tbody tr")).to_have_count(0)
