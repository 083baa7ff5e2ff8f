"""One local region for all integration tests, started as `nearfield up` starts it.

    def test_answers(region):
        region.deploy_model("shout", engine={"kind": "custom", "import_path": "engines:Shout"},
                            pythonpath=Path(__file__).parent)
        httpx.post(region.url("shout") + "/v1/completions", ...)

A model deployed here stays until the session ends or `region.remove(name)`: remove what holds
much memory. Names are yours to keep apart: prefix them with the test file's topic.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nearfield.cli import deploy
from nearfield.cli import region as regions

DEPLOY_TIMEOUT_S = 120.0


class TestRegion:
    """A running region with what tests need of it."""

    __test__ = False

    def __init__(self, region: regions.Region) -> None:
        self.region = region
        self.base_url = region.base_url

    def url(self, model: str) -> str:
        """The base URL of a model deployed by `deploy_model`, without `/v1`."""
        return f"{self.base_url}/{model}"

    def deploy_model(
        self,
        model: str,
        *,
        replica: dict[str, Any] | None = None,
        pythonpath: Path | None = None,
        wait: bool = True,
        **spec: Any,
    ) -> None:
        """Deploy or upgrade `model` at `/model`.

        Args:
            replica: options of Serve's deployment; each replica counts 0.1 CPU unless they say.
            pythonpath: a directory for the replica's imports (custom engines).
            spec: the rest of the model's spec (`engine`, `source`, `limits`, ...).
        """
        app: dict[str, Any] = {
            "name": model,
            "route_prefix": f"/{model}",
            "import_path": "nearfield.serving:app",
            "args": {"model": model, "threads": 1, **spec},
            "deployments": [
                {"name": "replica", "ray_actor_options": {"num_cpus": 0.1}, **(replica or {})}
            ],
        }
        if pythonpath is not None:
            path = f"{pythonpath}{os.pathsep}{self.region.state.pythonpath}"
            app["runtime_env"] = {"env_vars": {"PYTHONPATH": path}}
        self.deploy(app, wait=wait)

    def deploy(self, *applications: dict[str, Any], wait: bool = True) -> None:
        """Deploy applications as they stand in a Serve config."""
        deploy.apply(self.region, applications)
        if wait:
            names = [app["name"] for app in applications]
            for outcome in deploy.wait_until_running(
                self.region, names, timeout_s=DEPLOY_TIMEOUT_S, report=print
            ):
                assert outcome.ready, f"{outcome.name}: {outcome.reason}"

    def remove(self, *models: str) -> None:
        """Remove models and wait until their replicas have drained."""
        deploy.apply(self.region, [], remove=models)
        assert deploy.wait_until_gone(self.region, models, timeout_s=60.0)


@pytest.fixture(scope="session")
def region(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestRegion]:
    """A region of its own directory and ports, on 16 imaginary CPUs."""
    root = tmp_path_factory.mktemp("home") / "regions" / "local"
    running = regions.start(root, regions.RegionOptions(num_cpus=16), print)
    try:
        yield TestRegion(running)
    finally:
        running.api.close()
        regions.end(running, drain_timeout_s=0)
