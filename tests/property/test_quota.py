"""Quotas over several gateways: whatever is lost, late, doubled or dead, the limit holds."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from nearfield.policy.quota import (
    LEASE_S,
    OFFLINE_GRACE_S,
    Bucket,
    Claim,
    Dimension,
    Grant,
    Lack,
    Lease,
    Limit,
    Limits,
    Reservation,
    Share,
    duration,
    rate_limit_headers,
    refusal,
    renew,
    reserve,
)

CAPACITY = 60
LIMITS = Limits(requests_per_minute=CAPACITY, tokens_per_minute=CAPACITY, concurrent_streams=6)
SUBJECT = "key:k"


@dataclass
class Store:
    """The store's part of one limit, as its transactions keep it."""

    limit: Limit
    bucket: Bucket | None = None
    leases: dict[str, Lease] = field(default_factory=dict)

    def renew(self, claim: Claim, now_s: float) -> Grant:
        self.leases = {h: lease for h, lease in self.leases.items() if lease.expires_s > now_s}
        self.bucket, lease, grant = renew(self.limit, self.bucket, self.leases, claim, now_s=now_s)
        self.leases[claim.holder] = lease
        held = sum(max(0, lease.held) for lease in self.leases.values())
        assert self.bucket.level + held <= self.limit.capacity + 1e-6
        return grant


@dataclass
class Sent:
    """A claim under way, and its answer once the store has one."""

    share: Share
    claim: Claim
    asked_s: float
    grant: Grant | None = None


class Gateways(RuleBasedStateMachine):
    """Gateways that share one limit of each kind, over a network that loses and doubles.

    The clock stands still between rules, so "at once" really is. A gateway that was away longer
    than its lease is one that died: for its running streams nobody can answer (in the product it
    goes offline, which is tested below).
    """

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 1000.0
        self.stores = {d: Store(_limit(d)) for d in LIMITS.bounded}
        self.gateways: dict[int, list[Share]] = {}
        self.held: dict[int, list[tuple[Reservation, int, bool]]] = {}
        self.mail: list[Sent] = []
        self.answers: list[Sent] = []
        self.names = itertools.count()
        self.admitted: dict[Dimension, list[tuple[float, int]]] = {"requests": [], "tokens": []}
        for number in (0, 1):
            self._boot(number)

    def _boot(self, number: int) -> None:
        self.gateways[number] = [
            Share(SUBJECT, d, _limit(d), now_s=self.now_s) for d in LIMITS.bounded
        ]
        self.held[number] = []

    def _claim(self, share: Share, waiting: list[int]) -> Sent:
        claim = share.claim(self.now_s, holder=f"h{next(self.names)}", waiting=waiting)
        sent = Sent(share, claim, self.now_s)
        self.mail.append(sent)
        return sent

    @rule(gateway=st.integers(0, 1), tokens=st.integers(1, 30), stream=st.booleans())
    def request(self, gateway: int, tokens: int, stream: bool) -> None:
        done = reserve(self.gateways[gateway], self.now_s, tokens=tokens, stream=stream)
        if isinstance(done, Lack):
            assert done.share.available(self.now_s) < done.needed
            return
        self.held[gateway].append((done, tokens, stream))
        self.admitted["requests"].append((self.now_s, 1))
        self.admitted["tokens"].append((self.now_s, tokens))

    @rule(gateway=st.integers(0, 1), used=st.floats(0, 1), data=st.data())
    def settle(self, gateway: int, used: float, data: st.DataObject) -> None:
        if not self.held[gateway]:
            return
        index = data.draw(st.integers(0, len(self.held[gateway]) - 1))
        reservation, tokens, _ = self.held[gateway].pop(index)
        reservation.settle(math.floor(tokens * used))
        reservation.settle(tokens)  # again: changes nothing

    @rule(gateway=st.integers(0, 1), waiting=st.lists(st.integers(1, 30), max_size=3))
    def ask(self, gateway: int, waiting: list[int]) -> None:
        for share in self.gateways[gateway]:
            self._claim(share, waiting if share.dimension == "tokens" else [1] * len(waiting))

    @precondition(lambda self: self.mail)
    @rule(data=st.data(), fate=st.sampled_from(["arrives", "arrives", "again later", "lost"]))
    def claim_travels(self, data: st.DataObject, fate: str) -> None:
        sent = data.draw(st.sampled_from(self.mail))
        # A message older than a lease is one that the network has given up.
        if fate == "lost" or self.now_s - sent.asked_s >= LEASE_S:
            self.mail.remove(sent)
            return
        sent.grant = self.stores[sent.claim.dimension].renew(sent.claim, self.now_s)
        if fate == "arrives":
            self.mail.remove(sent)
            self.answers.append(sent)
            self.answer_travels(-1)

    @precondition(lambda self: self.answers)
    @rule(index=st.integers(0, 5))
    def answer_travels(self, index: int) -> None:
        """An answer arrives, perhaps once more, perhaps long after."""
        sent = self.answers[index % len(self.answers)]
        assert sent.grant is not None
        sent.share.accept(sent.claim, sent.grant, asked_s=sent.asked_s)

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0, 2.9]))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds
        for number, shares in self.gateways.items():
            streams = next(share for share in shares if share.dimension == "streams")
            if streams.reserved and self.now_s >= streams.expires_s:
                self._boot(number)

    @rule(gateway=st.integers(0, 1))
    def crash(self, gateway: int) -> None:
        self._boot(gateway)

    @invariant()
    def no_span_of_time_has_more_than_the_limit_and_the_rate(self) -> None:
        for dimension, log in self.admitted.items():
            per_s = _limit(dimension).per_s
            assert per_s is not None
            # The most that any span ending now has above what the rate brought in it.
            above, before_s = 0.0, 0.0
            for at_s, amount in log:
                above = max(0.0, above - (at_s - before_s) * per_s) + amount
                before_s = at_s
                assert above <= CAPACITY + 1e-6, (dimension, log)

    @invariant()
    def no_more_streams_run_than_may(self) -> None:
        running = sum(stream for held in self.held.values() for _, _, stream in held)
        assert running <= 6

    @invariant()
    def nothing_is_held_that_was_never_granted(self) -> None:
        for dimension, store in self.stores.items():
            live = {h: lease for h, lease in store.leases.items() if lease.expires_s > self.now_s}
            held = sum(
                max(0, share.granted - share.spent - share.returned)
                for shares in self.gateways.values()
                for share in shares
                if share.dimension == dimension and self.now_s < share.expires_s
            )
            assert held <= sum(max(0, lease.held) for lease in live.values())


