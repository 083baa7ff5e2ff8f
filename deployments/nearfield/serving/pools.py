"""The pools of a region's models, as Serve's controller sees them, in front of the scaling policy.

Serve asks each deployment's policy by itself, ten times a second. Here the pools of one model come
together: what each deployment's contexts say is kept (`watch`), what they do not say is added
(`surroundings`), and once a second `policy.scale.step` decides for all of them; in between, each is
told what was decided. What was learnt, and why it was decided so, is kept in the cluster's head:
the policy's state outlives the controller, which Serve's own keeping of it does not.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from nearfield.api.scaling import KEY, Change, ModelScaling, PoolScaling
from nearfield.core.scaling import ScalingOptions
from nearfield.policy.scale import (
    Decision,
    PoolSignals,
    PoolSpec,
    ScalingSpec,
    Signals,
    State,
    step,
)
from nearfield.serving.surroundings import Surroundings
from nearfield.serving.watch import Watch
from ray.serve.config import AutoscalingContext

log = logging.getLogger(
    "ray.serve.nearfield.scaling"
)  # a child of Serve's: in the controller's log

STEP_S = 1.0
SILENT_S = 5.0
"""A pool that Serve has not asked about for so long is left out: its load is unknown ..."""
FORGET_S = 60.0
"""... and after so long it is gone."""
PASSED_OVER = 10
"""So often in a row others were asked about and this pool was not: that is no coincidence."""
KEEP_S = 10.0
TELL_S = 2.0
CHANGES = 50
"""Changes of a model's targets that are kept for whoever asks what happened."""
STATE_KEY = "scaling/state/"


class Seat:
    """One deployment's way to the fleet of its model.

    Raises:
        ValueError: the options are not a `ScalingOptions`.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = ScalingOptions.model_validate(options)
        self._watch = Watch()

    def decide(self, context: AutoscalingContext) -> int:
        """The deployment's target."""
        own = self._options
        application = context.app_name or context.deployment_name
        model = own.model or application
        fleet = _FLEETS.get(model)
        if fleet is None:
            fleet = _FLEETS[model] = Fleet(model, _SURROUNDINGS)
        now_s = float(context.current_time or 0.0)
        self._watch.read(context, now_s, resumed=fleet.knows(application))
        fleet.join(application, own, context, self._watch, now_s)
        return fleet.decide(application, now_s)


class _Member(NamedTuple):
    """A pool of a fleet: what its last context said, for as long as it is fresh."""

    spec: PoolSpec
    options: ScalingOptions
    watch: Watch
    heard_s: float


