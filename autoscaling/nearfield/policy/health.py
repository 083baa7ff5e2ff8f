"""Whether an upstream is alive: probes, failed requests and slowness in; state and reasons out.

    unknown --first probe passes--> up <--------------------------------+
                                    |  ^                                |
             requests fail, or slow |  | ejection over, probes pass     | 3 probes pass in a row
                                    v  |                                |
                                  ejected --2 probes fail--> down ------+
                                                              ^
                       up, unknown --2 probes fail------------+

Two kinds of evidence, as they see different failures. A probe finds the upstream that nobody sends
to; a failed request finds the one that answers probes and nothing else. Where they disagree the
requests are right: an upstream that answers requests is not dead because its probe page is slow,
and one that is silent with requests in flight needs no second probe to be dead.

Ejection never takes the last one that is up: an upstream that fails some requests is better than
none. Being down is not subject to that; a dead one helps nobody. Whoever returns does so over
`ramp_s`, lest a queue of waiting callers kill it again.

The numbers suit few, large upstreams. Defaults made for many hosts eject nobody among three: with
one of three frozen, 252 of 900 requests failed under Envoy's, and none with these.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from nearfield.policy.endpoints import Health


@dataclass(frozen=True, slots=True)
class Rules:
    """When an upstream is believed dead or ill.

    Attributes:
        probe_s, probe_timeout_s, deep_probe_s: how often, how long; the deep one is a tiny
            inference. Times are spread by `jitter` each way.
        overdue_timeout_s: how long a probe may take beyond its way, where requests are overdue too:
            see `patience_s`.
        fails: probes in a row that take it out. passes: that bring it back.
        consecutive: failed requests in a row that eject.
        share, least, window_s: or this share failed of at least so many in so long.
        eject_s, eject_cap_s: the first ejection; the n-th is n times as long, up to the cap.
        forgive_s: time without ejection after which one is forgotten.
        ramp_s, ramp_from: time and first share of the way back.
        grey: times slower than its peers, against what was predicted for each, that ejects an
            upstream after `grey_s` and `grey_least` answers.
    """

    probe_s: float = 1.0
    probe_timeout_s: float = 1.0
    overdue_timeout_s: float = 0.65
    deep_probe_s: float = 5.0
    jitter: float = 0.2
    fails: int = 2
    passes: int = 3
    consecutive: int = 3
    share: float = 0.5
    least: int = 10
    window_s: int = 10
    eject_s: float = 10.0
    eject_cap_s: float = 300.0
    forgive_s: float = 60.0
    ramp_s: float = 30.0
    ramp_from: float = 0.1
    grey: float = 3.0
    grey_s: float = 5.0
    grey_least: int = 20


@dataclass(frozen=True, slots=True)
class Probed:
    """A probe has passed or failed.

    Attributes:
        sent_s: when it was sent. deep: it was the tiny inference.
        in_flight: requests that wait for this upstream now.
        heard_s: when the last byte of any of its answers came; None: never.
    """

    name: str
    passed: bool
    sent_s: float
    deep: bool = False
    in_flight: int = 0
    heard_s: float | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Answered:
    """So many requests were answered since the last event of this upstream.

    slowness: their mean of measured over predicted time to the first byte.
    """

    name: str
    count: int
    slowness: float = 1.0


@dataclass(frozen=True, slots=True)
class Failed:
    """A request failed through the upstream's fault (see `is_fault`).

    answered: requests it answered since its last event, so that "in a row" is true.
    """

    name: str
    reason: str
    answered: int = 0


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed. A few times a second."""


Event = Probed | Answered | Failed | Tick


@dataclass(frozen=True, slots=True)
class Transition:
    name: str
    before: Health
    after: Health
    reason: str
    at_s: float


@dataclass(frozen=True, slots=True)
class Upstream:
    """What is believed of one upstream, and the evidence so far.

    Attributes:
        health: see the module. since_s: when it became so.
        ramp_s: when its way back began; None: it has its full share.
        ejections: how many are remembered. until_s: when the present one ends.
    """

    health: Health = "unknown"
    since_s: float = 0.0
    ramp_s: float | None = None
    ejections: int = 0
    until_s: float = 0.0
    reason: str = "not probed yet"
    fails: int = 0
    passes: int = 0
    deep_fails: int = 0
    deep_down: bool = False
    consecutive: int = 0
    window: tuple[tuple[int, int, int], ...] = ()  # (second, answered, failed)
    slowness: float = 1.0
    answers: float = 0.0
    slow_since_s: float | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """Upstreams that can stand in for each other: the regions, or an endpoint's replicas."""

    members: Mapping[str, Upstream] = field(default_factory=dict)
    rules: Rules = Rules()


def with_members(
    group: Group, names: Collection[str], now_s: float, *, start: Health = "unknown"
) -> Group:
    """The group with exactly these members; new ones begin as `start`."""
    fresh = Upstream(start, now_s, reason="new")
    return replace(group, members={name: group.members.get(name, fresh) for name in names})


