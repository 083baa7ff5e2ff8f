"""When a way that seems longer is measured again at once."""

from __future__ import annotations

import random

import pytest
from nearfield.policy.rtt import Rtt


def settled(level_s: float, jitter: float = 0.01) -> tuple[Rtt, random.Random]:
    rng, rtt = random.Random(7), Rtt()
    for _ in range(100):
        rtt = rtt.learn(level_s * rng.gauss(1.0, jitter))
    return rtt, rng


@pytest.mark.parametrize("level_s", [0.001, 0.02, 0.3])
def test_half_a_second_more_is_urgent_until_it_is_believed(level_s: float) -> None:
    rtt, _ = settled(level_s)
    assert not rtt.urgent
    probes = 0
    while rtt.level_s < level_s + 0.4:
        rtt = rtt.learn(level_s + 0.5)
        probes += 1
        assert rtt.urgent == (rtt.level_s < level_s + 0.4)
    assert probes == 3


def test_what_gains_little_can_wait() -> None:
    rtt, _ = settled(0.02)
    assert not rtt.learn(0.09).urgent


def test_jitter_is_hardly_ever_urgent() -> None:
    rtt, rng = settled(0.3, 0.07)
    urgent = 0
    for _ in range(20_000):
        rtt = rtt.learn(0.3 * rng.gauss(1.0, 0.07))
        urgent += rtt.urgent
    assert urgent < 20
