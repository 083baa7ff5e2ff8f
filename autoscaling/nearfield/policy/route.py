"""Which endpoint a request goes to: the one predicted to answer first, or the cheapest in time.

    predicted time to first byte = round trip + queue wait + time to first byte in the engine
                                   + cold start, where the endpoint is at zero

It is decided in two steps. `plan` is for what changes slowly: the hard filters, distances, who
counts as equally near. It is made anew at each poll, for each (model, class of callers). `pick` is
for what changes with every request: queues as this gateway knows them now, the session's cache,
the deadline. It costs microseconds.

Three things keep traffic from flapping and from flocking:

- the set of near-equals has a wide edge: an endpoint joins it within 1 % of the nearest and leaves
  beyond 8 %, so noise on the way moves nobody in and out; and a change that gains little waits
  until the set has stood for five minutes: at most two in ten;
- inside the set, two are drawn and the emptier one is taken (Mitzenmacher, "The power of two
  choices in randomized load balancing", IEEE TPDS 2001): gateways with the same old news do not
  all run to the same endpoint;
- a queue is counted as it must be by now: what the poll said, what this gateway has sent and got
  back since, and an echo of that for the other gateways, which read the same news.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from nearfield.policy.endpoints import (
    CRITICAL,
    DEFAULT,
    ECHO,
    QUEUE_SHARES,
    Ask,
    Caller,
    EndpointState,
    Refusal,
    Refused,
    crowd,
    eligible,
    refusal,
)
from nearfield.policy.first_byte import Heard, alike, hear, recalled

JOIN = 0.01
"""An endpoint joins the near-equals within this share of the least predicted time ..."""
LEAVE = 0.08
"""... and leaves them beyond this one."""
JOIN_S, LEAVE_S = 0.0005, 0.002
"""The same for short times, where a share would be less than a clock can tell."""

SETTLE_S = 60.0
"""So long after its first plan the set of near-equals changes freely: distances are new to it."""
STAND_S = 300.0
"""Later it stands for so long, unless to change it gains something: ..."""
NEARER, NEARER_S = 0.05, 0.001
"""... who is not in it is nearer than all in it by so much, a share or seconds, ..."""
FARTHER, FARTHER_S = 0.12, 0.003
"""... or who is in it is farther than the nearest by so much."""

SLO_JOIN, SLO_LEAVE = 0.8, 0.9
"""Shares of the SLO that a mean prediction must keep to count as meeting it, coming and staying."""
ECONOMY_SLO_S = 2.0
"""The SLO of an economy caller that names none: without one the cheapest queue grows until full."""
SAME_PRICE = 1.02
"""Prices within this ratio are one price."""

LATE = (math.inf, 1.5, 1.0)
"""Predicted over allowed time at which a request of each criticality is refused at once: it would
be computed for nobody. A critical one is tried as long as an empty queue would let it pass."""

Why = Literal["nearest", "near-equal", "cheapest", "spilled", "session", "re-entry", "fallback"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """An eligible endpoint with its numbers, seconds.

    Attributes:
        idle_s: predicted time to first byte with an empty queue.
        floor_s: that, less what makes its region no other than the fastest (`first_byte.alike`),
            and the operator's handicap: what it is compared by before the queue.
        wait_s: predicted wait at the poll.
    """

    state: EndpointState
    idle_s: float
    floor_s: float
    wait_s: float


class Row(NamedTuple):
    """A candidate as `pick` reads it.

    Attributes:
        spare: this gateway's requests in flight there up to which nobody waits.
        turn_s: what each one beyond waits longer.
        rooms: likewise, at which the queue is full, for each criticality.
        slots: the endpoint's.
    """

    floor_s: float
    number: int
    spare: float
    turn_s: float
    rooms: tuple[int, ...]
    weight: float
    slots: int
    candidate: Candidate

    def wait_s(self, own: int) -> float:
        """The wait for a turn when so many of this gateway's requests are there."""
        return (own - self.spare) * self.turn_s if own > self.spare else 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """Where requests of one model and class of callers may go, best first.

    Attributes:
        rows: the eligible endpoints; the first `near` of them are equals, of which any will do.
        held: endpoints (by number) that hysteresis favours in the next plan.
        within_s: the time to the first byte that `economy` keeps, else infinite.
        refused: the endpoints that are not eligible, and why.
        refusal: why there is no row, if there is none.
        degraded: plans of the declared fallback models, in order.
        made_s: when. since_s: when the first of those was that replaced each other.
        changed_s: when `held` last changed for another reason than that somebody was gone.
        heard: by endpoint, of first bytes.
    """

    ask: Ask
    caller: Caller
    rows: tuple[Row, ...]
    near: int
    held: frozenset[int]
    within_s: float
    refused: tuple[Refused, ...]
    refusal: Refusal | None
    degraded: tuple[Plan, ...]
    made_s: float
    since_s: float
    changed_s: float
    heard: dict[int, Heard]
    by_number: dict[int, Row]


