"""Which waiting inputs of different lengths make the next batch.

The oldest waiting input always goes: nothing starves, and a device that is idle never waits for
company. Who joins it depends on what a batch costs. An encoder that packs its sequences pays for
their tokens, so the next in line join, unless one is many times longer than the others (attention
still pads). One that pads to the longest pays
for the rectangle, so the nearest in length join, each only if it is predicted to cost less in this
batch than alone.

A batch grows until its overhead is a small part of it: more would gain nothing and make all of it
wait. And it stays within the time that the oldest has left under its objective. Where the oldest
is late already, small batches would only make the rest later: then the bound is off.

The prediction is seconds = overhead + rate x tokens, learned from finished batches by least
squares with exponential forgetting.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

FORGETTING = 0.98
"""Weight that a batch's measurement keeps with each later one."""

ENOUGH = 40.0
"""A batch whose tokens take so many times its overhead is large enough: the most that any larger
one could gain is 2.5 %."""

LEAST_S = 0.02
"""No shorter batch is large enough: an overhead this small against the noise is not known."""

SPREAD = 4.0
"""Most cells per token in the rectangle that a packed batch's attention still is. Sentences of one
corpus need 2 to 3; a document among short queries would make all of them as wide as itself."""


@dataclass(frozen=True, slots=True)
class BatchCost:
    """What a batch is predicted to cost, and the sums the prediction is fitted from.

    Attributes:
        overhead_s: seconds of a batch that do not depend on its size.
        token_s: seconds per token, padding included where there is any.
    """

    overhead_s: float = 0.001
    token_s: float = 0.0001
    n: float = 0.0
    x: float = 0.0
    xx: float = 0.0
    y: float = 0.0
    xy: float = 0.0

    def seconds(self, tokens: int) -> float:
        return self.overhead_s + self.token_s * tokens

    def is_enough(self, tokens: int) -> bool:
        """Whether a batch of so many tokens gains nothing by more."""
        return self.token_s * tokens >= max(ENOUGH * self.overhead_s, LEAST_S)

    def learn(self, tokens: float, took_s: float) -> BatchCost:
        """The cost after one more measured batch."""
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
    packed: bool,
) -> list[int]:
    """Indices of the inputs that make the next batch, the oldest first.

    Args:
        lengths: tokens of each waiting input, oldest first; at least one.
        max_batch: most inputs in a batch.
        left_s: seconds until the oldest should be answered.
        packed: a batch costs what its tokens cost; else what the rectangle around them does.
    """
    bound_s = left_s if cost.seconds(lengths[0]) <= left_s else math.inf
    if packed:
        return _in_line(lengths, cost, max_batch, bound_s)
    return _alike(lengths, cost, max_batch, bound_s)


def _in_line(lengths: Sequence[int], cost: BatchCost, max_batch: int, bound_s: float) -> list[int]:
    count, tokens, width = 1, lengths[0], lengths[0]
    for length in lengths[1:max_batch]:
        if cost.is_enough(tokens) or cost.seconds(tokens + length) > bound_s:
            break
        if (count + 1) * max(width, length) > SPREAD * (tokens + length):
            break
        count, tokens, width = count + 1, tokens + length, max(width, length)
    return list(range(count))


def _alike(lengths: Sequence[int], cost: BatchCost, max_batch: int, bound_s: float) -> list[int]:
    chosen, width = [0], lengths[0]
    others = sorted(range(1, len(lengths)), key=lambda i: (abs(lengths[i] - lengths[0]), i))
    for index in others:
        if len(chosen) >= max_batch or cost.is_enough(len(chosen) * width):
            break
        length = lengths[index]
        wider = max(width, length)
        together_s = cost.seconds((len(chosen) + 1) * wider)
        if together_s > bound_s:
            continue
        if together_s - cost.seconds(len(chosen) * width) < cost.seconds(length):
            chosen.append(index)
            width = wider
    return chosen
