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
from nearfield.core.settings import Settings

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


def _default_root() -> Path:
    return Settings.from_env(os.environ).home / "regions" / "local"


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
