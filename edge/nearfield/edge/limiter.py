"""Before the Router: how much each upstream may have at once, and who is refused when all have it.

An upstream is a replica, or what one model has in another region. Its limit is found by the time to
its first tokens (`policy.limit`). A leg to a full upstream is not taken: the Router is asked again
as if a try there had failed, so that what it would do then comes first: another replica, another
region, a declared fallback model. Only then is the request refused, the least critical first.

The Router is not asked to know of this: whatever implements `ports.Router` can stand behind it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from nearfield.core.errors import NearfieldError, Unavailable
from nearfield.edge.decisions import Admission, Routed, replica_gone
from nearfield.edge.proxy.ports import Answer, Attempt, Grant, Leg, Request, Router, Soon, Target
from nearfield.edge.retries import BudgetRetries
from nearfield.policy.limit import Limit, Window, comparable_s, full, refusal
from nearfield.policy.retry import HEDGED_KINDS

MOST_TIMES: Final = 256
"""Of one window that are looked at: the first ones tell its median well enough."""
DETOURS: Final = 4
"""Other legs that the Router is asked for in place of one that cannot be taken."""
HOLD_SMOOTHING: Final = 0.1
FORGOTTEN_S: Final = 300.0
"""An upstream that nothing was sent to for so long: its replica is gone, or is another by now."""
TIDY_S: Final = 10.0


class _Upstream:
    """What this process has in one upstream, and what it learnt from it."""

    __slots__ = (
        "hold_s", "inside", "limit", "peak", "rooms", "times_s", "used_s", "window_s",
    )  # fmt: skip

    def __init__(self, limit: Limit, now_s: float) -> None:
        self.limit = limit
        self.rooms = _rooms(limit)
        self.inside: set[Attempt] = set()
        self.peak = 0
        self.times_s: list[float] = []
        self.window_s = self.used_s = now_s
        self.hold_s = 0.0

    def add(self, attempt: Attempt) -> None:
        self.inside.add(attempt)
        self.used_s = attempt.started_s
        if len(self.inside) > self.peak:
            self.peak = len(self.inside)

    def answered(self, held_s: float, first_s: float | None, now_s: float) -> None:
        """A try ended well. `first_s`: its time to the first token, if it tells of the queue."""
        self.hold_s += (held_s - self.hold_s) * (HOLD_SMOOTHING if self.hold_s else 1.0)
        if first_s is None:
            return
        times_s = self.times_s
        if len(times_s) < MOST_TIMES:
            times_s.append(first_s)
        if full(len(times_s), now_s - self.window_s):
            times_s.sort()
            self.limit = self.limit.learn(Window(times_s[len(times_s) // 2], self.peak))
            self.rooms = _rooms(self.limit)
            self.times_s = []
            self.window_s = now_s
            self.peak = len(self.inside)


def _rooms(limit: Limit) -> tuple[int, ...]:
    return limit.room(0), limit.room(1), limit.room(2)


@dataclass(frozen=True, slots=True)
class UpstreamLimit:
    """For people to look at: an upstream, its limit, and what it has now."""

    address: str
    model: str
    limit: float
    in_flight: int
    baseline_s: float


class LimitedRouter:
    """A Router before a Router. Grants must be `KeyGate`'s."""

    def __init__(
        self,
        router: Router,
        retries: BudgetRetries,
        *,
        limit: Limit | None = None,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """
        Args:
            router: who decides. retries: who is told of every try's begin and end as well.
            limit: of an upstream that nothing is known of.
            draw: uniform in [0, 1): spreads those who are told to come back.
        """
        self._router = router
        self._retries = retries
        self._limit = limit or Limit()
        self._clock = clock
        self._draw = draw
        self._upstreams: dict[tuple[Target, str], _Upstream] = {}
        self._tidied_s = clock()

    # ---- Router -----------------------------------------------------------------------------

    def pick(
        self, request: Request, grant: Grant, attempts: Sequence[Attempt]
    ) -> Soon[Leg | Answer]:
        suspects = self._retries.suspects
        if attempts and suspects.any:
            # It was let in, and has killed since. A gateway that sent it here must hear so: it
            # would try it elsewhere.
            convicted = suspects.convicted(request)
            if convicted is not None:
                return convicted
        found = self._router.pick(request, grant, attempts)
        if not isinstance(found, Leg):
            return found
        admission: Admission = grant.about
        if attempts:
            last = attempts[-1]
            if last.ended_s is None and last.failure is None:
                return self._beside(found, request, grant, attempts)
        if self._open(found, admission):
            return found
        return self._elsewhere(found, request, grant, attempts)

    def began(self, attempt: Attempt) -> None:
        key = _key(attempt)
        upstream = self._upstreams.get(key)
        if upstream is None:
            upstream = self._upstreams[key] = _Upstream(self._limit, attempt.started_s)
        upstream.add(attempt)
        self._retries.began(attempt)
        self._router.began(attempt)
        if attempt.started_s - self._tidied_s >= TIDY_S:
            self._tidy(attempt.started_s)

    def ended(self, attempt: Attempt) -> None:
        upstream = self._upstreams.get(_key(attempt))
        try:
            if upstream is not None and attempt in upstream.inside:
                upstream.inside.discard(attempt)
                self._learn(upstream, attempt)
                self._retries.ended(attempt, upstream.inside)
        finally:
            self._router.ended(attempt)

    # ---- what can be seen -------------------------------------------------------------------

    def limits(self) -> list[UpstreamLimit]:
        """All upstreams that were used lately."""
        return [
            UpstreamLimit(
                target.authority.decode("ascii"),
                model,
                upstream.limit.value,
                len(upstream.inside),
                upstream.limit.baseline_s,
            )
            for (target, model), upstream in self._upstreams.items()
        ]

    @property
    def unbalanced(self) -> int:
        """Tries that are counted; none where none is under way."""
        return sum(len(each.inside) for each in self._upstreams.values()) + self._retries.unbalanced

    # ---- deciding ---------------------------------------------------------------------------

    def _open(self, leg: Leg, admission: Admission) -> bool:
        model = ""
        if isinstance(leg, Routed):
            if admission.confined is not None and leg.region != admission.confined:
                return False
            model = leg.model
        upstream = self._upstreams.get((leg.target, model))
        return upstream is None or len(upstream.inside) < upstream.rooms[admission.criticality]

    def _beside(
        self, leg: Leg, request: Request, grant: Grant, attempts: Sequence[Attempt]
    ) -> Leg | NearfieldError:
        """A second try while the first one runs: only elsewhere, only where there is room."""
        elsewhere = all(attempt.leg.target is not leg.target for attempt in attempts)
        open_ = elsewhere and self._open(leg, grant.about)
        if open_ and self._retries.may_hedge(request, grant, attempts):
            return leg
        return Unavailable("No second try is started.", code="not_hedged")

    def _elsewhere(
        self, leg: Leg, request: Request, grant: Grant, attempts: Sequence[Attempt]
    ) -> Leg | NearfieldError:
        """What the Router would do if a try of `leg` had failed; at last, the refusal."""
        admission: Admission = grant.about
        first = leg
        now_s = self._clock()
        tries = list(attempts)
        for _ in range(DETOURS):
            tries.append(Attempt(leg, now_s, ended_s=now_s, failure="refused"))
            found = self._router.pick(request, grant, tries)
            if isinstance(found, asyncio.Future):
                found.cancel()  # to wait here would be a queue of our own
                break
            if not isinstance(found, Leg):
                break
            if any(_same(found, tried.leg) for tried in tries):
                break  # there is no other
            if self._open(found, admission):
                return found
            leg = found
        if admission.confined is not None and attempts:
            return replica_gone(suspect=admission.accused or admission.trial is not None)
        upstream = self._upstreams[_key_of(first)]
        return refusal(
            upstream.limit,
            len(upstream.inside),
            admission.criticality,
            hold_s=upstream.hold_s,
            draw=self._draw(),
        )

    # ---- learning ---------------------------------------------------------------------------

    def _learn(self, upstream: _Upstream, attempt: Attempt) -> None:
        if attempt.failure is not None or attempt.status >= 400 or attempt.first_byte_s is None:
            return
        request, grant = attempt.request, attempt.grant
        if request is None or grant is None:
            return
        now_s = attempt.ended_s or self._clock()
        admission: Admission = grant.about
        first_s: float | None = None
        # What comes as a whole takes as long as it is long, unless it is always short.
        if request.stream or admission.kind in HEDGED_KINDS:
            took_s = attempt.first_byte_s - attempt.started_s
            first_s = comparable_s(took_s, admission.prompt_tokens)
        upstream.answered(now_s - attempt.started_s, first_s, now_s)

    def _tidy(self, now_s: float) -> None:
        self._tidied_s = now_s
        self._upstreams = {
            key: upstream
            for key, upstream in self._upstreams.items()
            if upstream.inside or now_s - upstream.used_s < FORGOTTEN_S
        }


def _same(leg: Leg, other: Leg) -> bool:
    """Whether they lead to the same upstream; an ingress leads to the replicas behind it."""
    if leg.target is other.target:
        return True
    if isinstance(leg, Routed) and isinstance(other, Routed):
        return leg.replica is None and other.replica is not None and leg.endpoint == other.endpoint
    return False


def _key(attempt: Attempt) -> tuple[Target, str]:
    return _key_of(attempt.leg)


def _key_of(leg: Leg) -> tuple[Target, str]:
    return leg.target, leg.model if isinstance(leg, Routed) else ""