class Fleet:
    """The pools of one model in this region, and the policy's last word on them."""

    def __init__(self, model: str, surroundings: Surroundings) -> None:
        self._model = model
        self._surroundings = surroundings
        self._members: dict[str, _Member] = {}
        self._passed: dict[str, Counter[str]] = {}
        kept = surroundings.kept(STATE_KEY + model)
        self._state = State() if kept is None else State.from_plain(json.loads(kept))
        self._decision: Decision | None = None
        self._decided_s = self._kept_s = self._told_s = -math.inf
        self._began_s = math.inf
        self._targets: dict[str, tuple[int, float]] = {}  # and since when
        self._changes: deque[Change] = deque(maxlen=CHANGES)

    def knows(self, application: str) -> bool:
        """Whether it has been decided for before, by this controller or by one before it."""
        return application in self._state.pools

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
        self._passed[application] = Counter()
        for name, passed in self._passed.items():
            if name != application:
                passed[application] += 1

    def decide(self, application: str, now_s: float) -> int:
        """The application's target."""
        new = self._decision is None or not any(
            t.name == application for t in self._decision.targets
        )
        if new or now_s - self._decided_s >= STEP_S:
            self._step(now_s)
        assert self._decision is not None
        return self._decision.target(application).replicas

    def _step(self, now_s: float) -> None:
        for name in [n for n, m in self._members.items() if self._is_gone(m, now_s)]:
            del self._members[name], self._passed[name]
        state = self._state
        if now_s < state.now_s:  # the wall clock was set back
            state = State()
        members = sorted(self._members.values(), key=_preference)
        curious = any(m.watch.starting or self._is_silent(m) for m in members)
        self._surroundings.attend(curious=curious)
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
        seen = (self._signals(m, spec.max_wait_s, now_s) for m in members)
        signals = Signals(now_s, tuple(pool for pool in seen if pool is not None))
        self._decision, self._state = step(signals, state, spec)
        self._decided_s, self._began_s = now_s, min(self._began_s, now_s)
        if now_s - self._began_s < FORGET_S:  # after a new controller's start they join one by one
            pools = {**state.pools, **self._state.pools}
            self._state = replace(self._state, pools=pools)
        for change in self._note(now_s):
            self._changes.appendleft(change)
            before = "" if change.before is None else f"{change.before} -> "
            log.info("scaling %s: %s: %s%s", self._model, change.application, before, change.reason)
        self._keep(now_s)

    def _is_silent(self, member: _Member) -> bool:
        """Whether none of it ran, and Serve has stopped asking about it."""
        passed = self._passed[member.spec.name]
        return member.watch.at_zero and max(passed.values(), default=0) >= PASSED_OVER

    def _is_cold(self, member: _Member) -> bool:
        """Whether requests wait for its first replica, which is what makes Serve stop."""
        return self._is_silent(member) and self._surroundings.has_replicas(member.spec.name)

    def _is_gone(self, member: _Member, now_s: float) -> bool:
        return now_s - member.heard_s > FORGET_S and not self._is_cold(member)

    def _signals(self, member: _Member, max_wait_s: float, now_s: float) -> PoolSignals | None:
        """What is known of one pool; None: nothing."""
        name, watch = member.spec.name, member.watch
        stuck = self._surroundings.stuck(name)
        refused = self._surroundings.refused(member.options.node_types, now_s)
        if self._is_cold(member):
            return watch.cold(name, now_s, stuck=stuck, refused=refused)
        if now_s - member.heard_s > SILENT_S:
            return None
        return watch.signals(name, max_wait_s, now_s, stuck=stuck, refused=refused)

    def _note(self, now_s: float) -> Iterator[Change]:
        """The targets that are others than before."""
        assert self._decision is not None
        for target in self._decision.targets:
            before, _ = self._targets.get(target.name, (None, 0.0))
            if before != target.replicas:
                self._targets[target.name] = (target.replicas, now_s)
                yield Change(now_s, target.name, before, target.replicas, target.reason)

    def _keep(self, now_s: float) -> None:
        changed = bool(self._changes) and self._changes[0].at_s == now_s
        if changed or now_s - self._told_s >= TELL_S:
            self._told_s = now_s
            self._surroundings.keep(KEY + self._model, self._told().to_json())
        if now_s - self._kept_s >= KEEP_S:
            self._kept_s = now_s
            plain = json.dumps(self._state.to_plain(), allow_nan=False)
            self._surroundings.keep(STATE_KEY + self._model, plain.encode())

    def _told(self) -> ModelScaling:
        assert self._decision is not None
        pools = tuple(
            PoolScaling(
                application=target.name,
                pool=self._members[target.name].options.pool,
                replicas=target.replicas,
                since_s=self._targets[target.name][1],
                reason=target.reason,
                leaving=len(target.drain),
            )
            for target in self._decision.targets
        )
        terms = {
            name: value for name, value in self._decision.terms.items() if math.isfinite(value)
        }
        return ModelScaling(
            self._model, self._decided_s, self._decision.reason, terms, pools, tuple(self._changes)
        )


def _preference(member: _Member) -> tuple[float, str]:
    """The cheapest for each request at once first: until speeds are measured, that is the order."""
    return member.spec.usd_per_hour / member.spec.target_ongoing, member.spec.name


_SURROUNDINGS = Surroundings()
_FLEETS: dict[str, Fleet] = {}
"""By model. The controller's process is where the pools of a model meet: Serve makes one policy for
each deployment and none for several applications."""
