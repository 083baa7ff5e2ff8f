"""More than one try of a request: whether, within which budgets, and what a lost try says.

    LimitedRouter ──began, ended──→ BudgetRetries ──a replica died──→ Suspects
    Exchange ──again, hedge_after_s──→ BudgetRetries

A connection that ends without an answer may mean that the replica is dead, or that it closed a kept
connection just when it was used, or that it ends every connection it gets. It is taken for dead
once: what was inside then may go elsewhere without asking the budget, for the work of the dead is
not done twice. What the same target ends later, within `DEATH_S`, is a failure like any other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Final

from nearfield.edge.decisions import FROM, Admission, Routed, crossed, said_replica_lost
from nearfield.edge.proxy.ports import NEVER_SENT, Attempt, Grant, Request, Target
from nearfield.edge.suspects import Suspects
from nearfield.policy import retry
from nearfield.policy.retry import HEDGED_KINDS, Budget, Cause, History, Quantile, hedge_budget

DEATH_S: Final = 10.0
"""A target that is taken for dead is not taken for dead again so soon. A replica that is started
again has another port."""
STALE_S: Final = 0.05
"""A kept connection that ends so soon after it was used, alone, was being closed already: the way
to a replica and back takes less."""
DOUBT_S: Final = 2.0
"""How long a refused connection after that says that it was a death nevertheless."""
TOGETHER_S: Final = 2.0
"""What was inside a target when it died hears of it within so long."""
MARK_S: Final = 1.0
NOBODY_THERE: Final = frozenset((b"no_capacity", b"no_healthy_region", b"not_here"))
"""Codes of a region's gateway that had nobody to give the request to: it was never run there."""
LEAVING: Final = b"draining"
"""Code of a replica whose machine will be taken away. It was not run there either, ..."""
LEFT: Final = b"interrupted"
"""... and what it had begun before ends like this: it is done again, as that of the dead."""
SAFE_METHODS: Final = frozenset((b"GET", b"HEAD", b"OPTIONS"))


def nowhere(region: str) -> bool:
    """No region is known to be lost."""
    return False


