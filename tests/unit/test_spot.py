"""Spot capacity: what is learnt of a zone's losses, and what is bought against them."""

from __future__ import annotations

from nearfield.policy import mix
from nearfield.policy.spot import Trust


def hours(trust: Trust, count: int, *, running: int = 4, lost_each_h: int = 0) -> Trust:
    """So many hours in use, in minutes; each hour ends with a loss."""
    now_s = 0.0
    for minute in range(60 * count):
        now_s += 60.0
        lost = lost_each_h if minute % 60 == 59 else 0
        trust = trust.observe(
            now_s, 60.0, running=running, lost=lost, refused=False, booted=bool(lost)
        )
    return trust


def test_losses_are_counted_by_zone_and_not_by_replica() -> None:
    few = hours(Trust(), 12, running=4, lost_each_h=4)
    many = hours(Trust(), 12, running=40, lost_each_h=40)
    assert few.losses_per_hour == many.losses_per_hour
    assert few.share > 0.9
    assert hours(Trust(), 12, running=40, lost_each_h=1).share < 0.1
    assert few.missing(120.0) > 10 * hours(Trust(), 48).missing(120.0)


def test_history_fades() -> None:
    bad = hours(Trust(), 12, lost_each_h=4)
    assert hours(bad, 200).losses_per_hour < 0.1 * bad.losses_per_hour


def zone(usd: float, exposed_usd: float, *, share: float = 1.0, zones: int = 1) -> mix.Offer:
    return mix.Offer(10.0, usd, 0, 0, 20, 60.0, exposed_usd, share, zones)


def test_without_losses_the_cheapest_zone_has_everything() -> None:
    assert mix.hedged(80.0, 80.0, (zone(1.0, 0.0), zone(2.0, 0.0))) == (8, 0)


def test_what_may_be_lost_at_once_is_spread_and_stood_in_for() -> None:
    counts = mix.hedged(80.0, 80.0, tuple(zone(1.0 + i / 10, 5.0) for i in range(4)))
    assert sum(counts) - max(counts) >= 8  # any zone may go
    assert sum(counts) < 16


def test_one_zone_that_goes_often_is_backed_by_what_never_goes() -> None:
    always = mix.Offer(10.0, 3.0, 0, 0, 20, 60.0)
    assert mix.hedged(80.0, 80.0, (zone(1.0, 0.1), always)) == (8, 0)
    spot, steady = mix.hedged(80.0, 80.0, (zone(1.0, 9.0), always))
    assert steady >= 8
    assert spot == 0


def test_what_is_held_above_the_expected_is_a_spare_already() -> None:
    assert mix.hedged(80.0, 60.0, tuple(zone(1.0, 5.0) for _ in range(4))) == (2, 2, 2, 2)


def test_a_spare_costs_less_the_less_goes_at_once() -> None:
    some, whole = (
        mix.hedged(80.0, 80.0, (zone(1.0, 2.0, share=s, zones=4),))[0] for s in (0.25, 1.0)
    )
    assert 8 < some < whole
