"""Batches of inputs of different lengths: bounded, cheaper together, and nobody is left behind."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nearfield.policy.batching import BatchCost, next_batch

lengths = st.lists(st.integers(1, 512), min_size=1, max_size=64)
costs = st.builds(BatchCost, st.floats(0, 0.01), st.floats(1e-7, 1e-3))


def tokens_of(waiting: list[int], batch: list[int], packed: bool) -> int:
    chosen = [waiting[i] for i in batch]
    return sum(chosen) if packed else len(chosen) * max(chosen)


@given(lengths, costs, st.integers(1, 32), st.floats(0, 1), st.booleans())
def test_a_batch_holds_the_oldest_and_no_more_than_fits(
    waiting: list[int], cost: BatchCost, max_batch: int, left_s: float, packed: bool
) -> None:
    batch = next_batch(waiting, cost, max_batch=max_batch, left_s=left_s, packed=packed)
    assert batch[0] == 0
    assert len(batch) == len(set(batch)) <= max_batch
    late = cost.seconds(waiting[0]) > left_s
    assert late or cost.seconds(tokens_of(waiting, batch, packed)) <= left_s


@given(lengths, costs, st.integers(1, 32), st.floats(0, 1), st.booleans())
def test_together_is_never_dearer_than_apart(
    waiting: list[int], cost: BatchCost, max_batch: int, left_s: float, packed: bool
) -> None:
    batch = next_batch(waiting, cost, max_batch=max_batch, left_s=left_s, packed=packed)
    together_s = cost.seconds(tokens_of(waiting, batch, packed))
    apart_s = sum(cost.seconds(waiting[i]) for i in batch)
    assert together_s <= apart_s + 1e-9


@given(lengths, costs, st.booleans())
def test_a_batch_that_has_enough_takes_nobody_more(
    waiting: list[int], cost: BatchCost, packed: bool
) -> None:
    batch = next_batch(waiting, cost, max_batch=64, left_s=1e9, packed=packed)
    assert len(batch) == 1 or not cost.is_enough(tokens_of(waiting, batch[:-1], packed))


@given(lengths, costs, st.booleans())
def test_everything_is_served_within_as_many_batches_as_inputs(
    waiting: list[int], cost: BatchCost, packed: bool
) -> None:
    left = list(enumerate(waiting))
    for _ in waiting:
        if not left:
            break
        ahead = [n for _, n in left]
        batch = set(next_batch(ahead, cost, max_batch=8, left_s=0.05, packed=packed))
        left = [entry for position, entry in enumerate(left) if position not in batch]
    assert not left


@pytest.mark.parametrize("packed", [True, False])
def test_inputs_of_one_length_share_a_full_batch(packed: bool) -> None:
    cost = BatchCost(overhead_s=0.01, token_s=0.0001)
    assert next_batch([9] * 40, cost, max_batch=8, left_s=9, packed=packed) == list(range(8))


def test_a_long_input_does_not_drag_short_ones_along_where_they_would_be_padded() -> None:
    cost = BatchCost(overhead_s=0.005, token_s=0.0001)
    waiting = [500, 5, 6, 495]
    assert next_batch(waiting, cost, max_batch=8, left_s=9, packed=False) == [0, 3]
    assert next_batch(waiting, cost, max_batch=8, left_s=9, packed=True) == [0, 1, 2, 3]
    waiting = [500, *[5] * 9]
    assert next_batch(waiting, cost, max_batch=8, left_s=9, packed=True) == [0, 1, 2, 3]


@given(lengths, costs)
def test_attention_over_a_packed_batch_pads_little(waiting: list[int], cost: BatchCost) -> None:
    batch = next_batch(waiting, cost, max_batch=64, left_s=1e9, packed=True)
    chosen = [waiting[i] for i in batch]
    assert len(chosen) * max(chosen) <= 4 * sum(chosen)


@pytest.mark.parametrize("packed", [True, False])
def test_who_is_late_does_not_make_the_rest_later(packed: bool) -> None:
    """Batches of one are the slowest way to serve a queue that is behind."""
    cost = BatchCost(overhead_s=0.005, token_s=0.0001)
    in_time = next_batch([20] * 9, cost, max_batch=8, left_s=0.01, packed=packed)
    late = next_batch([20] * 9, cost, max_batch=8, left_s=-1.0, packed=packed)
    assert (len(in_time), len(late)) == (2, 8)


@given(st.floats(1e-4, 5e-3), st.floats(1e-6, 1e-3))
def test_the_cost_is_learned(overhead_s: float, token_s: float) -> None:
    cost = BatchCost()
    for i in range(60):
        tokens = (1 + i % 8) * (10 + 7 * (i % 5))
        cost = cost.learn(tokens, overhead_s + token_s * tokens)
    assert cost.seconds(128) == pytest.approx(overhead_s + token_s * 128, rel=0.02)


def test_one_size_teaches_nothing_about_the_slope() -> None:
    cost = BatchCost(0.001, 0.0001)
    for _ in range(20):
        cost = cost.learn(128, 0.5)
    assert cost.token_s == 0.0001
