"""A simulation's page in a real browser: nothing is cut off, numbers follow the pointer."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nearfield.simulator.report import page
from nearfield.simulator.result import simulate
from nearfield.simulator.scenario import Scenario, read

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SCENARIOS = Path("examples/scenarios")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    of = read(SCENARIOS / "spot-with-fallback.yaml")
    assert isinstance(of, Scenario)
    faults = [of.faults[0].model_copy(update={"at_s": 300.0})]
    short = of.model_copy(update={"duration_s": 600.0, "faults": faults})
    path = tmp_path_factory.mktemp("page") / "spot.html"
    path.write_text(page(simulate(short, SCENARIOS)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield running
        running.close()


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_person_can_read_it(browser: Any, report: Path, width: int, scheme: str) -> None:
    seen = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    wrong: list[str] = []
    seen.on("pageerror", lambda error: wrong.append(str(error)))
    seen.goto(report.as_uri())
    assert seen.evaluate("document.documentElement.scrollWidth") <= width
    least_px = 9 if width < 600 else 10
    sizes = seen.eval_on_selector_all(
        "svg text", "all => all.map(text => text.getBoundingClientRect().height)"
    )
    assert min(sizes) >= least_px
    captions = seen.locator("figcaption small").all_inner_texts()
    assert captions[0] == "requests/s, by minutes since the start"
    assert all(", by minutes since the start" in caption for caption in captions)
    plot = seen.locator("svg[data-plot='1']")
    plot.hover()
    assert "spot-a" in seen.locator("#tip").inner_text()
    rows = seen.locator("#history tbody tr:visible")
    everything = rows.count()
    seen.fill("#filter", "LOST spot-a")
    assert 0 < rows.count() < everything
    assert all("spot-a" in text for text in rows.all_inner_texts())
    assert seen.locator("#shown").inner_text() == f"{rows.count()} of {everything}"
    assert not wrong
    seen.close()
