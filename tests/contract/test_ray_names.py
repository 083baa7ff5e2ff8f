"""The catalogue's resources and labels are those of the installed Ray."""

from __future__ import annotations

import ray._raylet
from nearfield.core.catalog_files import read_catalog
from ray._private.accelerators import get_all_accelerator_managers
from ray.util.accelerators import accelerators as names

CATALOG = read_catalog()
# Ray has no manager for these: their operator names the resource.
UNMANAGED = {"IPU", "WSE"}


def test_resources() -> None:
    known = {manager.get_resource_name() for manager in get_all_accelerator_managers()}
    for row in CATALOG.accelerators.values():
        assert row.ray.resource in known | UNMANAGED | {"CPU"}, row.name


def test_labels() -> None:
    known = {value for value in vars(names).values() if isinstance(value, str)}
    for row in CATALOG.accelerators.values():
        if row.ray.accelerator_type is not None:
            assert row.ray.accelerator_type in known, row.name


def test_the_keys_that_a_plan_writes() -> None:
    assert ray._raylet.RAY_NODE_MARKET_TYPE_KEY == "ray.io/market-type"
    assert ray._raylet.RAY_NODE_ACCELERATOR_TYPE_KEY == "ray.io/accelerator-type"
