"""How fast a replica is, read from the totals it tells.

Between two readings it was busy for so long, with so many requests at once on average, and
answered so many tokens. A stretch with one request at a time tells the speed of a request alone;
one with (nearly) all slots taken tells the speed of all together; one between tells the least that
all together reach. Old stretches count less and less, by busy time: a replica that idles forgets
nothing, and one whose work has changed is known anew after about a minute of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nearfield.api.load import Kind, ReplicaLoad

MEMORY_S = 30.0
"""Busy seconds after which a stretch counts half."""
STRETCH_S = 1.0
"""Busy seconds, with at least one answer, that make a stretch: shorter ones are mostly chance."""
LONGEST_STRETCH_S = 60.0
"""A stretch without any answer is given up then: its requests were cancelled, or have failed."""
ALONE = 1.3
"""Mean requests at once up to which a stretch counts as one at a time."""
FULL = 0.7
"""Share of the slots from which it counts as all of them."""
GAIN = 4.0
"""Assumed gain of a full batch over one request, at most, until one has been seen. A decoder on
a CPU gains 5.7 with 16 sequences, an encoder 1.3 (docs/adr/0003, 0006)."""


@dataclass(frozen=True, slots=True)
class Speed:
    """What is to be expected of a replica.

    Attributes:
        alone_tokens_s: for one request alone. tokens_s: for all slots together.
        request_tokens: of one request, mean.
        first_byte_s: from its turn to its first byte, mean. hold_s: how long it keeps a slot, mean.
        prefill_token_s: time to the first byte that one prompt token less saves.
        measured: not assumed.
    """

    alone_tokens_s: float
    tokens_s: float
    request_tokens: float
    first_byte_s: float
    hold_s: float
    prefill_token_s: float = 0.0
    measured: bool = False


ASSUMED: dict[Kind, Speed] = {
    "generate": Speed(500.0, 500.0 * GAIN, 250.0, 0.1, 0.5),
    "embed": Speed(5_000.0, 10_000.0, 50.0, 0.01, 0.01),
    "tensor": Speed(100.0, 100.0, 1.0, 0.01, 0.01),
    "other": Speed(100.0, 100.0 * GAIN, 10.0, 0.05, 0.1),
}
"""Of replicas that have answered nothing yet, here or before."""


@dataclass(slots=True)
class _Ratio:
    """A mean of recent stretches."""

    above: float = 0.0
    below: float = 0.0

    def add(self, above: float, below: float, keep: float) -> None:
        self.above = self.above * keep + above
        self.below = self.below * keep + below

    @property
    def value(self) -> float | None:
        return self.above / self.below if self.below > 0 and self.above > 0 else None


class Meter:
    """Reads one replica's totals."""

    def __init__(self) -> None:
        self._last: ReplicaLoad | None = None
        self._alone = _Ratio()
        self._full = _Ratio()
        self._tokens = _Ratio()
        self._first_byte = _Ratio()
        self._hold = _Ratio()
        self._prefill = _Ratio()
        self._least_alone = 0.0
        self._least_full = 0.0

    def read(self, load: ReplicaLoad) -> bool:
        """Take a reading; whether the replica's speed may be another than before."""
        last = self._last
        if last is None or load.busy_s < last.busy_s or load.answered < last.answered:
            self._last = load
            return False
        busy_s = load.busy_s - last.busy_s
        if busy_s < STRETCH_S:
            return False
        answered = load.answered - last.answered
        if not answered:
            if busy_s > LONGEST_STRETCH_S:
                self._last = load
            return False
        self._last = load
        keep = 0.5 ** (busy_s / MEMORY_S)
        request_s = load.request_s - last.request_s
        tokens = float(load.answered_tokens - last.answered_tokens)
        at_once = max(1.0, request_s / busy_s)
        rate = tokens / busy_s
        self._tokens.add(tokens, answered, keep)
        self._first_byte.add(load.first_byte_s - last.first_byte_s, answered, keep)
        # Requests inside the engine wait there when it has fewer slots: they hold none meanwhile.
        held_s = request_s * min(1.0, load.slots / at_once)
        self._hold.add(held_s, answered, keep)
        cached = load.cached_tokens - last.cached_tokens
        computed = load.prompt_tokens - last.prompt_tokens - cached
        if load.cached_tokens:  # an engine that keeps no cache saves nothing
            self._prefill.add(load.first_byte_s - last.first_byte_s, max(1, computed), keep)
        self._least_alone = max(self._least_alone * keep, rate / at_once)
        self._least_full = max(self._least_full * keep, rate)
        alone = self._alone.value
        if at_once <= ALONE:
            self._alone.add(tokens, request_s, keep)
        if at_once >= FULL * load.slots or (
            alone is not None and at_once > ALONE and rate < FULL * at_once * alone
        ):
            self._full.add(tokens, busy_s, keep)
        return True

    def speed(self, prior: Speed, slots: int) -> Speed:
        """What to expect; of what has not been seen yet, what `prior` says."""
        tokens = self._tokens.value
        if tokens is None:
            return prior
        alone = self._alone.value or max(prior.alone_tokens_s, self._least_alone)
        full = self._full.value
        if full is None:
            gain = prior.tokens_s / prior.alone_tokens_s if prior.measured else GAIN
            full = alone * min(gain, float(slots))
        full = max(full, self._least_full)
        return replace(
            prior,
            alone_tokens_s=min(alone, full),
            tokens_s=full,
            request_tokens=tokens,
            first_byte_s=self._first_byte.value or prior.first_byte_s,
            hold_s=self._hold.value or prior.hold_s,
            prefill_token_s=self._prefill.value or 0.0,
            measured=True,
        )


def together(speeds: list[tuple[Speed, int]]) -> Speed:
    """Of several replicas with so many slots each: what a request may expect of them.

    Raises:
        ValueError: there is none.
    """
    slots = sum(count for _, count in speeds)
    if not slots:
        raise ValueError("no replica has a slot")
    turns_per_s = sum(count / speed.hold_s for speed, count in speeds)

    def mean(of: list[float]) -> float:
        return sum(value * count for value, (_, count) in zip(of, speeds, strict=True)) / slots

    return Speed(
        alone_tokens_s=mean([speed.alone_tokens_s for speed, _ in speeds]),
        tokens_s=mean([speed.tokens_s for speed, _ in speeds]),
        request_tokens=mean([speed.request_tokens for speed, _ in speeds]),
        first_byte_s=mean([speed.first_byte_s for speed, _ in speeds]),
        hold_s=slots / turns_per_s,
        prefill_token_s=mean([speed.prefill_token_s for speed, _ in speeds]),
        measured=any(speed.measured for speed, _ in speeds),
    )
