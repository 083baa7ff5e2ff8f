"""How many replicas each pool of one model should have now, and why.

    decision, state = step(signals, state, spec)

Pure: time is in the signals, what was learnt is in the state. Production (the Serve adapter) and
the simulator call this same function. Call it every second or so; any other pace, and an irregular
one, gives the same answers up to what was not seen in between.

The parts, each in a file of its own:

    demand     what comes, and what capacity it would have needed
    forecast   what will be needed once a replica asked for now serves
    headroom   how much more than that, for the price of being late
    outlook    those two for several bases, of which the cheapest counts
    capacity   what a replica gets done, and how long it boots; the concurrency target
    mix        which pools it is bought from
    spot       spares, zones, and whether a pool can be had at all

What remains for here is when to act. Up: at once. Down: when nothing of the last minutes asked for
more, never while requests queue (Knative's panic), never on no data, and never before what
replaces a replica serves. To zero after `idle_s` without a request; from zero with the first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from nearfield.policy import mix, spot
from nearfield.policy.capacity import Pool
from nearfield.policy.demand import Demand
from nearfield.policy.outlook import DRAIN_S, TINY, Amounts, Outlook, holding
from nearfield.policy.plain import plain, revived
from nearfield.policy.pools import (
    NO_DATA,
    CapacityKind,
    Decision,
    Measured,
    NoData,
    Notice,
    PoolSignals,
    PoolSpec,
    PoolTarget,
    ScalingSpec,
    Signals,
)

__all__ = [
    "NO_DATA",
    "CapacityKind",
    "Decision",
    "Measured",
    "NoData",
    "Notice",
    "PoolSignals",
    "PoolSpec",
    "PoolTarget",
    "ScalingSpec",
    "Signals",
    "State",
    "step",
]

REACT_S = 5.0
"""Added to a boot: what passes until a change is seen."""
OUTAGES = 0.25
"""Share of the allowed lateness that losses of spot capacity may spend. A pool whose losses alone
would spend it is as dear as the dearest, which is never lost."""
WARM_BINS = 3
"""Bins that must be full before rates are believed."""
VERSION = 2


class Group(NamedTuple):
    """What was learnt of the pools that share one traffic.

    Attributes:
        demand, outlook: see there.
        caught: capacity that was asked for to catch up with a backlog.
        request_work: mean work of a request. last_s: when the last one came.
        has_work: the unit of work is measured; else it is a request.
    """

    demand: Demand = Demand()
    outlook: Outlook = Outlook()
    caught: Amounts = ()
    request_work: float = 1.0
    last_s: float = -math.inf
    has_work: bool = False


@dataclass(frozen=True, slots=True)
class State:
    """What the policy remembers: opaque to callers. `State()` is the beginning of everything."""

    now_s: float = -math.inf
    pools: Mapping[str, Pool] = field(default_factory=dict)
    groups: Mapping[str, Group] = field(default_factory=dict)

    def to_plain(self) -> dict[str, object]:
        """As JSON can hold it."""
        return {
            "version": VERSION,
            "now_s": plain(self.now_s),
            "pools": {name: plain(pool) for name, pool in self.pools.items()},
            "groups": {name: plain(group) for name, group in self.groups.items()},
        }

    @classmethod
    def from_plain(cls, found: Mapping[str, object]) -> State:
        """Back again. What this version cannot read is forgotten: `State()`."""
        try:
            if found["version"] != VERSION:
                return cls()
            pools, groups, now_s = found["pools"], found["groups"], found["now_s"]
            if not (isinstance(pools, Mapping) and isinstance(groups, Mapping)):
                return cls()
            return cls(
                revived(float, now_s),
                {str(name): revived(Pool, pool) for name, pool in pools.items()},
                {str(name): revived(Group, group) for name, group in groups.items()},
            )
        except (KeyError, TypeError, ValueError):
            return cls()


class _Member(NamedTuple):
    """One pool in one step. boot_s, usd: what holds now; good: running and not noticed."""

    spec: PoolSpec
    signals: PoolSignals | None
    pool: Pool
    work_s: Measured
    boot_s: float
    usd: float

    @property
    def good(self) -> int:
        return self.signals.running - len(self.signals.notices) if self.signals else 0

    @property
    def coming(self) -> int:
        """Replicas that start and are not overdue."""
        if self.signals is None:
            return 0
        return sum(not spot.overdue(age_s, self.boot_s) for age_s in self.signals.starting)

    @property
    def have(self) -> int:
        """All that run or start, those with a notice aside."""
        return self.good + len(self.signals.starting) if self.signals else 0

    @property
    def before(self) -> int:
        """The target until now."""
        return self.pool.target if self.pool.target >= 0 else self.have


class _Wanted(NamedTuple):
    """Of one group: capacity in work a second, why, and the numbers.

    None: as it was, and at least `replicas` together.

    Attributes:
        least_s: of that capacity, what should be there when a zone is lost.
    """

    work_s: float | None
    why: str
    terms: dict[str, float]
    may_fall: bool
    awake: bool
    replicas: int = 0
    least_s: float = 0.0


def step(signals: Signals, state: State, spec: ScalingSpec) -> tuple[Decision, State]:
    """What every pool should have now, and what to remember until the next step.

    Raises:
        ValueError: signals of a pool that the spec does not have, or time ran backwards.
    """
    now_s = signals.now_s
    if now_s < state.now_s:
        raise ValueError(f"time ran backwards: now_s {now_s:.3f} after {state.now_s:.3f}")
    given = {pool.name: pool for pool in signals.pools}
    if unknown := given.keys() - {pool.name for pool in spec.pools}:
        raise ValueError(f"signals of a pool that is not in the spec: {sorted(unknown)[0]!r}")
    elapsed_s = now_s - state.now_s if math.isfinite(state.now_s) else 0.0
    members = [_member(p, given.get(p.name), state, now_s, elapsed_s) for p in spec.pools]
    groups, wishes = {}, {}
    counts: dict[str, int] = {}
    notes: dict[str, str] = {}
    for key in dict.fromkeys(_group(pool) for pool in spec.pools):
        own = _compared([m for m in members if _group(m.spec) == key])
        old = state.groups.get(key, Group())
        groups[key], wishes[key] = _want(own, old, spec, now_s, elapsed_s)
        _place(own, wishes[key], spec, counts, notes, now_s)
    _afford(members, spec, counts, notes)
    targets = tuple(
        PoolTarget(m.spec.name, counts[m.spec.name], _drains(m), notes[m.spec.name])
        for m in members
    )
    terms: dict[str, float] = {}
    for key, wanted in wishes.items():
        prefix = f"{key}." if len(wishes) > 1 else ""
        terms.update({prefix + name: value for name, value in wanted.terms.items()})
    reason = "; ".join(
        (f"{key or 'everybody'}: " if len(wishes) > 1 else "") + wanted.why
        for key, wanted in wishes.items()
    )
    pools = {m.spec.name: m.pool._replace(target=counts[m.spec.name]) for m in members}
    return Decision(targets, reason, terms), State(now_s, pools, groups)


def _group(pool: PoolSpec) -> str:
    return ",".join(sorted(pool.products))


def _member(
    spec: PoolSpec, signals: PoolSignals | None, state: State, now_s: float, elapsed_s: float
) -> _Member:
    pool = state.pools.get(spec.name, Pool())
    usd = spec.usd_per_hour
    if signals is not None:
        pool = pool.observe(signals, spec, now_s, elapsed_s)
        if signals.usd_per_hour is not NO_DATA:
            usd = signals.usd_per_hour
    return _Member(spec, signals, pool, pool.speed(spec), pool.boots_in(spec), usd)


def _compared(members: list[_Member]) -> list[_Member]:
    """The members with a speed each, if that of any is known: a pool that never ran is taken to be
    as fast as that one, for each request it should have at once. Pools whose specs say that they
    are equally fast are measured together: nothing is moved between zones for noise."""
    members = [_pooled(m, members) for m in members]
    known = next((m for m in members if m.work_s is not NO_DATA), None)
    if known is None or known.work_s is NO_DATA:
        return members
    per_request = known.work_s / known.spec.target_ongoing
    return [
        m._replace(work_s=per_request * m.spec.target_ongoing) if m.work_s is NO_DATA else m
        for m in members
    ]


def _pooled(member: _Member, members: list[_Member]) -> _Member:
    declared = member.spec.work_s
    if declared is NO_DATA:
        return member
    alike = [m for m in members if m.spec.work_s == declared and m.good > 0]
    replicas = sum(m.good for m in alike)
    if not replicas:
        return member
    work_s = math.fsum(m.good * m.work_s for m in alike if m.work_s is not NO_DATA)
    return member._replace(work_s=work_s / replicas)


# ---- how much -----------------------------------------------------------------------------------


def _want(
    members: list[_Member], group: Group, spec: ScalingSpec, now_s: float, elapsed_s: float
) -> tuple[Group, _Wanted]:
    """How much capacity one group's traffic wants."""
    dark = [m.spec.name for m in members if _dark(m, group.has_work)]
    if dark:
        why = f"no data from {', '.join(dark)}: nothing is given up"
        return group, _Wanted(None, why, {}, may_fall=False, awake=True)
    seen = [m.signals for m in members if m.signals is not None]
    arrivals = _total(s.arrivals for s in seen)
    has_work = group.has_work or any(s.work_in is not NO_DATA for s in seen)
    work = _total(s.work_in for s in seen) if has_work else arrivals
    ongoing, queued = _total(s.ongoing for s in seen), _total(s.queued for s in seen)
    if has_work and not group.has_work:
        group = Group(has_work=True, last_s=group.last_s)  # another unit: nothing is comparable
    if arrivals > TINY:
        gain = min(1.0, arrivals / 1000.0 + 1.0 / (1.0 + group.demand.closed))
        request_work = group.request_work + gain * (work / arrivals - group.request_work)
        group = group._replace(last_s=now_s, request_work=request_work)
    elif ongoing > 0.0 or not math.isfinite(group.last_s):
        group = group._replace(last_s=now_s)
    demand = group.demand.observe(now_s, work, now_s - elapsed_s)
    group = group._replace(demand=demand)
    queue_age_s = max((s.queue_age_s for s in seen if s.queue_age_s is not NO_DATA), default=0.0)
    idle_s = now_s - group.last_s
    awake = idle_s < spec.idle_s
    fastest = _next(members)
    if fastest is None or fastest.work_s is NO_DATA or demand.closed < WARM_BINS:
        return group, _by_concurrency(members, ongoing, awake)
    lead_s = fastest.boot_s + REACT_S
    hold_s = max(spec.hold_s, lead_s)
    late_share = min(1.0, _total(s.late for s in seen) / arrivals) if arrivals > 0.0 else 0.0
    running = _running(members)
    outlook, enough = group.outlook.enough(
        demand,
        now_s,
        late=late_share * work,
        running=running,
        replica=fastest.work_s,
        lead_s=lead_s,
        wait_s=spec.max_wait_s,
        hold_s=hold_s,
        allowed=spec.max_late,
    )
    level = demand.level
    calm = min(level, enough.expected)  # a burst that will be over needs no replica to catch up
    backlog = _backlog(members, running, queued * group.request_work, calm, lead_s)
    panic = queue_age_s > spec.max_wait_s or backlog > spec.max_wait_s * max(
        running, fastest.work_s
    )
    # What a loss took is replaced at once; that it was missing may take as long to make good.
    struck = any(now_s - m.pool.trust.lost_s < lead_s + DRAIN_S for m in members)
    catch_up = calm + backlog / (max(DRAIN_S, lead_s) if struck else DRAIN_S) if panic else 0.0
    # What ran at the beginning was asked for by somebody: it is held longer than a boot.
    caught = group.caught or ((now_s + hold_s - lead_s, running),)
    caught = holding(caught, now_s, catch_up, lead_s)
    held = max(caught[0][1], enough.held)
    group = group._replace(outlook=outlook, caught=caught)
    terms = {
        "level": level,
        "expected": enough.expected,
        "enough": enough.amount,
        "risk": enough.risk,
        "catch_up": catch_up,
        "held": held,
        "lead_s": lead_s,
        "base": float(enough.base),
        "error": outlook.errors[enough.base].scale,
        "late_price": enough.late_price,
        "panic": float(panic),
    }
    if not awake and ongoing == 0.0:
        why = f"no request for {idle_s:.0f} s"
        return group, _Wanted(0.0, why, terms, may_fall=True, awake=False)
    why = (
        f"{level:.3g} work/s come, {enough.expected:.3g} expected in {lead_s:.0f} s, "
        f"{enough.amount:.3g} is enough but for {enough.risk:.2%}"
    )
    if catch_up > enough.amount:
        why += f"; {catch_up:.3g} to catch up with a backlog of {backlog:.3g}"
    if held > max(enough.amount, catch_up):
        why += f"; {held:.3g} was wanted within {hold_s:.0f} s"
    least_s = min(held, math.sqrt(held * enough.expected))  # half-way, in logs
    return group, _Wanted(held, why, terms, not panic, awake=True, least_s=least_s)


