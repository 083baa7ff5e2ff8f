"""What the environment may set, read once and in one place.

    NEARFIELD_HOME                 where local state is kept (default: ~/.nearfield)
    NEARFIELD_DATABASE_URL         tenants, keys, quotas, usage: sqlite:////absolute/path or
                                   postgresql://user@host/name (default: SQLite in NEARFIELD_HOME)
    NEARFIELD_KEY_PEPPER_FILE      the secret behind the digests of API keys
                                   (default: key-pepper in NEARFIELD_HOME, made when first needed)

A region that has one of these takes no request without a passport or a key:

    NEARFIELD_PASSPORT_KEYS_FILE   the secrets it shares with its gateways
    NEARFIELD_KEYS_FILE            API keys of its own, from `nearfield keys export`

and then refuses what may not be where it is:

    NEARFIELD_JURISDICTION         `eu`; unset: whatever is bound to any place is refused

A model's own settings are never here: they stand in its config, which can be reviewed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nearfield.core.errors import BadRequest


@dataclass(frozen=True, slots=True)
class Settings:
    """The environment, parsed. Paths are absolute."""

    home: Path
    database_url: str
    key_pepper_file: Path
    passport_keys_file: Path | None = None
    keys_file: Path | None = None
    jurisdiction: str | None = None

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Settings:
        """Parse the environment.

        Raises:
            BadRequest: a variable has a value that cannot be used.
        """
        home = _path(environ, "NEARFIELD_HOME") or Path.home() / ".nearfield"
        return cls(
            home=home,
            database_url=environ.get("NEARFIELD_DATABASE_URL")
            or f"sqlite:///{home / 'nearfield.sqlite3'}",
            key_pepper_file=_path(environ, "NEARFIELD_KEY_PEPPER_FILE") or home / "key-pepper",
            passport_keys_file=_path(environ, "NEARFIELD_PASSPORT_KEYS_FILE"),
            keys_file=_path(environ, "NEARFIELD_KEYS_FILE"),
            jurisdiction=environ.get("NEARFIELD_JURISDICTION") or None,
        )


def _path(environ: Mapping[str, str], name: str) -> Path | None:
    value = environ.get(name)
    if value is None:
        return None
    path = Path(value).expanduser()
    if not path.is_absolute():
        raise BadRequest(f"{name} is {value!r}: it must be an absolute path", param=name)
    return path
