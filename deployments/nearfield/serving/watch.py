"""What happened to one deployment between the contexts that Serve shows its policy.

What a context does not say is counted here: how long replicas have been starting, how long they
took, which were lost. Replicas report totals that only grow (`Gate.totals`): what came since the
last step is their difference, whoever else reads them.
"""

from __future__ import annotations

import math

from nearfield.policy.pools import NO_DATA, Measured, Notice, PoolSignals
from nearfield.serving.departure import LATER_S, LEAVES, STARTED
from nearfield.serving.gate import WAITS_S
from ray.serve.config import AutoscalingContext

STALE_S = 30.0
"""A replica's totals that are older say nothing of now."""


class Watch:
    """Reads a deployment's contexts. Times are Unix times."""

    def __init__(self) -> None:
        self._asked_s: list[float] = []  # when the replicas that start were asked for
        self._unmeasured = 0  # of them, those that were asked for before anybody watched
        self._running: frozenset[str] = frozenset()
        self._began_s = math.inf
        self._heard_s = -math.inf
        self._target = 0
        self._started_s: dict[str, float] = {}
        self._leaves: dict[str, float] = {}
        self._told: set[str] = set()  # of a loss that their notice announced
        self._totals: dict[str, dict[str, float]] = {}
        self._now: dict[str, float] = {}
        self._since: dict[str, float] = {}
        self._known = False
        self._boots_s: list[float] = []
        self._lost = 0

    def read(self, context: AutoscalingContext, now_s: float, *, resumed: bool = False) -> None:
        """Take in what Serve knows now.

        Args:
            resumed: others decided before this began: what starts by then was their doing.
        """
        running = frozenset(r.unique_id for r in context.running_replicas)
        target = context.target_num_replicas
        first = math.isinf(self._began_s)
        self._began_s, self._heard_s = min(self._began_s, now_s), now_s
        good = len(self._running) - len(self._leaves)
        gone = self._running - running
        self._note(context, running, now_s)
        if not first:
            self._arrive(len(running - self._running), now_s)
            meant = max(0, good + len(self._asked_s) - target)
            # Who had a notice is counted since it came.
            self._lost += max(0, len(gone - self._told) - meant)
        self._told &= running
        starting = max(0, target - len(running) + len(self._leaves))
        del self._asked_s[starting:]  # Serve stops the youngest first
        self._asked_s += [now_s] * (starting - len(self._asked_s))
        if first and resumed:
            self._unmeasured = starting
        self._running, self._target = running, target

    def _arrive(self, came: int, now_s: float) -> None:
        for asked_s in self._asked_s[:came]:
            if self._unmeasured:
                self._unmeasured -= 1
            else:
                self._boots_s.append(now_s - asked_s)
        del self._asked_s[:came]

    def _note(self, context: AutoscalingContext, running: frozenset[str], now_s: float) -> None:
        metrics = context.raw_metrics or {}
        facts: dict[str, dict[str, float]] = {}
        for name, by_replica in metrics.items():
            for replica, series in by_replica.items():
                if series and now_s - series[-1].timestamp <= STALE_S:
                    facts.setdefault(replica.unique_id, {})[name] = float(series[-1].value)
        self._now = {"handles": float(context.total_queued_requests or 0.0)}
        for key, told in facts.items():
            self._count(key, told)
        self._totals = {key: own for key, own in self._totals.items() if key in running}
        self._known = bool(facts.keys() & running) or not running
        leaves = {key: told.get(LEAVES, 0.0) for key, told in facts.items() if key in running}
        self._leaves = {key: due_s for key, due_s in leaves.items() if due_s}
        self._lost += len(self._leaves.keys() - self._told)
        self._told |= self._leaves.keys()

    def _count(self, key: str, told: dict[str, float]) -> None:
        """One replica's totals, and what it has to do."""
        # What it did before anybody watched did not come in this second.
        old = told.get(STARTED, self._began_s) < self._began_s
        totals = self._totals.setdefault(key, {})
        for name, value in told.items():
            if name.endswith("_total"):
                before = totals.get(name, value if old else 0.0)
                self._since[name] = self._since.get(name, 0.0) + max(0.0, value - before)
                totals[name] = value
            elif name not in (LEAVES, STARTED):
                reduce = max if name.endswith("_s") else float.__add__
                self._now[name] = reduce(self._now.get(name, 0.0), value)

    @property
    def starting(self) -> bool:
        """Whether a replica was asked for that does not run yet."""
        return bool(self._asked_s)

    @property
    def at_zero(self) -> bool:
        """Whether none runs."""
        return not self._running

    def signals(
        self, name: str, max_wait_s: float, now_s: float, *, stuck: int = 0, refused: bool = False
    ) -> PoolSignals:
        """What came since the last time this was asked.

        Args:
            stuck: replicas that wait for a machine which nobody brings.
            refused: the nodes that its replicas would start on cannot be had now.
        """
        since, self._since = self._since, {}
        boots_s, self._boots_s = tuple(self._boots_s), []
        lost, self._lost = self._lost, 0
        seen = self._now
        queued = seen.get("waiting", 0.0) + seen["handles"]

        def known(value: float) -> Measured:
            return value if self._known else NO_DATA

        return PoolSignals(
            name,
            running=len(self._running),
            starting=_ages(self._asked_s, now_s, len(self._asked_s) if refused else stuck),
            ongoing=known(queued + seen.get("running", 0.0)),
            queued=known(queued),
            arrivals=known(since.get("arrived_total", 0.0)),
            late=known(since.get("refused_total", 0.0) + since.get(_waited(max_wait_s), 0.0)),
            queue_age_s=known(seen.get("queue_age_s", 0.0)),
            boots_s=boots_s,
            notices=tuple(
                Notice(key, math.inf if due_s >= LATER_S else due_s)
                for key, due_s in sorted(self._leaves.items())
            ),
            lost=lost,
        )

    def cold(self, name: str, now_s: float, *, stuck: int, refused: bool) -> PoolSignals:
        """While there are requests and no replica Serve does not ask: it starts one by itself."""
        asked_s = self._asked_s or [self._heard_s]
        return PoolSignals(
            name,
            running=0,
            starting=_ages(asked_s, now_s, len(asked_s) if refused else stuck),
            ongoing=1.0,  # at least
            queued=1.0,
            arrivals=0.0,
            late=0.0,
            queue_age_s=now_s - self._heard_s,
        )


def _ages(asked_s: list[float], now_s: float, stuck: int) -> tuple[float, ...]:
    """How long replicas have been starting; infinite: those of the last that are stuck."""
    placed = max(0, len(asked_s) - stuck)
    return (*(now_s - at_s for at_s in asked_s[:placed]), *(math.inf for _ in asked_s[placed:]))


def _waited(max_wait_s: float) -> str:
    """The total of the requests that waited longer, or of the next shorter wait that is counted."""
    counted = [wait_s for wait_s in WAITS_S if wait_s <= max_wait_s]
    return f"waited_{counted[-1] if counted else WAITS_S[0]:g}_total"