def _dark(member: _Member, has_work: bool) -> bool:
    """Whether the pool's load is unknown."""
    signals = member.signals
    if signals is None or signals.arrivals is NO_DATA:
        return True
    return has_work and signals.work_in is NO_DATA


def _total(values: Iterable[Measured]) -> float:
    return math.fsum(value for value in values if value is not NO_DATA)


def _running(members: list[_Member]) -> float:
    """Work a second that is done now."""
    return math.fsum(m.good * m.work_s for m in members if m.work_s is not NO_DATA)


def _next(members: list[_Member]) -> _Member | None:
    """The pool that one more replica would come from: the cheapest per work that has room."""
    known = [m for m in members if m.work_s is not NO_DATA]
    if len(known) < len(members):
        return None
    open_ = [m for m in known if m.spec.max_replicas > 0]

    def price(member: _Member) -> tuple[bool, float]:
        assert member.work_s is not NO_DATA
        full = member.have >= member.spec.max_replicas
        return (full, member.usd / member.work_s)

    return min(open_, key=price, default=None)


def _by_concurrency(members: list[_Member], ongoing: float, awake: bool) -> _Wanted:
    """Before a replica's speed is known: so many that each has its target of requests."""
    first = members[0].spec
    needed = math.ceil(ongoing / first.target_ongoing - 1e-9)
    why = f"{ongoing:.3g} requests at once, {first.target_ongoing:.3g} for each replica"
    if not awake:
        return _Wanted(0.0, "no request yet", {"ongoing": ongoing}, may_fall=True, awake=False)
    terms = {"ongoing": ongoing, "needed": float(needed)}
    why += "; its speed is not known yet"
    return _Wanted(None, why, terms, may_fall=False, awake=True, replicas=needed)


