"""What commands that take config files do alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from nearfield.cli.commands.check import print_problems

if TYPE_CHECKING:
    from nearfield.cli.config_files import ConfigFile
    from nearfield.cli.output import Progress
    from nearfield.cli.probe import Answer


def checked(paths: Sequence[str | Path]) -> list[ConfigFile]:
    """The files, if they are valid; prints what is wrong with them.

    Raises:
        InvalidConfig: they are not.
    """
    from nearfield.cli.applications import InvalidConfig, load_valid

    try:
        files, warnings = load_valid(paths)
    except InvalidConfig as invalid:
        print_problems(invalid.problems)
        raise
    print_problems(warnings)
    return files


def answered(answer: Answer) -> str:
    """What a model was asked and said, in a line."""
    from nearfield.cli.probe import QUESTION, SENTENCE

    said = click.style(str(answer.text), bold=True)
    took = click.style(f"({answer.seconds * 1000:.0f} ms)", dim=True)
    asked = {"chat": f"{QUESTION} → ", "embeddings": f'"{SENTENCE}" → '}.get(answer.kind, "")
    return f"{answer.model}: {asked}{said} {took}"


def show_examples(shown: Sequence[tuple[str, str]]) -> None:
    """Titles, and what to copy."""
    for title, code in shown:
        click.echo(f"\n{click.style(f'# {title}', dim=True)}\n{code}")


def stop(end: Callable[..., object], progress: Progress, what: str) -> None:
    """End what `nearfield up` has started; Ctrl-C once more ends it at once.

    Args:
        end: takes `drain_timeout_s`. what: is finished first.
    """
    progress(f"stopping: {what} (Ctrl-C again: at once)")
    started_s = time.monotonic()
    try:
        end()
    except KeyboardInterrupt:
        end(drain_timeout_s=0.0)
    progress(f"stopped in {time.monotonic() - started_s:.1f} s; nothing is left running")
