"""`nearfield gateway`."""

from __future__ import annotations

import asyncio
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from nearfield.cli.output import json_option, print_json
from nearfield.core.settings import Settings
from nearfield.edge.channel import DRAIN_S
from nearfield.edge.proxy.handover import MOST_WORKERS

if TYPE_CHECKING:
    from nearfield.edge.supervisor import Options, Running

STOP_S = 90.0
"""How long `--stop` waits: a gateway drains for half a minute unless it was told otherwise."""
_EXTRA = ("httptools", "uvloop", "msgspec")


@click.command
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--workers",
    type=click.IntRange(1, MOST_WORKERS),
    default=1,
    show_default=True,
    help="Processes that share its port; each forwards about as much as a core can.",
)
@click.option(
    "--state",
    type=click.Path(file_okay=False, path_type=Path),
    help="Its folder: the last good state, usage on its way.  [default: by its name, in "
    "~/.nearfield/gateways]",
)
@click.option(
    "--drain-s",
    type=click.FloatRange(0),
    default=DRAIN_S,
    show_default=True,
    help="How long requests may take to end when it stops.",
)
@click.option("--restart", is_flag=True, help="Give the running one new workers, from FILE as now.")
@click.option("--take-over", is_flag=True, help="Replace the running one's process by this one.")
@click.option("--stop", is_flag=True, help="Stop the running one; it drains first.")
@json_option
def gateway(
    file: Path,
    workers: int,
    state: Path | None,
    drain_s: float,
    restart: bool,
    take_over: bool,
    stop: bool,
    as_json: bool,
) -> int:
    """Run the gateway of FILE in the foreground, until Ctrl-C.

    It needs no Ray and no torch: pip install 'nearfield[edge]'. FILE names the regions that it
    sends to, and the one that it stands in, if any; `nearfield check FILE` says what is wrong.

    \b
    nearfield gateway vienna.yaml                    clients are accepted within a second
    nearfield gateway vienna.yaml --restart          from another terminal, after FILE changed
    nearfield gateway vienna.yaml --take-over        after an upgrade: another process, same port
    nearfield gateway vienna.yaml --stop             once what it accepted has been answered

    Neither --restart nor --take-over refuses or breaks a request. If the new workers do not
    start, the old ones stay, and you are told why. SIGHUP restarts too.

    \b
    gateway: vienna                                  FILE, at its shortest: an edge site
    jurisdiction: eu
    regions: [eu-west.yaml, us-east.yaml]            region files that have a gateway_url
    listen: {host: 0.0.0.0, port: 8080}
    """
    if restart + take_over + stop > 1:
        raise click.UsageError("--restart, --take-over and --stop: one of them at a time.")
    _require_extra()
    if restart or stop:
        return _tell(file, state, restart=restart, as_json=as_json)
    from nearfield.edge.supervisor import Options

    return _run(file, Options(state, workers, drain_s, take_over), as_json=as_json)


def _run(file: Path, options: Options, *, as_json: bool) -> int:
    from nearfield.edge.supervisor import Supervisor, WorkerFailed
    from nearfield.telemetry import logs

    def ready(running: Running) -> None:
        if as_json:
            print_json(_document(running))
        else:
            click.echo(_line(running))

    logs.configure()
    try:
        return asyncio.run(Supervisor(file, options, ready).run())
    except WorkerFailed as failed:  # the worker has said why
        if as_json:
            print_json({"error": {"message": failed.message, "code": failed.code}})
        return failed.exit_code


def _tell(file: Path, state: Path | None, *, restart: bool, as_json: bool) -> int:
    """Restart or stop the one that runs."""
    from nearfield.cli import gateways
    from nearfield.edge import files

    if state is None:
        name = files.read(file).gateway.gateway
        state = files.default_state(Settings.from_env(os.environ), name)
    told = gateways.restart(state) if restart else gateways.stop(state, timeout_s=STOP_S)
    if as_json:
        print_json({**_document(told), "running": restart})
    elif restart:
        click.echo(f"Restarted: {_line(told)}")
    else:
        click.echo(f"The gateway {told.gateway} has stopped.")
    return 0


def _line(running: Running) -> str:
    from nearfield.edge.__main__ import ready_line

    return ready_line(running)


def _document(running: Running) -> dict[str, Any]:
    return {
        "gateway": running.gateway,
        "endpoint": running.url,
        "grpc": running.grpc,
        "console": f"{running.url}/console",
        "pid": running.pid,
        "workers": list(running.workers),
        "generation": running.generation,
    }


def _require_extra() -> None:
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        raise click.ClickException(f"{missing[0]} is not installed: pip install 'nearfield[edge]'")
