"""Tenants, products and keys in SQL."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from nearfield.api.keys import (
    Key,
    Product,
    Snapshot,
    Tenant,
    key_subject,
    product_subject,
    tenant_subject,
)
from nearfield.core.errors import Conflict, NotFound
from nearfield.policy.quota import Limits
from nearfield.store import schema
from nearfield.store.database import Database
from nearfield.store.schema import keys, limits, products, revisions, tenants
from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Select,
    and_,
    exc,
    literal,
    or_,
    select,
    update,
)

_LIMITS = (
    limits.c.requests_per_minute,
    limits.c.tokens_per_minute,
    limits.c.concurrent_streams,
)
_TENANTS = select(tenants, *_LIMITS).outerjoin_from(
    tenants, limits, limits.c.subject == literal(tenant_subject("")) + tenants.c.name
)
_PRODUCTS = select(products, *_LIMITS).outerjoin_from(
    products,
    limits,
    limits.c.subject
    == literal(product_subject("", "").rstrip("/")) + products.c.tenant + "/" + products.c.name,
)
_KEYS = select(keys, *_LIMITS).outerjoin_from(
    keys, limits, limits.c.subject == literal(key_subject("")) + keys.c.id
)


class SqlDirectory:
    """See `ports.Directory`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # ---- following ----

    def revision(self) -> int:
        with self._database.reading() as connection:
            return _revision(connection)

    def changes(self, since: int) -> Snapshot:
        with self._database.reading() as connection:
            # In this order: what is read later is at least as new, and a key needs its tenant.
            revision = _revision(connection)
            if revision == since:
                return Snapshot(revision)
            of_keys = _all(connection, _KEYS.where(keys.c.revision > since))
            of_products = _all(connection, _PRODUCTS.where(products.c.revision > since))
            of_tenants = _all(connection, _TENANTS.where(tenants.c.revision > since))
        return Snapshot(
            revision,
            tuple(_tenant(row) for row in of_tenants),
            tuple(_product(row) for row in of_products),
            tuple(_key(row) for row in of_keys),
        )

    # ---- tenants ----

    def tenant(self, name: str) -> Tenant:
        with self._database.reading() as connection:
            return _tenant(_one(connection, _TENANTS.where(tenants.c.name == name), "tenant", name))

    def tenants(self, *, after: str | None = None, limit: int | None = None) -> list[Tenant]:
        query = _beyond(_TENANTS, tenants.c.name, after).order_by(tenants.c.name).limit(limit)
        with self._database.reading() as connection:
            return [_tenant(row) for row in _all(connection, query)]

    def add_tenant(self, tenant: Tenant) -> None:
        with self._database.writing() as connection:
            values = _tenant_values(tenant, _next_revision(connection))
            try:
                connection.execute(tenants.insert(), values)
            except exc.IntegrityError:
                raise _taken("tenant", tenant.name) from None
            _put_limits(connection, tenant_subject(tenant.name), tenant.limits)

    def change_tenant(self, name: str, change: Callable[[Tenant], Tenant]) -> Tenant:
        with self._database.writing() as connection:
            revision = _next_revision(connection)  # first: it keeps other writers out
            query = _TENANTS.where(tenants.c.name == name)
            tenant = change(_tenant(_one(connection, query, "tenant", name)))
            values = _tenant_values(tenant, revision)
            connection.execute(update(tenants).where(tenants.c.name == name).values(**values))
            _put_limits(connection, tenant_subject(name), tenant.limits)
            return tenant

    # ---- products ----

    def product(self, tenant: str, name: str) -> Product:
        query = _PRODUCTS.where(products.c.tenant == tenant, products.c.name == name)
        with self._database.reading() as connection:
            return _product(_one(connection, query, "product", f"{tenant}/{name}"))

    def products(
        self, tenant: str | None = None, *, after: str | None = None, limit: int | None = None
    ) -> list[Product]:
        query = _beyond(_of_tenant(_PRODUCTS, products.c.tenant, tenant), products.c.name, after)
        ordered = query.order_by(products.c.tenant, products.c.name).limit(limit)
        with self._database.reading() as connection:
            return [_product(row) for row in _all(connection, ordered)]

    def add_product(self, product: Product) -> None:
        with self._database.writing() as connection:
            _require_tenant(connection, product.tenant)
            values = {
                "tenant": product.tenant,
                "name": product.name,
                "created_s": product.created_s,
                "revision": _next_revision(connection),
            }
            try:
                connection.execute(products.insert(), values)
            except exc.IntegrityError:
                raise _taken("product", f"{product.tenant}/{product.name}") from None
            subject = product_subject(product.tenant, product.name)
            _put_limits(connection, subject, product.limits)

    def change_product(
        self, tenant: str, name: str, change: Callable[[Product], Product]
    ) -> Product:
        here = (products.c.tenant == tenant, products.c.name == name)
        with self._database.writing() as connection:
            revision = _next_revision(connection)
            row = _one(connection, _PRODUCTS.where(*here), "product", f"{tenant}/{name}")
            product = change(_product(row))
            connection.execute(update(products).where(*here).values(revision=revision))
            _put_limits(connection, product_subject(tenant, name), product.limits)
            return product

    # ---- keys ----

    def key(self, key_id: str) -> Key:
        with self._database.reading() as connection:
            return _read_key(connection, key_id)

    def keys(
        self, tenant: str | None = None, *, after: str | None = None, limit: int | None = None
    ) -> list[Key]:
        query = _of_tenant(_KEYS, keys.c.tenant, tenant)
        with self._database.reading() as connection:
            if after is not None:
                made = _of_tenant(select(keys.c.created_s), keys.c.tenant, tenant)
                made_s = _one(connection, made.where(keys.c.id == after), "key", after).created_s
                at_once = and_(keys.c.created_s == made_s, keys.c.id > after)
                query = query.where(or_(keys.c.created_s > made_s, at_once))
            rows = _all(connection, query.order_by(keys.c.created_s, keys.c.id).limit(limit))
            return [_key(row) for row in rows]

    def add_key(self, key: Key) -> None:
        with self._database.writing() as connection:
            _require_tenant(connection, key.tenant)
            values = {
                "id": key.id,
                "tenant": key.tenant,
                "product": key.product,
                "label": key.label,
                "scopes": json.dumps(sorted(key.scopes)),
                "models": _dumped(key.models),
                "digest": key.digest,
                "created_s": key.created_s,
                "expires_s": key.expires_s,
                "revision": _next_revision(connection),
            }
            try:
                connection.execute(keys.insert(), values)
            except exc.IntegrityError:
                raise _missing("product", f"{key.tenant}/{key.product}") from None
            _put_limits(connection, key_subject(key.id), key.limits)

    def rotate_key(self, key_id: str, digest: str, *, now_s: float, grace_s: float) -> Key:
        with self._database.writing() as connection:
            revision = _next_revision(connection)
            key = _read_key(connection, key_id)
            if key.revoked_s is not None:
                raise Conflict(f"Key {key_id} is revoked: create another.", code="key_revoked")
            values: dict[str, Any] = {
                "digest": digest,
                "rotated_s": now_s,
                "previous_digest": key.digest,
                "previous_until_s": now_s + grace_s,
            }
            _update_key(connection, key_id, revision=revision, **values)
            return replace(key, **values)

    def revoke_key(self, key_id: str, *, now_s: float) -> Key:
        with self._database.writing() as connection:
            revision = _next_revision(connection)
            key = _read_key(connection, key_id)
            if key.revoked_s is not None:
                return key
            _update_key(connection, key_id, revision=revision, revoked_s=now_s)
            return replace(key, revoked_s=now_s)