def _backlog(
    members: list[_Member], capacity: float, queued: float, level: float, lead_s: float
) -> float:
    """Work that will wait when what is asked for now serves, as things start meanwhile."""
    starts = sorted(
        (max(0.0, m.boot_s - age_s), m.work_s)
        for m in members
        if m.signals is not None and m.work_s is not NO_DATA
        for age_s in m.signals.starting
        if not spot.overdue(age_s, m.boot_s)
    )
    at_s, backlog = 0.0, queued
    for in_s, work_s in starts:
        if in_s >= lead_s:
            break
        backlog = max(0.0, backlog + (level - capacity) * (in_s - at_s))
        capacity += work_s
        at_s = in_s
    return max(0.0, backlog + (level - capacity) * (lead_s - at_s))


# ---- of which pools -----------------------------------------------------------------------------


def _place(
    members: list[_Member],
    wanted: _Wanted,
    spec: ScalingSpec,
    counts: dict[str, int],
    notes: dict[str, str],
    now_s: float,
) -> None:
    """Fill in the counts of one group's pools, bounds kept, and why."""
    if not wanted.awake:
        for member in members:
            counts[member.spec.name] = member.spec.min_replicas
            notes[member.spec.name] = f"{member.spec.min_replicas}: {wanted.why}"
        return
    if wanted.work_s is None:
        needed = wanted.replicas
        for member in members:
            pool = member.spec
            count = max(member.before, pool.min_replicas)
            # What it has, but for those that wait for a machine.
            gives = min(count, member.good + member.coming) if _refused(member) else count
            more = max(0, min(needed - gives, _most(member) - count))
            needed = max(0, needed - gives - more)
            counts[pool.name] = max(pool.min_replicas, min(pool.max_replicas, count + more))
            notes[pool.name] = f"{counts[pool.name]}: {wanted.why}"
        return
    dearest = max(m.usd / m.work_s for m in members if m.work_s is not NO_DATA)
    offers = [_offer(m, dearest / (OUTAGES * spec.max_late)) for m in members]
    # However little is wanted, somebody must be there.
    goal = max(wanted.work_s, 0.5 * min(o.work_s for o in offers))
    chosen = _bought(members, offers, goal, wanted.least_s)
    kept = _kept(members, goal, chosen)
    tried = _tried(members, offers, chosen, now_s)
    for i, member in enumerate(members):
        pool, why = member.spec, wanted.why
        count = min(chosen[i] + kept[i] + tried[i], pool.max_replicas)
        if not wanted.may_fall and member.before > count:
            count, why = min(member.before, pool.max_replicas), f"{why}; requests wait: none goes"
        if kept[i]:
            why += f"; {kept[i]} stay until others serve"
        if offers[i].most < pool.max_replicas:
            why += f"; at most {offers[i].most} can be had: starts were refused or are overdue"
            why += ", one more is tried" if tried[i] else ""
        counts[pool.name] = count
        notes[pool.name] = f"{count}: {why}"


