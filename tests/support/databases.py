"""A real PostgreSQL of one's own: Debian's or anybody's, where it is installed."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path


def postgres_programs() -> Path | None:
    """Where `initdb` and `postgres` are; Debian keeps them off the PATH."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).resolve().parent
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return installed[-1].parent if installed else None


class Postgres:
    """A server that listens on a socket of its own and nowhere else."""

    def __init__(self, programs: Path, home: Path) -> None:
        self._programs = programs
        self._home = home
        # It refuses to be root's.
        self._user = None if os.geteuid() else pwd.getpwnam("nobody").pw_name
        if self._user is not None:
            shutil.chown(home, self._user)
        self._data = home / "data"
        new = ["-D", str(self._data), "-U", "nearfield", "-A", "trust", "--no-sync", "-E", "UTF8"]
        self._run("initdb", *new)

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [self._programs / program, *arguments],
            cwd=self._home,
            user=self._user,
            check=True,
            capture_output=True,
            timeout=60,
        )

    def start(self) -> None:
        options = f"-c listen_addresses='' -c unix_socket_directories={self._home} -c fsync=off"
        arguments = ["-D", str(self._data), "-o", options, "-l", str(self._home / "log"), "-w"]
        self._run("pg_ctl", *arguments, "start")

    def stop(self, mode: str = "immediate") -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            self._run("pg_ctl", "-D", str(self._data), "-m", mode, "-w", "stop")

    def create(self, name: str) -> str:
        """A new database; returns its URL."""
        self._run("createdb", "-h", str(self._home), "-U", "nearfield", name)
        return f"postgresql://nearfield@/{name}?host={self._home}"


@contextlib.contextmanager
def postgres() -> Iterator[Postgres | None]:
    """A running server, None where PostgreSQL is not installed."""
    programs = postgres_programs()
    if programs is None:
        yield None
        return
    # Socket paths are short, and another user must reach it: not pytest's own folder.
    with tempfile.TemporaryDirectory(prefix="nearfield-pg-") as folder:
        server = Postgres(programs, Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.stop()
