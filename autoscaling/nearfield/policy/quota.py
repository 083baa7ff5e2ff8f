"""Requests, tokens and streams: what a caller may still have, right across several gateways.

A limit is a bucket: full at first; what is taken comes back at the limit's rate. The store keeps
the buckets. A gateway leases a share of one for a few seconds and spends from it without asking
anybody. What it does not need it returns. At every moment

    the bucket's level + all that gateways hold of it  <=  capacity

so what all of them together let through in any span of T seconds is at most capacity + rate x T.
A gateway that dies takes what it held with it: that counts as spent (streams: as ended).

A claim carries totals that never fall (granted, spent, returned) under a name that is used for one
lease only (`holder`), so a message that is lost, repeated or overtaken changes nothing.

A request reserves its estimate, from all limits that apply or from none, and settles what it
really used. What it used beyond its reservation is a debt that the bucket pays first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from nearfield.core.errors import RateLimited

Dimension = Literal["requests", "tokens", "streams"]
DIMENSIONS: tuple[Dimension, ...] = ("requests", "tokens", "streams")

LEASE_S = 3.0
"""How long a share may be spent after it was leased or renewed. Also how long the others do
without what a gateway held that died."""

RENEW_S = 0.5
"""How often a gateway looks which of its leases to renew."""

AHEAD_S = 2 * RENEW_S
"""A gateway holds what it expects to need for so long."""

OFFLINE_GRACE_S = 300.0
"""Without the store a gateway goes on at its part of the rate for so long. Then it refuses."""

UNLIMITED = 2**62
"""Granted where a limit has been lifted."""

QUIET = 0.05
"""Expected requests below which a caller counts as quiet: three seconds after its last one."""

MINUTE_S = 60.0


@dataclass(frozen=True, slots=True)
class Limit:
    """One bound. `per_s` is what comes back each second; None: what ended is free at once."""

    capacity: int
    per_s: float | None


@dataclass(frozen=True, slots=True)
class Limits:
    """What a key, a product or a tenant may have; None is no bound."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_streams: int | None = None

    def of(self, dimension: Dimension) -> Limit | None:
        if dimension == "streams":
            most = self.concurrent_streams
            return None if most is None else Limit(most, None)
        most = self.requests_per_minute if dimension == "requests" else self.tokens_per_minute
        return None if most is None else Limit(most, most / MINUTE_S)

    @property
    def bounded(self) -> list[Dimension]:
        """The dimensions that have a bound."""
        return [dimension for dimension in DIMENSIONS if self.of(dimension) is not None]


# ---- the store's side: one step in one transaction ----------------------------------------------


@dataclass(frozen=True, slots=True)
class Bucket:
    """What nobody holds, at a time on the store's clock. Below zero: a debt."""

    level: float
    updated_s: float


@dataclass(frozen=True, slots=True)
class Lease:
    """A gateway's totals as the store knows them. Units: requests, tokens or streams."""

    granted: int
    spent: int
    returned: int
    expires_s: float

    @property
    def held(self) -> int:
        return self.granted - self.spent - self.returned


@dataclass(frozen=True, slots=True)
class Claim:
    """What a gateway asks and reports.

    Attributes:
        subject: whose limit: `key:…`, `product:…`, `tenant:…`.
        holder: the lease's name, chosen by the gateway and never used again.
        wanted: how much more it could use.
        least: how much of it is of any use: less would only be missing elsewhere.
    """

    subject: str
    dimension: Dimension
    holder: str
    spent: int = 0
    returned: int = 0
    wanted: int = 0
    least: int = 0


@dataclass(frozen=True, slots=True)
class Grant:
    """The store's answer to a claim.

    Attributes:
        limit: the bound as it is now, None if there is none any more.
        granted: all that this lease was ever granted.
        level: what nobody holds.
        sharers: gateways with a lease on the same limit, the asking one included.
    """

    subject: str
    dimension: Dimension
    limit: Limit | None
    granted: int = 0
    level: float = 0.0
    sharers: int = 1