class Pick(NamedTuple):
    """Where one request goes.

    Attributes:
        wait_s: predicted wait in the queue as it is now.
        saved_s: prefill that the session's cache saves.
        plan: the one that chose; of a fallback model if `why` is "fallback".
    """

    candidate: Candidate
    why: Why
    wait_s: float
    saved_s: float
    plan: Plan

    @property
    def predicted_s(self) -> float:
        """Time to the first byte."""
        return self.candidate.idle_s + self.wait_s - self.saved_s


def plan(
    states: Sequence[EndpointState],
    ask: Ask,
    caller: Caller,
    *,
    now_s: float,
    previous: Plan | None = None,
    degraded: tuple[Plan, ...] = (),
) -> Plan:
    """The plan for what is known now.

    Args:
        states: the endpoints. Those of other models may be left out.
        previous: the plan that this one replaces: hysteresis holds on to its choices.
        degraded: plans of the models that the caller accepts instead, in order.

    Raises:
        ValueError: a plan in `degraded` was made for other callers.
    """
    if any(smaller.caller != caller for smaller in degraded):
        raise ValueError("a fallback model's plan must be made for the same class of callers")
    passed, refused = eligible(states, ask, caller)
    known = {} if previous is None else previous.heard
    # Who is gone is forgotten: its number may be another's.
    heard = {s.number: hear(s, known.get(s.number), now_s) for s in passed}
    passed = [recalled(state, heard[state.number], now_s) for state in passed]
    alike_s = alike(passed)
    candidates = [_candidate(state, alike_s[state.endpoint.region]) for state in passed]
    held, since_s, changed_s = frozenset[int](), now_s, now_s
    if previous is not None:
        held, since_s, changed_s = previous.held, previous.since_s, previous.changed_s
    within_s = math.inf
    if caller.mode == "economy":
        slo_s = ECONOMY_SLO_S if caller.slo_s is None else caller.slo_s
        within_s = SLO_LEAVE * slo_s
        order, near, held = _by_price(candidates, held, slo_s)
    else:
        stands = now_s - since_s >= SETTLE_S and now_s - changed_s < STAND_S
        stands = stands and not _gains(candidates, held)
        order, near = _by_distance(candidates, held, stands=stands)
        left = held.intersection(c.state.number for c in order)
        held = frozenset(c.state.number for c in order[:near])
        if held != left:
            changed_s = now_s
    echo = 1.0 + ECHO * (crowd([s.load for s in passed], [s.own for s in passed]) - 1.0)
    rows = tuple(_row(candidate, echo) for candidate in order)
    return Plan(
        ask=ask,
        caller=caller,
        rows=rows,
        near=near,
        held=held,
        within_s=within_s,
        refused=tuple(refused),
        refusal=None if rows else refusal(refused, ask, caller),
        degraded=degraded,
        made_s=now_s,
        since_s=since_s,
        changed_s=changed_s,
        heard=heard,
        by_number={row.number: row for row in rows},
    )


def _candidate(state: EndpointState, alike_s: float) -> Candidate:
    idle_s = state.rtt_s + state.first_byte_s
    if state.replicas == 0:
        idle_s += state.cold_start_s or 0.0
    wait_s, waiting = 0.0, state.load - state.slots + 1
    if waiting > 0 and state.replicas:
        # The head of the queue has waited so long already: whatever the mean says, a queue that
        # moves slower than that is not to be expected faster.
        wait_s = max(waiting * state.turn_s, state.queue_age_s)
    return Candidate(state, idle_s, idle_s - alike_s + state.endpoint.handicap_s, wait_s)


def _row(candidate: Candidate, echo: float) -> Row:
    state = candidate.state
    if state.replicas == 0:  # whoever comes waits for the same start
        spare, turn_s = math.inf, 0.0
    else:
        spare = state.own + (state.slots - 1 - state.load) / echo
        waiting = state.load - state.slots + 1
        turn_s = (candidate.wait_s / waiting if waiting > 0 else state.turn_s) * echo
    room = state.slots - (state.load - state.own)
    return Row(
        candidate.floor_s,
        state.number,
        spare,
        turn_s,
        tuple(room + int(share * state.max_queued) for share in QUEUE_SHARES),
        state.weight,
        max(1, state.slots),
        candidate,
    )


def _gains(candidates: list[Candidate], held: frozenset[int]) -> bool:
    """Whether another set of near-equals would be noticeably nearer than what is left of this."""
    inside = [c.floor_s for c in candidates if c.state.number in held]
    if not inside:
        return True
    least_s = min(c.floor_s for c in candidates)
    if min(inside) - least_s > max(NEARER * least_s, NEARER_S):
        return True
    return max(inside) - least_s > max(FARTHER * least_s, FARTHER_S)


