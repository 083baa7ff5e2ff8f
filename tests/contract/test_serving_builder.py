from __future__ import annotations

import importlib.util
import subprocess
import sys

import nearfield.serving
import pytest
from nearfield.core.spec import ENGINE_KINDS, ModelSpec
from nearfield.serving.builder import SPARE_REQUESTS
from nearfield.serving.engines.table import ENGINES


def test_a_custom_engine_imports_neither_ray_nor_torch() -> None:
    code = (
        "import sys; from nearfield.serving.engines.base import FunctionEngine\n"
        "print({'ray', 'torch', 'starlette', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_every_kind_of_engine_has_its_class() -> None:
    assert {*ENGINES, "custom"} == set(ENGINE_KINDS)
    for path in ENGINES.values():
        module, _, _ = path.partition(":")
        assert importlib.util.find_spec(module) is not None, module


def test_the_package_exports_the_builder_and_nothing_else() -> None:
    assert callable(nearfield.serving.app)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        nearfield.serving.nothing  # noqa: B018


def test_limits_become_options_of_the_deployment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "2")
    spec = ModelSpec.model_validate(
        {
            "model": "m",
            "engine": "tests.support.programs:Programs",
            "limits": {"max_running": 3, "max_queued": 4, "drain_s": 10},
        }
    )
    application = nearfield.serving.app(spec)
    deployment = application._bound_deployment
    config = deployment._deployment_config
    assert deployment.name == "replica"
    assert config.max_ongoing_requests == 3 + 4 + SPARE_REQUESTS
    assert config.graceful_shutdown_timeout_s == 2 + 10 + 5