def _refused(member: _Member) -> bool:
    """Whether its last launches came to nothing."""
    return member.pool.trust.backoff_s > 0.0


def _most(member: _Member) -> int:
    """What one pool can be counted on for: all it may have, or what it has where it is refused."""
    most = member.spec.max_replicas
    if _refused(member):
        most = min(most, member.good + member.coming)
    return max(most, member.spec.min_replicas)


def _tries(member: _Member, now_s: float) -> bool:
    """Whether one more is to find out if a pool that was refused can be had again: once the time
    has come, or if it waits there already."""
    if not _refused(member):
        return False
    waits = member.signals is not None and len(member.signals.starting) > member.coming
    return waits or (now_s >= member.pool.trust.blocked_s and not member.coming)


def _tried(
    members: list[_Member], offers: list[mix.Offer], chosen: list[int], now_s: float
) -> list[int]:
    """One each of the refused pools that would do the work for less than what was bought, and of
    spot zones that would do it for the same: there is one more to spread over.

    They come on top: what may never start replaces nothing.
    """
    prices = [(offer.usd + offer.exposed_usd) / offer.work_s for offer in offers]
    dearest = max((p for p, n in zip(prices, chosen, strict=True) if n), default=math.inf)
    return [
        int(_tries(member, now_s) and (price < dearest or _spreads(member, price, dearest)))
        for price, member in zip(prices, members, strict=True)
    ]


