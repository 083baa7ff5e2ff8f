"""Batches of inputs of different lengths: bounded, cheaper together, and nobody is left behind."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nearfield.policy.batching import BatchCost, next_batch

lengths = st.lists(st.integers(1, 512), min_size=1, max_size=64)
costs = st.builds(BatchCost, st.floats(0, 0.01), st.floats(1e-7, 1e-3))


@given(lengths, costs, st.integers(1, 32), st.floats(0, 1))
def test_a_batch_holds_the_oldest_and_no_more_than_fits(
    waiting: list[int], cost: BatchCost, max_batch: int, left_s: float
) -> None:
    batch = next_batch(waiting, cost, max_batch=max_batch, left_s=left_s)
    assert batch[0] == 0
    assert len(batch) == len(set(batch)) <= max_batch
    width = max(waiting[i] for i in batch)
    assert len(batch) == 1 or cost.seconds(len(batch), width) <= left_s


@given(lengths, costs, st.integers(1, 32))
def test_together_is_never_dearer_than_apart(
    waiting: list[int], cost: BatchCost, max_batch: int
) -> None:
    batch = next_batch(waiting, cost, max_batch=max_batch, left_s=1e9)
    together_s = cost.seconds(len(batch), max(waiting[i] for i in batch))
    apart_s = sum(cost.seconds(1, waiting[i]) for i in batch)
    assert together_s <= apart_s + 1e-9


@given(lengths, costs)
def test_everything_is_served_within_as_many_batches_as_inputs(
    waiting: list[int], cost: BatchCost
) -> None:
    left = list(enumerate(waiting))
    for _ in waiting:
        if not left:
            break
        batch = set(next_batch([n for _, n in left], cost, max_batch=8, left_s=0.05))
        left = [entry for position, entry in enumerate(left) if position not in batch]
    assert not left


@given(st.integers(1, 512), st.integers(2, 32))
def test_inputs_of_one_length_share_a_full_batch(length: int, max_batch: int) -> None:
    cost = BatchCost(0.001, 0.0001)
    batch = next_batch([length] * 40, cost, max_batch=max_batch, left_s=1e9)
    assert batch == list(range(max_batch))


def test_a_long_input_does_not_drag_short_ones_along() -> None:
    cost = BatchCost(overhead_s=0.001, token_s=0.0001)
    assert next_batch([500, 5, 6, 495], cost, max_batch=8, left_s=1e9) == [0, 3]


@given(st.floats(1e-4, 5e-3), st.floats(1e-6, 1e-3))
def test_the_cost_is_learned(overhead_s: float, token_s: float) -> None:
    cost = BatchCost()
    for i in range(60):
        rows, width = 1 + i % 8, 10 + 7 * (i % 5)
        cost = cost.learn(rows, width, overhead_s + token_s * rows * width)
    assert cost.seconds(4, 32) == pytest.approx(overhead_s + token_s * 128, rel=0.02)


def test_one_size_teaches_nothing_about_the_slope() -> None:
    cost = BatchCost(0.001, 0.0001)
    for _ in range(20):
        cost = cost.learn(4, 32, 0.5)
    assert cost.token_s == 0.0001
