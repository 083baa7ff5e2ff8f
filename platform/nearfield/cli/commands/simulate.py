"""`nearfield simulate`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from nearfield.cli.commands.check import print_problems
from nearfield.cli.main import EXIT_INVALID
from nearfield.cli.output import json_option, print_json, print_table
from nearfield.core.errors import BadRequest, NearfieldError

if TYPE_CHECKING:
    from nearfield.simulator.scenario import Scenario

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command
@click.argument("scenario", type=_FILE, metavar="SCENARIO")
@click.option(
    "--mode",
    type=click.Choice(["events", "fluid"]),
    help="Every request by itself, or many as one. [default: the scenario's, else events]",
)
@click.option("--seed", type=int, help="Instead of the scenario's.")
@click.option("--report", type=_FILE, metavar="FILE.html", help="Write the page with the plots.")
@click.option("--out", type=_FILE, metavar="FILE.json", help="Write all figures.")
@click.option(
    "--calibrate",
    multiple=True,
    metavar="[ENGINE=]RUN.csv",
    help="Take an engine's timings from the requests of a real run.",
)
@json_option
def simulate(
    scenario: Path, mode: str | None, seed: int | None, report: Path | None, out: Path | None,
    calibrate: tuple[str, ...], as_json: bool,
) -> int:  # fmt: skip
    """Run a scenario through the production policy, in simulated time.

    Routing, ranking, admission, retries, health and scaling are the code that runs in production;
    the world around it is simulated, and so is every figure. The same seed gives the same bytes.

    \b
    nearfield simulate examples/scenarios/three-regions.yaml --report day.html
    nearfield simulate spot.yaml --mode fluid --json | jq .simulated.cost
    nearfield simulate spot.yaml --calibrate l4=run.csv

    Exit code 2 if the scenario is invalid.
    """
    from nearfield.simulator.books import InvariantError
    from nearfield.simulator.result import simulate as run

    check_folders(report, out)
    read = read_scenario(scenario)
    if read is None:
        return EXIT_INVALID
    measured: dict[str, Any] = {}
    for given in calibrate:
        read, measured[given] = _calibrated(read, given)
        click.echo(measured[given], err=True)
    started_s, started_cpu_s = time.perf_counter(), time.process_time()
    try:
        with progress_bar(read.simulation) as progress:
            result = run(read, scenario.parent, seed=seed, mode=mode, progress=progress)
    except InvariantError as broken:
        raise NearfieldError(
            f"Something happened that must not: {broken}. This is a mistake in nearfield, not in "
            "the scenario: please report it with the scenario and its seed."
        ) from broken
    wall_s, cpu_s = time.perf_counter() - started_s, time.process_time() - started_cpu_s
    rate_rps = result["requests"]["arrived"] / cpu_s
    if report is not None:
        from nearfield.simulator.report import page

        write_file(report, page(result))
    if out is not None:
        import json

        write_file(out, json.dumps(result, indent=2) + "\n")
    if as_json:
        speed = {
            "wall_s": round(wall_s, 3),
            "cpu_s": round(cpu_s, 3),
            "simulated_requests_per_cpu_s": round(rate_rps),
        }
        calibrated = {given: str(found) for given, found in measured.items()}
        print_json({"simulated": result, "measured": speed | {"calibrated": calibrated}})
        return 0
    _show(result)
    click.echo(
        click.style(
            f"{result['requests']['arrived']:,} requests in {wall_s:.1f} s ({rate_rps:,.0f} in a "
            "second of one core). Every figure above is simulated.",
            dim=True,
        )
    )
    for written in (report, out):
        if written is not None:
            click.echo(f"written: {written}")
    return 0


def check_folders(*files: Path | None) -> None:
    """Of what is to be written: better said before a long run than after it."""
    for file in files:
        if file is not None and not file.parent.is_dir():
            raise BadRequest(f"{file.parent} does not exist: create it, or name another file.")


def read_scenario(path: Path) -> Scenario | None:
    """The scenario; None, and what is wrong with it has been said."""
    from nearfield.simulator.scenario import read

    found = read(path)
    if isinstance(found, list):
        print_problems(found)
        return None
    return found


def _calibrated(scenario: Scenario, given: str) -> tuple[Scenario, object]:
    from nearfield.simulator.calibrate import calibrate

    engine, equals, file = given.partition("=")
    return calibrate(scenario, engine if equals else None, Path(file if equals else given))


def write_file(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadRequest(f"{path} cannot be written: {error.strerror}.") from None


@contextmanager
def progress_bar(name: str) -> Iterator[Callable[[float], None]]:
    """A bar on stderr; nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), Remaining())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(name, total=1.0)
        yield lambda share: bar.update(task, completed=share)


def _show(result: dict[str, Any]) -> None:
    from nearfield.simulator.report import latency, percent

    requests, cost = result["requests"], result["cost"]
    rows = []
    for model in result["models"]:
        rows.append(
            [
                model["model"],
                f"{model['arrived']:,}",
                percent(model["attainment"]),
                "kept" if model["slo_kept"] else "missed",
                *(latency(model["ttft_s"][q]) for q in ("p50", "p95", "p99")),
                f"{model['usd']:,.2f}",
            ]
        )
    head = ["model", "requests", "in time", "SLO", "first token p50", "p95", "p99", "USD"]
    print_table(head, rows)
    click.echo()
    pools = [
        [
            f"{pool['region']}/{pool['pool']}",
            pool["capacity"].replace("_", " "),
            f"{pool['served']:,}",
            f"{sum(pool['replica_seconds'].values()) / 3600:,.2f}",
            f"{pool['launched']:,}",
            f"{pool['lost']:,}",
            f"{pool['usd']:,.2f}",
        ]
        for pool in result["pools"]
    ]
    print_table(["pool", "capacity", "served", "replica h", "launched", "lost", "USD"], pools)
    click.echo()
    spot = cost["usd_by_capacity"]["spot"]
    click.echo(
        f"late {percent(requests['late_fraction'])}; of those {requests['refused']:,} refused, "
        f"{requests['expired']:,} expired, {requests['lost']:,} lost"
    )
    click.echo(
        f"{cost['usd']:,.2f} USD ({spot:,.2f} of it spot), {cost['usd_per_hour']:,.2f} an hour; "
        f"{result['decisions']['that_changed_something']:,} decisions changed something"
    )
