"""How many requests an upstream takes at once, found by its time to the first token; who is shed.

A gradient controller after Netflix's concurrency-limits (Gradient2), which in turn follows TCP
Vegas: where first tokens come late the limit shrinks in proportion, else it grows by the square
root of itself. Time to the first token, not total time: an answer's length is no sign of overload.

Three things differ from Gradient2.

- Late is what waits noticeably (`SLACK_S`), not what takes a multiple of the least: an engine that
  batches answers four at once in twice the time of one, and that is its purpose.
- A limit that is not known yet is wide. What an upstream can do is told by its replicas and
  respected by the Router; this finds out where that is not true (any more). One slow window, a
  pause of somebody's garbage collector, proves nothing.
- The baseline is the least, not a mean, so overload never becomes the normal. That it is wrong for
  good is found by a look: after many late windows the limit is halved for a moment, and what the
  first token takes then is the new baseline (as BBR and Envoy probe theirs).

Overload is refused in order of criticality, each level at its share of the limit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from nearfield.core.errors import Unavailable

SHARES = (1.0, 0.9, 0.6)
"""Share of the limit that requests of each criticality may fill: critical, default, sheddable."""

MOST = 1024.0
"""The limit of an upstream of which nothing is known: the connections that are opened to one."""
LEAST = 1.0

TOLERANCE = 1.5
SLACK_S = 0.5
"""The first token is late after TOLERANCE times the baseline, and SLACK_S after it at the earliest:
what a reader notices, and what a second replica could have used."""
LATE_IN_A_ROW = 2
"""Late windows from which on the limit is what was really in flight, and no wide guess."""

SMOOTHING = 0.2
LEAST_GRADIENT = 0.5
"""Both as in Gradient2: one window changes the limit by a tenth at most."""

FALL = 0.3
"""Weight of a faster window in the baseline: the first ones may have waited for a cold start.
Slower ones have none: a queue that grows slowly would become the normal."""
PROMPT_TOKENS = 1000
"""A prompt of so many tokens may take twice the time of a short one; of twice as many, thrice."""

LOOK_EVERY = 80
"""Late windows after which the baseline is looked for anew: about a minute of overload."""
LOOK_WINDOWS = 5
LOOK_SHARE = 0.5
"""How far, and for how long, the limit goes down for that: the queue must drain."""

MAX_RETRY_AFTER_S = 30.0

WINDOW_ANSWERS = 10
WINDOW_S = 0.5
FEWEST_ANSWERS = 5
"""A median of fewer tells of one long prompt before one's own, and not of a queue."""


def full(answers: int, age_s: float) -> bool:
    """Whether a window is long enough to be learnt from."""
    if answers < FEWEST_ANSWERS:
        return False
    return age_s >= (WINDOW_S if answers >= WINDOW_ANSWERS else 2 * WINDOW_S)


def comparable_s(first_token_s: float, prompt_tokens: int) -> float:
    """What the first token would have taken, about, after a short prompt."""
    return first_token_s / (1.0 + prompt_tokens / PROMPT_TOKENS)


@dataclass(frozen=True, slots=True)
class Window:
    """What was seen of an upstream since the last window.

    Attributes:
        first_token_s: median time to the first token, made comparable.
        peak: most requests in flight.
    """

    first_token_s: float
    peak: int


@dataclass(frozen=True, slots=True)
class Limit:
    """An upstream's concurrency limit, and what it was found by.

    Attributes:
        value: requests in flight. most: its bound.
        baseline_s: time to the first token without a queue; 0: not known yet.
    """

    value: float = MOST
    most: float = MOST
    baseline_s: float = 0.0
    _in_a_row: int = 0  # late windows up to the last one
    _late: int = 0  # late windows since the limit last had room to spare
    _looking: int = 0  # windows that the look for a baseline still takes
    _least_s: float = math.inf  # the fastest of them
    _resume: float = 0.0  # the limit afterwards

    def room(self, criticality: int) -> int:
        """Requests in flight at which one more of this criticality is refused."""
        return max(1, int(self.value * SHARES[criticality]))

    def learn(self, window: Window) -> Limit:
        """After one more window that had answers in it."""
        took_s, peak = window.first_token_s, window.peak
        if self._looking:
            return self._looked(took_s)
        if self.baseline_s == 0.0:
            return replace(self, baseline_s=took_s)
        late_s = max(TOLERANCE * self.baseline_s, self.baseline_s + SLACK_S)
        if took_s > late_s:
            return self._shrunk(late_s / took_s, peak)
        value = self.value
        # Below half of it nothing was learnt about more. A small one lets in fewer than that.
        used = peak >= min(value / 2, self.room(len(SHARES) - 1))
        if used:
            value += SMOOTHING * math.sqrt(value)
        return replace(
            self,
            value=min(self.most, value),
            baseline_s=self.baseline_s + FALL * min(0.0, took_s - self.baseline_s),
            _in_a_row=0,
            _late=self._late if used else 0,
        )

    def _shrunk(self, gradient: float, peak: int) -> Limit:
        in_a_row, late = self._in_a_row + 1, self._late + 1
        value = self.value
        if in_a_row >= LATE_IN_A_ROW:
            value = max(LEAST, min(value, peak))
            if late >= LOOK_EVERY:
                return replace(
                    self,
                    value=max(LEAST, LOOK_SHARE * value),
                    _in_a_row=0,
                    _late=0,
                    _looking=LOOK_WINDOWS,
                    _least_s=math.inf,
                    _resume=value,
                )
            wanted = value * max(LEAST_GRADIENT, gradient) + math.sqrt(value)
            value = max(LEAST, min(self.most, value + SMOOTHING * (wanted - value)))
        return replace(self, value=value, _in_a_row=in_a_row, _late=late)

    def _looked(self, took_s: float) -> Limit:
        least_s = min(self._least_s, took_s)
        if self._looking > 1:
            return replace(self, _looking=self._looking - 1, _least_s=least_s)
        return replace(self, value=self._resume, baseline_s=least_s, _looking=0)


def refusal(
    limit: Limit, in_flight: int, criticality: int, *, hold_s: float, draw: float = 0.0
) -> Unavailable:
    """What a request is told that is refused because others matter more, or came before.

    Args:
        in_flight: requests that the upstream has.
        hold_s: how long a request stays in flight, mean.
        draw: uniform in [0, 1): spreads those who come back.
    """
    excess = in_flight + 1 - limit.room(criticality)
    drained_s = max(1.0, excess * hold_s / limit.value)
    return Unavailable(
        "The service is overloaded, and takes more important requests first. "
        "Send the request again later.",
        code="overloaded",
        retry_after_s=float(math.ceil(min(MAX_RETRY_AFTER_S, drained_s * (1.0 + draw)))),
    )
