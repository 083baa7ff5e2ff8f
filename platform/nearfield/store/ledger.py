"""Usage records in SQL: added once, never changed, summed when somebody asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from nearfield.store.database import Database
from nearfield.store.ports import GroupBy, Usage, UsageTotal
from nearfield.store.schema import usage
from sqlalchemy import ColumnElement, Text, case, cast, func, select

RECORDS_AT_ONCE = 1000
_DAY_S = 86400

_NAMES = ", ".join(Usage.__struct_fields__)
_MARKS = ", ".join(["?"] * len(Usage.__struct_fields__))
_ADD = f"INSERT INTO usage ({_NAMES}) VALUES ({_MARKS}) ON CONFLICT DO NOTHING"  # noqa: S608 (ours)
_INSERT: Mapping[str, str] = {"sqlite": _ADD, "postgresql": _ADD.replace("?", "%s")}
"""As the drivers take it, one row at a time. A gateway has one core for all it does: this takes
4 µs a record of it, a statement of SQLAlchemy's 9, and one with all rows in its VALUES 180."""

_COLUMNS: Mapping[GroupBy, ColumnElement[Any]] = {
    "tenant": usage.c.tenant,
    "product": usage.c.product,
    "key": usage.c.key_id,
    "model": usage.c.model,
    "region": usage.c.region,
    "endpoint": usage.c.endpoint,
    "outcome": usage.c.outcome,
}


class SqlLedger:
    """See `ports.Ledger`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def append(self, records: Sequence[Usage]) -> int:
        statement = _INSERT[self._database.dialect]
        added = 0
        for start in range(0, len(records), RECORDS_AT_ONCE):
            rows = [
                msgspec.structs.astuple(record)
                for record in records[start : start + RECORDS_AT_ONCE]
            ]
            with self._database.writing() as connection:
                added += connection.exec_driver_sql(statement, rows).rowcount
        return added

    def totals(
        self,
        by: Sequence[GroupBy],
        *,
        tenant: str | None = None,
        since_s: float | None = None,
        until_s: float | None = None,
        skip: int = 0,
        limit: int | None = None,
    ) -> list[UsageTotal]:
        groups = [self._day() if name == "day" else _COLUMNS[name] for name in by]
        query = select(
            *groups,
            func.count().label("requests"),
            func.sum(case((usage.c.guessed, 1), else_=0)).label("guessed_requests"),
            func.sum(usage.c.input_tokens).label("input_tokens"),
            func.sum(usage.c.cached_tokens).label("cached_tokens"),
            func.sum(usage.c.output_tokens).label("output_tokens"),
            func.sum(usage.c.duration_s).label("duration_s"),
        )
        if tenant is not None:
            query = query.where(usage.c.tenant == tenant)
        if since_s is not None:
            query = query.where(usage.c.started_s >= since_s)
        if until_s is not None:
            query = query.where(usage.c.started_s < until_s)
        if groups:
            query = query.group_by(*groups).order_by(*groups).offset(skip).limit(limit)
        with self._database.reading() as connection:
            rows = connection.execute(query).all()
        return [
            UsageTotal(
                tuple(row[: len(groups)]),
                row.requests,
                int(row.guessed_requests),
                int(row.input_tokens),
                int(row.cached_tokens),
                int(row.output_tokens),
                float(row.duration_s),
            )
            for row in rows
            if row.requests
        ]

    def _day(self) -> ColumnElement[Any]:
        """A record's day in UTC, as 2026-11-24."""
        if self._database.dialect == "sqlite":
            return func.date(usage.c.started_s, "unixepoch")
        moment = func.timezone("UTC", func.to_timestamp(usage.c.started_s))
        return cast(func.to_char(moment, "YYYY-MM-DD"), Text)
