"""Admission to the KV cache: bounded, first come first served, and nothing is left for ever."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from nearfield.policy.admission import admit, fit

KV_TOKENS = 4096
tokens = st.integers(1, KV_TOKENS)
small = st.integers(1, 600)


@given(st.lists(tokens, max_size=20), st.integers(1, KV_TOKENS))
def test_a_rectangle_holds_every_sequence_within_the_budget(
    reserved: list[int], columns: int
) -> None:
    rectangle = fit(reserved, kv_tokens=KV_TOKENS, max_rows=16, columns=columns)
    if rectangle is None:
        return
    assert rectangle.rows == len(reserved) <= 16
    assert rectangle.columns >= max(reserved, default=0)
    assert rectangle.rows * rectangle.columns <= KV_TOKENS


@given(tokens, st.integers(1, KV_TOKENS))
def test_one_sequence_that_fits_the_budget_is_always_admitted_when_idle(
    need: int, columns: int
) -> None:
    assert admit([], [(1, need)], kv_tokens=KV_TOKENS, max_rows=16, columns=columns)[0] == 1


@given(
    st.lists(small, max_size=8),
    st.lists(st.tuples(st.integers(1, 4), small), min_size=1, max_size=12),
    st.integers(128, KV_TOKENS),
)
def test_the_oldest_join_first_and_the_result_fits(
    running: list[int], waiting: list[tuple[int, int]], columns: int
) -> None:
    joining, new_columns = admit(
        running, waiting, kv_tokens=KV_TOKENS, max_rows=16, columns=columns
    )
    joined = [need for count, need in waiting[:joining] for _ in range(count)]
    everyone = [*running, *joined]
    if joining:
        assert len(everyone) <= 16
        assert len(everyone) * new_columns <= KV_TOKENS
        assert new_columns >= max(everyone)
    if joining < len(waiting):
        count, need = waiting[joining]
        more = [*everyone, *[need] * count]
        assert fit(more, kv_tokens=KV_TOKENS, max_rows=16, columns=new_columns) is None


@given(st.lists(small, min_size=1, max_size=40))
def test_everything_is_served_in_order_as_the_batch_drains(needs: list[int]) -> None:
    waiting, running, order, columns = list(enumerate(needs)), [], [], 128
    while waiting or running:
        joining, columns = admit(
            [need for _, need in running],
            [(1, need) for _, need in waiting],
            kv_tokens=KV_TOKENS,
            max_rows=4,
            columns=columns,
        )
        assert joining or running
        order += [index for index, _ in waiting[:joining]]
        running += waiting[:joining]
        waiting = waiting[joining:]
        running = running[1:]
    assert order == list(range(len(needs)))


def test_the_rectangle_is_kept_while_it_serves() -> None:
    assert admit([100], [(1, 100)], kv_tokens=4096, max_rows=8, columns=512) == (1, 512)
    assert admit([100] * 7, [(1, 100)], kv_tokens=4096, max_rows=8, columns=1024) == (1, 128)
