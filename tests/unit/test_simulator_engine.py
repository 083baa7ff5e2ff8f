"""The engine of the simulator: what a request takes alone, and what company costs it."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
from nearfield.simulator.engine import Batch, Request, Timing

TIMING = Timing(token_s=1e-4, step_s=0.02, sequence_s=0.001, chunk=500, slots=4, max_queued=8)
SOURCE: Any = SimpleNamespace(timeout_s=1e6)
HERE: Any = object()


def request(came_s: float, prompt: int, answer: int, gateway: Any = HERE) -> Request:
    return Request(came_s, SOURCE, gateway, prompt, answer)


def run(batch: Batch, until_s: float = math.inf) -> list[tuple[float, Request]]:
    """All that is done by then, with its time."""
    done = []
    while batch.next_s <= until_s and batch.next_s < math.inf:
        now_s = batch.next_s
        done += [(now_s, each) for each in batch.run(now_s)]
    return done


def test_alone_a_request_takes_its_prompt_and_an_iteration_a_token() -> None:
    batch = Batch(TIMING, 2.0)
    asked = request(5.0, 1000, 10)
    assert batch.add(asked, 5.0)
    [(ended_s, _)] = run(batch)
    prefill_s = 1000 * 1e-4 + 2 * 0.02
    assert asked.first_s == pytest.approx(5.0 + prefill_s)
    assert ended_s == pytest.approx(5.0 + prefill_s + 9 * 0.021)
    assert ended_s == pytest.approx(5.0 + TIMING.alone_s(1000, 10))


def test_an_answer_of_nothing_ends_with_its_prompt() -> None:
    batch = Batch(TIMING, 2.0)
    asked = request(0.0, 1000, 0)
    batch.add(asked, 0.0)
    [(ended_s, _)] = run(batch)
    assert ended_s == asked.first_s == pytest.approx(TIMING.prefill_s(1000, 0))


def test_company_slows_each_step_and_prompts_stall_answers() -> None:
    batch = Batch(TIMING, 2.0)
    first, second = request(0.0, 0, 100), request(1.0, 1000, 100)
    batch.add(first, 0.0)
    run(batch, 0.9)
    batch.add(second, 1.0)
    done = {each: at_s for at_s, each in run(batch)}
    # 1 s alone is 47.7 iterations. The other's 1000 tokens wait for the 48th and take two; then
    # both decode.
    alone = 1 + (1.0 - 0.02) / 0.021
    stalled_s = (50 - alone) * 0.021 + 1000 * 1e-4
    assert second.first_s == pytest.approx(1.0 + stalled_s)
    assert done[first] == pytest.approx(1.0 + stalled_s + 50 * 0.022)
    assert done[second] > done[first]


def test_who_finds_no_place_waits_in_line() -> None:
    batch = Batch(TIMING, max_wait_s=0.5)
    asked = [request(0.0, 0, 50) for _ in range(6)]
    for each in asked:
        batch.add(each, 0.0)
    assert batch.running == 4
    assert batch.load == 6
    done = [each for _, each in run(batch)]
    assert done == asked
    assert asked[4].joined_s == pytest.approx(0.02 + 0.021 + 48 * 0.024)
    assert batch.late == 2
    assert all(each.runs == 1 for each in asked)


def test_short_prompts_that_are_there_together_share_an_iteration() -> None:
    batch = Batch(TIMING, 2.0)
    asked = [request(0.0, prompt, 1) for prompt in (100, 200, 250, 40, 1200)]
    for each in asked[:4]:
        batch.add(each, 0.0)
    done = run(batch)
    assert [each for _, each in done] == asked[:4]
    assert asked[0].first_s == pytest.approx(100 * 1e-4 + 0.02), "it was alone when it began"
    assert asked[1].first_s == asked[2].first_s == asked[3].first_s
    assert asked[3].first_s == pytest.approx(590 * 1e-4 + 2 * 0.02)


def test_whose_deadline_has_passed_is_not_begun() -> None:
    batch = Batch(TIMING, 2.0)
    for _ in range(4):
        batch.add(request(0.0, 0, 10_000), 0.0)
    late = request(0.0, 0, 1)
    late.deadline_s = 1.0
    batch.add(late, 0.0)
    assert len(run(batch)) == 4
    assert batch.expired == [late]
    assert late.runs == 0


def test_kv_cache_bounds_the_batch_by_the_production_rule() -> None:
    timing = Timing(1e-4, 0.02, 0.001, 500, slots=4, max_queued=8, kv_tokens=512)
    batch = Batch(timing, 2.0)
    asked = [request(0.0, 150, 50) for _ in range(3)]
    for each in asked:
        batch.add(each, 0.0)
    assert batch.running == 2, "200 tokens take 256 columns: two rows of 512"
    assert [each for _, each in run(batch)] == asked
    assert batch.load == 0


def test_slower_from_now_on() -> None:
    batch = Batch(TIMING, 2.0)
    batch.add(request(0.0, 0, 100), 0.0)
    run(batch, 0.5)
    batch.change(TIMING.slower(3.0), 1.05)
    [(ended_s, _)] = run(batch)
    alone_s = 0.02 + 99 * 0.021
    assert ended_s == pytest.approx(1.05 + 3 * (alone_s - 1.05))


def test_what_a_gateway_brought_goes_with_it() -> None:
    batch = Batch(TIMING, 2.0)
    other = cast(Any, object())
    mine = [request(0.0, 100, 20) for _ in range(3)]
    theirs = [request(0.0, 100, 20, other) for _ in range(3)]
    for pair in zip(theirs, mine, strict=True):
        for each in pair:
            batch.add(each, 0.0)
    assert sorted(map(id, batch.remove(other, 0.05))) == sorted(map(id, theirs))
    assert [each for _, each in run(batch)] == mine


def test_many_steps_lose_no_time_to_rounding() -> None:
    batch = Batch(TIMING, 2.0)
    batch.add(request(0.0, 0, 3_000_000), 0.0)
    for i in range(1, 2000):
        now_s = 30.0 * i
        run(batch, now_s)
        batch.add(request(now_s, 0, 1), now_s)
    done = run(batch)
    assert batch.load == 0
    assert done[-1][0] == pytest.approx(3_000_000 * 0.021, rel=1e-3)


@pytest.mark.parametrize(("prompt", "answer"), [(200, 100), (4000, 10), (1000, 0), (0, 300)])
def test_a_full_replica_does_what_it_is_said_to(prompt: int, answer: int) -> None:
    batch = Batch(TIMING, 2.0)
    asked = [request(0.0, prompt, answer) for _ in range(400)]
    for each in asked:
        batch.add(each, 0.0)
    done = run(batch)
    half = [at_s for at_s, _ in done[100:300]]
    rate_rps = (len(half) - 1) / (half[-1] - half[0])
    assert rate_rps == pytest.approx(TIMING.full_rps(prompt, answer), rel=0.05)
