"""A Ray of its own for one server of the benchmarks, with Serve in it, until it is told to end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

import ray
from ray import serve


def run(deploy: Callable[[], object], forwarded: tuple[str, ...]) -> None:
    """
    Args:
        deploy: calls `serve.run`. forwarded: how the variables begin that replicas get too.
    """
    stop = threading.Event()
    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, lambda *_: stop.set())
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=os.environ["BENCH_RAY_DIR"],
        runtime_env={"env_vars": {k: v for k, v in os.environ.items() if k.startswith(forwarded)}},
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": int(os.environ["BENCH_PORT"])})
        deploy()
        print("bench: ready", flush=True)
        stop.wait()
    finally:
        serve.shutdown()
        ray.shutdown()
