"""What commands print: text for people, or one JSON document; and the options they share."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource
from nearfield.core.settings import Settings

_REGION = "nearfield.region"
_DIRECTORY = click.Path(file_okay=False, path_type=Path)
Command = TypeVar("Command", bound=Callable[..., Any])


def json_option(command: Command) -> Command:
    """`--json`: one JSON document on stdout, and nothing else there."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")(command)


def dir_option(command: Command) -> Command:
    """`--dir`: which region."""
    return click.option(
        "--dir",
        "root",
        type=_DIRECTORY,
        default=_default_root,
        show_default="~/.nearfield/regions/local",
        help="The region's directory; NEARFIELD_HOME moves the default.",
    )(command)


def region_option(command: Command) -> Command:
    """`--dir` and `--region`: which of those that run here. See `names_one`."""
    return click.option(
        "--region",
        metavar="NAME",
        is_eager=True,
        expose_value=False,
        callback=_remember_region,
        help="One of those that `nearfield up --regions` runs.",
    )(dir_option(command))


def names_one() -> bool:
    """Whether the command line says which region."""
    context = click.get_current_context()
    given = context.get_parameter_source("root") is ParameterSource.COMMANDLINE
    return given or region_named() is not None


def region_named() -> str | None:
    """What `--region` says."""
    name: str | None = click.get_current_context().meta.get(_REGION)
    return name


def home() -> Path:
    """Where local state is kept."""
    return Settings.from_env(os.environ).home


def _remember_region(ctx: click.Context, _: click.Parameter, name: str | None) -> None:
    if name is not None and ("/" in name or name.startswith(".")):
        raise click.BadParameter(f"{name!r} is no region's name")
    ctx.meta[_REGION] = name


def _default_root() -> Path:
    return home() / "regions" / (region_named() or "local")


def print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2, sort_keys=True))


class Progress:
    """Progress lines with the time since the start: on stderr if stdout is to hold JSON."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._started_s = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started_s

    def __call__(self, text: str) -> None:
        stamp = click.style(f"{self.elapsed_s:6.1f} s", dim=True)
        click.echo(f"{stamp}  {text}", err=self._as_json)


def failed(text: str) -> None:
    """A failure that does not end the command, in the style of those that do."""
    click.echo(f"{click.style('error:', fg='red', bold=True)} {text}", err=True)


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns: coloured by rich on a terminal, plain and one line a row elsewhere."""
    if sys.stdout.isatty():
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table

        table = Table(*headers, box=SIMPLE_HEAD, pad_edge=False)
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    lines = [headers, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        click.echo("  ".join(cells).rstrip())


def duration(seconds: float) -> str:
    """A span of time for people."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
