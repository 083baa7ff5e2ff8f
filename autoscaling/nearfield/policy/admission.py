"""Which waiting sequences may join a running batch: KV-cache admission by token budget.

The cache is a rectangle of rows x columns (see `serving.engines.decoder`): a row for each
sequence, as many columns as the longest one may need. A request reserves its prompt and all of
its `max_tokens` when it joins, so an admitted sequence always finishes: nothing is ever
preempted or swapped out. First come, first served: a request that does not fit yet is waited
for and never overtaken, so nothing starves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

COLUMN_GRANULE_TOKENS = 128
"""Columns come in steps of this many tokens, so that the rectangle seldom changes."""


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Rows in use and columns reserved for each, tokens."""

    rows: int
    columns: int


def fit(
    reserved_tokens: Sequence[int],
    *,
    kv_tokens: int,
    max_rows: int,
    columns: int,
) -> Rectangle | None:
    """The rectangle for sequences that reserve this much each, or None if there is none.

    Keeps the present number of `columns` where it serves (a change copies the cache), and
    otherwise takes the fewest that do, in granules.
    """
    rows = len(reserved_tokens)
    if rows > max_rows:
        return None
    need = max(reserved_tokens, default=0)
    if need <= columns and rows * columns <= kv_tokens:
        return Rectangle(rows, columns)
    fewest = -(-need // COLUMN_GRANULE_TOKENS) * COLUMN_GRANULE_TOKENS
    fewest = min(max(fewest, COLUMN_GRANULE_TOKENS), kv_tokens)
    if fewest < need or rows * fewest > kv_tokens:
        return None
    return Rectangle(rows, fewest)


def admit(
    running_tokens: Sequence[int],
    waiting: Sequence[tuple[int, int]],
    *,
    kv_tokens: int,
    max_rows: int,
    columns: int,
) -> tuple[int, int]:
    """How many of the waiting requests join now, and the columns the cache must have.

    Args:
        running_tokens: reserved tokens of each running sequence.
        waiting: for each waiting request, oldest first: (sequences, reserved tokens of each).
        kv_tokens: the cache's size. max_rows: most sequences in a step. columns: the present
            rectangle's.

    Returns:
        (joining, columns): the first `joining` requests of `waiting` join.
    """
    reserved = list(running_tokens)
    joining = 0
    for sequences, tokens in waiting:
        rectangle = fit(
            [*reserved, *[tokens] * sequences],
            kv_tokens=kv_tokens,
            max_rows=max_rows,
            columns=columns,
        )
        if rectangle is None:
            break
        reserved += [tokens] * sequences
        columns = rectangle.columns
        joining += 1
    return joining, columns