def _by_distance(
    candidates: list[Candidate], held: frozenset[int], *, stands: bool = False
) -> tuple[list[Candidate], int]:
    """Near-equals first, each part by floor; and how many the near-equals are.

    Args:
        stands: they are those that are `held`, whatever their distance.
    """
    if not candidates:
        return [], 0
    least_s = min(c.floor_s for c in candidates)
    join_s = least_s + max(JOIN * least_s, JOIN_S)
    leave_s = least_s + max(LEAVE * least_s, LEAVE_S)
    near: list[Candidate] = []
    far: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.floor_s, c.state.number)):
        stays = candidate.state.number in held
        equal = stays if stands else candidate.floor_s <= (leave_s if stays else join_s)
        (near if equal else far).append(candidate)
    return near + far, len(near)


def _by_price(
    candidates: list[Candidate], held: frozenset[int], slo_s: float
) -> tuple[list[Candidate], int, frozenset[int]]:
    """The cheapest that meet the SLO first; those that do not, by distance, last.

    `held` is here who meets the SLO: who does stays until well beyond.
    """
    meets: list[Candidate] = []
    misses: list[Candidate] = []
    for candidate in candidates:
        share = SLO_LEAVE if candidate.state.number in held else SLO_JOIN
        (meets if candidate.idle_s <= share * slo_s else misses).append(candidate)
    if not meets:
        order, near = _by_distance(candidates, frozenset())
        return order, near, frozenset()
    least_usd = min(c.state.endpoint.unit_usd for c in meets)
    cheapest = [c for c in meets if c.state.endpoint.unit_usd <= SAME_PRICE * least_usd]
    first, near = _by_distance(cheapest, held)
    chosen = {c.state.number for c in first}
    dearer = [c for c in meets if c.state.number not in chosen]
    dearer.sort(key=lambda c: (c.state.endpoint.unit_usd, c.floor_s))
    order = first + dearer + _by_distance(misses, frozenset())[0]
    return order, near, frozenset(c.state.number for c in meets)


def pick(
    plan: Plan,
    own: Sequence[int],
    draw: float,
    *,
    criticality: int = DEFAULT,
    allowed_s: float = math.inf,
    session: int = -1,
    cached_tokens: int = 0,
) -> Pick | Refusal:
    """Where one request goes now.

    Args:
        own: this gateway's requests in flight, by the endpoints' numbers.
        draw: uniform in [0, 1). A hash of the session instead of a random number sends a session
            the same way at every gateway, for as long as queues allow.
        allowed_s: time left until the request's deadline.
        session: number of the endpoint that holds the session's KV cache, -1 for none.
        cached_tokens: prompt tokens that cache is believed to save.

    Returns:
        A `Pick`, or a `Refusal` with the reason and, where time may help, when to come back.
    """
    near = plan.near
    if near == 0:
        assert plan.refusal is not None
        if plan.degraded and plan.refusal.retry_after_s is not None:
            return _degrade(plan, plan.refusal, own, draw, criticality, allowed_s)
        return plan.refusal
    rows = plan.rows
    row = rows[0]
    if near > 1:  # two draws, and what is left of the number for a third
        draw *= near
        first = int(draw)
        draw = (draw - first) * near
        second = int(draw)
        draw -= second
        row = rows[first]
        if second != first:
            other = rows[second]
            if (own[other.number] - other.spare) * row.slots < (
                own[row.number] - row.spare
            ) * other.slots:
                row = other
    _, number, spare, _, rooms, weight, _, candidate = row
    mine = own[number]
    if mine <= spare and mine < rooms[criticality] and draw < weight:
        why: Why = "near-equal" if near > 1 else _FIRST[plan.caller.mode]
        found = Pick(candidate, why, 0.0, 0.0, plan)
    else:
        scanned = _scan(plan, own, draw, criticality, plan.within_s)
        if isinstance(scanned, Refusal):
            return _degrade(plan, scanned, own, draw, criticality, allowed_s)
        found = scanned
    if session >= 0:
        found = _with_session(found, own, criticality, session, cached_tokens)
    if found.predicted_s > allowed_s:
        return _late(found, own, draw, criticality, allowed_s)
    return found


_FIRST: dict[str, Why] = {"nearest": "nearest", "economy": "cheapest"}


