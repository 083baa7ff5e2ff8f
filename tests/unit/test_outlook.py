"""Headroom by what lateness is worth, and which setting decides: those tried on paper."""

from __future__ import annotations

import math

from nearfield.policy.headroom import BEGINNING, TICK_S, Errors, choices
from nearfield.policy.outlook import PRICES, Outlook, Shadow
from nearfield.policy.scale import PoolSpec, ScalingSpec

from tests.support.scaling import World


def outlook(made: World) -> Outlook:
    return made.state.groups[""].outlook


def run(seconds: int, first: int = 12, boot_s: float = 30.0, peak: float = 0.0) -> World:
    """A hundred a second, and so much more for a minute in every ten."""
    spec = ScalingSpec((PoolSpec("gpu", max_replicas=99, boot_s=boot_s),))
    made = World(spec, {"gpu": 10.0}, boot_s=boot_s)
    made.pools["gpu"].running = first
    return made.run(seconds, lambda now_s: 100.0 + (peak if now_s % 600.0 < 60.0 else 0.0))


def test_the_dearer_lateness_the_more_replicas_and_the_less_risk() -> None:
    errors = Errors()
    found = choices(100.0, 3.0, errors.scale, errors.tails(), PRICES)
    assert [c.replicas for c in found] == sorted(c.replicas for c in found)
    assert [c.risk for c in found] == sorted((c.risk for c in found), reverse=True)
    for choice, price in zip(found, PRICES, strict=True):
        # None of the others is cheaper at this price.
        cost = choice.replicas * 3.0 / 100.0 + price * choice.risk
        others = [c.replicas * 3.0 / 100.0 + price * c.risk for c in found]
        assert cost <= min(others) + 1e-9


def test_errors_are_told_apart_by_the_time_within_ten_minutes() -> None:
    errors = Errors()
    for tick in range(BEGINNING + 400):
        now_s = TICK_S * tick
        errors = errors.observe(0.3 if now_s % 600.0 == 30.0 else 0.01, now_s, 35.0)
    assert errors.scale_at(6000.0 + 30.0) > 2.0 * errors.scale_at(6000.0 + 300.0)


def test_a_beginning_is_no_habit() -> None:
    errors = Errors()
    for tick in range(BEGINNING):
        errors = errors.observe(0.3 if tick < 8 else 0.0, TICK_S * tick, 35.0)
    assert len({errors.scale_at(TICK_S * phase) for phase in range(40)}) == 1


def test_a_shadow_waits_for_its_boots_and_is_late_meanwhile() -> None:
    shadow = Shadow(((0.0, 10.0),), ((0.0, 10.0),))
    for bin_ in range(1, 13):
        shadow = shadow.after(
            5.0 * bin_, 5.0, 100.0, 40.0, 20.0,
            lead_s=30.0, wait_s=2.0, hold_s=30.0, keep=1.0, bunched_s=0.0, counts=True,
        )  # fmt: skip
        if bin_ == 6:
            assert shadow.late > 300.0  # 20 a second come, 10 are done
    assert shadow.backlog < 100.0  # 40 are done from 35 s on
    assert math.isclose(shadow.cost, 5.0 * 12 * 40.0)


def test_lateness_that_never_comes_becomes_cheap() -> None:
    early, late = outlook(run(300)).last, outlook(run(2400)).last
    assert late.late_price < early.late_price
    assert late.held <= early.held


def test_a_start_from_nothing_is_no_evidence() -> None:
    """Everybody is late for a whole boot; that no setting is to blame for."""
    cold, warm = run(900, first=0, boot_s=120.0), run(900, boot_s=120.0)
    assert outlook(cold).last.late_price <= 2.0 * outlook(warm).last.late_price


def test_lateness_makes_lateness_dear() -> None:
    calm, restless = outlook(run(1800)).last, outlook(run(1800, peak=60.0)).last
    assert restless.amount > calm.amount
