"""Seven per cent of noise: at most two changes of where requests go in ten minutes.

`python -m tests.simulation.jitter --seeds 1000` measures over more seeds.
"""

from __future__ import annotations

import pytest

from tests.simulation.jitter import FIVE_EQUALS_S, changes, gaussian

MOST = 2


@pytest.mark.parametrize("seed", range(20))
def test_equals_do_not_come_and_go(seed: int) -> None:
    assert changes(FIVE_EQUALS_S, gaussian(seed)) <= MOST


@pytest.mark.parametrize("farther", [1.01, 1.03, 1.045, 1.06, 1.08])
def test_nor_do_those_that_are_a_little_farther(farther: float) -> None:
    """Where the edges are, noise has the best chances."""
    for seed in range(4):
        assert changes((0.08, *(0.08 * farther,) * 4), gaussian(seed)) <= MOST