def _limit(dimension: Dimension) -> Limit:
    limit = LIMITS.of(dimension)
    assert limit is not None
    return limit


TestGateways = Gateways.TestCase
TestGateways.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)


class Pair:
    """Gateways that reach the store at once."""

    def __init__(self, limits: Limits, count: int = 2, now_s: float = 0.0) -> None:
        self.now_s = now_s
        self.names = itertools.count()
        self.stores = {d: Store(_of(limits, d)) for d in limits.bounded}
        self.gateways = [
            [Share(SUBJECT, d, _of(limits, d), now_s=now_s) for d in limits.bounded]
            for _ in range(count)
        ]

    def sync(self, share: Share, waiting: list[int] | None = None) -> Grant:
        claim = share.claim(self.now_s, holder=f"h{next(self.names)}", waiting=waiting or [])
        grant = self.stores[share.dimension].renew(claim, self.now_s)
        share.accept(claim, grant, asked_s=self.now_s)
        return grant

    def request(self, gateway: int, tokens: int = 1, *, stream: bool = False) -> Reservation | Lack:
        """As a gateway does: what lacks is asked for once more, until the store has none."""
        shares = self.gateways[gateway]
        while True:
            done = reserve(shares, self.now_s, tokens=tokens, stream=stream)
            if isinstance(done, Reservation):
                return done
            before = done.share.available(self.now_s)
            self.sync(done.share, [done.needed])
            if done.share.available(self.now_s) <= before:
                return done


def _of(limits: Limits, dimension: Dimension) -> Limit:
    limit = limits.of(dimension)
    assert limit is not None
    return limit


@given(st.integers(1, 80), st.lists(st.integers(0, 2), min_size=1, max_size=200))
def test_exactly_the_limit_gets_in_at_once_wherever_it_is_asked_for(
    limit: int, order: list[int]
) -> None:
    world = Pair(Limits(requests_per_minute=limit), count=3)
    done = [isinstance(world.request(gateway), Reservation) for gateway in order]
    # Whoever asked first may hold some that another would have liked, but nobody gets too many;
    # and all who ask until they are refused use it up.
    assert sum(done) <= limit
    rest = sum(isinstance(world.request(g), Reservation) for g in (0, 1, 2) for _ in range(limit))
    assert sum(done) + rest == limit


