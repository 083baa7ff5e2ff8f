"""Plain ports: everyone may pass, targets by the power of two choices, retries where harmless.

For tests, for trying things out, and as the smallest example of each port.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence

from nearfield.core.errors import NearfieldError, Unavailable
from nearfield.edge.proxy.ports import (
    NEVER_SENT,
    Attempt,
    Grant,
    Leg,
    Outcome,
    Request,
    Target,
)

SAFE_METHODS = frozenset((b"GET", b"HEAD", b"OPTIONS"))


class OpenGate:
    """Lets everybody pass. Inference may run twice: it changes nothing."""

    def enter(self, request: Request) -> NearfieldError | None:
        return None

    def admit(self, request: Request) -> Grant:
        return Grant(replayable=request.model is not None)


class Spread:
    """Of two targets drawn at random the one with fewer requests under way."""

    def __init__(self, targets: Sequence[Target], seed: int | None = None) -> None:
        self._legs = [Leg(target) for target in targets]
        self._random = random.Random(seed)
        self.running = dict.fromkeys(targets, 0)

    def pick(
        self, request: Request, grant: Grant, attempts: Sequence[Attempt]
    ) -> Leg | NearfieldError:
        legs = self._legs
        if attempts:
            tried = {attempt.leg.target for attempt in attempts}
            legs = [leg for leg in legs if leg.target not in tried] or legs
        if len(legs) == 1:
            return legs[0]
        if not legs:
            return Unavailable("No replica of the model is known.", retry_after_s=1.0)
        one, other = self._random.sample(legs, 2)
        return one if self.running[one.target] <= self.running[other.target] else other

    def began(self, attempt: Attempt) -> None:
        self.running[attempt.leg.target] += 1

    def ended(self, attempt: Attempt) -> None:
        self.running[attempt.leg.target] -= 1


class Careful:
    """Tries again what cannot have been executed, or does no harm when it is executed twice."""

    def __init__(self, max_attempts: int = 3, hedge_s: float | None = None) -> None:
        self._max_attempts = max_attempts
        self._hedge_s = hedge_s

    def again(self, request: Request, grant: Grant, attempts: Sequence[Attempt]) -> bool:
        if len(attempts) >= self._max_attempts:
            return False
        harmless = grant.replayable or request.method in SAFE_METHODS
        return harmless or attempts[-1].failure in NEVER_SENT

    def hedge_after_s(self, request: Request, grant: Grant) -> float | None:
        return self._hedge_s


class Remember:
    """Keeps the last outcomes, and counts what was refused before it was a request."""

    def __init__(self, most: int = 1000) -> None:
        self.outcomes: deque[Outcome] = deque(maxlen=most)
        self.refused: dict[str, int] = {}

    def done(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)

    def malformed(self, code: str) -> None:
        self.refused[code] = self.refused.get(code, 0) + 1
