"""Whether a request may be sent again, and what all of that may cost together.

A request may be replayed before the first byte of its answer has gone out, where running it twice
does no harm, and never when it has taken a replica with it. Retries that failures cause are bounded
by a budget: without one, a region that fails makes every caller send more, to those still standing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

Cause = Literal["refused", "died", "failed"]
"""`refused`: the upstream never had the request (no connection, or it was closed before anything
was written). `died`: the upstream itself is gone, with all its requests. `failed`: this request got
an error or no answer in time."""

MOST_ATTEMPTS = 3
"""Runs of one request, the first included."""
MOST_REFUSALS = 8
"""Upstreams that may refuse one request's connection before it is given up."""
MOST_CROSSINGS = 1
"""Runs outside the region that had the request first."""

HEDGED_KINDS = frozenset({"embed", "tensor"})
"""Work that is short and always the same: a second run of a long generation costs too much."""
HEDGE_QUANTILE = 0.95
HEDGE_LEAST = 100
"""Answers to have seen before the quantile is believed."""


@dataclass(frozen=True, slots=True)
class History:
    """What a request has been through.

    Attributes:
        begun: something of the answer has reached the client.
        idempotent: running it twice does no harm: an inference. keyed: it carries an
            `Idempotency-Key`, so the region runs it once whatever arrives.
        runs: upstreams that may have started it. refusals: those that cannot have.
        crossings: runs in another region than the first.
        suspect: it was in flight when a replica died, and nothing has absolved it since.
        guilty: that death was its own doing (see `policy.quarantine`).
        left_s: until its deadline.
    """

    begun: bool = False
    idempotent: bool = True
    keyed: bool = False
    runs: int = 1
    refusals: int = 0
    crossings: int = 0
    suspect: bool = False
    guilty: bool = False
    left_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a request may be sent again, and why.

    Attributes:
        isolated: only as a trial (`quarantine.may_try`): it may have killed a replica.
        budgeted: only if the budget allows it as well.
    """

    allowed: bool
    reason: str
    isolated: bool = False
    budgeted: bool = True


def may_replay(
    history: History,
    cause: Cause,
    *,
    crosses: bool = False,
    region_lost: bool = False,
    needs_s: float = 0.0,
) -> Verdict:
    """Whether the request may be sent again after this.

    Args:
        crosses: to another region. needs_s: the time to the first byte predicted there.
        region_lost: the region it comes from is gone altogether, its agent as well as its replicas.
            No request does that, so a suspect may leave, on trial.
    """
    reason = _obstacle(history, cause, crosses, region_lost, needs_s)
    if reason is not None:
        return Verdict(False, reason)
    # What was never run costs nobody anything, and the work of the dead is not done twice.
    return Verdict(
        True,
        f"sent again: the upstream {_WORDS[cause]}",
        isolated=history.suspect,
        budgeted=cause == "failed",
    )


_WORDS = {"refused": "did not take it", "died": "is gone", "failed": "failed"}


def _obstacle(
    history: History, cause: Cause, crosses: bool, region_lost: bool, needs_s: float
) -> str | None:
    if history.begun:
        return "its answer has begun"
    if history.guilty:
        return "a replica died of it"
    if cause != "refused" and not (history.idempotent or history.keyed):
        return "it may have run, and is neither idempotent nor carries an Idempotency-Key"
    if history.left_s <= needs_s:
        return "its deadline would pass"
    if history.runs >= MOST_ATTEMPTS:
        return f"it has run {history.runs} times"
    if history.refusals >= MOST_REFUSALS:
        return f"{history.refusals} upstreams did not take it"
    if crosses and history.crossings >= MOST_CROSSINGS:
        return "it has crossed to another region before"
    if crosses and history.suspect and not region_lost:
        return "it may have killed a replica, and stays in its region"
    return None


@dataclass(frozen=True, slots=True)
class Budget:
    """Extra requests, as a share of the requests themselves, over a sliding window.

    Fed with a running total of first attempts, which the caller keeps anyway: nothing is done here
    for a request that needs no retry.

    Attributes:
        share, window_s: extras per request, and over how long.
        least: extras that are allowed however few the requests.
        concurrent: extras at once beyond `share` of the requests in flight; None: no bound.
        extras: granted so far, in all.
    """

    share: float = 0.2
    window_s: float = 10.0
    least: int = 3
    concurrent: int | None = 3
    extras: int = 0
    _marks: tuple[tuple[float, int, int], ...] = ()  # (when, requests, extras), the oldest first

    def mark(self, now_s: float, requests: int) -> Budget:
        """Remember the running total of requests. About once a second."""
        return replace(self, _marks=(*self._recent(now_s), (now_s, requests, self.extras)))

    def take(
        self, now_s: float, requests: int, *, in_flight: int, extra_in_flight: int
    ) -> tuple[Budget, Literal["now", "later", "no"]]:
        """Ask for one extra request.

        Args:
            requests: running total of first attempts.
            in_flight: requests in flight, extras included; extra_in_flight: the extras.

        Returns:
            The budget afterwards, and `now`; `later`: too many extras at this moment, ask again
            when one has ended; or `no`.
        """
        marks = self._recent(now_s)
        _, requests_before, extras_before = marks[0] if marks else (now_s, 0, 0)
        allowed = max(self.least, int(self.share * (requests - requests_before)))
        if self.extras - extras_before >= allowed:
            return self, "no"
        if (
            self.concurrent is not None
            and extra_in_flight >= self.concurrent + self.share * in_flight
        ):
            return self, "later"
        return replace(self, extras=self.extras + 1), "now"

    def _recent(self, now_s: float) -> tuple[tuple[float, int, int], ...]:
        """The marks inside the window, and the last one before it."""
        marks = self._marks
        while len(marks) > 1 and marks[1][0] <= now_s - self.window_s:
            marks = marks[1:]
        return marks


def hedge_budget() -> Budget:
    """At most 5 % of extra load, and none from a trickle of requests."""
    return Budget(share=0.05, least=0, concurrent=None)


@dataclass(frozen=True, slots=True)
class Quantile:
    """A quantile of a stream of times, in constant memory.

    It goes up by much at each time above and down by little at each below, in proportion, so that
    it rests where a share `q` is below (stochastic approximation: Robbins and Monro, 1951).
    """

    q: float = HEDGE_QUANTILE
    value_s: float = 0.0
    seen: int = 0

    def learn(self, took_s: float) -> Quantile:
        took_s = max(took_s, 1e-6)
        if self.seen == 0:
            return replace(self, value_s=took_s, seen=1)
        gain = max(0.03, 1.0 / (1.0 + 0.2 * self.seen))
        step = gain * (self.q if took_s > self.value_s else self.q - 1.0)
        return replace(self, value_s=self.value_s * math.exp(step), seen=self.seen + 1)


def hedge_after_s(
    kind: str, answers: Quantile, *, opted_in: bool, left_s: float, elsewhere_s: float | None
) -> float | None:
    """When to run a request a second time if it is not answered by then; None: never.

    Args:
        kind: of work: `embed`, `tensor`, `generate`.
        answers: time to the answer of requests like this one.
        left_s: until its deadline.
        elsewhere_s: predicted wait at another upstream that could run it; None if there is none.
            A queue there means that nobody has slots to give away.
    """
    if not opted_in or kind not in HEDGED_KINDS or answers.seen < HEDGE_LEAST:
        return None
    if elsewhere_s is None or elsewhere_s > 0 or answers.value_s >= left_s:
        return None
    return answers.value_s