def test_two_hundred_at_once_on_a_quota_of_fifty_are_fifty() -> None:
    world = Pair(Limits(requests_per_minute=50))
    done = [world.request(number % 2) for number in range(200)]
    assert sum(isinstance(one, Reservation) for one in done) == 50
    world.now_s += 6.0  # a tenth of a minute
    done = [world.request(number % 2) for number in range(200)]
    assert sum(isinstance(one, Reservation) for one in done) == 5


def test_a_sustained_load_gets_the_whole_rate_whoever_serves_it() -> None:
    world = Pair(Limits(requests_per_minute=600))
    served = [0, 0]
    for step in range(1200):  # 2 minutes at 20 a second in each of two, twice what is allowed
        world.now_s = step * 0.1
        for gateway in (0, 1) if step % 2 else (1, 0):
            if step % 5 == 0:
                world.sync(world.gateways[gateway][0])
            served[gateway] += sum(
                isinstance(world.request(gateway), Reservation) for _ in range(2)
            )
    assert 0.97 * 1800 <= sum(served) <= 1800  # the bucket, and what came back in two minutes
    assert min(served) > 0.4 * sum(served)


def test_what_was_reserved_and_not_used_is_free_again() -> None:
    world = Pair(Limits(tokens_per_minute=1000))
    first = world.request(0, tokens=1000)
    assert isinstance(first, Reservation)
    assert isinstance(world.request(0, tokens=1), Lack)
    first.settle(100)
    assert isinstance(world.request(0, tokens=900), Reservation)
    assert isinstance(world.request(1, tokens=1), Lack)


def test_a_large_request_is_not_starved_by_fair_parts() -> None:
    world = Pair(Limits(tokens_per_minute=5000))
    world.sync(world.gateways[0][0], [10])
    world.sync(world.gateways[1][0], [10])
    assert isinstance(world.request(0, tokens=4000), Reservation)


def test_what_overtakes_or_comes_again_changes_nothing() -> None:
    world = Pair(Limits(tokens_per_minute=1000))
    share, store = world.gateways[0][0], world.stores["tokens"]
    world.sync(share, [600])
    old = share.claim(0.0, holder="unused")  # gives all of it back
    assert (old.returned, old.spent) == (600, 0)
    store.renew(old, 0.0)
    world.sync(share, [1000])
    before = store.bucket, store.leases
    for stale in (old, Claim(SUBJECT, "tokens", share.holder), old):
        store.renew(stale, 0.0)
        assert (store.bucket, store.leases) == before
    late = share.claim(0.0, holder="unused", waiting=[50])
    answer = store.renew(late, 0.0)
    world.now_s = LEASE_S + 1
    world.sync(share)
    share.accept(late, answer, asked_s=0.0)
    assert share.available(world.now_s) == 0, "that lease is over"


def test_what_cannot_help_is_left_to_others() -> None:
    world = Pair(Limits(tokens_per_minute=1000))
    assert isinstance(world.request(0, tokens=600), Reservation)
    assert isinstance(world.request(0, tokens=600), Lack)
    assert isinstance(world.request(1, tokens=400), Reservation)


def test_more_than_was_reserved_is_a_debt_that_is_paid_first() -> None:
    world = Pair(Limits(tokens_per_minute=600))
    first = world.request(0, tokens=100)
    assert isinstance(first, Reservation)
    first.settle(900)
    assert isinstance(world.request(0, tokens=1), Lack)
    assert isinstance(world.request(1, tokens=1), Lack)
    world.now_s += 29.0
    assert isinstance(world.request(1, tokens=1), Lack)
    world.now_s += 2.0
    assert isinstance(world.request(1, tokens=1), Reservation)


def test_what_is_not_needed_goes_back() -> None:
    world = Pair(Limits(requests_per_minute=100))
    busy, other = world.gateways[0][0], world.gateways[1][0]
    world.sync(busy, [1] * 80)
    assert world.sync(other, [1] * 90).level + other.available(0.0) == 20
    for _ in range(8):
        world.now_s += 0.5
        world.sync(busy)
    assert busy.available(world.now_s) == 0
    assert busy.idle
    for _ in range(6):  # by halves: it is not alone yet
        world.sync(other, [1] * 90)
    assert other.available(world.now_s) >= 80


