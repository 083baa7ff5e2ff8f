"""Which first byte to expect of an endpoint: what its engine takes, without what its company cost.

A first byte is measured among other requests, and how many those are follows the traffic. Taken as
a property of the endpoint it would send the traffic to where much is already, and keep it away for
ever from where there once was too much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from nearfield.policy.endpoints import EndpointState

ALIKE, ALIKE_S = 2.0, 0.03
"""Regions answer alike whose first bytes differ by less, as a ratio and in seconds. So much comes
of how busy they are, and that follows the traffic: who serves more has more replicas, waits less
for one of them, and would draw the neighbours' traffic as well, for good."""

FORGET_S = 60.0
"""A first byte that took longer than it can, because of company, is half forgotten so long after
the company has gone: nobody who stays away learns that it has."""


class Heard(NamedTuple):
    """Of an endpoint, over many polls: the least first byte, and when it last had requests."""

    least_s: float
    used_s: float


def hear(state: EndpointState, before: Heard | None, now_s: float) -> Heard:
    """With what one more poll has told."""
    if before is None:
        return Heard(state.first_byte_s, now_s)
    least_s = min(before.least_s, state.first_byte_s)
    return Heard(least_s, now_s if state.load else before.used_s)


def recalled(state: EndpointState, heard: Heard, now_s: float) -> EndpointState:
    """With the first byte that is to be expected if nobody has been there for a while."""
    least_s, used_s = heard
    first_s = state.first_byte_s
    if used_s == now_s or first_s == least_s:
        return state
    left = 0.5 ** ((now_s - used_s) / FORGET_S)
    return replace(state, first_byte_s=least_s + left * (first_s - least_s))


def alike(states: Sequence[EndpointState]) -> dict[str, float]:
    """By region: seconds of its first bytes that are no difference from the fastest region's."""
    fastest_s: dict[str, float] = {}
    for state in states:
        region, first_s = state.endpoint.region, state.first_byte_s
        fastest_s[region] = min(fastest_s.get(region, first_s), first_s)
    least_s = min(fastest_s.values(), default=0.0)
    most_s = min((ALIKE - 1.0) * least_s, ALIKE_S)
    return {region: min(first_s - least_s, most_s) for region, first_s in fastest_s.items()}
