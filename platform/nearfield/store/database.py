"""One SQL database: connections, transactions, its clock, and what is said when it is gone."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nearfield.core.errors import BadRequest, Unavailable
from nearfield.store.migrations import migrate
from sqlalchemy import URL, Connection, Engine, create_engine, event, exc, func, make_url, select

log = logging.getLogger("nearfield.store")

BUSY_S = 5.0
"""How long a transaction waits for another's lock."""
CONNECT_S = 3.0
STATEMENT_S = 5.0
POOL_SIZE = 5
RETRY_AFTER_S = 2.0

_GONE = (exc.OperationalError, exc.InterfaceError, exc.InternalError, exc.TimeoutError)


class Database:
    """Connections to one database. Thread-safe. Connects, and brings the schema up to date, when
    it is first used: until then it may be down."""

    def __init__(self, url: str) -> None:
        """
        Args:
            url: `sqlite:////absolute/path`, or `postgresql://user:password@host/name`.

        Raises:
            BadRequest: it is neither, or PostgreSQL's driver is not installed.
        """
        self._url = _parsed(url)
        self._engine = _engine(self._url)
        self._ready = False
        self._starting = threading.Lock()

    @property
    def dialect(self) -> str:
        return self._engine.dialect.name

    @contextlib.contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that only reads.

        Raises:
            Unavailable: the database cannot be reached.
        """
        with self._transaction(writes=False) as connection:
            yield connection

    @contextlib.contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that is committed at the end of the block. SQLite runs one at a time.

        Raises:
            Unavailable: the database cannot be reached.
        """
        with self._transaction(writes=True) as connection:
            yield connection

    @contextlib.contextmanager
    def _transaction(self, *, writes: bool) -> Iterator[Connection]:
        try:
            self._start()
            with self._engine.connect() as connection:
                connection.execution_options(nearfield_writes=writes)
                with connection.begin():
                    yield connection
        except _GONE as error:
            raise self._unavailable(error) from error

    def _start(self) -> None:
        if self._ready:
            return
        with self._starting:
            if self._ready:
                return
            if self.dialect == "sqlite":
                _create_private(Path(self._url.database or ""))
            with self._engine.connect() as connection:
                connection.execution_options(nearfield_writes=True)
                with connection.begin():
                    migrate(connection)
            self._ready = True

    def _unavailable(self, error: Exception) -> Unavailable:
        where = self._url.render_as_string(hide_password=True)
        said = str(getattr(error, "orig", None) or error).strip().splitlines()
        log.warning("the database at %s: %s", where, said[0] if said else type(error).__name__)
        return Unavailable(
            "The database cannot be reached at present.",
            code="database_unavailable",
            retry_after_s=RETRY_AFTER_S,
        )

    def now_s(self, connection: Connection) -> float:
        """Unix time on the clock that all who share this database share."""
        if self.dialect == "sqlite":
            return time.time()  # they are on this machine
        return float(connection.scalar(select(func.extract("epoch", func.clock_timestamp()))) or 0)

    def close(self) -> None:
        self._engine.dispose()


def _parsed(url: str) -> URL:
    try:
        parsed = make_url(url)
    except exc.ArgumentError:
        raise _bad_url() from None
    name = parsed.get_backend_name()
    if name == "sqlite" and parsed.database and Path(parsed.database).is_absolute():
        return parsed
    if name == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    raise _bad_url()


def _bad_url() -> BadRequest:
    return BadRequest(
        "The database's URL must be sqlite:////absolute/path or postgresql://user@host/name.",
        param="NEARFIELD_DATABASE_URL",
    )


def _engine(url: URL) -> Engine:
    if url.get_backend_name() == "sqlite":
        engine = create_engine(url, connect_args={"timeout": BUSY_S}, pool_size=POOL_SIZE)
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    milliseconds = int(STATEMENT_S * 1000)
    try:
        return create_engine(
            url,
            pool_size=POOL_SIZE,
            max_overflow=0,
            pool_timeout=STATEMENT_S,
            pool_pre_ping=True,
            pool_recycle=1800,
            connect_args={
                "connect_timeout": int(CONNECT_S),
                "tcp_user_timeout": milliseconds,  # a partition: packets vanish, nobody says so
                "options": f"-c statement_timeout={milliseconds} "
                f"-c lock_timeout={milliseconds} "
                f"-c idle_in_transaction_session_timeout={4 * milliseconds}",
                "application_name": "nearfield",
            },
        )
    except ModuleNotFoundError:
        raise BadRequest(
            "PostgreSQL needs its driver: pip install 'nearfield[postgres]'",
            param="NEARFIELD_DATABASE_URL",
        ) from None


def _create_private(path: Path) -> None:
    """Digests and bills are nobody else's; SQLite's own files beside it get the same mode."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600, exist_ok=True)
    except OSError as error:
        raise exc.OperationalError("open", None, error) from error


def _prepare_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # we begin transactions ourselves
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")  # readers do not wait for the writer
    cursor.execute("PRAGMA synchronous=FULL")  # a revoked key stays revoked after a power cut
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads first and writes then could not wait for its lock: it would fail.
    writes = connection.get_execution_options().get("nearfield_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