def test_a_dead_gateways_part_counts_as_spent_and_its_streams_as_ended() -> None:
    world = Pair(Limits(requests_per_minute=60, concurrent_streams=2))
    for _ in range(2):
        assert isinstance(world.request(0, stream=True), Reservation)
    world.sync(world.gateways[0][0], [1] * 60)
    assert world.gateways[0][0].available(0.0) == 58
    assert isinstance(world.request(1), Lack)
    world.now_s = LEASE_S + 1.0  # gateway 0 is not heard of again; meanwhile 1 came back a second
    admitted = sum(isinstance(world.request(1), Reservation) for _ in range(60))
    assert admitted in (1, 2, 3, 4)
    world.now_s += 10
    for _ in range(2):
        assert isinstance(world.request(1, stream=True), Reservation)
    assert isinstance(world.request(1, stream=True), Lack)


def test_streams_that_outlive_a_lease_still_count() -> None:
    world = Pair(Limits(concurrent_streams=3))
    running = [world.request(0, stream=True) for _ in range(2)]
    world.now_s += LEASE_S + 1  # the gateway was paused, its streams go on
    assert isinstance(world.request(0, stream=True), Reservation)
    assert isinstance(world.request(0, stream=True), Lack)
    for one in running:
        assert isinstance(one, Reservation)
        one.settle(5)
    assert isinstance(world.request(0, stream=True), Reservation)


def test_a_reservation_of_a_lost_lease_is_paid_for() -> None:
    world = Pair(Limits(tokens_per_minute=600))
    late = world.request(0, tokens=300)
    assert isinstance(late, Reservation)
    world.now_s += LEASE_S + 27.0  # the store took them for spent, half of them came back
    fresh = world.request(0, tokens=500)
    late.settle(10)
    share = world.gateways[0][0]
    assert isinstance(fresh, Reservation)
    assert (share.reserved, share.spent) == (500, 0)


def test_a_limit_that_changes_holds_at_the_next_renewal() -> None:
    world = Pair(Limits(requests_per_minute=100))
    assert isinstance(world.request(0), Reservation)
    world.stores["requests"].limit = Limit(10, 10 / 60)
    world.now_s += 0.5
    admitted = sum(isinstance(world.request(0), Reservation) for _ in range(200))
    assert admitted <= 100
    world.now_s += LEASE_S
    assert sum(isinstance(world.request(0), Reservation) for _ in range(200)) <= 10
    assert world.gateways[0][0].limit.capacity == 10


class TestWithoutTheStore:
    def test_each_gateway_goes_on_with_its_part_until_the_grace_is_over(self) -> None:
        world = Pair(Limits(requests_per_minute=600, concurrent_streams=4))
        for gateway in (0, 1, 0, 1):
            for share in world.gateways[gateway]:
                world.sync(share, [1])
        served = 0
        for tick in range(int(2 * (OFFLINE_GRACE_S + 20))):
            world.now_s = tick * 0.5
            for shares in world.gateways:
                for share in shares:
                    share.earn(world.now_s)
                while isinstance(reserve(shares, world.now_s, tokens=0, stream=False), Reservation):
                    served += 1
        assert served <= 600 + 10 * (OFFLINE_GRACE_S + LEASE_S)
        assert served >= 0.95 * 10 * OFFLINE_GRACE_S
        assert world.gateways[0][0].available(world.now_s) == 0, "it fails closed in the end"

    def test_streams_are_parted_too(self) -> None:
        world = Pair(Limits(concurrent_streams=4))
        for gateway in (0, 1, 0, 1):
            world.sync(world.gateways[gateway][0], [1])
        running = [world.request(0, stream=True)]
        world.now_s += LEASE_S + 1
        for shares in world.gateways:
            shares[0].earn(world.now_s)
        started = [
            isinstance(reserve(shares, world.now_s, tokens=0, stream=True), Reservation)
            for shares in world.gateways
            for _ in range(4)
        ]
        assert len(running) + sum(started) == 4

    def test_a_key_never_seen_starts_with_its_part(self) -> None:
        share = Share(SUBJECT, "tokens", Limit(1000, 1000 / 60), now_s=0.0, sharers=4)
        share.earn(0.0)
        assert share.available(0.0) == 250

    def test_a_short_outage_changes_nothing(self) -> None:
        world = Pair(Limits(requests_per_minute=60))
        share = world.gateways[0][0]
        world.sync(share, [1] * 30)
        world.now_s = LEASE_S / 2
        share.earn(world.now_s)
        assert share.available(world.now_s) == 30
        assert share.offline_since_s is None

    def test_afterwards_the_store_decides_again(self) -> None:
        world = Pair(Limits(requests_per_minute=60))
        share = world.gateways[0][0]
        world.sync(share, [1])
        world.now_s = LEASE_S + 1
        share.earn(world.now_s)
        assert share.available(world.now_s) > 0
        world.sync(share, [1] * 5)
        assert share.offline_since_s is None
        assert share.available(world.now_s) == 5


