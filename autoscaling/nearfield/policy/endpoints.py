"""Endpoints, what is known of them, and which of them may serve a caller at all.

The hard filters, in this order, each with its reason: jurisdiction, model, version, pool, health,
draining, capacity. Jurisdiction comes first and nothing overrides it: when everything inside is
down the answer is a refusal, never a region outside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from nearfield.core.errors import Forbidden, NearfieldError, NotFound, RateLimited, Unavailable

Health = Literal["up", "ejected", "down", "unknown"]
"""What `policy.health` believes: `ejected` answers probes and failed requests, `down` answers
neither, `unknown` has not been probed yet."""

Mode = Literal["nearest", "economy"]
Filter = Literal[
    "jurisdiction",
    "model",
    "version",
    "pool",
    "health",
    "draining",
    "capacity",
    "full",
    "deadline",
]
"""What can refuse an endpoint, in the order it is asked. The last two depend on the moment and on
the request, so `route.pick` asks them."""
FILTERS: tuple[Filter, ...] = get_args(Filter)

CRITICAL, DEFAULT, SHEDDABLE = 0, 1, 2
"""Criticality of a request, as a position: overload refuses the highest number first."""
CRITICALITIES = ("critical", "default", "sheddable")

QUEUE_SHARES = (1.0, 0.9, 0.5)
"""Share of an endpoint's queue that each criticality may fill."""

ECHO = 0.5
"""Share of the other gateways' changes since a poll that this one's are taken to tell. All read the
same news and do much the same; without it they run together to what was empty then. In
`tests/simulation/region_world.py` at load 0.8 requests lose 168 ms to the way and the wait without
it, 56 ms with it, and 49 ms if every gateway knew all queues at every moment."""
MOST_ECHO = 8.0
"""Most gateways believed in, by the ratio of all requests in flight to this gateway's own."""

BACK_S = 3.0
"""When an upstream that is down may be back at the earliest: three probes must pass."""
DRAIN_S = 5.0
"""When to come back while everything drains: a drain means that something takes over."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """(region, model, version, pool): what is routed to, scaled and priced.

    Attributes:
        jurisdiction: where its data stays (`eu`).
        products: whose pool it is; None: a shared one.
        current: serves callers that name no version.
        unit_usd: the price of a unit of this model's work (a million tokens, a thousand
            inferences). Only compared here, never added up: bills are computed elsewhere.
        handicap_s: what an operator would rather wait than use it. A preferred pool has 0, its
            stand-in some milliseconds: traffic spills once the queue costs more than that.
    """

    region: str
    model: str
    version: str
    pool: str
    jurisdiction: str
    products: frozenset[str] | None = None
    current: bool = True
    unit_usd: float = 0.0
    handicap_s: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.region}/{self.model}@{self.version}/{self.pool}"


@dataclass(frozen=True, slots=True)
class EndpointState:
    """What the last poll and probes told about an endpoint.

    Attributes:
        number: the gateway's own number for it: its position in the list of this gateway's
            requests in flight that `route.pick` reads.
        health, weight: from `policy.health`; `weight` below 1 while it re-enters.
        back_s: when it may be believed alive again, if it is not.
        rtt_s: from `policy.rtt`.
        replicas: ready ones. slots: requests they run at once, together.
        max_queued: requests that may wait behind those.
        load: requests running and waiting there at the poll, everybody's.
        own: this gateway's among them.
        first_byte_s: from a request's turn to its first byte, mean.
        hold_s: how long a request keeps its slot, mean.
        queue_age_s: how long the oldest waiting request had waited.
        cold_start_s: from zero replicas to the first turn; None: it cannot start.
        prefill_token_s: prefill time that one cached token of the prompt saves.
    """

    endpoint: Endpoint
    number: int
    rtt_s: float
    health: Health = "up"
    weight: float = 1.0
    back_s: float = BACK_S
    draining: bool = False
    replicas: int = 1
    slots: int = 1
    max_queued: int = 0
    load: int = 0
    own: int = 0
    first_byte_s: float = 0.0
    hold_s: float = 0.0
    queue_age_s: float = 0.0
    cold_start_s: float | None = None
    prefill_token_s: float = 0.0

    @property
    def turn_s(self) -> float:
        """Seconds between two turns while all slots are taken."""
        return self.hold_s / self.slots if self.slots else 0.0


def crowd(loads: Sequence[int], own: Sequence[int]) -> float:
    """How many gateways like this one the loads at the poll would need."""
    return max(1.0, min(MOST_ECHO, sum(loads) / max(1, sum(own))))


@dataclass(frozen=True, slots=True)
class Ask:
    """What a request asks for. version: None for the current one."""

    model: str
    version: str | None = None


@dataclass(frozen=True, slots=True)
class Caller:
    """A class of callers: all that the filters and the mode depend on. There are few of them.

    Attributes:
        jurisdictions: where its data may go; None: anywhere.
        product: whose pools it may use, besides those that are everybody's.
        slo_s: the time to the first byte that `economy` must keep.
    """

    jurisdictions: frozenset[str] | None = None
    product: str | None = None
    mode: Mode = "nearest"
    slo_s: float | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """Why an endpoint is not eligible."""

    state: EndpointState
    filter: Filter
    reason: str

    @property
    def passing(self) -> bool:
        """Whether a while may change it."""
        return self.filter in _PASSING


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why no endpoint is: the filter that left none, and when to come back if that helps."""

    filter: Filter
    message: str
    retry_after_s: float | None = None

    def error(self, draw: float = 0.0) -> NearfieldError:
        """As the caller sees it.

        Args:
            draw: uniform in [0, 1): spreads those who come back over half as long again.
        """
        kind, code = _ERRORS[self.filter]
        after_s = self.retry_after_s
        if after_s is not None:
            after_s = float(max(1, math.ceil(after_s * (1 + 0.5 * draw))))
        return kind(self.message, code=code, retry_after_s=after_s)


