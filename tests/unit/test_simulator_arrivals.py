"""Recorded traffic and capacity are replayed as they were recorded."""

from __future__ import annotations

import gzip
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from nearfield.core.errors import BadRequest
from nearfield.simulator.arrivals import Stream, stream
from nearfield.simulator.scenario import Spot, Traffic
from nearfield.simulator.traces import spot_changes

REPOSITORY = Path(__file__).parents[2]


def shared() -> Path | None:
    """The shared data's traces, inside the repository or beside it."""
    for parent in (REPOSITORY, REPOSITORY.parent):
        folder = parent / "shared" / "data" / "traces"
        if folder.is_dir():
            return folder
    return None


def made(folder: Path, arrivals: dict[str, Any], **more: Any) -> Stream:
    traffic = Traffic.model_validate(
        {"traffic": "t", "model": "m", "arrivals": arrivals, **more}, strict=True
    )
    return stream(traffic, folder, random.Random(1), start_s=0.0, utc_offset_h=0.0)


LENGTHS = {"input_tokens": 10, "output_tokens": 5}


def test_a_request_trace_is_replayed_from_an_offset_and_again(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "t.csv.gz", "wt") as file:
        file.write("arrival_s,input_tokens,output_tokens\n0,1,2\n1,3,4\n2,5,6\n")
    arrivals = {"kind": "requests", "file": "t.csv.gz", "offset_s": 1.0, "repeat": True}
    taken = made(tmp_path, arrivals).take(5.0)
    assert taken[:3] == [(0.0, 3, 4), (1.0, 5, 6), (pytest.approx(5 / 3), 1, 2)]
    assert len(made(tmp_path, arrivals | {"repeat": False}).take(50.0)) == 2
    thrice = made(tmp_path, arrivals | {"repeat": False, "times": 3.0}).take(50.0)
    assert [row[1:] for row in thrice].count((3, 4)) == 3
    assert thrice == sorted(thrice)


def test_columns_may_have_other_names_and_lengths_may_be_drawn(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("t_s,steps\n1,30\n2,40\n")
    arrivals = {
        "kind": "requests",
        "file": "t.csv",
        "time": "t_s",
        "input_tokens": "steps",
        "output_tokens": None,
    }
    assert made(tmp_path, arrivals, output_tokens=7).take(9.0) == [(1.0, 30, 7), (2.0, 40, 7)]


def test_a_trace_out_of_order_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("arrival_s,input_tokens,output_tokens\n2,1,1\n1,1,1\n")
    with pytest.raises(BadRequest, match="not in order of arrival_s"):
        made(tmp_path, {"kind": "requests", "file": "t.csv"})
    (tmp_path / "t.csv").write_text("arrival_s,input_tokens,output_tokens\n2,many,1\n")
    with pytest.raises(BadRequest, match="'many' in the column 'input_tokens'"):
        made(tmp_path, {"kind": "requests", "file": "t.csv"})


def test_rates_are_followed_window_by_window(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("window_start_s,rate_rps\n0,0\n100,50\n200,5\n")
    arrivals = {"kind": "rates", "file": "r.csv", "times": 2.0}
    taken = [row[0] for row in made(tmp_path, arrivals, **LENGTHS).take(400.0)]
    counts = [sum(a <= t < b for t in taken) for a, b in pairwise((0, 100, 200, 300, 400))]
    assert counts[0] == counts[3] == 0, "nothing before, and nothing after the last window"
    assert counts[1] == pytest.approx(10_000, rel=0.05)
    assert counts[2] == pytest.approx(1000, rel=0.15)
    tick = made(tmp_path, arrivals, **LENGTHS)
    assert tick.tick(100.0, 4).count == 0
    assert tick.tick(200.0, 4).count == pytest.approx(10_000, rel=0.05)


def test_clients_keep_their_rate_their_clumps_and_their_lengths(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text(
        "client,window_start_s,rate_rps,interarrival_cv,family,p1,p2\n"
        "a,0,20,3,Gamma,0.11,1\na,600,40,1,Gamma,1,1\nb,0,5,1.5,Weibull,0.7,1\n"
    )
    columns = "client,period_start_s,field,mean,p1,p5,p10,p25,p50,p75,p90,p95,p99\n"
    (tmp_path / "l.csv").write_text(
        columns + "a,0,input_tokens,100,100,100,100,100,100,100,100,100,100\n"
        "a,0,output_tokens,9,9,9,9,9,9,9,9,9,9\n"
    )
    arrivals = {"kind": "clients", "file": "c.csv", "tokens": "l.csv"}
    taken = made(tmp_path, arrivals).take(1200.0)
    first = [row for row in taken if row[0] < 600]
    assert len(first) == pytest.approx(600 * 25, rel=0.15)
    assert len(taken) - len(first) == pytest.approx(600 * 40, rel=0.05)
    assert {row[1:] for row in taken} == {(100, 9)}, "who is not covered sends what the others do"
    assert made(tmp_path, arrivals).cv2 > 2
    assert made(tmp_path, arrivals).tick(600.0, 8).count == pytest.approx(15_000, rel=0.2)


def test_spot_capacity_is_shifted_to_the_start(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text(
        "trace_id,t_s,available_instances\nz,0,1\nz,100,4\nz,300,0\nother,0,9\n"
    )
    spot = Spot(file="s.csv", trace="z", times=2.0, offset_s=150.0)
    assert spot_changes(spot, tmp_path) == [(0.0, 8), (150.0, 0)]
    with pytest.raises(BadRequest, match="has 2 traces: name one"):
        spot_changes(Spot(file="s.csv"), tmp_path)


@pytest.mark.skipif(shared() is None, reason="the shared traces are not beside the repository")
@pytest.mark.parametrize(
    ("file", "tokens", "mean_rps"),
    [
        ("servegen_deepseek_r1_clients_day1.csv.gz", "servegen_deepseek_r1_tokens_day1.csv.gz", 16),
        ("azure_llm_2023_conv.csv.gz", None, 5.9),
    ],
)
def test_the_shared_traces_have_the_rates_they_are_known_for(
    file: str, tokens: str | None, mean_rps: float
) -> None:
    folder = shared()
    assert folder is not None
    arrivals: dict[str, Any] = {"kind": "requests", "file": file}
    span_s = 2700.0
    if tokens is not None:
        arrivals, span_s = {"kind": "clients", "file": file, "tokens": tokens}, 86_400.0
    replayed = made(folder, arrivals)
    count = sum(replayed.tick(span_s * (i + 1) / 100, 4).count for i in range(100))
    assert count / span_s == pytest.approx(mean_rps, rel=0.1)
