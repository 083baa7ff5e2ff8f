"""Who executes a request that may come twice, in SQL.

A claim holds while its lease does; each new one is a new attempt, and only the newest attempt can
answer. So two gateways never both believe that a request is theirs.
"""

from __future__ import annotations

import json
from typing import Any

from nearfield.store.database import Database
from nearfield.store.ports import Answered, Claimed, InFlight, OtherRequest
from nearfield.store.schema import idempotency
from sqlalchemy import Row, delete, select, update
from sqlalchemy.dialects import postgresql, sqlite

KEEP_UNANSWERED_S = 24 * 3600.0
_RELEASED = 0.0


class SqlIdempotency:
    """See `ports.Idempotency`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def claim(
        self, tenant: str, key: str, *, fingerprint: str, owner: str, lease_s: float
    ) -> Claimed | InFlight | Answered | OtherRequest:
        module = sqlite if self._database.dialect == "sqlite" else postgresql
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
            insert = module.insert(idempotency).on_conflict_do_nothing()
            if connection.scalar(insert.returning(idempotency.c.attempt), values) is not None:
                return Claimed(1, orphaned=False)
            row = connection.execute(select(idempotency).where(*here).with_for_update()).first()
            if row is None:
                return InFlight(0.0)  # it was swept away this moment: ask again
            if row.fingerprint != fingerprint:
                return OtherRequest()
            if row.status is not None:
                return _answer(row)
            if row.lease_ends_s > now_s:
                return InFlight(row.lease_ends_s - now_s)
            again = {
                "owner": owner,
                "attempt": row.attempt + 1,
                "lease_ends_s": now_s + lease_s,
                "expires_s": now_s + KEEP_UNANSWERED_S,
            }
            connection.execute(update(idempotency).where(*here).values(**again))
            return Claimed(row.attempt + 1, orphaned=row.lease_ends_s != _RELEASED)

    def extend(self, tenant: str, key: str, attempt: int, *, lease_s: float) -> bool:
        with self._database.writing() as connection:
            ends_s = self._database.now_s(connection) + lease_s
            return self._change(connection, tenant, key, attempt, lease_ends_s=ends_s)

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
            old = idempotency.c.expires_s <= self._database.now_s(connection)
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
