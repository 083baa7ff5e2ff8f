"""What commands that take config files do alike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from nearfield.cli.commands.check import print_problems

if TYPE_CHECKING:
    from nearfield.cli.config_files import ConfigFile
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
