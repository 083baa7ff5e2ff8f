"""The store over one SQL database."""

from __future__ import annotations

from nearfield.store.database import Database
from nearfield.store.directory import SqlDirectory
from nearfield.store.idempotency import SqlIdempotency
from nearfield.store.ledger import SqlLedger
from nearfield.store.ports import Directory, Idempotency, Ledger, Quotas
from nearfield.store.quotas import SqlQuotas
from nearfield.store.schema import facts
from sqlalchemy import Select, select
from sqlalchemy.dialects import postgresql, sqlite


class Store:
    """All ports of one database. Nothing is connected to before it is needed."""

    def __init__(self, url: str) -> None:
        """
        Raises:
            BadRequest: the URL is of no database that is supported.
        """
        self._database = Database(url)
        self.directory: Directory = SqlDirectory(self._database)
        self.quotas: Quotas = SqlQuotas(self._database)
        self.ledger: Ledger = SqlLedger(self._database)
        self.idempotency: Idempotency = SqlIdempotency(self._database)

    def fact(self, name: str) -> str | None:
        """What is recorded under a name."""
        with self._database.reading() as connection:
            kept: str | None = connection.scalar(_fact(name))
        return kept

    def settle_fact(self, name: str, value: str) -> str:
        """What is recorded under a name: this value, unless there was one already."""
        found = self.fact(name)
        if found is not None:
            return found
        module = sqlite if self._database.dialect == "sqlite" else postgresql
        with self._database.writing() as connection:
            insert = module.insert(facts).on_conflict_do_nothing()
            connection.execute(insert, {"name": name, "value": value})
            return str(connection.scalar(_fact(name)))

    def close(self) -> None:
        self._database.close()


def _fact(name: str) -> Select[str]:
    return select(facts.c.value).where(facts.c.name == name)