class TestWhatTheCallerIsTold:
    def test_headers_are_openais(self) -> None:
        world = Pair(Limits(requests_per_minute=60, tokens_per_minute=6000))
        assert isinstance(world.request(0, tokens=1500), Reservation)
        assert dict(rate_limit_headers(world.gateways[0], world.now_s)) == {
            b"x-ratelimit-limit-requests": b"60",
            b"x-ratelimit-remaining-requests": b"59",
            b"x-ratelimit-reset-requests": b"1s",
            b"x-ratelimit-limit-tokens": b"6000",
            b"x-ratelimit-remaining-tokens": b"4500",
            b"x-ratelimit-reset-tokens": b"15s",
        }

    def test_of_several_limits_the_nearest_its_end_is_shown(self) -> None:
        now_s = 5.0
        shares = [
            Share("key:k", "requests", Limit(100, 100 / 60), now_s=now_s),
            Share("tenant:t", "requests", Limit(30, 0.5), now_s=now_s),
            Share("key:k", "streams", Limit(1, None), now_s=now_s),
        ]
        headers = dict(rate_limit_headers(shares, now_s))
        assert headers[b"x-ratelimit-limit-requests"] == b"30"
        assert len(headers) == 3

    def test_remaining_grows_as_the_bucket_fills(self) -> None:
        world = Pair(Limits(requests_per_minute=60))
        for _ in range(20):
            world.request(0)
        share = world.gateways[0][0]
        assert share.remaining(world.now_s) == 40
        assert share.remaining(world.now_s + 10.5) == 50
        assert share.remaining(world.now_s + 1000) == 60

    @given(st.floats(0, 1e5))
    def test_durations_round_up_and_read_as_openai_writes_them(self, seconds: float) -> None:
        text = duration(seconds).decode()
        minutes, _, rest = text.rpartition("m") if not text.endswith("ms") else ("", "", text)
        scale = 0.001 if rest.endswith("ms") else 1.0
        read = int(minutes or 0) * 60 + float(rest.rstrip("ms")) * scale
        assert seconds - 1e-6 <= read <= seconds + 0.0011

    def test_durations(self) -> None:
        given_s = (0, 0.0123, 0.9995, 1.5, 59.9999, 60, 360.25)
        assert [duration(s) for s in given_s] == [
            b"0ms",
            b"13ms",
            b"1s",
            b"1.5s",
            b"1m0s",
            b"1m0s",
            b"6m0.25s",
        ]

    def test_a_refusal_says_when_to_come_back(self) -> None:
        world = Pair(Limits(tokens_per_minute=600))
        assert isinstance(world.request(0, tokens=600), Reservation)
        lack = world.request(0, tokens=100)
        assert isinstance(lack, Lack)
        error = refusal(lack, world.now_s)
        assert error.code == "rate_limit_exceeded"
        assert error.retry_after_s == 10.0
        world.now_s += 10.0
        assert isinstance(world.request(0, tokens=100), Reservation)

    def test_what_never_fits_is_told_so(self) -> None:
        world = Pair(Limits(tokens_per_minute=600))
        lack = world.request(0, tokens=601)
        assert isinstance(lack, Lack)
        error = refusal(lack, world.now_s)
        assert error.retry_after_s is None
        assert "601 tokens" in error.message
        assert "600 tokens per minute" in error.message

    def test_streams_are_told_apart(self) -> None:
        world = Pair(Limits(concurrent_streams=0))
        lack = world.request(0, stream=True)
        assert isinstance(lack, Lack)
        assert refusal(lack, 0.0).message.startswith("This key may have 0 streams at once")

    def test_a_limit_of_zero_refuses_everything(self) -> None:
        world = Pair(Limits(requests_per_minute=0))
        lack: Any = world.request(0)
        assert isinstance(lack, Lack)
        assert refusal(lack, 0.0).retry_after_s is None
        assert dict(rate_limit_headers(world.gateways[0], 0.0))[b"x-ratelimit-reset-requests"] == (
            b"0ms"
        )