# ---- statements ---------------------------------------------------------------------------------


def _revision(connection: Connection) -> int:
    return int(connection.scalar(select(revisions.c.revision)) or 0)


def _next_revision(connection: Connection) -> int:
    """Locks the counter until the end of the transaction: revisions become visible in order."""
    bump = update(revisions).values(revision=revisions.c.revision + 1)
    return int(connection.scalar(bump.returning(revisions.c.revision)) or 0)


def _all(connection: Connection, query: Select[Any]) -> Iterable[Row[Any]]:
    return connection.execute(query).all()


def _one(connection: Connection, query: Select[Any], what: str, name: str) -> Row[Any]:
    row = connection.execute(query).one_or_none()
    if row is None:
        raise _missing(what, name)
    return row


def _of_tenant(query: Select[Any], column: ColumnElement[str], tenant: str | None) -> Select[Any]:
    return query if tenant is None else query.where(column == tenant)


def _beyond(query: Select[Any], column: ColumnElement[str], after: str | None) -> Select[Any]:
    return query if after is None else query.where(column > after)


def _require_tenant(connection: Connection, name: str) -> None:
    _one(connection, select(tenants.c.name).where(tenants.c.name == name), "tenant", name)


def _read_key(connection: Connection, key_id: str) -> Key:
    return _key(_one(connection, _KEYS.where(keys.c.id == key_id), "key", key_id))


def _update_key(connection: Connection, key_id: str, **values: Any) -> None:
    connection.execute(update(keys).where(keys.c.id == key_id).values(**values))


def _put_limits(connection: Connection, subject: str, bounds: Limits) -> None:
    connection.execute(schema.limits.delete().where(limits.c.subject == subject))
    if bounds != Limits():
        values = {
            "subject": subject,
            "requests_per_minute": bounds.requests_per_minute,
            "tokens_per_minute": bounds.tokens_per_minute,
            "concurrent_streams": bounds.concurrent_streams,
        }
        connection.execute(schema.limits.insert(), values)


# ---- rows ---------------------------------------------------------------------------------------


def _tenant_values(tenant: Tenant, revision: int) -> dict[str, Any]:
    return {
        "name": tenant.name,
        "jurisdictions": _dumped(tenant.jurisdictions),
        "suspended": tenant.suspended,
        "created_s": tenant.created_s,
        "revision": revision,
    }


def _tenant(row: Row[Any]) -> Tenant:
    jurisdictions = _loaded(row.jurisdictions)
    return Tenant(row.name, jurisdictions, row.suspended, _limits(row), row.created_s)


def _product(row: Row[Any]) -> Product:
    return Product(row.tenant, row.name, _limits(row), row.created_s)


def _key(row: Row[Any]) -> Key:
    return Key(
        id=row.id,
        tenant=row.tenant,
        product=row.product,
        label=row.label,
        scopes=frozenset(json.loads(row.scopes)),
        models=_loaded(row.models),
        digest=row.digest,
        limits=_limits(row),
        created_s=row.created_s,
        expires_s=row.expires_s,
        revoked_s=row.revoked_s,
        rotated_s=row.rotated_s,
        previous_digest=row.previous_digest,
        previous_until_s=row.previous_until_s,
    )


def _limits(row: Row[Any]) -> Limits:
    return Limits(row.requests_per_minute, row.tokens_per_minute, row.concurrent_streams)


def _dumped(names: frozenset[str] | None) -> str | None:
    return None if names is None else json.dumps(sorted(names))


def _loaded(text: str | None) -> frozenset[str] | None:
    return None if text is None else frozenset(json.loads(text))


def _missing(what: str, name: str) -> NotFound:
    return NotFound(f"There is no {what} {name!r}.", code=f"{what}_not_found")


def _taken(what: str, name: str) -> Conflict:
    return Conflict(f"There is a {what} {name!r} already.", code=f"{what}_exists")
