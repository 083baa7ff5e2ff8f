"""Who is believed alive: groups of upstreams fed with evidence, and what their answers tell."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection

from nearfield.edge.proxy.ports import Attempt, Target
from nearfield.policy import health
from nearfield.policy.endpoints import Health
from nearfield.policy.health import Answered, Event, Failed, Group, Rules, Transition, Upstream

log = logging.getLogger("nearfield.edge.world")

SLACK_S = 0.02
"""Differences of this size are the machine's, not the upstream's: added to what an answer took and
to what was predicted, before they are compared."""


class Peer:
    """Somebody who answers requests: a replica, or a region's gateway or ingress.

    Attributes:
        name: within its group. target: where it is.
        running: tries at it that have not ended, and when their first byte was expected.
        asked_s: when it was last asked how it is.
        heard_s: when the last try that has ended was heard last; None: never.
        used_s, good_s: when a request was last sent to it, and when it last answered one well.
        deep_s: when it may be asked for a tiny inference again.
    """

    __slots__ = (
        "_answered", "_slowness", "asked_s", "deep_s", "good_s", "heard_s", "name", "running",
        "target", "used_s",
    )  # fmt: skip

    def __init__(self, name: str, target: Target | None) -> None:
        self.name = name
        self.target = target
        self.running: dict[Attempt, float] = {}
        self.asked_s = -math.inf
        self.heard_s: float | None = None
        self.used_s = self.good_s = self.deep_s = -math.inf
        self._answered = 0
        self._slowness = 0.0

    def last_heard_s(self) -> float | None:
        """When the last byte of any of its answers came; None: never."""
        heard_s = self.heard_s
        for attempt in self.running:
            if attempt.heard_s is not None and (heard_s is None or attempt.heard_s > heard_s):
                heard_s = attempt.heard_s
        return heard_s

    def overdue(self, before_s: float) -> bool:
        """Whether a first byte was expected before that time, and nothing was heard since."""
        heard_s = self.last_heard_s()
        if heard_s is not None and heard_s >= before_s:
            return False
        return any(
            due_s < before_s and attempt.heard_s is None for attempt, due_s in self.running.items()
        )

    def answered(self, took_s: float, expected_s: float, now_s: float) -> None:
        """One more answer: told to its group with the next evidence, or at the next round."""
        self.good_s = now_s
        self._answered += 1
        self._slowness += (took_s + SLACK_S) / (expected_s + SLACK_S)

    def take_answers(self) -> Answered | None:
        """The answers since the last time, as evidence."""
        count, total = self._answered, self._slowness
        if not count:
            return None
        self._answered, self._slowness = 0, 0.0
        return Answered(self.name, count, total / count)


class Beliefs:
    """A group of upstreams, kept up to date. `told` hears of every change of health."""

    def __init__(
        self, rules: Rules, told: Callable[[Transition], None], draw: Callable[[], float]
    ) -> None:
        self._group = Group(rules=rules)
        self._told = told
        self._draw = draw

    @property
    def rules(self) -> Rules:
        return self._group.rules

    def members(self, names: Collection[str], now_s: float, *, start: Health) -> None:
        """There are exactly these; new ones begin as `start`."""
        if self._group.members.keys() != set(names):
            self._group = health.with_members(self._group, names, now_s, start=start)

    def of(self, name: str) -> Upstream:
        """
        Raises:
            KeyError: it is no member.
        """
        return self._group.members[name]

    def weight(self, name: str, now_s: float) -> float:
        """The share of its traffic that it has back."""
        return health.weight(self._group.members[name], now_s, self._group.rules)

    def back_s(self, name: str, now_s: float) -> float:
        """When it can be up again at the earliest, in seconds from now."""
        return health.back_s(self._group.members[name], now_s, self._group.rules)

    def feed(self, event: Event | None, now_s: float) -> None:
        """Take account of some evidence."""
        if event is None:
            return
        self._group, transitions = health.step(self._group, event, now_s, self._draw())
        for transition in transitions:
            log.warning(
                "%s is %s, was %s: %s",
                transition.name,
                transition.after,
                transition.before,
                transition.reason,
            )
            self._told(transition)

    def failed(self, peer: Peer, reason: str, now_s: float) -> None:
        """A request failed through the fault of `peer`."""
        answers = peer.take_answers()
        self.feed(answers, now_s)
        self.feed(Failed(peer.name, reason, answers.count if answers is not None else 0), now_s)
