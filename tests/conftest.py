"""What holds for every test: slow folders get more time than the default of pyproject.toml, and
hypothesis tries the same examples every time, however busy the machine is."""

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

SLOW_TIMEOUT_S = 300
SLOW = {"integration", "multiregion", "chaos", "e2e"}  # as in the Makefile


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    for item in items:
        if (
            item.path.relative_to(tests).parts[0] in SLOW
            and item.get_closest_marker("timeout") is None
        ):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_S))
