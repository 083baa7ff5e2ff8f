"""The schema, step by step: each step once, in order, in the transaction that records it.

A step is SQL that SQLite and PostgreSQL both take; where they differ, one text each. A step that
was released is never edited: the next one is added.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from nearfield.core.errors import Unavailable
from sqlalchemy import Connection, text

_ADVISORY_LOCK = 0x6E656172  # "near"

_FIRST: Final = """
CREATE TABLE revisions (id BIGINT PRIMARY KEY, revision BIGINT NOT NULL);
INSERT INTO revisions (id, revision) VALUES (1, 1);
CREATE TABLE tenants (
    name TEXT PRIMARY KEY, jurisdictions TEXT, suspended BOOLEAN NOT NULL,
    created_s DOUBLE PRECISION NOT NULL, revision BIGINT NOT NULL
);
CREATE INDEX tenants_by_revision ON tenants (revision);
CREATE TABLE products (
    tenant TEXT NOT NULL REFERENCES tenants (name), name TEXT NOT NULL,
    created_s DOUBLE PRECISION NOT NULL, revision BIGINT NOT NULL, PRIMARY KEY (tenant, name)
);
CREATE INDEX products_by_revision ON products (revision);
CREATE TABLE keys (
    id TEXT PRIMARY KEY, tenant TEXT NOT NULL REFERENCES tenants (name), product TEXT,
    label TEXT NOT NULL, scopes TEXT NOT NULL, models TEXT, digest TEXT NOT NULL,
    created_s DOUBLE PRECISION NOT NULL, expires_s DOUBLE PRECISION, revoked_s DOUBLE PRECISION,
    rotated_s DOUBLE PRECISION, previous_digest TEXT, previous_until_s DOUBLE PRECISION,
    revision BIGINT NOT NULL,
    FOREIGN KEY (tenant, product) REFERENCES products (tenant, name)
);
CREATE INDEX keys_by_revision ON keys (revision);
CREATE INDEX keys_by_tenant ON keys (tenant);
CREATE TABLE limits (
    subject TEXT PRIMARY KEY, requests_per_minute BIGINT, tokens_per_minute BIGINT,
    concurrent_streams BIGINT
);
CREATE TABLE buckets (
    subject TEXT NOT NULL, dimension TEXT NOT NULL, level DOUBLE PRECISION,
    updated_s DOUBLE PRECISION, PRIMARY KEY (subject, dimension)
);
CREATE TABLE leases (
    subject TEXT NOT NULL, dimension TEXT NOT NULL, holder TEXT NOT NULL, granted BIGINT NOT NULL,
    spent BIGINT NOT NULL, returned BIGINT NOT NULL, expires_s DOUBLE PRECISION NOT NULL,
    PRIMARY KEY (subject, dimension, holder)
);
CREATE INDEX leases_by_expiry ON leases (expires_s);
CREATE TABLE usage (
    record_id TEXT PRIMARY KEY, tenant TEXT NOT NULL, product TEXT, key_id TEXT NOT NULL,
    model TEXT NOT NULL, version TEXT NOT NULL, region TEXT NOT NULL, endpoint TEXT NOT NULL,
    operation TEXT NOT NULL, outcome TEXT NOT NULL, input_tokens BIGINT NOT NULL,
    cached_tokens BIGINT NOT NULL, output_tokens BIGINT NOT NULL,
    started_s DOUBLE PRECISION NOT NULL, duration_s DOUBLE PRECISION NOT NULL
);
CREATE INDEX usage_by_tenant ON usage (tenant, started_s);
CREATE INDEX usage_by_start ON usage (started_s);
CREATE TABLE idempotency (
    tenant TEXT NOT NULL, key TEXT NOT NULL, fingerprint TEXT NOT NULL, owner TEXT NOT NULL,
    attempt BIGINT NOT NULL, lease_ends_s DOUBLE PRECISION NOT NULL,
    expires_s DOUBLE PRECISION NOT NULL, status BIGINT, headers TEXT, body {binary},
    PRIMARY KEY (tenant, key)
);
CREATE INDEX idempotency_by_expiry ON idempotency (expires_s);
"""

# A ledger that could be edited would be none.
_USAGE_IS_APPEND_ONLY: Final = {
    "sqlite": """
        CREATE TRIGGER usage_is_not_updated BEFORE UPDATE ON usage
            BEGIN SELECT RAISE(ABORT, 'usage is append-only') \\; END;
        CREATE TRIGGER usage_is_not_deleted BEFORE DELETE ON usage
            BEGIN SELECT RAISE(ABORT, 'usage is append-only') \\; END
    """,
    "postgresql": """
        CREATE FUNCTION usage_is_append_only() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN RAISE EXCEPTION 'usage is append-only' \\; END $$;
        CREATE TRIGGER usage_is_not_changed BEFORE UPDATE OR DELETE OR TRUNCATE ON usage
            EXECUTE FUNCTION usage_is_append_only()
    """,
}

_USAGE_MAY_BE_GUESSED: Final = """
ALTER TABLE usage ADD COLUMN guessed BOOLEAN NOT NULL DEFAULT FALSE;
"""

_CLAIMANTS_SAY_THAT_THEY_LIVE: Final = """
CREATE TABLE claimants (
    owner TEXT PRIMARY KEY, lives_until_s DOUBLE PRECISION NOT NULL, doubted_s DOUBLE PRECISION
);
"""

MIGRATIONS: tuple[str | Mapping[str, str], ...] = (
    _FIRST,
    _USAGE_IS_APPEND_ONLY,
    _USAGE_MAY_BE_GUESSED,
    _CLAIMANTS_SAY_THAT_THEY_LIVE,
)
_BINARY = {"sqlite": "BLOB", "postgresql": "BYTEA"}


def migrate(connection: Connection, steps: tuple[str | Mapping[str, str], ...] = MIGRATIONS) -> int:
    """Bring the schema up to date, in the transaction that `connection` is in.

    Returns:
        how many steps were missing.

    Raises:
        Unavailable: the schema is newer than this program.
    """
    dialect = connection.dialect.name
    if dialect == "postgresql":  # several gateways may start at once; SQLite's transaction locks
        connection.execute(text(f"SELECT pg_advisory_xact_lock({_ADVISORY_LOCK})"))
    connection.execute(
        text("CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL)")
    )
    found = connection.scalar(text("SELECT value FROM facts WHERE name = 'schema'"))
    version = int(found or 0)
    if version > len(steps):
        raise Unavailable(
            f"The database's schema is at version {version} and this program knows up to "
            f"{len(steps)}: it was changed by a newer nearfield. Upgrade this one."
        )
    for step in steps[version:]:
        for statement in _statements(step if isinstance(step, str) else step[dialect]):
            connection.exec_driver_sql(statement.format(binary=_BINARY[dialect]))
    missing = len(steps) - version
    if missing:
        statement = "INSERT INTO facts (name, value) VALUES ('schema', :version) ON CONFLICT (name)"
        connection.execute(
            text(statement + " DO UPDATE SET value = excluded.value"), {"version": str(len(steps))}
        )
    return missing


def _statements(step: str) -> list[str]:
    """The statements of a step. A semicolon inside one is written with a backslash."""
    parts = step.replace("\\;", "\0").split(";")
    return [part.replace("\0", ";").strip() for part in parts if part.strip()]