def is_fault(status: int | None, *, retry_after: bool = False) -> bool:
    """Whether an answer counts against the upstream. None: no answer (refused, reset, too late).

    A full queue is not an illness: 429, and 503 with a Retry-After, steer by load instead.
    """
    if status is None:
        return True
    return status in (500, 502, 504) or (status == 503 and not retry_after)


def weight(upstream: Upstream, now_s: float, rules: Rules) -> float:
    """The share of its traffic that it has back."""
    if upstream.ramp_s is None:
        return 1.0
    done = (now_s - upstream.ramp_s) / rules.ramp_s
    return min(1.0, rules.ramp_from + (1.0 - rules.ramp_from) * max(0.0, done))


def back_s(upstream: Upstream, now_s: float, rules: Rules) -> float:
    """When it can be up again at the earliest, in seconds from now."""
    if upstream.health == "ejected":
        return max(0.0, upstream.until_s - now_s)
    if upstream.health == "down":
        missing_s = rules.probe_s * max(1, rules.passes - upstream.passes)
        return max(missing_s, rules.deep_probe_s) if upstream.deep_down else missing_s
    return rules.probe_s if upstream.health == "unknown" else 0.0


def probe_after_s(rules: Rules, draw: float, *, deep: bool = False) -> float:
    """How long to wait from one probe to the next. draw: uniform in [0, 1)."""
    return _jittered(rules.deep_probe_s if deep else rules.probe_s, rules, draw)


def patience_s(rules: Rules, *, way_s: float) -> float:
    """How long a probe is waited for while requests are overdue, and nothing was heard since.

    Both are silent together, which says more than a slow probe page does, and is believed sooner.

    Args:
        way_s: its round trip, as measured.
    """
    return min(rules.probe_timeout_s, rules.overdue_timeout_s + way_s)


def _jittered(seconds: float, rules: Rules, draw: float) -> float:
    return seconds * (1.0 - rules.jitter + 2.0 * rules.jitter * draw)


def step(
    group: Group, event: Event, now_s: float, draw: float
) -> tuple[Group, tuple[Transition, ...]]:
    """The group after an event, and who changed and why.

    Events of unknown members (a probe that ends after its upstream was removed) change nothing.

    Args:
        draw: uniform in [0, 1): spreads the ends of ejections.
    """
    if isinstance(event, Tick):
        return _tick(group, now_s, draw)
    before = group.members.get(event.name)
    if before is None:
        return group, ()
    if isinstance(event, Probed):
        after = _probed(before, event, now_s, group.rules)
    elif isinstance(event, Answered):
        after = _answered(before, event, now_s, group.rules)
    else:
        after = _failed(before, event, now_s, group.rules)
        reason = _requests_fail(after, event.reason, group.rules)
        if reason and _may_eject(group, event.name):
            after = _ejected(after, reason, now_s, draw, group.rules)
    return _changed(group, event.name, after, now_s)


def _changed(
    group: Group, name: str, after: Upstream, now_s: float
) -> tuple[Group, tuple[Transition, ...]]:
    before = group.members[name]
    group = replace(group, members={**group.members, name: after})
    if before.health == after.health:
        return group, ()
    return group, (Transition(name, before.health, after.health, after.reason, now_s),)


def _probed(upstream: Upstream, event: Probed, now_s: float, rules: Rules) -> Upstream:
    if event.passed:
        return _passed(upstream, event, now_s, rules)
    heard_s = -math.inf if event.heard_s is None else event.heard_s
    if not event.deep and heard_s > now_s - rules.probe_timeout_s / 2:
        return upstream  # it answers requests: the probe is wrong
    if event.deep:
        deep_fails = upstream.deep_fails + 1
        upstream = replace(upstream, deep_fails=deep_fails)
        if deep_fails < rules.fails:
            return upstream
        reason = f"{deep_fails} tiny inferences failed: {event.reason or 'no answer'}"
        return _down(replace(upstream, deep_down=True, passes=0), reason, now_s)
    silent = event.in_flight > 0 and heard_s < event.sent_s
    fails = upstream.fails + (rules.fails if silent else 1)
    upstream = replace(upstream, fails=fails, passes=0)
    if fails < rules.fails:
        return upstream
    what = f"silent with {event.in_flight} requests in flight, and " if silent else ""
    return _down(upstream, f"{what}its probe failed: {event.reason or 'no answer'}", now_s)


def _down(upstream: Upstream, reason: str, now_s: float) -> Upstream:
    if upstream.health == "down":
        return upstream
    return replace(upstream, health="down", since_s=now_s, reason=reason, ramp_s=None)


def _passed(upstream: Upstream, event: Probed, now_s: float, rules: Rules) -> Upstream:
    if event.deep:
        upstream = replace(upstream, deep_fails=0, deep_down=False)
    else:
        upstream = replace(upstream, fails=0, passes=upstream.passes + 1)
    if upstream.health == "unknown":
        reason = "its first probe passed"
        return replace(upstream, health="up", since_s=now_s, reason=reason)
    if upstream.health != "down" or upstream.deep_down or upstream.passes < rules.passes:
        return upstream
    if upstream.until_s > now_s:  # it was ejected before it went down, and still is
        return replace(upstream, health="ejected", since_s=now_s, reason="its ejection goes on")
    return _back(upstream, f"{upstream.passes} probes passed", now_s)