def _spreads(member: _Member, price: float, dearest: float) -> bool:
    return member.spec.kind == "spot" and price <= mix.SAME_PRICE * dearest < math.inf


def _offer(member: _Member, missing_usd: float) -> mix.Offer:
    """What one pool can give now, and the price of being exposed to its losses.

    Args:
        missing_usd: price an hour of a unit of work that is missing all the time.
    """
    pool, trust = member.spec, member.pool.trust
    assert member.work_s is not NO_DATA
    most = _most(member)
    have = min(member.good + member.coming, most)
    exposed_usd = 0.0
    if pool.kind == "spot":
        exposed_usd = missing_usd * member.work_s * trust.missing(member.boot_s + REACT_S)
    return mix.Offer(
        member.work_s,
        member.usd,
        have,
        pool.min_replicas,
        most,
        member.boot_s,
        exposed_usd,
        trust.share,
    )


def _bought(
    members: list[_Member], offers: list[mix.Offer], goal: float, least_s: float
) -> list[int]:
    """Replicas of each pool: the cheapest mix, zones of one price as one, and spread over them."""
    zones: list[list[int]] = []
    for i, member in enumerate(members):
        for zone in zones:
            both_spot = member.spec.kind == members[zone[0]].spec.kind == "spot"
            if both_spot and mix.same_price(offers[zone[0]], offers[i]):
                zone.append(i)
                break
        else:
            zones.append([i])
    joined = tuple(_joined([offers[i] for i in zone]) for zone in zones)
    counts = [0] * len(members)
    for zone, offer, total in zip(zones, joined, mix.hedged(goal, least_s, joined), strict=True):
        if len(zone) == 1:
            counts[zone[0]] = total
            continue
        shares = spot.spread(
            total - offer.least,
            tuple(max(0, offers[i].have - offers[i].least) for i in zone),
            tuple(offers[i].most - offers[i].least for i in zone),
            tuple(members[i].pool.trust.losses_per_hour for i in zone),
        )
        for i, share in zip(zone, shares, strict=True):
            counts[i] = offers[i].least + share
    return counts


