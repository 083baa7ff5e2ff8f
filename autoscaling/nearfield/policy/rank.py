"""Which replica of an endpoint a request goes to: where it is soon finished and holds up few.

    predicted = work / the speed of a request alone + delay
    delay     = wait for a turn + what sharing the replica's speed with others adds
    score     = work / the speed of a request alone + COURTESY x delay

The delay counts more than the work, because where a request is delayed it delays others as much.
If each only minimised its own time, all would queue at the fast replicas while slow ones stood
idle: selfish routing (Roughgarden and Tardos, "How bad is selfish routing?", JACM 2002).

Work is tokens: of the prompt, less those the replica's KV cache holds already, and of the answer
as far as it can be expected. Counting connections, as leastconn does, takes a slow replica for as
good as a fast one and a long prompt for a short one.

A poll is up to a quarter of a second old. What this gateway itself has sent since, and got back, it
knows exactly: a replica's load is what the others had there at the poll, and what is ours now. The
other gateways read the same news and do much the same: what ours has changed since the poll is
taken for an echo of what theirs have (`ECHO`), lest all run to the replica that was empty then.

How fast a request runs depends on its company. Alone it gets `alone_tokens_s`; together they get at
most `tokens_s`. That covers a batching engine on an accelerator as well as slots that each compute
for themselves (then the one is the other over the number of slots).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from nearfield.policy.endpoints import DEFAULT, ECHO, QUEUE_SHARES, Health, crowd

MOST_LOOKED_AT = 16
"""Replicas compared for one request. Of more, as many are sampled evenly: what the best of so many
gains over them is lost in the age of what is known."""

COURTESY = 3.0
"""Weight of a request's delay against its work. In `tests/simulation/replica_world.py`, 1 doubles
the mean of a busy mix of fast and slow replicas; from 2.5 to 4 mean and p99 hardly differ."""

NOTHING: Mapping[int, int] = {}


class ReplicaState(NamedTuple):
    """What the last poll told about a replica.

    Attributes:
        number: the gateway's own number for it: a position in its lists of own requests and work.
        health, weight: from `policy.health`; `weight` below 1 while it re-enters.
        slots: requests it computes at once. max_queued: those that may wait behind.
        load: requests it had, running and waiting. work: tokens those still needed.
        own, own_work: this gateway's part of both.
        tokens_s: what it computes with every slot taken. alone_tokens_s: for one request alone.
        queue_age_s: how long the oldest waiting request had waited.
        kv_used, kv_total: tokens of KV cache; 0 in total: it has none to run out of.
    """

    number: int
    name: str
    tokens_s: float
    alone_tokens_s: float
    slots: int = 1
    max_queued: int = 0
    health: Health = "up"
    weight: float = 1.0
    draining: bool = False
    load: int = 0
    work: float = 0.0
    own: int = 0
    own_work: float = 0.0
    queue_age_s: float = 0.0
    kv_used: int = 0
    kv_total: int = 0


class Place(NamedTuple):
    """A replica as `choose` reads it: how it computes, and what others have there.

    `others + echo x own` is its load by now, and likewise its work.
    """

    number: int
    others: float
    others_work: float
    echo: float
    slots: int
    token_s: float
    alone_token_s: float
    late_s: float
    kv_free: float
    rooms: tuple[int, ...]
    weight: float
    state: ReplicaState


class Choice(NamedTuple):
    """Where a request goes. score_s: what it was compared by; wait_s: until its turn."""

    state: ReplicaState
    score_s: float
    wait_s: float


def places(states: Sequence[ReplicaState]) -> tuple[Place, ...]:
    """The replicas that may have requests, the fastest first. Once a poll.

    Where none is up, ejected ones are: they answer probes. Those that are down or unknown are not.
    """
    open_ = [s for s in states if not s.draining and s.tokens_s > 0 and s.slots > 0]
    up = [s for s in open_ if s.health == "up"] or [s for s in open_ if s.health == "ejected"]
    echo = 1.0 + ECHO * (crowd([s.load for s in up], [s.own for s in up]) - 1.0)
    fastest = sorted(up, key=lambda s: (-s.alone_tokens_s, s.number))
    return tuple(_place(state, echo) for state in fastest)


def _place(state: ReplicaState, echo: float) -> Place:
    waiting = state.load - state.slots + 1
    late_s = 0.0
    if waiting > 0:  # a queue whose head waits longer than its work explains is a slow one
        explained_s = state.work / max(1, state.load) / state.tokens_s * waiting
        late_s = max(0.0, state.queue_age_s - explained_s)
    room = state.slots - (state.load - state.own)
    queue = state.max_queued
    critical, default, sheddable = QUEUE_SHARES
    return Place(
        state.number,
        state.load - echo * state.own,
        state.work - echo * state.own_work,
        echo,
        state.slots,
        1 / state.tokens_s,
        1 / state.alone_tokens_s,
        late_s,
        state.kv_total - state.kv_used if state.kv_total else math.inf,
        (room + int(critical * queue), room + int(default * queue), room + int(sheddable * queue)),
        state.weight,
        state,
    )


def choose(
    open_places: Sequence[Place],
    own: Sequence[int],
    own_work: Sequence[float],
    draw: float,
    *,
    tokens: float,
    criticality: int = DEFAULT,
    cached: Mapping[int, int] = NOTHING,
) -> Choice | None:
    """The best replica for a request of so many tokens; None if all are full.

    Args:
        own, own_work: this gateway's requests in flight and their tokens, by replica number.
        draw: uniform in [0, 1).
        tokens: the request's work.
        cached: tokens of its prompt that a replica (by number) need not compute again.
    """
    count = len(open_places)
    looked_at: Sequence[Place] = open_places
    if count > MOST_LOOKED_AT:  # every so many: all speeds are among them
        step = count / MOST_LOOKED_AT
        looked_at = [open_places[int((i + draw) * step)] for i in range(MOST_LOOKED_AT)]
    best: Place | None = None
    spared: Place | None = None
    best_s = spared_s = math.inf
    best_wait_s = spared_wait_s = 0.0
    ties = 1
    for place in looked_at:
        (
            number,
            others,
            work,
            echo,
            slots,
            token_s,
            alone_s,
            late_s,
            kv_free,
            rooms,
            weight,
            _,
        ) = place
        mine = own[number]
        if mine >= rooms[criticality]:
            continue
        load = others + echo * mine
        need = tokens
        if cached:
            need = max(1.0, tokens - cached.get(number, 0))
        elif need * alone_s > best_s:
            break  # the rest is slower even when idle
        if load + 1 <= slots:
            slowed_s = (load + 1) * token_s - alone_s if load > 0.0 else 0.0
            wait_s = 0.0
        else:
            slowed_s = slots * token_s - alone_s
            work += echo * own_work[number]
            wait_s = (load + 1 - slots) * (work / load if work > 0.0 else 0.0) * token_s + late_s
        if need > kv_free:  # it waits until others have given back what it lacks
            wait_s += (need - kv_free) * token_s
        score_s = need * alone_s + COURTESY * wait_s
        if slowed_s > 0.0:
            score_s += COURTESY * need * slowed_s
        if weight < 1.0:  # re-entering: its share of the requests only
            if draw >= weight:
                draw = (draw - weight) / (1.0 - weight)
                if score_s < spared_s:
                    spared, spared_s, spared_wait_s = place, score_s, wait_s
                continue
            draw /= weight
        if score_s < best_s:
            best, best_s, best_wait_s, ties = place, score_s, wait_s, 1
        elif score_s == best_s:  # equals in turn, not always the first of them
            ties += 1
            if draw * ties < 1.0:
                draw *= ties
                best, best_wait_s = place, wait_s
            else:
                draw = (draw * ties - 1.0) / (ties - 1)
    if best is None:
        if spared is None:
            return None
        best, best_s, best_wait_s = spared, spared_s, spared_wait_s
    return Choice(best.state, best_s, best_wait_s)
