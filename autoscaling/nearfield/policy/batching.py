"""Which waiting inputs of different lengths make the next batch.

An encoder pads a batch to its longest input, so a batch costs rows x width, and company only
helps while it is about as long. The rule: the oldest waiting input always goes (nothing starves,
and a device that is idle never waits for company); others join, nearest in length first, as long
as computing them in this batch is predicted to cost less than computing them alone, and the
batch stays within the time the oldest has left under its objective.

The prediction is seconds = overhead + rate x rows x width, learned from finished batches by least
squares with exponential forgetting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FORGETTING = 0.98
"""Weight that a batch's measurement keeps with each later one."""


@dataclass(frozen=True, slots=True)
class BatchCost:
    """What a batch is predicted to cost, and the sums the prediction is fitted from.

    Attributes:
        overhead_s: seconds of a batch that do not depend on its size.
        token_s: seconds per padded token.
    """

    overhead_s: float = 0.001
    token_s: float = 0.0001
    n: float = 0.0
    x: float = 0.0
    xx: float = 0.0
    y: float = 0.0
    xy: float = 0.0

    def seconds(self, rows: int, width: int) -> float:
        return self.overhead_s + self.token_s * rows * width

    def learn(self, rows: int, width: int, took_s: float) -> BatchCost:
        """The cost after one more measured batch."""
        tokens = float(rows * width)
        n = FORGETTING * self.n + 1
        x = FORGETTING * self.x + tokens
        xx = FORGETTING * self.xx + tokens * tokens
        y = FORGETTING * self.y + took_s
        xy = FORGETTING * self.xy + tokens * took_s
        spread = n * xx - x * x
        overhead_s, token_s = self.overhead_s, self.token_s
        if n >= 4 and spread > 1e-6 * n * xx:
            token_s = max(1e-9, (n * xy - x * y) / spread)
            overhead_s = max(0.0, (y - token_s * x) / n)
        return BatchCost(overhead_s, token_s, n, x, xx, y, xy)


def next_batch(
    lengths: Sequence[int],
    cost: BatchCost,
    *,
    max_batch: int,
    left_s: float,
) -> list[int]:
    """Indices of the inputs that make the next batch, the oldest first.

    Args:
        lengths: tokens of each waiting input, oldest first; at least one.
        max_batch: most inputs in a batch.
        left_s: seconds until the oldest should be answered; a batch may take no longer, but one
            input always goes.
    """
    chosen, width = [0], lengths[0]
    others = sorted(range(1, len(lengths)), key=lambda i: (abs(lengths[i] - lengths[0]), i))
    for index in others:
        if len(chosen) >= max_batch:
            break
        length = lengths[index]
        wider = max(width, length)
        together_s = cost.seconds(len(chosen) + 1, wider)
        if together_s > left_s:
            continue
        if together_s - cost.seconds(len(chosen), width) < cost.seconds(1, length):
            chosen.append(index)
            width = wider
    return chosen
