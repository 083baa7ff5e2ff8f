"""The strict mirror of Serve's config: it knows what the installed Ray knows."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from nearfield.core import serve_config
from pydantic import BaseModel, ValidationError

# Ours, and the name of the model it mirrors in ray.serve.schema or ray.serve.config.
MIRRORED: list[tuple[type[BaseModel], str]] = [
    (serve_config.ServeConfig, "ServeDeploySchema"),
    (serve_config.Application, "ServeApplicationSchema"),
    (serve_config.Deployment, "DeploymentSchema"),
    (serve_config.RayActorOptions, "RayActorOptionsSchema"),
    (serve_config.HttpOptions, "HTTPOptionsSchema"),
    (serve_config.GrpcOptions, "gRPCOptionsSchema"),
    (serve_config.LoggingConfig, "LoggingConfig"),
    (serve_config.TracingConfig, "TracingConfig"),
    (serve_config.ControllerOptions, "ControllerOptions"),
    (serve_config.AutoscalingConfig, "AutoscalingConfig"),
    (serve_config.AutoscalingPolicy, "AutoscalingPolicy"),
    (serve_config.BackpressureConfig, "BackpressureConfig"),
    (serve_config.RequestRouterConfig, "RequestRouterConfig"),
    (serve_config.GangSchedulingConfig, "GangSchedulingConfig"),
    (serve_config.DeploymentActor, "DeploymentActorConfig"),
]
# In an application, Serve knows these only to refuse them.
NOT_MIRRORED: dict[type[BaseModel], set[str]] = {serve_config.Application: {"host", "port"}}


@pytest.fixture(scope="module")
def ray_models() -> dict[str, type[BaseModel]]:
    """Serve's own models by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's use of pydantic is not ours to mend
        from ray.serve import config, schema
    return {**vars(config), **vars(schema)}


@pytest.mark.parametrize(("ours", "name"), MIRRORED, ids=lambda item: str(item))
def test_fields_are_those_of_the_installed_ray(
    ray_models: dict[str, type[BaseModel]], ours: type[BaseModel], name: str
) -> None:
    theirs = ray_models[name]
    assert set(ours.model_fields) == set(theirs.model_fields) - NOT_MIRRORED.get(ours, set())


def test_runtime_env_keys_are_those_of_the_installed_ray() -> None:
    from ray.runtime_env import RuntimeEnv

    # With a leading underscore Ray keeps what it has parsed; users write it without.
    known = {key.lstrip("_") for key in RuntimeEnv.known_fields} - NOT_FOR_REPLICAS
    assert set(serve_config.RuntimeEnv.model_fields) == known


# Of other languages and launchers, or Ray's internal bookkeeping.
NOT_FOR_REPLICAS = {"java_jars", "mpi", "ray_release", "ray_commit", "inject_current_ray"}

FULL: dict[str, Any] = {
    "proxy_location": "HeadOnly",
    "http_options": {"host": "127.0.0.1", "port": 8000, "request_timeout_s": 30},
    "grpc_options": {"port": 9000, "grpc_servicer_functions": []},
    "logging_config": {"encoding": "JSON", "log_level": "DEBUG", "enable_access_log": False},
    "tracing_config": {"enabled": True, "sampling_ratio": 0.5},
    "target_capacity": 50,
    "applications": [
        {
            "name": "own",
            "route_prefix": "/own",
            "import_path": "own.app:app",
            "runtime_env": {"env_vars": {"A": "b"}, "pip": ["x"]},
            "args": {"anything": 1},
            "deployments": [
                {
                    "name": "Own",
                    "max_ongoing_requests": 8,
                    "max_queued_requests": 16,
                    "backpressure_config": {"status_code": 429, "retry_after_s": 1.5},
                    "autoscaling_config": {
                        "min_replicas": 0,
                        "initial_replicas": 1,
                        "max_replicas": 4,
                        "target_ongoing_requests": 2,
                        "downscale_to_zero_delay_s": 60,
                        "aggregation_function": "mean",
                    },
                    "graceful_shutdown_timeout_s": 5,
                    "ray_actor_options": {
                        "num_cpus": 0.5,
                        "resources": {"TPU": 4},
                        "label_selector": {"accelerator": "l4"},
                        "fallback_strategy": [{"label_selector": {"accelerator": "t4"}}],
                    },
                    "max_replicas_per_node": 2,
                    "rolling_update_percentage": 0.5,
                    "max_surge_percent": 20,
                }
            ],
        }
    ],
}


def test_a_full_config_passes_here_and_there(ray_models: dict[str, type[BaseModel]]) -> None:
    serve_config.ServeConfig.model_validate(FULL)
    for application in FULL["applications"]:
        serve_config.Application.model_validate(application)
    ray_models["ServeDeploySchema"].model_validate(FULL)


def test_serve_lets_unknown_keys_through_and_we_do_not(
    ray_models: dict[str, type[BaseModel]],
) -> None:
    """The reason for the mirror; when Ray refuses them too, it can go."""
    typo = {"name": "Own", "max_ongoing_request": 8}
    ray_models["DeploymentSchema"].model_validate(typo)
    with pytest.raises(ValidationError, match="max_ongoing_request"):
        serve_config.Deployment.model_validate(typo)


def test_ray_itself_has_the_last_word(tmp_path: Path) -> None:
    """Rules of Serve's own that the strict schema does not repeat; Ray is not imported before."""
    path = tmp_path / "model.yaml"
    path.write_text(
        "applications:\n"
        "  - name: chat\n"
        "    route_prefix: /chat\n"
        "    import_path: nearfield.serving:app\n"
        "    args: {model: chat, engine: generate, source: builtin://abacus}\n"
        "    runtime_env:\n"
        "      working_dir: ./here\n"
    )
    code = (
        "import sys; from nearfield.cli.config_files import check_files\n"
        f"without = check_files([{str(path)!r}], ray=False)\n"
        "assert without == [] and 'ray' not in sys.modules, without\n"
        f"(problem,) = check_files([{str(path)!r}])\n"
        "print(problem.field, problem.value, problem.message)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "applications[0].runtime_env {'working_dir': './here'}" in done.stdout
    assert "Ray Serve refuses it" in done.stdout