_ERRORS: dict[Filter, tuple[type[NearfieldError], str]] = {
    "jurisdiction": (Forbidden, "outside_jurisdiction"),
    "model": (NotFound, "model_not_found"),
    "version": (NotFound, "version_not_found"),
    "pool": (Forbidden, "no_pool"),
    "health": (Unavailable, "no_healthy_region"),
    "draining": (Unavailable, "draining"),
    "capacity": (Unavailable, "no_capacity"),
    "full": (RateLimited, "queue_full"),
    "deadline": (Unavailable, "deadline_unreachable"),
}


def eligible(
    states: Sequence[EndpointState], ask: Ask, caller: Caller
) -> tuple[list[EndpointState], list[Refused]]:
    """Those that pass every hard filter, and the others with the filter that refused them.

    An ejected endpoint passes only where none that is up does: it still answers probes, and an
    attempt is worth more than a refusal. One that is down or unknown never passes.
    """
    passed: list[EndpointState] = []
    ejected: list[EndpointState] = []
    refused: list[Refused] = []
    for state in states:
        stopped = _stopped(state, ask, caller)
        if stopped is not None:
            refused.append(Refused(state, *stopped))
        elif state.health == "up":
            passed.append(state)
        else:
            ejected.append(state)
    if passed or not ejected:
        refused += [Refused(state, "health", "ejected: its requests failed") for state in ejected]
        return passed, refused
    return ejected, refused


def _stopped(state: EndpointState, ask: Ask, caller: Caller) -> tuple[Filter, str] | None:
    endpoint = state.endpoint
    allowed = caller.jurisdictions
    if allowed is not None and endpoint.jurisdiction not in allowed:
        return "jurisdiction", f"{endpoint.jurisdiction} is not in {', '.join(sorted(allowed))}"
    if endpoint.model != ask.model:
        return "model", f"serves {endpoint.model}"
    if ask.version is None:
        if not endpoint.current:
            return "version", f"{endpoint.version} is served only to callers that name it"
    elif endpoint.version != ask.version:
        return "version", f"serves version {endpoint.version}"
    if endpoint.products is not None and caller.product not in endpoint.products:
        return "pool", "another product's pool"
    if state.health == "down":
        return "health", "believed dead: probes fail"
    if state.health == "unknown":
        return "health", "not probed yet"
    if state.draining:
        return "draining", "finishes what it has and takes nothing new"
    if state.replicas == 0 and state.cold_start_s is None:
        return "capacity", "no replica, and it cannot start one"
    return None


def refusal(refused: Sequence[Refused], ask: Ask, caller: Caller) -> Refusal:
    """Why nothing is left: the filter that the last of this model's endpoints met.

    Endpoints of other models say nothing about this one, so they are not looked at, and callers
    may leave them out.
    """
    ours = [r for r in refused if r.state.endpoint.model == ask.model]
    if not ours:
        return Refusal("model", f"The model {ask.model!r} does not exist.")
    last = max((r.filter for r in ours), key=FILTERS.index)
    if last == "jurisdiction":
        return Refusal(
            last,
            f"The model {ask.model!r} is served in no region of "
            f"{', '.join(sorted(caller.jurisdictions or ())) or 'your jurisdiction'}.",
        )
    if last == "version":
        return Refusal(last, f"The model {ask.model!r} has no version {ask.version!r}.")
    if last == "pool":
        return Refusal(last, f"No pool of the model {ask.model!r} is open to this key.")
    back_s = min(r.state.back_s if r.filter == "health" else DRAIN_S for r in ours if r.passing)
    return Refusal(last, _PASSING[last].format(ask.model), back_s)


_PASSING: dict[Filter, str] = {
    "health": "No region that may serve {!r} is healthy.",
    "draining": "Every healthy endpoint of {!r} is draining.",
    "capacity": "No replica of {!r} is running, and none can start.",
}
"""What a while changes, in the caller's words."""
