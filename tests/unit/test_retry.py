"""Replays, budgets, hedges: each rule by itself."""

from __future__ import annotations

import math
import random

import pytest
from nearfield.policy.retry import (
    HEDGE_LEAST,
    Budget,
    Cause,
    History,
    Quantile,
    hedge_after_s,
    hedge_budget,
    may_replay,
)


@pytest.mark.parametrize(
    ("history", "cause", "options", "reason"),
    [
        (History(begun=True), "refused", {}, "its answer has begun"),
        (History(guilty=True), "failed", {}, "a replica died of it"),
        (History(idempotent=False), "failed", {}, "it may have run, and is neither"),
        (History(idempotent=False), "died", {}, "it may have run, and is neither"),
        (History(left_s=0.0), "refused", {}, "its deadline would pass"),
        (History(left_s=0.2), "failed", {"needs_s": 0.3}, "its deadline would pass"),
        (History(runs=3), "failed", {}, "it has run 3 times"),
        (History(runs=0, refusals=8), "refused", {}, "8 upstreams did not take it"),
        (History(crossings=1), "failed", {"crosses": True}, "it has crossed to another region"),
        (History(suspect=True), "died", {"crosses": True}, "it may have killed a replica"),
    ],
)
def test_what_forbids_a_replay(
    history: History, cause: Cause, options: dict[str, bool], reason: str
) -> None:
    verdict = may_replay(history, cause, **options)  # type: ignore[arg-type]
    assert not verdict.allowed
    assert verdict.reason.startswith(reason)


@pytest.mark.parametrize(
    ("history", "cause", "options", "budgeted", "isolated"),
    [
        (History(), "failed", {}, True, False),
        (History(), "died", {}, False, False),
        (History(runs=0, refusals=1), "refused", {}, False, False),
        (History(idempotent=False), "refused", {}, False, False),  # nobody can have run it
        (History(idempotent=False, keyed=True), "failed", {}, True, False),
        (History(crossings=1), "failed", {}, True, False),
        (History(), "failed", {"crosses": True}, True, False),
        (History(suspect=True), "died", {}, False, True),
        (History(suspect=True), "died", {"crosses": True, "region_lost": True}, False, True),
    ],
)
def test_what_allows_one(
    history: History, cause: Cause, options: dict[str, bool], budgeted: bool, isolated: bool
) -> None:
    verdict = may_replay(history, cause, **options)  # type: ignore[arg-type]
    assert verdict.allowed
    assert verdict.budgeted is budgeted
    assert verdict.isolated is isolated


def test_a_quiet_gateway_may_retry_three_times_in_ten_seconds() -> None:
    budget = Budget().mark(0.0, 0)
    answers = []
    for _ in range(5):
        budget, answer = budget.take(1.0, 4, in_flight=1, extra_in_flight=0)
        answers.append(answer)
    assert answers == ["now", "now", "now", "no", "no"]
    for second in range(2, 12):
        budget = budget.mark(float(second), 4)
    assert budget.take(12.0, 4, in_flight=1, extra_in_flight=0)[1] == "now"


def test_a_busy_one_a_fifth_of_its_requests() -> None:
    budget = Budget().mark(0.0, 0)
    granted = 0
    for i in range(1000):
        budget, answer = budget.take(5.0, 1000, in_flight=50, extra_in_flight=0)
        granted += answer == "now"
        assert i < 200 or answer == "no"
    assert granted == 200


def test_too_many_at_once_wait_their_turn() -> None:
    budget = Budget().mark(0.0, 0)
    answers = [
        budget.take(1.0, 1000, in_flight=20, extra_in_flight=extra)[1] for extra in (0, 6, 7, 30)
    ]
    assert answers == ["now", "now", "later", "later"]  # 3 + a fifth of 20


def test_hedges_are_a_twentieth_and_none_of_a_trickle() -> None:
    budget = hedge_budget().mark(0.0, 0)
    assert budget.take(1.0, 19, in_flight=1, extra_in_flight=0)[1] == "no"
    granted = 0
    for _ in range(100):
        budget, answer = budget.take(1.0, 400, in_flight=1, extra_in_flight=0)
        granted += answer == "now"
    assert granted == 20


@pytest.mark.parametrize("spread", [0.1, 0.5, 1.0])
def test_the_quantile_is_learned_and_follows(spread: float) -> None:
    rng = random.Random(4)
    quantile = Quantile()
    for scale in (0.02, 0.2, 0.05):
        for _ in range(4000):
            quantile = quantile.learn(scale * math.exp(rng.gauss(0, spread)))
        values = []
        for _ in range(2000):
            quantile = quantile.learn(scale * math.exp(rng.gauss(0, spread)))
            values.append(quantile.value_s)
        expected_s = scale * math.exp(1.645 * spread)
        assert sum(values) / len(values) == pytest.approx(expected_s, rel=0.15)


def test_a_hedge_needs_consent_a_short_kind_experience_and_room_elsewhere() -> None:
    seen = Quantile(value_s=0.04, seen=HEDGE_LEAST)
    usual = {"opted_in": True, "left_s": 1.0, "elsewhere_s": 0.0}
    assert hedge_after_s("embed", seen, **usual) == 0.04  # type: ignore[arg-type]
    assert hedge_after_s("tensor", seen, **usual) == 0.04  # type: ignore[arg-type]
    for kind, answers, other in (
        ("generate", seen, {}),
        ("embed", seen, {"opted_in": False}),
        ("embed", Quantile(value_s=0.04, seen=HEDGE_LEAST - 1), {}),
        ("embed", seen, {"left_s": 0.04}),
        ("embed", seen, {"elsewhere_s": None}),
        ("embed", seen, {"elsewhere_s": 0.01}),
    ):
        assert hedge_after_s(kind, answers, **{**usual, **other}) is None  # type: ignore[arg-type]
