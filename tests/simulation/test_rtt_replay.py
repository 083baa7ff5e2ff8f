"""Over measured round trips: within 3 % of always knowing the best.

`python -m tests.simulation.rtt_replay` replays all of them and prints the figures.
"""

from __future__ import annotations

import pytest

from tests.simulation.rtt_replay import (
    HEAD,
    Weather,
    every,
    few_regions,
    line,
    packaged,
    replay,
    shared_folder,
    shared_tables,
)

MOST_ADDED = 0.03


@pytest.mark.parametrize("regions", [3, 8, 21])
def test_not_knowing_the_best_costs_less_than_three_per_cent(
    regions: int, capsys: pytest.CaptureFixture[str]
) -> None:
    cities = few_regions(every(packaged(), 12), regions, seed=2)
    result = replay(cities, seconds=240, seed=2)
    with capsys.disabled():
        print("\n" + HEAD + "\n" + line(f"cities, {regions} regions each", result))
    assert result.requests > 3000
    assert result.added(result.policy_s) <= MOST_ADDED


def test_where_nothing_happens_but_noise_nobody_moves() -> None:
    calm = Weather(drift=0.0, detour_every_s=1e12)
    result = replay(every(packaged(), 12), seconds=240, seed=3, weather=calm)
    assert result.changes <= 1
    assert result.added(result.policy_s) <= 0.01


def test_the_shared_tables() -> None:
    folder = shared_folder()
    if folder is None:
        pytest.skip("no shared/data/network in or beside the repository: its tables are not ours")
    ours = packaged()
    for name, table in shared_tables(folder):
        if name.startswith("edge"):  # what we ship is what was measured
            assert {c: ways for c, ways in ours.items() if ways} == {
                city: {k: pytest.approx(v, rel=1e-5) for k, v in ways.items()}
                for city, ways in table.items()
            }
        result = replay(every(table, 12), seconds=120, seed=4)
        assert result.added(result.policy_s) <= MOST_ADDED, name
