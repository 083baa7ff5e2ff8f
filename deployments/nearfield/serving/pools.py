"""The pools of a region's models, as Serve's controller sees them, in front of the scaling policy.

Serve asks each deployment's policy by itself, ten times a second. Here the pools of one model come
together: what each deployment's context says is kept, and once a second `policy.scale.step` decides
for all of them; in between, each is told what was decided.

What a context does not say is counted here: how long replicas have been starting, how long they
took, which were lost. Replicas report totals that only grow (`Gate.totals`): what came since the
last step is their difference, whoever else reads them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from nearfield.core.scaling import ScalingOptions
from nearfield.policy.scale import (
    NO_DATA,
    Decision,
    Measured,
    PoolSignals,
    PoolSpec,
    ScalingSpec,
    Signals,
    State,
    step,
)
from nearfield.serving.gate import WAITS_S
from nearfield.serving.launches import Launches
from ray.serve.config import AutoscalingContext

log = logging.getLogger(
    "ray.serve.nearfield.scaling"
)  # a child of Serve's: in the controller's log

STEP_S = 1.0
SILENT_S = 5.0
"""A pool that Serve has not asked about for so long is left out: its load is unknown ..."""
FORGET_S = 60.0
"""... and after so long it is gone."""
STALE_S = 30.0
"""A replica's totals that are older say nothing of now."""
STATE_KEY = "nearfield"


class Seat:
    """One deployment's way to the fleet of its model.

    Raises:
        ValueError: the options are not a `ScalingOptions`.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = ScalingOptions.model_validate(options)
        self._watch = Watch()

    def decide(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The target and the state to keep: Serve's answer of a policy."""
        own = self._options
        application = context.app_name or context.deployment_name
        fleet = _FLEETS.setdefault(own.model or application, Fleet(own.model or application))
        now_s = float(context.current_time or 0.0)
        self._watch.read(context, now_s)
        fleet.join(application, own, context, self._watch, now_s)
        fleet.adopt(context.policy_state.get(STATE_KEY))
        target, plain = fleet.decide(application, now_s)
        return target, {STATE_KEY: plain}


