"""Scenario files: strict, and what is wrong is told with its place and a remedy."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from nearfield.core.spec import Strict
from nearfield.simulator import scenario as schema
from nearfield.simulator.scenario import Scenario, read

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples" / "scenarios").glob("*.yaml"))

GOOD = """\
simulation: small
duration_s: 60
regions:
  - {region: eu, jurisdiction: eu, rtt_ms: {us: 80}}
  - {region: us, jurisdiction: us}
engines:
  - {engine: l4, prefill_tokens_per_s: 9000, step_ms: 25}
models:
  - {model: chat}
pools:
  - {pool: l4, model: chat, engine: l4, usd_per_hour: 0.8, max_replicas: 4}
traffic:
  - traffic: day
    model: chat
    arrivals: {kind: poisson, rate_rps: 5}
    input_tokens: 800
    output_tokens: 150
"""


def problems(tmp_path: Path, text: str) -> list[tuple[str, str, str]]:
    path = tmp_path / "s.yaml"
    path.write_text(text)
    found = read(path, "s.yaml")
    assert isinstance(found, list)
    return [(p.field, p.message, p.remedy) for p in found]


def test_a_good_one_is_read_with_its_shorthands(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(GOOD)
    scenario = read(path)
    assert isinstance(scenario, Scenario)
    assert scenario.traffic[0].input_tokens is not None
    assert scenario.traffic[0].input_tokens.model_dump() == {"kind": "fixed", "value": 800}
    assert scenario.pools[0].regions is None


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_valid(path: Path) -> None:
    assert isinstance(read(path), Scenario)


@pytest.mark.parametrize(
    ("change", "field", "message", "remedy"),
    [
        (("duration_s: 60", "duration: 60"), "duration", "unknown key", "duration_s"),
        (("kind: poisson", "kind: poison"), "traffic[0].arrivals.kind", "one of", "poisson"),
        (("kind: poisson, ", ""), "traffic[0].arrivals.kind", "is missing", "one of poisson"),
        (("engine: l4, usd", "engine: l40, usd"), "pools[0].engine", "names no engine", "l4"),
        (("model: chat\n    arr", "model: chats\n    arr"), "traffic[0].model", "no model", "chat"),
        (("rate_rps: 5", "rate_rps: -5"), "traffic[0].arrivals.rate_rps", "at least 0", "value"),
        ((", rtt_ms: {us: 80}", ""), "regions[0].rtt_ms", "says nothing about us", "us: 80"),
        (("max_replicas: 4", "max_replicas: 4, min_replicas: 5"), "pools[0].min_replicas", "", ""),
        (("max_replicas: 4", "max_replicas: 4, spot: {}"), "pools[0].spot", "capacity: spot", ""),
        (("    input_tokens: 800\n", ""), "traffic[0].input_tokens", "is missing", "500"),
        (
            ("kind: poisson, rate_rps: 5", "kind: requests, file: no.csv"),
            "traffic[0].arrivals.file",
            "does not exist",
            "relative",
        ),
        (("duration_s: 60", "duration_s: 60\nduration_s: 70"), "duration_s", "twice", "remove"),
        (("step_ms: 25", "step_ms: 0"), "engines[0].step_ms", "above 0", ""),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path, change: tuple[str, str], field: str, message: str, remedy: str
) -> None:
    found = problems(tmp_path, GOOD.replace(*change))
    matching = [each for each in found if each[0] == field]
    assert matching, found
    assert message in matching[0][1]
    assert remedy in matching[0][2]


def test_two_pools_of_one_name_are_refused_where_they_meet(tmp_path: Path) -> None:
    line = GOOD[GOOD.index("  - {pool") : GOOD.index("traffic:")]
    apart = line.replace("usd_per_hour", "regions: [us], usd_per_hour")
    only = line.replace("usd_per_hour", "regions: [eu], usd_per_hour")
    assert any("another pool" in p[1] for p in problems(tmp_path, GOOD.replace(line, line + apart)))
    path = tmp_path / "apart.yaml"
    path.write_text(GOOD.replace(line, only + apart))
    assert isinstance(read(path), Scenario)


def test_every_key_is_documented() -> None:
    text = (ROOT / "docs" / "simulate.md").read_text()
    sections = [
        found
        for found in vars(schema).values()
        if isinstance(found, type) and issubclass(found, Strict) and found is not Strict
    ]
    keys = {key for section in sections for key in section.model_fields}
    assert len(keys) > 80
    assert sorted(key for key in keys if not re.search(rf"\b{key}\b", text)) == []