def renew(
    limit: Limit,
    bucket: Bucket | None,
    leases: Mapping[str, Lease],
    claim: Claim,
    *,
    now_s: float,
) -> tuple[Bucket, Lease, Grant]:
    """Answer one claim.

    Args:
        bucket: None if nobody ever asked.
        leases: of this limit, by holder; those that have expired count as spent.
        now_s: the store's clock.

    Returns:
        The bucket and the holder's lease as they are from now on, and the answer.
    """
    live = {holder: lease for holder, lease in leases.items() if lease.expires_s > now_s}
    level = _refilled(limit, bucket, sum(max(0, lease.held) for lease in live.values()), now_s)
    mine = live.pop(claim.holder, Lease(0, 0, 0, 0.0))
    spent, returned = max(mine.spent, claim.spent), max(mine.returned, claim.returned)
    debt = max(0, spent + returned - mine.granted)
    granted = mine.granted + debt
    level += returned - mine.returned - debt
    more = _grantable(level, claim, sharers=1 + len(live))
    lease = Lease(granted + more, spent, returned, now_s + LEASE_S)
    level -= more
    grant = Grant(claim.subject, claim.dimension, limit, lease.granted, level, 1 + len(live))
    return Bucket(level, max(now_s, bucket.updated_s) if bucket else now_s), lease, grant


def _refilled(limit: Limit, bucket: Bucket | None, held: int, now_s: float) -> float:
    room = limit.capacity - held
    if bucket is None or limit.per_s is None:
        return room
    return min(bucket.level + max(0.0, now_s - bucket.updated_s) * limit.per_s, room)


