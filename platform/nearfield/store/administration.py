"""Everything an administrator does: one method each, for the command line and the admin API.

Who may do what is decided by whoever calls this.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from nearfield.api.keys import (
    Key,
    Product,
    Snapshot,
    Tenant,
    key_mac,
    new_key,
    new_key_id,
    save_keys,
    usable,
)
from nearfield.api.signing import Mac, read_private
from nearfield.core.errors import BadRequest, Conflict
from nearfield.core.settings import Settings
from nearfield.policy.quota import Limits
from nearfield.store.forms import (
    NewKey,
    NewProduct,
    NewTenant,
    ProductChange,
    Rotation,
    TenantChange,
)
from nearfield.store.ports import GroupBy, UsageTotal
from nearfield.store.sql import Store

_PEPPER_BYTES = 32


class Administration:
    """Tenants, products, keys and usage of one store."""

    def __init__(
        self, store: Store, pepper: bytes, *, clock: Callable[[], float] = time.time
    ) -> None:
        """
        Args:
            clock: Unix time.
        """
        self._directory = store.directory
        self._ledger = store.ledger
        self._pepper = pepper
        self._mac = key_mac(pepper)
        self._clock = clock

    # ---- tenants and products ----

    def create_tenant(self, form: NewTenant) -> Tenant:
        """
        Raises:
            Conflict: the name is taken.
        """
        tenant = Tenant(
            form.name,
            _names(form.jurisdictions),
            suspended=False,
            limits=form.limits.onto(Limits()),
            created_s=self._clock(),
        )
        self._directory.add_tenant(tenant)
        return tenant

    def tenants(self, *, after: str | None = None, limit: int | None = None) -> list[Tenant]:
        """See `ports.Directory`, here and below."""
        return self._directory.tenants(after=after, limit=limit)

    def tenant(self, name: str) -> Tenant:
        """
        Raises:
            NotFound: there is none.
        """
        return self._directory.tenant(name)

    def change_tenant(self, name: str, form: TenantChange) -> Tenant:
        """
        Raises:
            NotFound: there is none.
        """
        changes = form.given("jurisdictions", "suspended")
        if "jurisdictions" in changes:
            changes["jurisdictions"] = _names(form.jurisdictions)
        return self._directory.change_tenant(
            name, lambda tenant: replace(tenant, limits=form.limits.onto(tenant.limits), **changes)
        )

    def create_product(self, tenant: str, form: NewProduct) -> Product:
        """
        Raises:
            Conflict: the name is taken. NotFound: there is no such tenant.
        """
        product = Product(tenant, form.name, form.limits.onto(Limits()), self._clock())
        self._directory.add_product(product)
        return product

    def products(
        self, tenant: str | None = None, *, after: str | None = None, limit: int | None = None
    ) -> list[Product]:
        return self._directory.products(tenant, after=after, limit=limit)

    def product(self, tenant: str, name: str) -> Product:
        """
        Raises:
            NotFound: there is none.
        """
        return self._directory.product(tenant, name)

    def change_product(self, tenant: str, name: str, form: ProductChange) -> Product:
        """
        Raises:
            NotFound: there is none.
        """
        return self._directory.change_product(
            tenant, name, lambda product: replace(product, limits=form.limits.onto(product.limits))
        )

    # ---- keys ----

    def create_key(self, form: NewKey) -> tuple[Key, str]:
        """A key, and what its owner must keep: it is not kept here.

        Raises:
            NotFound: there is no such tenant or product.
        """
        now_s = self._clock()
        key_id = new_key_id()
        presented = new_key(key_id)
        key = Key(
            id=key_id,
            tenant=form.tenant,
            product=form.product,
            label=form.label,
            scopes=frozenset(form.scopes),
            models=_names(form.models),
            digest=self._digest(presented),
            limits=form.limits.onto(Limits()),
            created_s=now_s,
            expires_s=None if form.expires_in_s is None else now_s + form.expires_in_s,
        )
        self._directory.add_key(key)
        return key, presented

    def keys(
        self, tenant: str | None = None, *, after: str | None = None, limit: int | None = None
    ) -> list[Key]:
        """
        Raises:
            NotFound: there is no key `after` among them.
        """
        return self._directory.keys(tenant, after=after, limit=limit)

    def key(self, key_id: str) -> Key:
        """
        Raises:
            NotFound: there is none.
        """
        return self._directory.key(key_id)

    def rotate_key(self, key_id: str, form: Rotation) -> tuple[Key, str]:
        """The key with another secret, and what its owner must keep.

        Raises:
            NotFound: there is none. Conflict: it is revoked.
        """
        presented = new_key(key_id)
        digest = self._digest(presented)
        key = self._directory.rotate_key(key_id, digest, now_s=self._clock(), grace_s=form.grace_s)
        return key, presented

    def revoke_key(self, key_id: str) -> Key:
        """
        Raises:
            NotFound: there is none.
        """
        return self._directory.revoke_key(key_id, now_s=self._clock())

    def export_keys(self, path: Path) -> int:
        """Write all keys that can be used to a file for regions; returns how many.

        Raises:
            BadRequest: the file cannot be written.
        """
        snapshot = usable(self._directory.changes(0), self._clock())
        try:
            save_keys(path, snapshot, pepper=self._pepper)
        except OSError as error:
            raise BadRequest(f"The keys cannot be written: {error}") from None
        return len(snapshot.keys)

    def snapshot(self) -> Snapshot:
        """Everything that keys are checked with."""
        return self._directory.changes(0)

    def _digest(self, presented: str) -> str:
        return self._mac(presented.encode()).hex()

    # ---- usage ----

    def usage(
        self,
        by: Sequence[GroupBy],
        *,
        tenant: str | None = None,
        since_s: float | None = None,
        until_s: float | None = None,
        skip: int = 0,
        limit: int | None = None,
    ) -> list[UsageTotal]:
        """Sums of usage records; see `ports.Ledger`."""
        return self._ledger.totals(
            by, tenant=tenant, since_s=since_s, until_s=until_s, skip=skip, limit=limit
        )


def _names(names: Sequence[str] | None) -> frozenset[str] | None:
    return None if names is None else frozenset(names)


# ---- opening ------------------------------------------------------------------------------------


@contextlib.contextmanager
def administration(settings: Settings) -> Iterator[Administration]:
    """The administration of the configured store.

    Raises:
        BadRequest, Conflict: the settings do not fit the store.
        Unavailable: the database cannot be reached.
    """
    store = Store(settings.database_url)
    try:
        yield Administration(store, open_pepper(store, settings.key_pepper_file))
    finally:
        store.close()


def open_pepper(store: Store, path: Path) -> bytes:
    """The pepper of a store's keys; made when the store has none yet.

    Raises:
        BadRequest: the file cannot be used.
        Conflict: it is another store's, or lost.
    """
    recorded = store.fact(_FINGERPRINT)
    if not path.exists():
        if recorded is not None:
            raise Conflict(
                f"The file with the key pepper is missing: {path}. Put it back, or set "
                "NEARFIELD_KEY_PEPPER_FILE: without it no key of this database can be checked.",
                code="pepper_missing",
            )
        _make_pepper(path)
    pepper = read_pepper(path)
    fingerprint = Mac(pepper, b"nearfield pepper\n")(b"").hex()[:16]
    if store.settle_fact(_FINGERPRINT, fingerprint) != fingerprint:
        raise Conflict(
            f"The key pepper in {path} is not the one that this database's keys were made with.",
            code="pepper_mismatch",
        )
    return pepper


def read_pepper(path: Path) -> bytes:
    """The pepper in a file.

    Raises:
        BadRequest: there is none, or others may read it.
    """
    try:
        pepper = bytes.fromhex(read_private(path, "key pepper").decode().strip())
    except ValueError:
        pepper = b""
    if len(pepper) < _PEPPER_BYTES:
        raise BadRequest(
            f"The file with the key pepper must hold {_PEPPER_BYTES} bytes or more in "
            f"hexadecimal: {path}"
        )
    return pepper


def _make_pepper(path: Path) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return  # somebody was faster
    except OSError as error:
        raise BadRequest(f"The file with the key pepper cannot be made: {error}") from None
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(_PEPPER_BYTES) + "\n")


_FINGERPRINT = "key_pepper"