class BudgetRetries:
    """The Retries of one gateway process. Grants must be `KeyGate`'s, legs `Routed`.

    Attributes:
        suspects: shared with the Gate.
    """

    def __init__(
        self,
        suspects: Suspects,
        *,
        region_lost: Callable[[str], bool] = nowhere,
        wait_s: Callable[[Request, Grant, Sequence[Attempt]], float | None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            region_lost: whether a region, by name, is believed dead: its agent and its replicas.
            wait_s: how long the request would queue where it would be tried next, None: nowhere.
                None: not known; then who is not full is taken to have no queue.
        """
        self.suspects = suspects
        self._region_lost = region_lost
        self._wait_s = wait_s
        self._clock = clock
        self._requests = 0  # first tries, ever
        self._in_flight = 0
        self._extras: set[Attempt] = set()  # in flight
        self._budget = Budget()
        self._hedges = hedge_budget()
        self._marked_s = clock()
        self._budget = self._budget.mark(self._marked_s, 0)
        self._hedges = self._hedges.mark(self._marked_s, 0)
        self._answers: dict[str, Quantile] = {}  # by model
        self._deaths: dict[Target, float] = {}
        self._doubts: dict[Target, Attempt] = {}

    # ---- told by the LimitedRouter ----------------------------------------------------------

    def began(self, attempt: Attempt) -> None:
        """A try starts."""
        assert attempt.grant is not None
        admission: Admission = attempt.grant.about
        self._in_flight += 1
        if admission.tries:
            self._extras.add(attempt)
        else:
            self._requests += 1
        admission.tries += 1
        if attempt.started_s - self._marked_s >= MARK_S:
            self._mark(attempt.started_s)

    def ended(self, attempt: Attempt, company: Collection[Attempt]) -> None:
        """It is over. `company`: the other tries that the same target has."""
        self._in_flight -= 1
        self._extras.discard(attempt)
        failure = attempt.failure
        if failure is None or failure == "status":
            self._answered(attempt)
        elif failure in NEVER_SENT:
            self._refused(attempt)
        elif failure in ("closed", "truncated"):
            self._broken(attempt, company)
        elif failure == "abandoned":
            self._bury(attempt, ())

    @property
    def unbalanced(self) -> int:
        """Tries that are counted; none where none is under way."""
        return self._in_flight + len(self._extras)

    def _answered(self, attempt: Attempt) -> None:
        leg = attempt.leg
        if attempt.status != 200 or attempt.first_byte_s is None or attempt.grant is None:
            return
        admission: Admission = attempt.grant.about
        if admission.kind in HEDGED_KINDS and isinstance(leg, Routed):
            known = self._answers.get(leg.model) or Quantile()
            self._answers[leg.model] = known.learn(attempt.first_byte_s - attempt.started_s)

    def _refused(self, attempt: Attempt) -> None:
        now_s = attempt.ended_s or self._clock()
        doubt = self._doubts.pop(attempt.leg.target, None)
        if doubt is not None and doubt.ended_s is not None and now_s - doubt.ended_s < DOUBT_S:
            self._bury(doubt, (doubt,))

    def _broken(self, attempt: Attempt, company: Collection[Attempt]) -> None:
        now_s = attempt.ended_s or self._clock()
        target = attempt.leg.target
        if now_s - self._deaths.get(target, -DEATH_S) < DEATH_S:
            return
        alone = attempt.failure == "closed" and attempt.reused and not company
        if alone and now_s - attempt.started_s < STALE_S:
            self._doubts[target] = attempt
            return
        self._bury(attempt, (attempt, *company))

    def _bury(self, attempt: Attempt, inside: Sequence[Attempt]) -> None:
        """Take its target for dead; `inside` are under suspicion."""
        now_s = attempt.ended_s or self._clock()
        leg = attempt.leg
        self._deaths[leg.target] = now_s
        # What ends the connections of a region's gateway, or of its ingress, is no request's doing.
        if inside and isinstance(leg, Routed) and leg.replica is not None:
            self.suspects.died(inside)

    def _mark(self, now_s: float) -> None:
        """Once a second, while there are requests: budgets, and what is old is forgotten."""
        self._marked_s = now_s
        self._budget = self._budget.mark(now_s, self._requests)
        self._hedges = self._hedges.mark(now_s, self._requests)
        if self._deaths:
            self._deaths = {t: s for t, s in self._deaths.items() if now_s - s < DEATH_S}
        if self._doubts:
            doubts = self._doubts.items()
            self._doubts = {t: a for t, a in doubts if now_s - (a.ended_s or 0.0) < DOUBT_S}

    # ---- Retries ----------------------------------------------------------------------------

    def again(self, request: Request, grant: Grant, attempts: Sequence[Attempt]) -> bool:
        """Also True where the answer of the next pick is a refusal: see `LimitedRouter.pick`."""
        if self.suspects.any and self.suspects.convicted(request) is not None:
            return True
        last = attempts[-1]
        now_s = self._clock()
        admission: Admission = grant.about
        if said_replica_lost(last):
            admission.accused = True
            self.suspects.accused_elsewhere(request)
        region = _region(attempts[0])
        refusals = sum(_never_run(attempt) for attempt in attempts)
        history = History(
            idempotent=grant.replayable or request.method in SAFE_METHODS,
            runs=len(attempts) - refusals,
            refusals=refusals,
            crossings=sum(crossed(attempt, region) for attempt in attempts),
            suspect=admission.trial is not None or admission.accused,
            left_s=request.deadline_s - now_s,
        )
        cause = self._cause(last)
        verdict = retry.may_replay(
            history, cause, crosses=True, region_lost=self._region_lost(region)
        )
        admission.confined = None
        if not verdict.allowed:
            # Not elsewhere; perhaps where it was. A suspect may leave nevertheless: the Router sees
            # whether its region has anybody left (`quarantine.departure`).
            verdict = retry.may_replay(history, cause)
            admission.confined = region
        if not verdict.allowed or not verdict.budgeted:
            return verdict.allowed
        # What another gateway sent here is that gateway's to try again: two budgets would multiply.
        by_gateway = admission.from_gateway or FROM in request.headers
        return not by_gateway and self._take(now_s)

    def _cause(self, attempt: Attempt) -> Cause:
        failure = attempt.failure
        if _never_run(attempt):
            return "refused"
        if failure == "abandoned" or said_replica_lost(attempt) or attempt.code == LEFT:
            return "died"
        died_s, ended_s = self._deaths.get(attempt.leg.target), attempt.ended_s
        if failure != "closed" or died_s is None or ended_s is None:
            return "failed"
        # It was inside when the target died, and heard of it at once.
        inside = attempt.started_s <= died_s and ended_s - died_s < TOGETHER_S
        return "died" if inside else "failed"

    def _take(self, now_s: float) -> bool:
        self._budget, answer = self._budget.take(
            now_s,
            self._requests,
            in_flight=self._in_flight,
            extra_in_flight=len(self._extras),
        )
        # "Later" would hold a request that has failed already; its caller can do that better.
        return answer == "now"

    def hedge_after_s(self, request: Request, grant: Grant) -> float | None:
        admission: Admission = grant.about
        if not admission.hedge:
            return None
        known = self._answers.get(request.model or "")
        if known is None or not grant.replayable or admission.trial is not None:
            return None
        return retry.hedge_after_s(
            admission.kind,
            known,
            opted_in=True,
            left_s=request.deadline_s - self._clock(),
            elsewhere_s=0.0,  # whether there is room elsewhere is asked when it starts
        )

    def may_hedge(self, request: Request, grant: Grant, attempts: Sequence[Attempt]) -> bool:
        """A second try is about to start beside the first: is there room and budget for it?"""
        if self._wait_s is not None and self._wait_s(request, grant, attempts) != 0.0:
            return False  # a queue: nobody has slots to give away
        self._hedges, answer = self._hedges.take(
            self._clock(),
            self._requests,
            in_flight=self._in_flight,
            extra_in_flight=len(self._extras),
        )
        return answer == "now"


def _never_run(attempt: Attempt) -> bool:
    if attempt.failure == "status":
        nobody = attempt.code in {*NOBODY_THERE, LEAVING} or _ingress_alone(attempt)
        return attempt.status == 503 and nobody
    return attempt.failure in NEVER_SENT


def _ingress_alone(attempt: Attempt) -> bool:
    """Whether Serve's ingress has answered for itself: it has no replica. Theirs have codes."""
    leg = attempt.leg
    return not attempt.code and isinstance(leg, Routed) and leg.ingress


def _region(attempt: Attempt) -> str:
    leg = attempt.leg
    return leg.region if isinstance(leg, Routed) else ""
