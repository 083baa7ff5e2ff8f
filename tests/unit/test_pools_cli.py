"""`nearfield pools plan` as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from nearfield.cli.main import main
from nearfield.core.catalog_files import read_catalog
from nearfield.simulator.scenario import Scenario, read

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/scenarios/shared-cluster.yaml"
SMALL = """
simulation: small
duration_s: 80
regions: [{region: eu, jurisdiction: eu}]
engines: [{engine: l4, prefill_tokens_per_s: 6000, step_ms: 30}]
models: [{model: m}]
pools: [{pool: p, model: m, engine: l4, usd_per_hour: 2, max_replicas: 9, initial_replicas: 2}]
traffic:
  - traffic: chat
    model: m
    product: chat
    arrivals: {kind: poisson, rate_rps: 3}
    input_tokens: 300
    output_tokens: 20
  - traffic: reports
    model: m
    product: reports
    arrivals: {kind: burst, base_rps: 0.1, burst_rps: 2, every_s: 60, lasts_s: 10}
    input_tokens: 4000
    output_tokens: 20
"""


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def test_a_table_says_what_isolation_costs_and_where_figures_are_from(
    scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "pools.html"
    assert main(["pools", "plan", str(scenario), "--report", str(page)]) == 0
    told = capsys.readouterr()
    for words in (
        "reports is noisy. Promised, first token p99: chat 700 ms",
        "fair-queued*",
        "dedicated",
        "cheapest that keeps the promises",
        "dominated by",
        "* with an engine that serves products in turn",
        "are simulated",
        "(assumed, the scenario's)",
    ):
        assert words in told.out
    assert told.err == "", "a progress bar is for terminals"
    drawn = page.read_text()
    assert "<svg" in drawn
    assert "in turn" in drawn
    assert "http" not in drawn, "it needs nothing else"


def test_json_and_a_published_price(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["pools", "plan", str(scenario), "--json", "--price", "aws/us-east-1/g6.xlarge"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["now"]["layout"] == "shared"
    assert found["now"]["cost_over_now"] == 0
    assert found["choice"]["promises_kept"]
    assert found["choice"]["products"]["chat"]["p99_ms"] <= 700
    assert "published" in found["figures"]["usd_per_hour"]
    assert {row["layout"] for row in found["rows"]} >= {"shared", "fair-queued", "dedicated"}
    price = read_catalog().prices["aws"].offers["us-east-1"]["g6.xlarge"].on_demand_usd_h
    assert price is not None
    for row in found["rows"]:
        assert row["usd_per_hour"] == pytest.approx(row["replicas"] * float(price), abs=1e-4)
        if row["dominated_by"] is not None:
            assert row["p99_ms_saved_per_usd_per_hour"] is None


def test_a_promise_that_nothing_keeps_is_an_exit_code(
    scenario: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pools", "plan", str(scenario), "--slo-p99-ms", "chat=1", "--replicas", "1"]) == 1
    assert "No layout up to 2 replicas keeps the promises" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--slo-p99-ms", "soon"], "write 700, or reports=8000"),
        (["--slo-p99-ms", "report=8000"], "did you mean reports?"),
        (["--report", "nowhere/pools.html"], "nowhere does not exist"),
        (["--limit", "reports=many"], "write reports=60000"),
        (["--noisy", "chta"], "did you mean chat?"),
        (["--model", "n"], "it has m"),
        (["--product", "chat=1:100/10"], "they stand in place of SCENARIO"),
        (["--price", "g6.xlarge"], "write provider/place/machine"),
        (["--price", "aws/us-east-1/g6.xlarg"], "the catalogue has no machine 'g6.xlarg'"),
    ],
)
def test_what_was_typed_wrong_is_said(
    scenario: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pools", "plan", str(scenario), *options]) == 2
    assert said in capsys.readouterr().err


TYPED = ["pools", "plan", "--product", "chat=0.3:300/20", "--product", "reports=0.02..0.3:4000/20"]
WHERE = ["--model", "llama-3.1-8b", "--precision", "fp8", "--price", "aws/us-east-1/g6.xlarge"]


def test_products_as_typed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TYPED, *WHERE, "--replicas", "1", "--slo-p99-ms", "1500", "--json"]) in (0, 1)
    found = json.loads(capsys.readouterr().out)
    assert found["noisy"] == "reports"
    assert found["simulation"] == "llama-3.1-8b-on-g6.xlarge"
    assert found["now"]["pools"] == "shared 1"
    assert 900 < found["now"]["products"]["chat"]["requests"] < 1300
    assert "roofline" in found["figures"]["engine and traffic"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pools", "plan"], "SCENARIO is missing"),
        ([*TYPED, *WHERE[:4]], "--product goes with --model"),
        ([*TYPED, "--product", "chat", *WHERE], "write NAME=RPS:IN/OUT"),
        ([*TYPED, "--product", "chat=1:9/9", *WHERE], "stands there twice"),
        (
            [*TYPED, *WHERE[:1], "llama-3.1-70b", *WHERE[2:]],
            "llama-3.1-70b in fp8 does not fit 1 L4",
        ),
    ],
)
def test_what_is_missing_is_said(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_the_example_costs_what_the_catalogue_says() -> None:
    found = read(EXAMPLE)
    assert isinstance(found, Scenario)
    price = read_catalog().prices["aws"].offers["us-east-1"]["g6.xlarge"].on_demand_usd_h
    assert price is not None
    assert found.pools[0].usd_per_hour == float(price)
