"""Run a gateway: `python -m nearfield.edge FILE`, as `nearfield gateway FILE` does."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from nearfield.core.errors import BadRequest, NearfieldError
from nearfield.edge.channel import DRAIN_S
from nearfield.edge.proxy.handover import MOST_WORKERS
from nearfield.edge.supervisor import Options, Running, Supervisor, WorkerFailed
from nearfield.telemetry import logs

EXIT_FAILED, EXIT_INVALID = 1, 2


def ready_line(running: Running) -> str:
    """What is said once clients are accepted."""
    grpc = "" if running.grpc is None else f", gRPC {running.grpc}"
    return f"gateway {running.gateway} ready: {running.url}{grpc} (console: {running.url}/console)"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m nearfield.edge", description="Run a gateway in the foreground."
    )
    parser.add_argument("file", type=Path, help="the gateway's file")
    parser.add_argument(
        "--state", type=Path, help="its folder; absent: gateways/NAME in NEARFIELD_HOME"
    )
    parser.add_argument("--workers", type=int, choices=range(1, MOST_WORKERS + 1), default=1)
    parser.add_argument("--drain-s", type=float, default=DRAIN_S)
    parser.add_argument("--take-over", action="store_true", help="from the one that runs")
    given = parser.parse_args()
    logs.configure()
    options = Options(given.state, given.workers, given.drain_s, given.take_over)
    supervisor = Supervisor(given.file, options, lambda it: print(ready_line(it), flush=True))
    try:
        return asyncio.run(supervisor.run())
    except WorkerFailed as failed:
        return failed.exit_code
    except NearfieldError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return EXIT_INVALID if isinstance(error, BadRequest) else EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
