"""What commands that take config files do alike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nearfield.cli.commands.check import print_problems

if TYPE_CHECKING:
    from nearfield.cli.config_files import ConfigFile


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
