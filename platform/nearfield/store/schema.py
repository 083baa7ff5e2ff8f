"""The tables as SQLAlchemy sees them. `migrations` creates them; a test compares the two.

Times are Unix seconds. `revision` is the directory's, at the row's last change.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    LargeBinary,
    MetaData,
    Table,
    Text,
)

metadata = MetaData()

facts = Table(
    # name → value: the schema's version, the pepper's fingerprint
    "facts",
    metadata,
    Column("name", Text, primary_key=True),
    Column("value", Text, nullable=False),
)

revisions = Table(
    # one row: the directory's newest revision
    "revisions",
    metadata,
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("revision", BigInteger, nullable=False),
)

tenants = Table(
    "tenants",
    metadata,
    Column("name", Text, primary_key=True),
    Column("jurisdictions", Text),  # a JSON list; NULL: anywhere
    Column("suspended", Boolean, nullable=False),
    Column("created_s", Double, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Index("tenants_by_revision", "revision"),
)

products = Table(
    "products",
    metadata,
    Column("tenant", Text, ForeignKey("tenants.name"), primary_key=True),
    Column("name", Text, primary_key=True),
    Column("created_s", Double, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Index("products_by_revision", "revision"),
)

keys = Table(
    "keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("tenant", Text, ForeignKey("tenants.name"), nullable=False),
    Column("product", Text),
    Column("label", Text, nullable=False),
    Column("scopes", Text, nullable=False),  # a JSON list
    Column("models", Text),  # a JSON list; NULL: any
    Column("digest", Text, nullable=False),
    Column("created_s", Double, nullable=False),
    Column("expires_s", Double),
    Column("revoked_s", Double),
    Column("rotated_s", Double),
    Column("previous_digest", Text),
    Column("previous_until_s", Double),
    Column("revision", BigInteger, nullable=False),
    ForeignKeyConstraint(["tenant", "product"], ["products.tenant", "products.name"]),
    Index("keys_by_revision", "revision"),
    Index("keys_by_tenant", "tenant"),
)

limits = Table(
    "limits",
    metadata,
    Column("subject", Text, primary_key=True),
    Column("requests_per_minute", BigInteger),
    Column("tokens_per_minute", BigInteger),
    Column("concurrent_streams", BigInteger),
)

buckets = Table(
    "buckets",
    metadata,
    Column("subject", Text, primary_key=True),
    Column("dimension", Text, primary_key=True),
    Column("level", Double),  # NULL: nobody asked yet
    Column("updated_s", Double),
)

leases = Table(
    "leases",
    metadata,
    Column("subject", Text, primary_key=True),
    Column("dimension", Text, primary_key=True),
    Column("holder", Text, primary_key=True),
    Column("granted", BigInteger, nullable=False),
    Column("spent", BigInteger, nullable=False),
    Column("returned", BigInteger, nullable=False),
    Column("expires_s", Double, nullable=False),
    Index("leases_by_expiry", "expires_s"),
)

usage = Table(
    "usage",
    metadata,
    Column("record_id", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("product", Text),
    Column("key_id", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("version", Text, nullable=False),
    Column("region", Text, nullable=False),
    Column("endpoint", Text, nullable=False),
    Column("operation", Text, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("input_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("started_s", Double, nullable=False),
    Column("duration_s", Double, nullable=False),
    Column("guessed", Boolean, nullable=False),
    Index("usage_by_tenant", "tenant", "started_s"),
    Index("usage_by_start", "started_s"),
)

idempotency = Table(
    "idempotency",
    metadata,
    Column("tenant", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("fingerprint", Text, nullable=False),
    Column("owner", Text, nullable=False),
    Column("attempt", BigInteger, nullable=False),
    Column("lease_ends_s", Double, nullable=False),  # 0: given back; else when it was first due
    Column("expires_s", Double, nullable=False),
    Column("status", BigInteger),  # NULL: not answered
    Column("headers", Text),
    Column("body", LargeBinary),
    Index("idempotency_by_expiry", "expires_s"),
)

claimants = Table(
    # Processes that hold claims of `idempotency`: one row each, however many those are.
    "claimants",
    metadata,
    Column("owner", Text, primary_key=True),
    Column("lives_until_s", Double, nullable=False),
    Column("doubted_s", Double),  # when somebody first found that in the past; NULL: nobody has
)
