"""Recorded traffic as a benchmark: schedules known beforehand do what policies do; the command."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest
from nearfield.simulator.parts import static

from benchmarks.autoscaling import hindsight, traces, traffic
from benchmarks.autoscaling.baselines import Reactive, ServeDefault
from benchmarks.autoscaling.hindsight import ALLOWED, Case, Setting
from benchmarks.autoscaling.waiting import Boots, Replay, first_replicas, late_share


def case(boot_s: int = 30, seconds: int = 3600) -> Case:
    """A load that doubles and halves, with noise."""
    rng = np.random.default_rng(7)
    rate = 60.0 + 30.0 * np.sin(np.arange(seconds) / 300.0)
    work = rng.poisson(rate).astype(np.float64)
    return Case(work, 4.0, Boots(boot_s), first_replicas(work, 4.0))


def replay(of: Case) -> Replay:
    return Replay(of.work, of.speed, of.boots, of.first)


@pytest.mark.parametrize("boot_s", [30, 120])
def test_a_reactive_schedule_is_what_the_reactive_policy_does(boot_s: int) -> None:
    made, setting = case(boot_s), Setting(0.85, 30, 300)
    known = made.follow(hindsight.reactive(made, setting))
    decided = replay(made).run(Reactive(*setting))
    assert known.late == pytest.approx(decided.late)
    assert known.cost == pytest.approx(decided.cost)
    assert known.boots == decided.boots


@pytest.mark.parametrize("replicas", [12, 15, 18])
def test_lateness_at_once_is_that_of_second_after_second(replicas: int) -> None:
    made = case()
    at_once = late_share(made.work, np.full(len(made.work), replicas * made.speed))
    begun = Replay(made.work, made.speed, made.boots, replicas)
    assert begun.run(static({"pool": replicas})).late == pytest.approx(at_once)


def test_the_oracle_is_cheaper_than_what_is_tuned_and_that_than_static() -> None:
    made = case(120)
    best, how = hindsight.oracle(made)
    tuned = hindsight.tuned(made, hindsight.tried(made))
    fixed = hindsight.static(made)
    assert tuned is not None
    assert max(best.late, tuned[0].late, fixed.late) <= ALLOWED
    assert best.cost < tuned[0].cost < fixed.cost, how
    assert hindsight.always(made, fixed.most - 1).late > ALLOWED


def test_dips_shorter_than_a_boot_are_filled_and_others_not() -> None:
    wanted = np.array([5, 5, 2, 5, 1, 1, 1, 1, 4, 4])
    assert hindsight._filled(wanted, 2).tolist() == [5, 5, 5, 5, 1, 1, 1, 1, 4, 4]


def test_a_fitted_policy_passes() -> None:
    made = case()
    default = replay(made).run(ServeDefault(made.speed * 4.0))
    found = hindsight.fitted(
        lambda share: ServeDefault(share * made.speed * 4.0),
        replay(made),
        default,
        least=0.1,
        most=1.5,
    )
    assert found is not None
    assert found[0].late <= ALLOWED


def test_boots_of_recorded_loads_take_as_long_in_the_mean() -> None:
    boots = Boots.around(120, (20.0, 30.0, 40.0))
    assert boots.mean_s == pytest.approx(120.0)
    assert Boots.around(30, ()).mean_s == 30.0


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Ten minutes of conversations, four a second."""
    rng = random.Random(3)
    (tmp_path / "traces").mkdir()
    lines = ["arrival_s,input_tokens,output_tokens"]
    at_s = 0.0
    while at_s < 600.0:
        lines.append(f"{at_s:.3f},{rng.randint(10, 900)},{rng.randint(5, 300)}")
        at_s += rng.expovariate(4.0)
    with gzip.open(tmp_path / "traces" / "azure_llm_2023_conv.csv.gz", "wt") as file:
        file.write("\n".join(lines) + "\n")
    return tmp_path


def test_the_command_writes_a_table_and_takes_baselines_from_an_earlier_run(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--traces", "azure_conv,azure_conv_tokens", "--boots", "30", "--scales", "3"]
    options += ["--data", str(data), "--results", str(data / "out"), "--processes", "1"]
    assert traces.main(options) == 0
    first = json.loads((data / "out" / "traces.json").read_text())
    assert [cell["unit"] for cell in first["cells"]] == ["requests", "tokens"]
    assert first["figures"] == "simulated"
    policies = first["cells"][0]["policies"]
    assert {"oracle", "nearfield", "reactive_one", "kpa_default", "static"} <= policies.keys()
    table = (data / "out" / "traces.md").read_text()
    assert "| 3 | 30 s |" in table
    assert table in capsys.readouterr().out
    again = [*options, "--reuse", str(data / "out" / "traces.json")]
    assert traces.main(again) == 0
    assert json.loads((data / "out" / "traces.json").read_text()) == first


def test_no_traces_is_said_with_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(traffic.VARIABLE, raising=False)
    monkeypatch.setattr(traffic, "ROOT", tmp_path / "checkout")
    assert traces.main(["--traces", "azure_conv"]) == 2
    assert "give its folder with --data or NEARFIELD_TRACES" in capsys.readouterr().err
    (tmp_path / "traces").mkdir()
    assert traces.main(["--traces", "azure_conv", "--data", str(tmp_path)]) == 2
    assert "azure_llm_2023_conv.csv.gz cannot be read" in capsys.readouterr().err
