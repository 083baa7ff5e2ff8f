"""`nearfield simulate` as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from nearfield.cli.main import main

from tests.unit.test_simulator_scenario import GOOD

STATIC = GOOD.replace("{model: chat}", "{model: chat, scaling: {policy: static}}").replace(
    "max_replicas: 4", "max_replicas: 4, initial_replicas: 2"
)


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(STATIC)
    return path


def test_a_table_for_people(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(scenario)]) == 0
    told = capsys.readouterr()
    assert "chat" in told.out
    assert "eu/l4" in told.out
    assert "Every figure above is simulated." in told.out
    assert told.err == "", "a progress bar is for terminals"


@pytest.mark.parametrize("mode", ["events", "fluid"])
def test_json_tells_what_is_simulated_from_what_is_measured(
    scenario: Path, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []
    for _ in range(2):
        assert main(["simulate", str(scenario), "--mode", mode, "--json"]) == 0
        shown.append(json.loads(capsys.readouterr().out))
    first, second = shown
    assert first["simulated"] == second["simulated"]
    assert first["simulated"]["figures"] == "simulated"
    assert first["simulated"]["mode"] == mode
    assert first["simulated"]["requests"]["done"] > 300
    assert first["measured"]["simulated_requests_per_cpu_s"] > 0


def test_the_files_of_one_seed_are_the_same_bytes(scenario: Path, tmp_path: Path) -> None:
    written = []
    for name, seed in (("a", "7"), ("b", "7"), ("c", "8")):
        out, report = tmp_path / f"{name}.json", tmp_path / f"{name}.html"
        options = ["--seed", seed, "--out", str(out), "--report", str(report)]
        assert main(["simulate", str(scenario), *options]) == 0
        written.append((out.read_bytes(), report.read_bytes()))
    assert written[0] == written[1]
    assert written[0] != written[2]


def test_a_report_needs_nothing_else(scenario: Path, tmp_path: Path) -> None:
    report = tmp_path / "r.html"
    assert main(["simulate", str(scenario), "--report", str(report)]) == 0
    page = report.read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    assert "<script src" not in page
    assert page.count("<svg") == 5
    assert "Every figure on this page is simulated." in page


def test_an_invalid_one_is_told_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(GOOD.replace("kind: poisson", "kind: poison"))
    assert main(["simulate", str(path)]) == 2
    told = capsys.readouterr().err
    assert "bad.yaml:15" in told
    assert "did you mean poisson?" in told
    assert main(["simulate", str(tmp_path / "none.yaml")]) == 2


def test_check_knows_scenarios(
    scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "--no-ray", str(scenario)]) == 0
    assert "ok (simulation small)" in capsys.readouterr().out
    scenario.write_text(GOOD.replace("engine: l4, usd", "engine: l40, usd"))
    assert main(["check", "--no-ray", "--json", str(scenario)]) == 2
    [problem] = json.loads(capsys.readouterr().out)["problems"]
    assert problem["field"] == "pools[0].engine"


def test_where_nothing_can_be_written_is_told_before_anything_runs(
    scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", str(scenario), "--report", str(tmp_path / "no" / "r.html")]) == 2
    assert "does not exist: create it" in capsys.readouterr().err
    assert main(["simulate", str(scenario), "--out", str(tmp_path)]) == 2


def test_a_trace_that_cannot_be_used_is_told(
    scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.csv").write_text("arrival_s,input_tokens\n1,5\n")
    scenario.write_text(STATIC.replace("kind: poisson, rate_rps: 5", "kind: requests, file: t.csv"))
    assert main(["simulate", str(scenario)]) == 2
    assert "t.csv has no column 'output_tokens'" in capsys.readouterr().err
