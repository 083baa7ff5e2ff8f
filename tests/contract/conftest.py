"""Stores for the tests: SQLite in a folder, and a real PostgreSQL where there is one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from nearfield.store.sql import Store

from tests.support.databases import Postgres, postgres


@pytest.fixture(scope="session")
def server() -> Iterator[Postgres | None]:
    with postgres() as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'store.sqlite3'}"
    running = request.getfixturevalue("server")
    if running is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt install postgresql)")
    name: str = running.create(f"t{next(_numbers)}")
    return name


_numbers = itertools.count()


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    opened = Store(url)
    yield opened
    opened.close()


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Store]:
    """SQLite only: for tests of what stands in front of a store."""
    opened = Store(f"sqlite:///{tmp_path / 'local.sqlite3'}")
    yield opened
    opened.close()
