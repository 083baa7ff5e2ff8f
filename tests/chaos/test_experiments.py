"""The quick experiments, held to everything but the times: CI's machines have other work.

All of them, at full size and held to the times: `make chaos`.
"""

from __future__ import annotations

import asyncio

import pytest

from tests.chaos import faults
from tests.chaos.experiments import EXPERIMENTS, Size
from tests.chaos.world import World

REQUESTS = 200
QUICK = {name: each for name, each in EXPERIMENTS.items() if each.quick}


@pytest.mark.parametrize("name", QUICK)
def test_nothing_is_lost(world: World, name: str) -> None:
    experiment = QUICK[name]
    if experiment.filters and (reason := faults.no_packet_filter()) is not None:
        pytest.skip(reason)
    try:
        result = asyncio.run(experiment.run(world, Size(REQUESTS)))
        print(result)
        assert not result.missed, f"{result.missed}: {result.tally.worst}, {result.notes}"
    finally:
        if not experiment.destroys:
            world.recover()
