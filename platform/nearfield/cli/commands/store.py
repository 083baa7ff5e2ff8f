"""What commands that administer a store do alike: they open it themselves, with no gateway."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

import click
from nearfield.core.settings import Settings

if TYPE_CHECKING:
    from nearfield.store.administration import Administration

Command = TypeVar("Command", bound=Callable[..., Any])

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def store_option(command: Command) -> Command:
    """`--store`: which database."""
    return click.option(
        "--store",
        "url",
        metavar="URL",
        help="sqlite:////path or postgresql://user@host/name.  "
        "[default: NEARFIELD_DATABASE_URL, else ~/.nearfield/nearfield.sqlite3]",
    )(command)


@contextlib.contextmanager
def opened(url: str | None) -> Iterator[Administration]:
    """The store's administration.

    Raises:
        NearfieldError: the store cannot be used.
    """
    try:
        from nearfield.store.administration import administration
    except ModuleNotFoundError as missing:
        raise click.ClickException(
            f"{missing.name} is not installed: pip install 'nearfield[edge]'"
        ) from None
    settings = Settings.from_env(os.environ)
    if url is not None:
        settings = replace(settings, database_url=url)
    with administration(settings) as found:
        yield found


def _as_limit(_: click.Context, __: click.Parameter, value: str | None) -> int | str | None:
    if value is None or value == "none":
        return value
    if not value.isdecimal():
        raise click.BadParameter(f"{value!r} is neither a whole number nor none")
    return int(value)


def limit_options(command: Command) -> Command:
    """`--requests-per-minute` and its likes; `none` takes a limit away."""
    for option, text in (
        ("--concurrent-streams", "Streams at once."),
        ("--tokens-per-minute", "Tokens of prompts and answers, in any minute."),
        ("--requests-per-minute", "Requests in any minute."),
    ):
        option_ = click.option(option, metavar="N|none", callback=_as_limit, help=text)
        command = option_(command)
    return command


def limits(**given: int | str | None) -> dict[str, int | None]:
    """The limits that were given, as the forms take them."""
    return {
        name: None if value == "none" else int(value)
        for name, value in given.items()
        if value is not None
    }


def as_seconds(_: click.Context, __: click.Parameter, value: str | None) -> float | None:
    """An option's span of time as 90d, 12h, 30m or 45s; without a unit, seconds."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)([smhd]?)", value)
    if found is None:
        raise click.BadParameter(f"{value!r} is no duration: write 90d, 12h, 30m or 45s")
    return float(found[1]) * _UNITS_S[found[2] or "s"]


def when(unix_s: float | None) -> str:
    """A moment for people, in UTC."""
    return "" if unix_s is None else f"{datetime.fromtimestamp(unix_s, UTC):%Y-%m-%d %H:%M}"


def listed(names: list[str] | None, otherwise: str) -> str:
    """Names for people. `otherwise`: what no list at all means."""
    return otherwise if names is None else ", ".join(names) or "none"


def bounds(limits: dict[str, int | None]) -> str:
    """Limits for people."""
    words = {
        "requests_per_minute": "requests/min",
        "tokens_per_minute": "tokens/min",
        "concurrent_streams": "streams",
    }
    shown = [f"{limits[name]} {word}" for name, word in words.items() if limits[name] is not None]
    return ", ".join(shown) or "none"