class Watch:
    """What happened to one deployment between its contexts."""

    def __init__(self) -> None:
        self._asked_s: list[float] = []  # when the replicas that start were asked for
        self._running: frozenset[str] = frozenset()
        self._found: frozenset[str] = frozenset()  # were there when this began to watch
        self._target: int | None = None
        self._totals: dict[str, dict[str, float]] = {}
        self._now: dict[str, float] = {}
        self._since: dict[str, float] = {}
        self._known = False
        self._boots_s: list[float] = []
        self._lost = 0

    def read(self, context: AutoscalingContext, now_s: float) -> None:
        """Take in what Serve knows now."""
        running = frozenset(r.unique_id for r in context.running_replicas)
        target = context.target_num_replicas
        came, went = len(running - self._running), len(self._running - running)
        if self._target is None:
            self._found = running
        else:
            for asked_s in self._asked_s[:came]:
                self._boots_s.append(now_s - asked_s)
            meant = max(0, len(self._running) + len(self._asked_s) - target)
            self._lost += max(0, went - meant)
        del self._asked_s[:came]
        starting = max(0, target - len(running))
        del self._asked_s[starting:]  # Serve stops the youngest first
        self._asked_s += [now_s] * (starting - len(self._asked_s))
        self._running, self._target = running, target
        self._count(context, running, now_s)

    @property
    def starting(self) -> bool:
        """Whether a replica was asked for that does not run yet."""
        return bool(self._asked_s)

    def _count(self, context: AutoscalingContext, running: frozenset[str], now_s: float) -> None:
        metrics = context.raw_metrics or {}
        self._now, heard = {}, set()
        for name, by_replica in metrics.items():
            for replica, series in by_replica.items():
                if not series or now_s - series[-1].timestamp > STALE_S:
                    continue
                value, key = float(series[-1].value), replica.unique_id
                heard.add(key)
                if not name.endswith("_total"):
                    reduce = max if name.endswith("_s") else float.__add__
                    self._now[name] = reduce(self._now.get(name, 0.0), value)
                    continue
                # What a replica did before it was watched did not come in this second.
                first = value if key in self._found else 0.0
                before = self._totals.setdefault(key, {}).get(name, first)
                self._since[name] = self._since.get(name, 0.0) + max(0.0, value - before)
                self._totals[key][name] = value
        self._totals = {key: own for key, own in self._totals.items() if key in running}
        self._known = bool(heard & running) or not running
        self._now["handles"] = float(context.total_queued_requests or 0.0)

    def signals(
        self, name: str, max_wait_s: float, now_s: float, *, refused: bool = False
    ) -> PoolSignals:
        """What came since the last time this was asked.

        Args:
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
            starting=tuple(math.inf if refused else now_s - asked_s for asked_s in self._asked_s),
            ongoing=known(queued + seen.get("running", 0.0)),
            queued=known(queued),
            arrivals=known(since.get("arrived_total", 0.0)),
            late=known(since.get("refused_total", 0.0) + since.get(_waited(max_wait_s), 0.0)),
            queue_age_s=known(seen.get("queue_age_s", 0.0)),
            boots_s=boots_s,
            lost=lost,
        )


def _waited(max_wait_s: float) -> str:
    """The total of the requests that waited longer, or of the next shorter wait that is counted."""
    counted = [wait_s for wait_s in WAITS_S if wait_s <= max_wait_s]
    return f"waited_{counted[-1] if counted else WAITS_S[0]:g}_total"


class _Member(NamedTuple):
    """A pool of a fleet: what its last context said, for as long as it is fresh."""

    spec: PoolSpec
    options: ScalingOptions
    watch: Watch
    heard_s: float


class Fleet:
    """The pools of one model in this region, and the policy's last word on them."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._members: dict[str, _Member] = {}
        self._state: State | None = None
        self._plain: dict[str, object] = {}
        self._decision: Decision | None = None
        self._decided_s = -math.inf
        self._told: dict[str, int] = {}

    def join(
        self,
        application: str,
        options: ScalingOptions,
        context: AutoscalingContext,
        watch: Watch,
        now_s: float,
    ) -> None:
        """Keep what the application's context says."""
        assert context.config is not None
        spec = PoolSpec(
            application,
            kind=options.kind,
            zone=options.zone,
            products=frozenset(options.products),
            min_replicas=context.capacity_adjusted_min_replicas,
            max_replicas=context.capacity_adjusted_max_replicas,
            usd_per_hour=options.usd_per_hour,
            target_ongoing=context.config.get_target_ongoing_requests(),
            boot_s=options.boot_s,
        )
        self._members[application] = _Member(spec, options, watch, now_s)

    def adopt(self, plain: object) -> None:
        """Go on from a state that Serve kept, if there is none here."""
        if self._state is None:
            self._state = State.from_plain(plain) if isinstance(plain, Mapping) else State()

    def decide(self, application: str, now_s: float) -> tuple[int, dict[str, object]]:
        """The application's target, and the state as plain data."""
        new = self._decision is None or not any(
            t.name == application for t in self._decision.targets
        )
        if new or now_s - self._decided_s >= STEP_S:
            self._step(now_s)
        assert self._decision is not None
        return self._decision.target(application).replicas, self._plain

    def _step(self, now_s: float) -> None:
        for name in [n for n, m in self._members.items() if now_s - m.heard_s > FORGET_S]:
            del self._members[name]
        state = self._state or State()
        if now_s < state.now_s:  # the wall clock was set back
            state = State()
        members = list(self._members.values())
        options = [m.options for m in members]
        budgets = [o.max_usd_per_hour for o in options if o.max_usd_per_hour is not None]
        spec = ScalingSpec(
            pools=tuple(m.spec for m in members),
            max_wait_s=min(o.max_wait_s for o in options),
            max_late=min(o.max_late for o in options),
            max_usd_per_hour=min(budgets, default=math.inf),
            hold_s=max(o.hold_s for o in options),
            idle_s=max(o.idle_s for o in options),
        )
        fresh = tuple(
            m.watch.signals(
                m.spec.name,
                spec.max_wait_s,
                now_s,
                refused=m.watch.starting and _LAUNCHES.refused(m.options.node_types, now_s),
            )
            for m in members
            if now_s - m.heard_s <= SILENT_S
        )
        self._decision, self._state = step(Signals(now_s, fresh), state, spec)
        self._decided_s, self._plain = now_s, self._state.to_plain()
        for line in self._changes():
            log.info(line)

    def _changes(self) -> Iterator[str]:
        """One line for each pool whose target is another than before."""
        assert self._decision is not None
        for target in self._decision.targets:
            before = self._told.get(target.name)
            if before != target.replicas:
                self._told[target.name] = target.replicas
                change = f"{before} -> " if before is not None else ""
                yield f"scaling {self._model}: {target.name}: {change}{target.reason}"


_LAUNCHES = Launches()
_FLEETS: dict[str, Fleet] = {}
"""By model. The controller's process is where the pools of a model meet: Serve makes one policy for
each deployment and none for several applications."""
