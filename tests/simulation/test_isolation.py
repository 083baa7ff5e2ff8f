"""What shared, fair-queued and dedicated pools do to a product whose neighbour is noisy."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from nearfield.core.errors import BadRequest
from nearfield.simulator.books import Histogram
from nearfield.simulator.isolation import FAIR, Row, compare
from nearfield.simulator.neighbours import SHARED, Case, Fare, Group, Order
from nearfield.simulator.scenario import Scenario

HERE = Path()
CHAT = {
    "traffic": "chat",
    "model": "m",
    "product": "chat",
    "arrivals": {"kind": "poisson", "rate_rps": 4},
    "input_tokens": {"kind": "lognormal", "p50": 300, "p95": 900},
    "output_tokens": 60,
}
REPORTS = {
    "traffic": "reports",
    "model": "m",
    "product": "reports",
    "arrivals": {
        "kind": "burst", "base_rps": 0.1, "burst_rps": 2.5, "every_s": 100, "lasts_s": 25,
    },
    "input_tokens": {"kind": "lognormal", "p50": 4000, "p95": 9000},
    "output_tokens": 100,
}  # fmt: skip


def scenario(*traffic: dict[str, Any], replicas: int = 2, **changes: Any) -> Scenario:
    return Scenario.model_validate(
        {
            "simulation": "neighbours",
            "duration_s": 300,
            "regions": [{"region": "eu", "jurisdiction": "eu"}],
            "engines": [
                {
                    "engine": "l4",
                    "prefill_tokens_per_s": 6000,
                    "step_ms": 30,
                    "step_ms_per_sequence": 0.4,
                    "max_running": 48,
                }
            ],
            "models": [{"model": "m"}],
            "pools": [
                {
                    "pool": "p",
                    "model": "m",
                    "engine": "l4",
                    "usd_per_hour": 2,
                    "max_replicas": 9,
                    "initial_replicas": replicas,
                }
            ],
            "traffic": list(traffic or (CHAT, REPORTS)),
        }
        | changes
    )


def one(names: tuple[str, ...], replicas: int, order: Order = "first come") -> Group:
    return Group(names, ((SHARED, replicas),), order)


def test_the_neighbour_is_heard_in_one_pool_less_in_turn_and_not_apart() -> None:
    case = Case(scenario(), HERE)
    assert case.noisiest == "reports"
    both = ("chat", "reports")
    shared = case.fares(one(both, 3))
    fair = case.fares(one(both, 3, "in turn"))
    apart = case.fares(one(("chat",), 1))["chat"]
    assert shared["chat"].p99_s > fair["chat"].p99_s
    assert shared["chat"].peak_over_share > fair["chat"].peak_over_share
    assert fair["chat"].over == apart.over == 0
    assert shared["chat"].peak_over_share > shared["chat"].over_share, "the peak is the peak"


def test_the_same_requests_come_whatever_the_layout() -> None:
    case = Case(scenario(), HERE)
    layouts = [
        case.fares(one(("chat", "reports"), 4)),
        case.fares(one(("chat", "reports"), 4, "in turn")),
        case.fares(Group(("chat", "reports"), (("chat", 2), (SHARED, 2)))),
        case.fares(one(("chat",), 2)) | case.fares(one(("reports",), 2)),
    ]
    ended = [{name: fare.ended for name, fare in fares.items()} for fares in layouts]
    # Some are on their way when the time is over: as many as replicas have, at most.
    for counts in ended[1:]:
        for name in counts:
            assert abs(counts[name] - ended[0][name]) <= 30
    assert case.fares(one(("chat", "reports"), 4)) is layouts[0], "nothing is simulated twice"


def test_one_product_alone_is_served_in_order_of_arrival_either_way() -> None:
    case = Case(scenario(), HERE)
    plain = case.fares(one(("reports",), 1))["reports"]
    fair = case.fares(one(("reports",), 1, "in turn"))["reports"]
    assert fair.ended == plain.ended
    for q in (0.5, 0.95, 0.99):
        assert fair.quantile_s(q) == pytest.approx(
            plain.quantile_s(q), rel=0.05
        )  # chunks are fuller


def test_the_comparison_prices_isolation() -> None:
    found = compare(Case(scenario(replicas=3, duration_s=150), HERE), goal_s=1.0)
    assert found.noisy == "reports"
    assert found.now.layout == SHARED
    assert found.now.replicas == 3
    assert found.choice is not None
    assert found.choice.kept
    assert found.choice.fares["chat"].p99_s <= 1.0 < found.now.fares["chat"].p99_s
    frontier = found.frontier
    costs = [row.usd_per_hour for row in frontier]
    times = [row.others.p99_s for row in frontier]
    assert costs == sorted(costs)
    assert times == sorted(times, reverse=True)
    assert len(set(times)) == len(times)
    for row in found.rows:
        assert row.usd_per_hour == 2 * row.replicas
        assert row not in frontier or not row.needs_turns
        if row.dominated_by is not None:
            assert row.dominated_by in frontier
            assert row.dominated_by.usd_per_hour <= row.usd_per_hour
            assert row.dominated_by.others.p99_s <= row.others.p99_s
    for before, after in itertools.pairwise(frontier):
        dollars = after.usd_per_hour - before.usd_per_hour
        if dollars and math.isfinite(before.others.p99_s):
            saved_ms = 1000 * (before.others.p99_s - after.others.p99_s)
            assert after.ms_per_usd == pytest.approx(saved_ms / dollars)


def test_an_engine_that_serves_in_turn_needs_no_pools_apart() -> None:
    case = Case(scenario(replicas=3, duration_s=150), HERE)
    found = compare(case, goal_s=1.0, in_turn=True)
    without = compare(case, goal_s=1.0)
    assert found.choice is not None
    assert found.choice.layout == FAIR
    assert found.hoped_for is None
    assert without.choice is not None
    assert without.choice.layout != FAIR
    assert found.choice.usd_per_hour <= without.choice.usd_per_hour


def test_the_same_seed_gives_the_same_rows() -> None:
    def rows() -> list[tuple[str, str, float]]:
        found = compare(Case(scenario(duration_s=60), HERE, seed=4), goal_s=1.0, now=2)
        return [(row.layout, row.pools, row.others.p99_s) for row in found.rows]

    assert rows() == rows()


def test_a_limit_is_kept_and_refuses_the_noise() -> None:
    case = Case(scenario(), HERE)
    both, limit = ("chat", "reports"), 100_000
    plain = case.fares(one(both, 2))
    limited = case.fares(Group(both, ((SHARED, 2),), limits=(("reports", limit),)))
    assert limited["chat"].over_share < plain["chat"].over_share
    assert limited["chat"].failed <= plain["chat"].failed
    refused = limited["reports"].failed_share
    assert 0.05 < refused < 0.9
    work = sum(case.work["reports"].values())
    let_in = work * (1 - refused)  # about: long ones are refused more often than short ones
    assert let_in <= 1.3 * (limit + limit / 60 * case.scenario.duration_s)

    short = Case(scenario(duration_s=120), HERE)
    found = compare(short, goal_s=1.0, now=2, limits={"reports": 20_000})
    rows = [row for row in found.rows if row.layout == "limited"]
    assert rows
    assert all(row.offered is False for row in rows), "it is shown, and never chosen"
    assert found.choice is None or found.choice.layout != "limited"


def test_who_was_refused_was_not_served_quickly() -> None:
    ttft = Histogram()
    ttft.add(0.1, 98)
    fare = Fare(ttft, ended=100, failed=2)
    assert fare.p99_s == math.inf
    assert fare.quantile_s(0.97) == pytest.approx(0.1, rel=0.03)
    assert Fare.all_of([fare, fare]).failed_share == 0.02


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"traffic": [CHAT]}, "m has 1 product"),
        (
            {"regions": [{"region": r, "jurisdiction": "eu", "rtt_ms": {"eu": 9, "us": 9}}
                         for r in ("eu", "us")]},
            "2 regions",
        ),
        ({"models": [{"model": "m"}, {"model": "n"}]}, "--model: the scenario has m, n"),
    ],
)  # fmt: skip
def test_what_is_no_case_is_said(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        Case(scenario(**changes), HERE)


def test_a_product_that_is_not_there_is_said() -> None:
    with pytest.raises(BadRequest, match="did you mean reports"):
        compare(Case(scenario(), HERE), noisy="report")


def test_rows_name_their_pools() -> None:
    groups = (Group(("reports",), (("reports", 5),)), one(("chat", "search"), 3))
    row = Row("reports apart", groups, 6.4, {}, Fare(), kept=True)
    assert row.pools == "reports 5 + shared 3"
    assert row.replicas == 8
