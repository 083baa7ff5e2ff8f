"""Two regions for all quick experiments: starting them takes longer than any of those."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.world import EU_WEST, US_EAST, World


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder: Path = tmp_path_factory.mktemp("chaos")
    with World(folder, (EU_WEST, US_EAST), print) as running:
        yield running
