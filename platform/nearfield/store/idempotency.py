"""Who executes a request that may come twice, in SQL.

Each claim is a new attempt, and only the newest attempt can answer. It holds as long as its owner,
a process, says that it lives: one row for all its claims. When the time it gave is over it is
doubted first, and found dead some time later. So while the database itself was away, which looks
the same, nobody loses a claim who comes back to say that it lives.
"""

from __future__ import annotations

import json
from typing import Any

from nearfield.store.database import Database
from nearfield.store.ports import Answered, Claimed, InFlight, OtherRequest
from nearfield.store.schema import claimants, idempotency
from sqlalchemy import Connection, Row, Table, delete, select, update
from sqlalchemy.dialects import postgresql, sqlite

KEEP_UNANSWERED_S = 24 * 3600.0
DOUBT_S = 0.4
"""From the first doubt of an owner until it is dead: it says that it lives more often than that."""
_RELEASED = 0.0
_NOBODY = ""


class SqlIdempotency:
    """See `ports.Idempotency`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def claim(
        self, tenant: str, key: str, *, fingerprint: str, owner: str, lease_s: float
    ) -> Claimed | InFlight | Answered | OtherRequest:
        here = (idempotency.c.tenant == tenant, idempotency.c.key == key)
        with self._database.writing() as connection:
            now_s = self._database.now_s(connection)
            connection.execute(delete(idempotency).where(*here, idempotency.c.expires_s <= now_s))
            values = {
                "tenant": tenant,
                "key": key,
                "fingerprint": fingerprint,
                "owner": owner,
                "attempt": 1,
                "lease_ends_s": now_s + lease_s,
                "expires_s": now_s + KEEP_UNANSWERED_S,
            }
            insert = self._insert(idempotency).on_conflict_do_nothing()
            if connection.scalar(insert.returning(idempotency.c.attempt), values) is not None:
                self._lives(connection, owner, now_s + lease_s)
                return Claimed(1, orphaned=False)
            row = connection.execute(select(idempotency).where(*here).with_for_update()).first()
            if row is None:
                return InFlight(0.0)  # it was swept away this moment: ask again
            if row.fingerprint != fingerprint:
                return OtherRequest()
            if row.status is not None:
                return _answer(row)
            released = row.lease_ends_s == _RELEASED
            left_s = 0.0 if released else self._left_s(connection, row.owner, now_s)
            if left_s > 0.0:
                return InFlight(left_s)
            again = {
                "owner": owner,
                "attempt": row.attempt + 1,
                "lease_ends_s": now_s + lease_s,
                "expires_s": now_s + KEEP_UNANSWERED_S,
            }
            connection.execute(update(idempotency).where(*here).values(**again))
            self._lives(connection, owner, now_s + lease_s)
            return Claimed(row.attempt + 1, orphaned=not released)

    def _left_s(self, connection: Connection, owner: str, now_s: float) -> float:
        """Until the owner of a claim may be found dead; 0: it is."""
        of = claimants.c.owner == owner
        found = connection.execute(select(claimants).where(of)).first()
        if found is None:
            return 0.0
        if found.lives_until_s > now_s:
            return float(found.lives_until_s - now_s)
        if found.doubted_s is None:
            connection.execute(update(claimants).where(of).values(doubted_s=now_s))
            return DOUBT_S
        return max(0.0, float(found.doubted_s + DOUBT_S - now_s))

    def lives(self, owner: str, *, lease_s: float) -> None:
        with self._database.writing() as connection:
            self._lives(connection, owner, self._database.now_s(connection) + lease_s)

    def _lives(self, connection: Connection, owner: str, until_s: float) -> None:
        """Last in its transaction, and in none that has doubted another: else two could wait for
        each other."""
        said = {"lives_until_s": until_s, "doubted_s": None}
        insert = self._insert(claimants).values(owner=owner, **said)
        connection.execute(insert.on_conflict_do_update(index_elements=["owner"], set_=said))

    def _insert(self, table: Table) -> Any:
        module = sqlite if self._database.dialect == "sqlite" else postgresql
        return module.insert(table)

    def abandon(self, tenant: str, key: str, attempt: int) -> bool:
        with self._database.writing() as connection:
            return self._change(connection, tenant, key, attempt, owner=_NOBODY)

    def complete(
        self, tenant: str, key: str, attempt: int, answer: Answered, *, keep_s: float
    ) -> bool:
        with self._database.writing() as connection:
            return self._change(
                connection,
                tenant,
                key,
                attempt,
                status=answer.status,
                headers=json.dumps(answer.headers),
                body=answer.body,
                expires_s=self._database.now_s(connection) + keep_s,
            )

    def release(self, tenant: str, key: str, attempt: int) -> bool:
        with self._database.writing() as connection:
            return self._change(connection, tenant, key, attempt, lease_ends_s=_RELEASED)

    def sweep(self) -> int:
        with self._database.writing() as connection:
            now_s = self._database.now_s(connection)
            dead = claimants.c.lives_until_s <= now_s - KEEP_UNANSWERED_S
            connection.execute(delete(claimants).where(dead))
            old = idempotency.c.expires_s <= now_s
            return connection.execute(delete(idempotency).where(old)).rowcount

    @staticmethod
    def _change(connection: Any, tenant: str, key: str, attempt: int, **values: Any) -> bool:
        statement = update(idempotency).where(
            idempotency.c.tenant == tenant,
            idempotency.c.key == key,
            idempotency.c.attempt == attempt,
            idempotency.c.status.is_(None),
            # What was given back stays so, whatever of the same attempt comes later.
            idempotency.c.lease_ends_s != _RELEASED,
        )
        return bool(connection.execute(statement.values(**values)).rowcount)


def _answer(row: Row[Any]) -> Answered:
    headers = tuple((name, value) for name, value in json.loads(row.headers))
    return Answered(row.status, headers, row.body)