def _joined(zone: list[mix.Offer]) -> mix.Offer:
    count = len(zone)
    open_ = [o for o in zone if o.most] or zone
    return mix.Offer(
        work_s=min(o.work_s for o in zone),
        usd=math.fsum(o.usd for o in zone) / count,
        have=sum(o.have for o in zone),
        least=sum(o.least for o in zone),
        most=sum(o.most for o in zone),
        boot_s=max(o.boot_s for o in zone),
        exposed_usd=math.fsum(o.exposed_usd for o in open_) / len(open_),
        share=math.fsum(o.share for o in open_) / len(open_),
        zones=len(open_),
    )


def _kept(members: list[_Member], goal: float, counts: list[int]) -> list[int]:
    """How many more of each pool stay until what replaces them serves: the cheapest."""
    serving = 0.0
    spare: list[tuple[float, int, int]] = []
    for i, member in enumerate(members):
        assert member.work_s is not NO_DATA
        serving += member.work_s * min(member.good, counts[i])
        room = min(member.good, member.spec.max_replicas) - counts[i]
        if room > 0:
            spare.append((member.usd / member.work_s, i, room))
    kept = [0] * len(members)
    for _, i, room in sorted(spare):
        work_s = members[i].work_s
        assert work_s is not NO_DATA
        kept[i] = max(0, min(room, math.ceil((goal - serving) / work_s - 1e-9)))
        serving += kept[i] * work_s
    return kept


def _afford(
    members: list[_Member], spec: ScalingSpec, counts: dict[str, int], notes: dict[str, str]
) -> None:
    """Take replicas away until the bill is within the budget, what drains counted."""
    if math.isinf(spec.max_usd_per_hour):
        return
    leaving = math.fsum(
        m.usd * (m.signals.draining + len(m.signals.notices)) for m in members if m.signals
    )
    usd, least = [m.usd for m in members], [m.spec.min_replicas for m in members]
    work_s = [1.0 if m.work_s is NO_DATA else m.work_s for m in members]
    budget_usd = spec.max_usd_per_hour - leaving
    fitting = mix.within(budget_usd, [counts[m.spec.name] for m in members], usd, least, work_s)
    # What runs and is given up now costs until it is drained: nothing new is started meanwhile.
    for m, count in zip(members, fitting, strict=True):
        budget_usd -= m.usd * max(0, m.good - count)
    stay = [max(b, min(m.good, n)) for m, n, b in zip(members, fitting, least, strict=True)]
    fitting = mix.within(budget_usd, fitting, usd, stay, work_s)
    for member, count in zip(members, fitting, strict=True):
        name = member.spec.name
        if count < counts[name]:
            notes[name] = (
                f"{count}: {counts[name]} would pass max_usd_per_hour {spec.max_usd_per_hour:g}"
                f" ({notes[name]})"
            )
            counts[name] = count


def _drains(member: _Member) -> tuple[str, ...]:
    if member.signals is None:
        return ()
    return tuple(
        n.replica for n in sorted(member.signals.notices, key=lambda n: (n.due_s, n.replica))
    )
