"""The buckets behind all limits, in SQL: `policy.quota.renew`, many claims to a transaction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nearfield.policy import quota
from nearfield.policy.quota import Bucket, Claim, Grant, Lease, Limits
from nearfield.store.database import Database
from nearfield.store.schema import buckets, leases, limits
from sqlalchemy import Connection, Table, bindparam, delete, select, tuple_, update
from sqlalchemy.dialects import postgresql, sqlite

Place = tuple[str, str]
"""A subject and a dimension."""

CLAIMS_AT_ONCE = 200
"""Bounds a transaction, and the parameters of a statement."""
SWEEP_AFTER_S = 3600.0


class SqlQuotas:
    """See `ports.Quotas`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def renew(self, claims: Sequence[Claim]) -> list[Grant]:
        grants: dict[Place, Grant] = {}
        # In one order everywhere, so that no two gateways wait for each other.
        ordered = sorted(claims, key=_place)
        for start in range(0, len(ordered), CLAIMS_AT_ONCE):
            with self._database.writing() as connection:
                for grant in self._renew(connection, ordered[start : start + CLAIMS_AT_ONCE]):
                    grants[grant.subject, grant.dimension] = grant
        return [grants[_place(claim)] for claim in claims]

    def _renew(self, connection: Connection, claims: Sequence[Claim]) -> list[Grant]:
        bounds = _bounds(connection, {claim.subject for claim in claims})
        bounded = [
            (claim, bound)
            for claim in claims
            if (bound := bounds.get(claim.subject, Limits()).of(claim.dimension)) is not None
        ]
        places = [_place(claim) for claim, _ in bounded]
        grants = [
            Grant(claim.subject, claim.dimension, None)
            for claim in claims
            if _place(claim) not in set(places)
        ]
        if not bounded:
            return grants
        levels = self._locked_buckets(connection, places)
        now_s = self._database.now_s(connection)  # after the locks: whoever had them is past
        held = _leases(connection, places, now_s)
        new_buckets: list[dict[str, Any]] = []
        new_leases: list[dict[str, Any]] = []
        for claim, bound in bounded:
            place = _place(claim)
            bucket, lease, grant = quota.renew(
                bound, levels[place], held.get(place, {}), claim, now_s=now_s
            )
            grants.append(grant)
            new_buckets.append(_bucket_values(place, bucket))
            new_leases.append(_lease_values(place, claim.holder, lease))
        self._write(connection, new_buckets, new_leases)
        return grants

    def sweep(self) -> int:
        with self._database.writing() as connection:
            expired = leases.c.expires_s < self._database.now_s(connection) - SWEEP_AFTER_S
            return connection.execute(delete(leases).where(expired)).rowcount

    def _locked_buckets(
        self, connection: Connection, places: Sequence[Place]
    ) -> dict[Place, Bucket | None]:
        rows = [{"subject": subject, "dimension": dimension} for subject, dimension in places]
        connection.execute(self._insert(buckets).on_conflict_do_nothing(), rows)
        query = (
            select(buckets)
            .where(tuple_(buckets.c.subject, buckets.c.dimension).in_(places))
            .order_by(buckets.c.subject, buckets.c.dimension)
            .with_for_update()
        )
        return {
            (row.subject, row.dimension): (
                None if row.level is None else Bucket(row.level, row.updated_s)
            )
            for row in connection.execute(query)
        }

    def _write(
        self,
        connection: Connection,
        new_buckets: list[dict[str, Any]],
        new_leases: list[dict[str, Any]],
    ) -> None:
        change = update(buckets).where(
            buckets.c.subject == bindparam("of_subject"),
            buckets.c.dimension == bindparam("of_dimension"),
        )
        connection.execute(change, new_buckets)
        upsert = self._insert(leases)
        columns = ("granted", "spent", "returned", "expires_s")
        upsert = upsert.on_conflict_do_update(
            index_elements=["subject", "dimension", "holder"],
            set_={name: upsert.excluded[name] for name in columns},
        )
        connection.execute(upsert, new_leases)

    def _insert(self, table: Table) -> sqlite.Insert | postgresql.Insert:
        if self._database.dialect == "sqlite":
            return sqlite.insert(table)
        return postgresql.insert(table)


def _bounds(connection: Connection, subjects: set[str]) -> dict[str, Limits]:
    rows = connection.execute(select(limits).where(limits.c.subject.in_(subjects)))
    return {
        row.subject: Limits(row.requests_per_minute, row.tokens_per_minute, row.concurrent_streams)
        for row in rows
    }


def _leases(
    connection: Connection, places: Sequence[Place], now_s: float
) -> dict[Place, dict[str, Lease]]:
    """Of each place, by holder; those of these places that have expired are removed."""
    here = tuple_(leases.c.subject, leases.c.dimension).in_(places)
    connection.execute(delete(leases).where(here, leases.c.expires_s <= now_s))
    found: dict[Place, dict[str, Lease]] = {}
    for row in connection.execute(select(leases).where(here)):
        lease = Lease(row.granted, row.spent, row.returned, row.expires_s)
        found.setdefault((row.subject, row.dimension), {})[row.holder] = lease
    return found


def _place(claim: Claim) -> Place:
    return claim.subject, claim.dimension


def _bucket_values(place: Place, bucket: Bucket) -> dict[str, Any]:
    subject, dimension = place
    return {
        "of_subject": subject,
        "of_dimension": dimension,
        "level": bucket.level,
        "updated_s": bucket.updated_s,
    }


def _lease_values(place: Place, holder: str, lease: Lease) -> dict[str, Any]:
    subject, dimension = place
    return {
        "subject": subject,
        "dimension": dimension,
        "holder": holder,
        "granted": lease.granted,
        "spent": lease.spent,
        "returned": lease.returned,
        "expires_s": lease.expires_s,
    }