def _grantable(level: float, claim: Claim, *, sharers: int) -> int:
    """A fair part of the level, or what the smallest waiting request needs, if it is there."""
    whole = math.floor(level + 1e-9)
    if whole < 1 or whole < claim.least:
        return 0
    return min(claim.wanted, max(1, whole // sharers, claim.least))


# ---- a gateway's side ---------------------------------------------------------------------------


class Share:
    """What one gateway may spend of one limit. Changed in place: it is on every request's path.

    Times are the gateway's monotonic clock. A lease is counted from before it was asked for, so it
    ends here before it ends in the store.

    Attributes:
        reserved: by requests that have not settled.
        term: counts the leases. What was reserved under an earlier one is paid for: the store has
            taken all that it held for spent.
        level: what nobody held when the store was last asked.
        sharers: gateways with a lease on the same limit, this one included.
        offline_since_s: since when the store has not answered.
    """

    __slots__ = (
        "_amount", "_counted_s", "_earned_s", "_next_holder", "_taken", "_told_s", "dimension",
        "expires_s", "granted", "holder", "level", "limit", "offline_since_s", "rate_per_s",
        "reserved", "returned", "sharers", "spent", "subject", "term",
    )  # fmt: skip

    def __init__(
        self, subject: str, dimension: Dimension, limit: Limit, *, now_s: float, sharers: int = 1
    ) -> None:
        self.subject = subject
        self.dimension: Dimension = dimension
        self.limit = limit
        self.sharers = sharers
        self.reserved = 0
        self.rate_per_s = 0.0
        self.term = 0
        self.level = float(limit.capacity)
        self.offline_since_s: float | None = None
        self._taken, self._amount = 0, 1
        self._counted_s = self._told_s = self._earned_s = now_s
        self._begin_term(None)

    def _begin_term(self, holder: str | None) -> None:
        self.holder: str | None = holder
        self._next_holder: str | None = None
        self.granted = self.spent = self.returned = 0
        self.expires_s = -math.inf
        self.term += 1
        if self.dimension != "streams":  # those go on, whoever counts them
            self.reserved = 0

    # ---- a request's part ----

    def available(self, now_s: float) -> int:
        """What can be reserved at once; below zero after a debt."""
        if now_s >= self.expires_s:
            return 0
        return self.granted - self.spent - self.returned - self.reserved

    def want(self, amount: int) -> None:
        """Note a demand, met or not."""
        self._taken += amount
        self._amount = amount

    def take(self, amount: int) -> None:
        """Reserve; a request is spent at once."""
        self.want(amount)
        if self.dimension == "requests":
            self.spent += amount
        else:
            self.reserved += amount

    def settle(self, term: int, reserved: int, used: int) -> None:
        """Free what was reserved in that term, charge what was used."""
        if self.dimension == "streams":
            self.reserved -= reserved
        elif self.dimension == "tokens" and term == self.term:
            self.reserved -= reserved
            self.spent += used

    def remaining(self, now_s: float) -> int:
        """What is left of the limit as far as this gateway knows, for the caller to be told."""
        own = self.granted - self.spent - self.returned - self.reserved
        level = max(0.0, self._level(now_s)) if self.offline_since_s is None else 0.0
        return max(0, min(self.limit.capacity, own + math.floor(level)))

    def _level(self, now_s: float) -> float:
        refilled = 0.0 if self.limit.per_s is None else (now_s - self._told_s) * self.limit.per_s
        return min(self.level + refilled, self.limit.capacity)

    # ---- renewal: `claim`, then `accept` or `earn` ----

    def due(self, now_s: float) -> bool:
        """Whether it is time to renew."""
        if self.offline_since_s is not None:
            return True
        free = self.granted - self.spent - self.returned - self.reserved
        expected = max(self.rate_per_s * AHEAD_S, self._taken)
        return now_s > self.expires_s - LEASE_S / 2 or free < expected

    def may_get(self, amount: int, now_s: float) -> bool:
        """Whether so much could be had by asking the store: not if it has just said no."""
        if self.offline_since_s is not None:
            return False
        return now_s - self._told_s > RENEW_S or self.remaining(now_s) >= amount

    def claim(self, now_s: float, *, holder: str, waiting: Sequence[int] = ()) -> Claim:
        """What to tell the store now, and to ask of it. Gives up what is more than needed.

        Args:
            holder: a fresh name, for the case that the lease has expired.
            waiting: what each request needs that waits for this.
        """
        self._count(now_s)
        ahead = math.ceil(self.rate_per_s * AHEAD_S)
        if self.holder is None or now_s >= self.expires_s:
            self._next_holder = holder
            spent = returned = 0
            free = -self.reserved if self.dimension == "streams" else 0
        else:
            free = self.granted - self.spent - self.returned - self.reserved
            if free > 2 * ahead and not waiting:
                self.returned += free - ahead
                free = ahead
            holder, spent, returned = self.holder, self.spent, self.returned
        return Claim(
            self.subject,
            self.dimension,
            holder,
            spent,
            returned,
            wanted=max(0, ahead - free, sum(waiting) - free),
            least=max(0, min(waiting) - free) if waiting else 0,
        )

    def _count(self, now_s: float) -> None:
        elapsed_s = now_s - self._counted_s
        if elapsed_s < AHEAD_S / 4:
            return  # too short to say anything about a rate
        weight = -math.expm1(-elapsed_s / AHEAD_S)
        self.rate_per_s += weight * (self._taken / elapsed_s - self.rate_per_s)
        if self.rate_per_s * AHEAD_S < QUIET * self._amount:
            self.rate_per_s = 0.0
        self._taken = 0
        self._counted_s = now_s

    def accept(self, claim: Claim, grant: Grant, *, asked_s: float) -> None:
        """Take the store's answer; `asked_s` is when the claim was made."""
        if grant.limit is None:
            self._begin_term(None)
            self.granted, self.expires_s = UNLIMITED, asked_s + LEASE_S
            self.offline_since_s = None
            return
        if claim.holder == self._next_holder:
            self._begin_term(claim.holder)
        elif claim.holder != self.holder:
            return  # an answer to a lease that is over
        self.limit = grant.limit
        self.granted = max(self.granted, grant.granted)
        self.expires_s = max(self.expires_s, asked_s + LEASE_S)
        self.level, self._told_s, self.sharers = grant.level, asked_s, grant.sharers
        self.offline_since_s = None

    def earn(self, now_s: float) -> None:
        """The store could not be asked: go on with this gateway's part of what was left in the
        bucket and of the rate, for a while."""
        most = self.limit.capacity / self.sharers
        if self.offline_since_s is None:
            if now_s < self.expires_s:
                return  # the lease still holds
            left = max(0.0, self._level(now_s)) / self.sharers
            self._begin_term(None)
            self.granted = math.floor(min(left, most))
            self.offline_since_s = self._earned_s = now_s
        if now_s - self.offline_since_s > OFFLINE_GRACE_S:
            return
        if self.limit.per_s is None:
            self.granted = math.floor(most)
        else:
            part_per_s = self.limit.per_s / self.sharers
            earned = math.floor((now_s - self._earned_s) * part_per_s)
            if earned:
                self._earned_s += earned / part_per_s
                room = math.floor(most) - (self.granted - self.spent)
                self.granted += max(0, min(earned, room))
        self.expires_s = now_s + LEASE_S

    def retire(self) -> None:
        """Expect nothing more: the next claim gives back all that is free."""
        self.rate_per_s, self._taken, self._counted_s = 0.0, 0, math.inf

    @property
    def idle(self) -> bool:
        """Nothing is held, reserved or expected: once the store knows, it can be forgotten."""
        held = self.granted - self.spent - self.returned
        if held > 0 and self.granted < UNLIMITED:
            return False
        return not (self.reserved or self.rate_per_s or self._taken)


@dataclass(frozen=True, slots=True)
class Lack:
    """Why nothing was reserved: the share that has too little, and what was asked of it."""

    share: Share
    needed: int


class Reservation:
    """What a request has reserved. `settle` it on every way out."""

    __slots__ = ("_streams", "_taken", "_tokens")

    def __init__(self, taken: list[tuple[Share, int]], tokens: int, streams: int) -> None:
        self._taken = taken
        self._tokens = tokens
        self._streams = streams

    def settle(self, tokens: int) -> None:
        """Say what was used; the rest is free again. Later calls change nothing."""
        for share, term in self._taken:
            reserved = self._tokens if share.dimension == "tokens" else self._streams
            share.settle(term, reserved, tokens)
        self._taken = []


UNBOUNDED = Reservation([], 0, 0)
"""Of a caller without limits: nothing to settle."""


def reserve(
    shares: Sequence[Share], now_s: float, *, tokens: int, stream: bool
) -> Reservation | Lack:
    """Reserve one request and its tokens from all shares, or nothing from any.

    Args:
        tokens: the most it is expected to use. stream: whether it counts as a stream.
    """
    if not shares:
        return UNBOUNDED
    amounts = {"requests": 1, "tokens": tokens, "streams": 1 if stream else 0}
    for share in shares:
        needed = amounts[share.dimension]
        if needed > share.available(now_s):
            share.want(needed)
            return Lack(share, needed)
    taken: list[tuple[Share, int]] = []
    for share in shares:
        share.take(amounts[share.dimension])
        taken.append((share, share.term))
    return Reservation(taken, tokens, amounts["streams"])


# ---- what the caller is told --------------------------------------------------------------------


def refusal(lack: Lack, now_s: float) -> RateLimited:
    """The error for a request that could not be let through."""
    share, needed = lack.share, lack.needed
    limit = share.limit
    whose = share.subject.partition(":")[0]
    if share.dimension == "streams":
        return RateLimited(
            f"This {whose} may have {limit.capacity} streams at once. End one first.",
            code="rate_limit_exceeded",
            retry_after_s=1.0,
        )
    unit = f"{share.dimension} per minute"
    if needed > limit.capacity:
        return RateLimited(
            f"The request needs {needed} {share.dimension}, and this {whose} may use "
            f"{limit.capacity} {unit}. Ask for less: it would never fit.",
            code="rate_limit_exceeded",
        )
    assert limit.per_s is not None  # for a limit of zero, anything needed is more than it
    wait_s = (needed - share.remaining(now_s)) / limit.per_s if limit.per_s else MINUTE_S
    return RateLimited(
        f"This {whose} has used its {limit.capacity} {unit}. Send the request again later.",
        code="rate_limit_exceeded",
        retry_after_s=min(MINUTE_S, max(1.0, wait_s)),
    )


def rate_limit_headers(shares: Iterable[Share], now_s: float) -> list[tuple[bytes, bytes]]:
    """OpenAI's headers for the limits that apply: of several of a kind, the one nearest its end.

    Source: OpenAI's guide to rate limits (x-ratelimit-{limit,remaining,reset}-{requests,tokens}).
    """
    tightest: dict[Dimension, tuple[int, Limit]] = {}
    for share in shares:
        if share.dimension == "streams":
            continue  # OpenAI has no header for these
        remaining = share.remaining(now_s)
        known = tightest.get(share.dimension)
        if known is None or remaining < known[0]:
            tightest[share.dimension] = (remaining, share.limit)
    headers: list[tuple[bytes, bytes]] = []
    for dimension, (remaining, limit) in tightest.items():
        of_limit, of_remaining, of_reset = _HEADERS[dimension]
        reset_s = (limit.capacity - remaining) / limit.per_s if limit.per_s else 0.0
        headers.append((of_limit, b"%d" % limit.capacity))
        headers.append((of_remaining, b"%d" % remaining))
        headers.append((of_reset, duration(reset_s)))
    return headers


_HEADERS = {
    dimension: (
        b"x-ratelimit-limit-" + dimension.encode(),
        b"x-ratelimit-remaining-" + dimension.encode(),
        b"x-ratelimit-reset-" + dimension.encode(),
    )
    for dimension in DIMENSIONS
}


def duration(seconds: float) -> bytes:
    """As OpenAI writes one: `120ms`, `1.5s`, `6m0s`."""
    milliseconds = math.ceil(seconds * 1000 - 1e-6)
    if milliseconds < 1000:
        return b"%dms" % milliseconds
    minutes, rest = divmod(milliseconds, 60_000)
    seconds_text = b"%gs" % (rest / 1000)
    return b"%dm%s" % (minutes, seconds_text) if minutes else seconds_text
