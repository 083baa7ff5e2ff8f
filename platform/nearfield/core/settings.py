"""What the environment may set, read once and in one place.

    NEARFIELD_HOME   where local regions keep their state (default: ~/.nearfield)

A model's own settings are never here: they stand in its config, which can be reviewed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nearfield.core.errors import BadRequest


@dataclass(frozen=True, slots=True)
class Settings:
    """The environment, parsed. `home`: the directory of local regions, absolute."""

    home: Path

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Settings:
        """Parse the environment.

        Raises:
            BadRequest: a variable has a value that cannot be used.
        """
        home = environ.get("NEARFIELD_HOME")
        if home is None:
            return cls(home=Path.home() / ".nearfield")
        path = Path(home).expanduser()
        if not path.is_absolute():
            raise BadRequest(
                f"NEARFIELD_HOME is {home!r}: it must be an absolute path", param="NEARFIELD_HOME"
            )
        return cls(home=path)
