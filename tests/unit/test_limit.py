"""The limit's arithmetic and the order of shedding."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nearfield.core.errors import Unavailable
from nearfield.policy.limit import (
    FEWEST_ANSWERS,
    LOOK_EVERY,
    LOOK_WINDOWS,
    MOST,
    SHARES,
    Limit,
    Window,
    full,
    refusal,
)


def taught(limit: Limit, times: int, took_s: float, peak: int) -> Limit:
    for _ in range(times):
        limit = limit.learn(Window(took_s, peak))
    return limit


def test_what_is_not_known_is_not_limited() -> None:
    assert Limit().room(2) > 500
    assert taught(Limit(), 50, 0.1, 3) == Limit(baseline_s=0.1)


def test_it_grows_while_used_without_a_queue_and_shrinks_with_one() -> None:
    known = taught(Limit(value=20.0), 5, 0.1, 5)
    grown = taught(known, 5, 0.1, 20)
    assert grown.value > known.value
    shrunk = taught(known, 5, 0.8, 20)
    assert shrunk.value < known.value
    assert shrunk.baseline_s == known.baseline_s  # overload teaches nothing


def test_a_batch_that_takes_longer_is_no_queue() -> None:
    known = taught(Limit(), 5, 0.02, 1)
    assert taught(known, 50, 0.3, 64).value == MOST


@pytest.mark.parametrize("criticality", range(len(SHARES)))
@pytest.mark.parametrize("value", [1.0, 2.1, 3.3, 7.9])
def test_a_small_limit_grows_again_whoever_fills_it(value: float, criticality: int) -> None:
    """What it lets in is rounded down: at 2.1 a single request, which is less than half of it."""
    limit = Limit(value=value, baseline_s=0.1)
    for _ in range(60):
        limit = limit.learn(Window(0.1, limit.room(criticality)))
    assert limit.value > 20


def test_a_median_needs_some_answers() -> None:
    assert not full(FEWEST_ANSWERS - 1, 60.0)
    assert full(FEWEST_ANSWERS, 1.0)
    assert not full(FEWEST_ANSWERS, 0.9)
    assert full(10, 0.5)


def test_one_slow_window_is_a_pause_and_two_are_a_queue() -> None:
    known = taught(Limit(), 5, 0.1, 5)
    paused = taught(known, 1, 5.0, 5)
    assert paused.value == MOST
    assert taught(paused, 1, 0.1, 5).value == MOST
    assert taught(paused, 1, 5.0, 40).value < 40


def test_a_baseline_from_a_cold_start_is_soon_forgotten() -> None:
    cold = taught(Limit(), 1, 6.0, 10)
    assert taught(cold, 12, 0.1, 10).baseline_s < 0.25


def test_after_a_minute_of_overload_it_looks_for_its_baseline_anew() -> None:
    limit = taught(Limit(), 1, 0.1, 5)
    limit = taught(limit, LOOK_EVERY - 1, 2.0, 30)
    before = limit.value
    looking = taught(limit, 1, 2.0, 30)
    assert looking.value == pytest.approx(before / 2)
    over = taught(looking, LOOK_WINDOWS - 1, 1.4, 8).learn(Window(1.2, 8))
    assert over.value == before
    assert over.baseline_s == 1.2
    assert taught(over, 10, 1.3, int(before)).value > before


def test_trickles_do_not_add_up_to_a_minute_of_overload() -> None:
    limit = taught(Limit(), 1, 0.1, 5)
    for _ in range(LOOK_EVERY):
        limit = taught(limit, 1, 2.0, 30)  # one slow window now and then
        limit = taught(limit, 1, 0.1, 3)
    assert limit.value == MOST


@given(
    st.lists(st.tuples(st.floats(0, 100), st.integers(0, 2000)), max_size=400),
    st.floats(1, 2000),
)
def test_it_stays_within_its_bounds(windows: list[tuple[float, int]], most: float) -> None:
    limit = Limit(value=1.0, most=most)
    for took_s, peak in windows:
        limit = limit.learn(Window(took_s, peak))
        assert 1.0 <= limit.value <= most
        assert 1 <= limit.room(2) <= limit.room(1) <= limit.room(0)


def test_the_least_critical_go_first() -> None:
    limit = Limit(value=10.0)
    assert [limit.room(level) for level in (0, 1, 2)] == [10, 9, 6]


def test_a_refusal_says_when_to_come_back() -> None:
    error = refusal(Limit(value=10.0), 30, 0, hold_s=2.0)
    assert isinstance(error, Unavailable)
    assert (error.code, error.retry_after_s) == ("overloaded", 5.0)  # 21 too many, 5 a second
    assert refusal(Limit(value=10.0), 30, 0, hold_s=2.0, draw=0.5).retry_after_s == 7.0
    assert refusal(Limit(value=10.0), 10, 0, hold_s=0.01).retry_after_s == 1.0
    assert refusal(Limit(value=1.0), 500, 0, hold_s=60.0).retry_after_s == 30.0