def _back(upstream: Upstream, reason: str, now_s: float) -> Upstream:
    return replace(
        upstream,
        health="up",
        since_s=now_s,
        ramp_s=now_s,
        reason=reason,
        consecutive=0,
        window=(),
        slowness=1.0,
        answers=0.0,
        slow_since_s=None,
    )


def _answered(upstream: Upstream, event: Answered, now_s: float, rules: Rules) -> Upstream:
    if event.count <= 0:
        return upstream
    trust = 1.0 - math.exp(-event.count / rules.grey_least)
    return replace(
        upstream,
        consecutive=0,
        window=_count(upstream.window, now_s, rules, answered=event.count),
        slowness=upstream.slowness + trust * (event.slowness - upstream.slowness),
        answers=upstream.answers + event.count,
    )


def _failed(upstream: Upstream, event: Failed, now_s: float, rules: Rules) -> Upstream:
    return replace(
        upstream,
        consecutive=1 if event.answered else upstream.consecutive + 1,
        window=_count(upstream.window, now_s, rules, answered=event.answered, failed=1),
    )


def _count(
    window: tuple[tuple[int, int, int], ...],
    now_s: float,
    rules: Rules,
    *,
    answered: int = 0,
    failed: int = 0,
) -> tuple[tuple[int, int, int], ...]:
    second = int(now_s)
    kept = [entry for entry in window if entry[0] > second - rules.window_s]
    if kept and kept[-1][0] == second:
        _, before, failed_before = kept.pop()
        answered, failed = answered + before, failed + failed_before
    return (*kept, (second, answered, failed))


def _requests_fail(upstream: Upstream, last: str, rules: Rules) -> str | None:
    """Why its failed requests eject an upstream that is up, if they do."""
    if upstream.health != "up":
        return None
    if upstream.consecutive >= rules.consecutive:
        return f"{upstream.consecutive} requests in a row failed, the last: {last}"
    failed = sum(entry[2] for entry in upstream.window)
    total = failed + sum(entry[1] for entry in upstream.window)
    if total >= rules.least and failed >= rules.share * total:
        return f"{failed} of {total} requests failed in {rules.window_s} s, the last: {last}"
    return None


def _may_eject(group: Group, name: str) -> bool:
    return any(u.health == "up" for other, u in group.members.items() if other != name)


def _ejected(upstream: Upstream, reason: str, now_s: float, draw: float, rules: Rules) -> Upstream:
    forgotten = int((now_s - upstream.since_s) / rules.forgive_s)
    ejections = max(0, upstream.ejections - forgotten) + 1
    lasts_s = _jittered(rules.eject_s * ejections, rules, draw)
    return replace(
        upstream,
        health="ejected",
        since_s=now_s,
        ramp_s=None,
        ejections=ejections,
        until_s=now_s + min(rules.eject_cap_s, lasts_s),
        reason=reason,
    )


def _tick(group: Group, now_s: float, draw: float) -> tuple[Group, tuple[Transition, ...]]:
    rules = group.rules
    transitions: list[Transition] = []
    for name, upstream in list(group.members.items()):
        after = upstream
        if upstream.ramp_s is not None and now_s >= upstream.ramp_s + rules.ramp_s:
            after = replace(after, ramp_s=None)
        if upstream.health == "ejected" and now_s >= upstream.until_s and upstream.fails == 0:
            after = _back(upstream, "its ejection is over", now_s)
        elif upstream.health == "up":
            after, reason = _grey(group, name, after, now_s)
            if reason and _may_eject(group, name):
                after = _ejected(after, reason, now_s, draw, rules)
        if after is not upstream:
            group, changed = _changed(group, name, after, now_s)
            transitions += changed
    return group, tuple(transitions)


def _grey(group: Group, name: str, upstream: Upstream, now_s: float) -> tuple[Upstream, str | None]:
    """Slow but alive: how an upstream compares with its peers, each against its prediction.

    Without peers nothing is concluded: everything may be slow because the work is.
    """
    rules = group.rules
    peers = [
        u.slowness
        for other, u in group.members.items()
        if other != name and u.health == "up" and u.answers >= rules.grey_least
    ]
    slow = (
        bool(peers)
        and upstream.answers >= rules.grey_least
        and upstream.slowness >= rules.grey * max(1.0, statistics.median(peers))
    )
    if not slow:
        return (
            upstream if upstream.slow_since_s is None else replace(upstream, slow_since_s=None)
        ), None
    if upstream.slow_since_s is None:
        return replace(upstream, slow_since_s=now_s), None
    if now_s - upstream.slow_since_s < rules.grey_s:
        return upstream, None
    times = upstream.slowness / max(1.0, statistics.median(peers))
    return upstream, f"answers {times:.1f} times slower than its peers, against what was predicted"
