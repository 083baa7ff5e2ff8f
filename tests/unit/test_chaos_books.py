"""The books of the chaos experiments: a book that cannot say no proves nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.chaos import report
from tests.chaos.experiments import Result
from tests.chaos.ledger import (
    Answer,
    Bars,
    Execution,
    Fault,
    Kind,
    account,
    failover_s,
    misses,
    quantile,
)
from tests.chaos.load import planned, read_stream
from tests.chaos.stub import executions, text_of, words_of

FAULT = Fault(10.0, 20.0)
PLACES = {"eu-west": "eu", "us-east": "us"}


def answer(
    id_: str = "a",
    kind: Kind = "ok",
    *,
    due_s: float = 11.0,
    took_s: float = 0.1,
    tenant: str = "any",
    status: int = 200,
    retry_after_s: float | None = None,
) -> Answer:
    return Answer(
        id_, tenant, False, due_s, due_s + took_s, kind, status, retry_after_s=retry_after_s
    )


def ran(id_: str = "a", region: str = "eu-west", *, done: bool = True) -> Execution:
    return Execution(id_, region, 11.0, "done", 12.0) if done else Execution(id_, region, 11.0)


def missed(answers: list[Answer], runs: list[Execution], bars: Bars | None = None) -> list[str]:
    tally = account(answers, runs, FAULT, PLACES)
    return misses(tally, answers, bars or Bars(), timed=False)


def test_all_is_well() -> None:
    assert missed([answer()], [ran()]) == []


@pytest.mark.parametrize(
    ("kind", "said"),
    [("lost", "1 lost"), ("cut", "1 cut without a word"), ("error", "1 errors")],
)
def test_what_is_not_good_is_told(kind: Kind, said: str) -> None:
    assert missed([answer(kind=kind)], []) == [said]


def test_a_broken_stream_that_was_told_is_allowed_where_it_is() -> None:
    assert missed([answer(kind="told")], []) == []
    assert missed([answer(kind="told")], [], Bars(told=False)) == ["1 streams broken"]


def test_a_run_that_was_cut_short_is_none_that_was_executed() -> None:
    tally = account([answer()], [ran(done=False), ran()], FAULT, PLACES)
    assert (tally.begun, tally.again, tally.duplicated) == (2, 1, 0)
    assert missed([answer()], [ran(), ran(region="us-east")]) == ["1 executed twice"]
    assert missed([answer()], [ran(), ran()], Bars(runs_twice=True)) == []


def test_a_run_that_ended_as_its_replica_died_may_be_made_again() -> None:
    first = Execution("a", "eu-west", 9.0, "done", FAULT.began_s - 0.01)
    tally = account([answer()], [first, ran()], FAULT, PLACES)
    assert (tally.duplicated, tally.raced) == (1, 1)
    assert missed([answer()], [first, ran()]) == []


def test_runs_of_others_do_not_count() -> None:
    assert account([answer()], [ran("b"), ran("b")], FAULT, PLACES).begun == 0


def test_abroad_is_abroad_even_if_it_came_to_nothing() -> None:
    runs = [ran(region="us-east", done=False)]
    assert missed([answer(tenant="eu", kind="told")], runs) == [
        "1 runs outside of their jurisdiction"
    ]
    assert missed([answer(tenant="any")], [ran(region="us-east")]) == []


def test_a_refusal_is_for_those_who_have_nowhere_to_go_and_says_when_to_come_back() -> None:
    bars = Bars(may_refuse=("eu",))
    refused = answer(kind="refused", tenant="eu", status=503, retry_after_s=3.0)
    assert missed([refused], [], bars) == []
    assert missed([refused], []) == ["1 refused that could have been served"]
    silent = answer(kind="refused", tenant="eu", status=503)
    assert missed([silent], [], bars) == ["503 without Retry-After"]


def test_load_is_what_was_begun() -> None:
    answers = [answer(str(n), "refused", status=503) for n in range(10)]
    runs = [ran(str(n % 10), done=False) for n in range(13)]
    assert missed(answers, runs, Bars(errors=1.0, load_times=1.2)) == ["13 runs for 10 requests"]
    assert missed(answers, runs[:12], Bars(errors=1.0, load_times=1.2)) == []


def test_who_was_in_flight_waits_from_the_fault_on() -> None:
    early = answer(due_s=9.9, took_s=0.9)
    late = answer(due_s=12.0, took_s=0.5)
    assert failover_s([early, late], FAULT) == pytest.approx(0.8)
    assert failover_s([answer(due_s=5.0), answer(due_s=20.0, took_s=9.0)], FAULT) == 0.0
    assert failover_s([answer(kind="refused", took_s=3.0)], FAULT) == 0.0
    assert failover_s([answer(kind="lost", took_s=11.0)], FAULT) == pytest.approx(11.0)


def test_times_are_held_to_where_they_are_meant_to_be() -> None:
    answers = [answer("a", due_s=1.0), answer("b", took_s=1.6)]
    tally = account(answers, [ran("a"), ran("b")], FAULT, PLACES)
    assert misses(tally, answers, Bars(), timed=False) == []
    assert misses(tally, answers, Bars(), timed=True) == [
        "failover 1.60 s",
        "p99 16.0 times that before",
    ]
    assert misses(tally, answers, Bars(failover_s=None, p99_s=2.0), timed=True) == []


def test_quantiles_are_values_that_occurred() -> None:
    assert quantile(range(1, 101), 0.99) == 99
    assert quantile([3.0, 1.0], 0.99) == 3.0
    assert math.isnan(quantile([], 0.5))


def test_the_load_is_the_same_each_time_and_of_its_rate() -> None:
    first = planned(1000, 40.0, name="x", seed=3)
    assert first == planned(1000, 40.0, name="x", seed=3)
    assert 20 < first[-1].after_s < 30
    assert 0.15 < sum(each.stream for each in first) / 1000 < 0.25
    assert len({each.id for each in first}) == 1000


def test_a_stream_is_read_to_its_end() -> None:
    piece = 'data: {"choices": [{"text": "a "}]}\n\n'
    assert read_stream(f"{piece}{piece}data: [DONE]\n\n".encode()) == ("a a ", "done", "")
    assert read_stream(piece.encode()) == ("a ", "cut", "")
    error = 'data: {"error": {"code": "unavailable"}}\n\n'
    assert read_stream(f"{piece}{error}".encode()) == ("a ", "told", "unavailable")


def test_words_and_texts_name_their_request() -> None:
    assert words_of("id:r-1 hold:0.5") == {"id": "r-1", "hold": "0.5"}
    assert text_of("r-1", 2) == "r-1.0 r-1.1 "


def test_an_engine_that_died_leaves_its_runs_open(tmp_path: Path) -> None:
    events = [("a", "begun", 1.0), ("b", "begun", 2.0), ("a", "done", 3.0), ("a", "begun", 4.0)]
    lines = [json.dumps([id_, "eu-west", event, at_s]) for id_, event, at_s in events]
    (tmp_path / "eu-west-7.runs").write_text("\n".join(lines) + "\n")
    assert executions(tmp_path) == [
        Execution("a", "eu-west", 1.0, "done", 3.0),
        Execution("b", "eu-west", 2.0),
        Execution("a", "eu-west", 4.0),
    ]


def test_a_report_says_what_was_missed(tmp_path: Path) -> None:
    tally = account([answer(kind="lost", took_s=11.0)], [], FAULT, PLACES)
    result = Result("region killed", tally, ("1 lost",), ("a note",))
    path = tmp_path / "results.jsonl"
    for _ in range(2):
        report.append(path, {**result.to_json(), "command": "make chaos", "machine": "2 cores"})
    text = report.render(report.read(path))
    assert "| region killed | 2 | 2 | 0 | 2 | 0 | 0 | 0 | 0 | 0 | 11.00 | – | – |" in text
    assert "**missed** in 2 of 2" in text
    assert "- region killed, run 1: **1 lost**; a note" in text
    assert "- `make chaos`, 2 cores (2 runs)" in text
