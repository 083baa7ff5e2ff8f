"""Which pools the capacity is bought from: the cheapest that covers it, and what there is stays.

Pools differ in speed and price, and replicas come whole: five of the cheapest per work and a slow
one for the rest may cost less than six. What would have to be started anew is charged its boot, so
a price must fall by more than a boot costs before anything moves.
"""

from __future__ import annotations

import math
from typing import NamedTuple

STAYS_S = 1800.0
"""Over how long a boot is written off when pools are compared."""
STRIDES = 16
"""Spares are tried in steps of so many parts of what is needed, where replicas are many."""
SAME_PRICE = 1.15
"""Spot pools whose work costs the same within this ratio are zones of one: spread over."""


class Offer(NamedTuple):
    """What one pool can give.

    Attributes:
        work_s: work a second of one replica, above 0. usd: price of one, an hour.
        have: replicas that run or start. least, most: how many it may have.
        exposed_usd: what each that is not safe adds to the price.
        share: of its zone, which goes at once. zones: over so many they are spread.
    """

    work_s: float
    usd: float
    have: int
    least: int
    most: int
    boot_s: float
    exposed_usd: float = 0.0
    share: float = 1.0
    zones: int = 1


class _Tier(NamedTuple):
    pool: int
    work_s: float
    usd: float
    room: int


def cover(work_s: float, offers: tuple[Offer, ...]) -> tuple[int, ...]:
    """Replicas of each pool that together do `work_s`, at the least price; all there are if it is
    too much. Equally cheap ones: the first."""
    return _cover(work_s, offers, math.inf)[1]


def hedged(work_s: float, least_s: float, offers: tuple[Offer, ...]) -> tuple[int, ...]:
    """Replicas of each pool that together do `work_s`, and more where that is cheaper than to be
    exposed to losses.

    Args:
        least_s: work a second that should still be done when a zone is lost, at most `work_s`.
    """
    if not any(offer.exposed_usd for offer in offers):
        return cover(work_s, offers)
    # Price is convex in the spare: the search ends where it has risen twice.
    stride = min(offer.work_s for offer in offers)
    stride *= max(1, round(work_s / stride / STRIDES))
    best: tuple[int, ...] = ()
    best_usd, risen, spare_s = math.inf, 0, 0.0
    while risen < 2 and spare_s <= work_s:
        usd, counts = _cover(work_s + spare_s, offers, work_s + spare_s - least_s)
        if usd < best_usd - _TINY:
            best_usd, best, risen = usd, counts, 0
        else:
            risen += 1
        spare_s += stride
    return best


def _cover(
    work_s: float, offers: tuple[Offer, ...], spare_s: float
) -> tuple[float, tuple[int, ...]]:
    """Price and replicas. spare_s: work a second that may be lost."""
    counts = [offer.least for offer in offers]
    rest = work_s - sum(offer.work_s * offer.least for offer in offers)
    tiers = []
    for pool, offer in enumerate(offers):
        safe = _safe(offer, spare_s)
        at = offer.least
        for until in sorted({min(offer.most, max(at, end)) for end in (offer.have, safe)}):
            tiers.append(_tier(pool, offer, at, until, safe))
            at = until
        tiers.append(_tier(pool, offer, at, offer.most, safe))
    tiers = sorted((t for t in tiers if t.room), key=lambda t: (t.usd / t.work_s, t.pool))
    for tier, count in _cheapest(rest, tiers, 0, math.inf)[1]:
        counts[tier] += count
    counts = _trimmed(work_s, offers, counts)
    usd = 0.0
    for offer, count in zip(offers, counts, strict=True):
        usd += offer.usd * (count + max(0, count - offer.have) * offer.boot_s / STAYS_S)
        usd += offer.exposed_usd * max(0, count - _safe(offer, spare_s))
    return usd, tuple(counts)


def _safe(offer: Offer, spare_s: float) -> int:
    """How many replicas the others could do without."""
    if not offer.exposed_usd or math.isinf(spare_s):
        return offer.most
    return int(offer.zones * max(0.0, spare_s) / (offer.share * offer.work_s) + _TINY)


def _tier(pool: int, offer: Offer, at: int, until: int, safe: int) -> _Tier:
    """The replicas from `at` to `until`, which are alike."""
    usd = offer.usd * (1.0 + offer.boot_s / STAYS_S) if until > offer.have else offer.usd
    return _Tier(pool, offer.work_s, usd + (offer.exposed_usd if until > safe else 0.0), until - at)


def _trimmed(work_s: float, offers: tuple[Offer, ...], counts: list[int]) -> list[int]:
    """Without those that a larger replica, taken last, has made needless: the dearest first."""
    spare = sum(o.work_s * n for o, n in zip(offers, counts, strict=True)) - work_s
    for pool in sorted(range(len(offers)), key=lambda i: (-offers[i].usd, i)):
        offer = offers[pool]
        gone = max(0, min(counts[pool] - offer.least, int(spare / offer.work_s + _TINY)))
        counts[pool] -= gone
        spare -= gone * offer.work_s
    return counts


_TINY = 1e-9
_Bought = tuple[float, tuple[tuple[int, int], ...]]


def _cheapest(rest: float, tiers: list[_Tier], first: int, limit: float) -> _Bought:
    """Price and (pool, replicas) of the best way to cover `rest`; what is beyond all tiers costs
    nothing. Once a tier can finish, it either does, or takes what goes in whole and leaves the
    remainder to a smaller one."""
    if rest <= _TINY or first == len(tiers):
        return 0.0, ()
    tier = tiers[first]
    whole = math.ceil(rest / tier.work_s - _TINY)
    if whole > tier.room:  # cheapest per work: take it all
        price, bought = _cheapest(
            rest - tier.room * tier.work_s, tiers, first + 1, limit - tier.room * tier.usd
        )
        return price + tier.room * tier.usd, ((tier.pool, tier.room), *bought)
    best: _Bought = (whole * tier.usd, ((tier.pool, whole),))
    part = (whole - 1) * tier.usd
    if part >= min(best[0], limit):
        return best
    left = rest - (whole - 1) * tier.work_s
    if sum(t.room * t.work_s for t in tiers[first + 1 :]) < left - _TINY:
        return best
    price, bought = _cheapest(left, tiers, first + 1, min(best[0], limit) - part)
    if part + price < best[0] - _TINY:
        kept = ((tier.pool, whole - 1),) if whole > 1 else ()
        best = (part + price, (*kept, *bought))
    return best


def same_price(a: Offer, b: Offer) -> bool:
    """Whether work costs the same in both, nearly, and replicas are as fast."""
    low, high = sorted((a.usd / a.work_s, b.usd / b.work_s))
    return high <= SAME_PRICE * low and math.isclose(a.work_s, b.work_s, rel_tol=0.05)


def within(
    budget_usd: float, counts: list[int], usd: list[float], least: list[int], work_s: list[float]
) -> list[int]:
    """The counts, with replicas taken away until the bill is within the budget.

    Those whose work is dearest go first; `least` of each stay, whatever they cost.
    """
    counts = list(counts)
    bill = math.fsum(n * price for n, price in zip(counts, usd, strict=True))
    order = sorted(range(len(counts)), key=lambda i: (-usd[i] / work_s[i], -i))
    for pool in order:
        while bill > budget_usd + _TINY and counts[pool] > least[pool] and usd[pool] > 0:
            gone = min(
                counts[pool] - least[pool],
                max(1, math.ceil((bill - budget_usd) / usd[pool] - _TINY)),
            )
            counts[pool] -= gone
            bill = math.fsum(n * price for n, price in zip(counts, usd, strict=True))
    return counts