def _scan(
    plan: Plan, own: Sequence[int], draw: float, criticality: int, within_s: float
) -> Pick | Refusal:
    """The best by queues as they are now, over all rows."""
    economy = plan.caller.mode == "economy"
    best: Row | None = None
    spared: Row | None = None
    best_s = spared_s = math.inf
    for position, row in enumerate(plan.rows):
        floor_s, number, spare, turn_s, rooms, weight, _, _ = row
        if floor_s >= best_s and position >= plan.near and not economy:
            break  # the rest is farther even with empty queues
        mine = own[number]
        if mine >= rooms[criticality]:
            continue
        score_s = floor_s + (mine - spare) * turn_s if mine > spare else floor_s
        if weight < 1.0:  # re-entering: its share of the requests only
            if draw >= weight:
                draw = (draw - weight) / (1.0 - weight)
                if score_s < spared_s:
                    spared, spared_s = row, score_s
                continue
            draw /= weight
        if score_s < best_s:
            best, best_s = row, score_s
            if economy and score_s <= within_s:
                break  # rows come by price
    why: Why = "spilled"
    if best is None:
        best, best_s, why = spared, spared_s, "re-entry"
    if best is None:
        return _full(plan, own, criticality)
    if best is plan.rows[0] and why == "spilled":
        why = _FIRST[plan.caller.mode]
    return Pick(best.candidate, why, best_s - best.floor_s, 0.0, plan)


def _full(plan: Plan, own: Sequence[int], criticality: int) -> Refusal:
    relief_s = min(
        (own[row.number] - row.rooms[criticality] + 1) * row.turn_s
        or row.candidate.state.cold_start_s
        or 0.0
        for row in plan.rows
    )
    message = f"The model {plan.ask.model!r} is busy everywhere. Send the request again later."
    return Refusal("full", message, relief_s)


def _with_session(
    found: Pick, own: Sequence[int], criticality: int, session: int, cached_tokens: int
) -> Pick:
    """The endpoint that holds the session's cache instead, if its cache outweighs its distance."""
    plan = found.plan
    home = plan.by_number.get(session)
    if home is None or own[session] >= home.rooms[criticality]:
        return found
    if plan.caller.mode == "economy" and home not in plan.rows[: plan.near]:
        return found  # it would cost more
    state = home.candidate.state
    saved_s = min(cached_tokens * state.prefill_token_s, state.first_byte_s)
    wait_s = home.wait_s(own[session])
    if home.floor_s + wait_s - saved_s > found.candidate.floor_s + found.wait_s:
        return found
    return Pick(home.candidate, "session", wait_s, saved_s, plan)


def _late(
    found: Pick, own: Sequence[int], draw: float, criticality: int, allowed_s: float
) -> Pick | Refusal:
    """What to do with a request that is predicted to be answered too late."""
    plan = found.plan
    if plan.caller.mode == "economy":  # what is dear may be in time
        sooner = _scan(plan, own, draw, criticality, min(plan.within_s, allowed_s))
        if isinstance(sooner, Pick) and sooner.predicted_s < found.predicted_s:
            found = sooner
            if found.predicted_s <= allowed_s:
                return found
    predicted_s = found.predicted_s
    hopeless = predicted_s > LATE[criticality] * allowed_s
    if criticality == CRITICAL:
        hopeless = found.candidate.idle_s > allowed_s
    otherwise: Pick | Refusal = found
    if hopeless:
        otherwise = Refusal(
            "deadline",
            f"The model {plan.ask.model!r} would begin its answer in {predicted_s:.2g} s, after "
            f"the deadline in {max(0.0, allowed_s):.2g} s.",
            max(1.0, predicted_s - allowed_s),
        )
    return _degrade(plan, otherwise, own, draw, criticality, allowed_s)


def _degrade(
    plan: Plan,
    otherwise: Pick | Refusal,
    own: Sequence[int],
    draw: float,
    criticality: int,
    allowed_s: float,
) -> Pick | Refusal:
    """The first declared fallback model that answers in time, before anything is shed."""
    for smaller in plan.degraded:
        found = pick(smaller, own, draw, criticality=criticality, allowed_s=allowed_s)
        if isinstance(found, Pick) and found.predicted_s <= allowed_s:
            return found._replace(why="fallback")
    return otherwise


def alternatives(
    plan: Plan,
    own: Sequence[int],
    *,
    tried: Collection[int],
    lost_region: str | None = None,
) -> tuple[Candidate, ...]:
    """Where the request may go when its endpoint failed, best first; then fallback models.

    Args:
        tried: numbers of the endpoints that have had it.
        lost_region: a region that is to be left out altogether.
    """
    scored = []
    for row in plan.rows:
        endpoint = row.candidate.state.endpoint
        mine = own[row.number]
        if row.number in tried or endpoint.region == lost_region or mine >= row.rooms[CRITICAL]:
            continue
        scored.append((row.floor_s + row.wait_s(mine), row.number, row.candidate))
    scored.sort(key=lambda entry: entry[:2])
    found = [candidate for _, _, candidate in scored]
    for smaller in plan.degraded:
        found += alternatives(smaller, own, tried=tried, lost_region=lost_region)
    return tuple(found)
