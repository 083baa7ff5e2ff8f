"""Two regions with their gateways for all tests here, started as people start them: `nearfield up`.

The model does what its prompt says (`tests.support.programs`), without weights: what is tested is
the way to it.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from nearfield.cli import federation as federations
from nearfield.cli import processes
from nearfield.cli.federation import Federation
from nearfield.core.settings import Settings
from nearfield.store.administration import administration
from nearfield.store.forms import NewKey, NewTenant, parse

from tests.support.terminal import Terminal

ROOT = Path(__file__).resolve().parents[2]
REGIONS = ("eu-west", "us-east")
MODEL = "programs"


@dataclass
class Fleet:
    """What `nearfield up` has started.

    Attributes:
        keys: API keys: `free` to go anywhere, bound to `eu` or `us`, and `platform`.
    """

    home: Path
    up: Terminal
    federation: Federation
    keys: dict[str, str] = field(default_factory=dict)

    def headers(self, key: str = "free") -> dict[str, str]:
        return {"authorization": f"Bearer {self.keys[key]}"}


def config(replicas: int = 1) -> dict[str, Any]:
    """The model as a Serve config."""
    engine = {"kind": "custom", "import_path": "tests.support.programs:Programs"}
    application = {
        "name": MODEL,
        "route_prefix": f"/{MODEL}",
        "import_path": "nearfield.serving:app",
        "args": {"model": MODEL, "engine": engine, "threads": 1},
        "runtime_env": {"env_vars": {"PYTHONPATH": str(ROOT)}},
        "deployments": [
            {
                "name": "replica",
                "num_replicas": replicas,
                "ray_actor_options": {"num_cpus": 0.1},
            }
        ],
    }
    return {"applications": [application]}


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    home = tmp_path_factory.mktemp("home")
    file = home / "programs.yaml"
    file.write_text(json.dumps(config()))
    up = Terminal(home, "up", "--regions", ",".join(REGIONS), "--keys", str(file))
    try:
        up.wait_for("Ctrl-C ends all regions and gateways")
        federation = federations.find(home)
        yield Fleet(home, up, federation, _keys(home))
        assert up.end(signal.SIGINT) == 0, up.text
        assert "nothing is left running" in up.text
        assert federations.read(home) is None
        assert _left(federation) == []
    finally:
        up.kill()
        if (left := federations.read(home)) is not None:
            federations.end(left, drain_timeout_s=0)


def _keys(home: Path) -> dict[str, str]:
    settings = Settings.from_env({**os.environ, "NEARFIELD_HOME": str(home)})
    bounds = {"free": None, "eu": ["eu"], "us": ["us"], "platform": None}
    made = {}
    with administration(settings) as store:
        for name, jurisdictions in bounds.items():
            store.create_tenant(
                parse(NewTenant, {"name": f"tenant-{name}", "jurisdictions": jurisdictions})
            )
            scope = "platform" if name == "platform" else "inference"
            form = {"tenant": f"tenant-{name}", "scopes": [scope]}
            made[name] = store.create_key(parse(NewKey, form))[1]
    return made


def _left(federation: Federation) -> list[int]:
    """Processes of the gateways, which carry a marker as regions do."""
    return [
        process.pid
        for member in federation
        for process in processes.of_region(member.gateway.marker)
    ]
