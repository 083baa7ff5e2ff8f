"""API keys: `nf_<id>_<secret>`, whose they are, and what they may do.

The store keeps HMAC-SHA256(pepper, key) and never the key. Whoever checks keys (a gateway, or a
region without one) holds a `KeyTable` in memory: a look-up by id, one MAC, one comparison in
constant time; no I/O, and nothing that was presented is kept.

A key that is rotated keeps its id, limits and scopes. Its former secret stays good for a grace
time, so that callers can be moved to the new one.
"""

from __future__ import annotations

import json
import math
import secrets
import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from hmac import compare_digest
from pathlib import Path
from typing import Any, Literal

import pydantic
from nearfield.api.signing import Mac, read_private_json, write_private
from nearfield.core.errors import (
    BadRequest,
    Forbidden,
    NearfieldError,
    Unauthenticated,
    Unavailable,
)
from nearfield.policy.quota import Limits

Scope = Literal["inference", "admin", "platform"]
"""What a key is for: asking models; administering its own tenant; administering all of them."""
SCOPES: tuple[Scope, ...] = ("inference", "admin", "platform")

PREFIX = "nf_"
ID_LENGTH = 12
SECRET_LENGTH = 43
"""Of 62 characters each: 256 bits."""

_ID_LETTERS = string.ascii_lowercase + "234567"
_SECRET_LETTERS = string.ascii_letters + string.digits
_ID_FROM, _ID_TO = len(PREFIX), len(PREFIX) + ID_LENGTH
_MAX_PRESENTED = 256
_DOMAIN = b"nearfield key\n"
_FILE_VERSION = 1


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who is billed. `jurisdictions`: where its data may be (`eu`); None: anywhere."""

    name: str
    jurisdictions: frozenset[str] | None = None
    suspended: bool = False
    limits: Limits = field(default_factory=Limits)
    created_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Product:
    """A part of a tenant's traffic that is limited, accounted and perhaps served on its own."""

    tenant: str
    name: str
    limits: Limits = field(default_factory=Limits)
    created_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Key:
    """A key as the store knows it. Times are Unix seconds.

    Attributes:
        models: names it may ask for; None: any.
        digest: of the key, hexadecimal. previous_digest: of the former one, good until
            `previous_until_s`.
    """

    id: str
    tenant: str
    product: str | None
    label: str
    scopes: frozenset[Scope]
    models: frozenset[str] | None
    digest: str = field(repr=False)
    limits: Limits = field(default_factory=Limits)
    created_s: float = 0.0
    expires_s: float | None = None
    revoked_s: float | None = None
    rotated_s: float | None = None
    previous_digest: str | None = field(default=None, repr=False)
    previous_until_s: float | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Tenants, products and keys as they were at a revision of the store: all, or what changed."""

    revision: int = 0
    tenants: tuple[Tenant, ...] = ()
    products: tuple[Product, ...] = ()
    keys: tuple[Key, ...] = ()


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls, and what that caller may do.

    Attributes:
        jurisdictions: where the request's data may be; None: anywhere.
        limits: by subject, of the key, its product and its tenant, where there are any.
    """

    tenant: str
    product: str | None
    key_id: str
    scopes: frozenset[Scope]
    models: frozenset[str] | None
    jurisdictions: frozenset[str] | None
    limits: tuple[tuple[str, Limits], ...] = ()

    def require_scope(self, scope: Scope) -> None:
        """
        Raises:
            Forbidden: the key is not for this.
        """
        if scope not in self.scopes:
            raise Forbidden(
                f"This API key is not for {scope}: it would need that scope.", code="scope_missing"
            )

    def require_model(self, model: str) -> None:
        """
        Raises:
            Forbidden: the key is for other models.
        """
        if self.models is not None and model not in self.models:
            raise Forbidden(
                "This API key is for other models.", param="model", code="model_not_allowed"
            )


# ---- making keys --------------------------------------------------------------------------------


def key_mac(pepper: bytes) -> Mac:
    """What makes a key's digest."""
    return Mac(pepper, _DOMAIN)


def new_key_id() -> str:
    """60 random bits: it is no secret, and stands in logs and bills."""
    return "".join(secrets.choice(_ID_LETTERS) for _ in range(ID_LENGTH))


def new_key(key_id: str) -> str:
    """A whole new key of that id: to be shown once and kept by its owner only."""
    secret = "".join(secrets.choice(_SECRET_LETTERS) for _ in range(SECRET_LENGTH))
    return f"{PREFIX}{key_id}_{secret}"


# ---- checking them ------------------------------------------------------------------------------


class _Entry:
    """One key, ready to be compared with."""

    __slots__ = ("digest", "ends_s", "previous", "previous_until_s", "principal", "refusal")

    def __init__(self, digest: bytes, principal: Principal) -> None:
        self.digest = digest
        self.principal = principal
        self.ends_s = math.inf
        self.refusal: Callable[[], NearfieldError] = _expired
        self.previous: bytes | None = None
        self.previous_until_s = -math.inf


class KeyTable:
    """All keys, in memory. `apply` what the store says, `authenticate` whoever comes.

    Attributes:
        revision: the store's, of the last snapshot.
        closed: nobody is let in: what is known is too old to be believed.
    """

    def __init__(self, pepper: bytes) -> None:
        self.revision = 0
        self.closed = False
        self._mac = key_mac(pepper)
        self._tenants: dict[str, Tenant] = {}
        self._products: dict[tuple[str, str], Product] = {}
        self._keys: dict[str, Key] = {}
        self._of_tenant: dict[str, set[str]] = {}
        self._entries: dict[bytes, _Entry] = {}
        nobody = Principal("", None, "", frozenset(), frozenset(), frozenset())
        self._nobody = _Entry(secrets.token_bytes(32), nobody)

    def __len__(self) -> int:
        return len(self._keys)

    def authenticate(self, authorization: bytes | None, now_s: float) -> Principal:
        """Who sent this `authorization` header.

        Args:
            authorization: its value, None if there is none. now_s: Unix time.

        Raises:
            Unauthenticated: nobody who may call. An unknown id and a wrong secret look the same.
            Forbidden: the tenant is suspended.
            Unavailable: the table is closed.
        """
        if authorization is not None and authorization[:10] == b"Bearer nf_":
            presented = authorization[7:]
        else:
            presented = _bearer(authorization)
        if len(presented) > _MAX_PRESENTED:
            raise _invalid()
        entry = self._entries.get(presented[_ID_FROM:_ID_TO], self._nobody)
        digest = self._mac(presented)
        if not compare_digest(digest, entry.digest):
            former = entry.previous
            if former is None or not compare_digest(digest, former):
                raise _invalid()
            if now_s >= entry.previous_until_s:
                raise Unauthenticated(
                    "This API key has been replaced: use the new one.", code="key_replaced"
                )
        if now_s >= entry.ends_s:
            raise entry.refusal()
        if self.closed:
            raise Unavailable(
                "API keys cannot be checked at present.", code="keys_unverified", retry_after_s=5.0
            )
        return entry.principal

    def apply(self, snapshot: Snapshot) -> None:
        """Take over what changed."""
        touched = {key.id for key in snapshot.keys}
        for tenant in snapshot.tenants:
            self._tenants[tenant.name] = tenant
            touched |= self._of_tenant.get(tenant.name, set())
        for product in snapshot.products:
            self._products[product.tenant, product.name] = product
            # A product's keys are its tenant's: there are not many, and products seldom change.
            touched |= self._of_tenant.get(product.tenant, set())
        for key in snapshot.keys:
            self._keys[key.id] = key
            self._of_tenant.setdefault(key.tenant, set()).add(key.id)
        for key_id in touched:
            self._entries[key_id.encode()] = self._entry(self._keys[key_id])
        self.revision = snapshot.revision

    def clear(self) -> None:
        """Forget everything."""
        for known in (self._tenants, self._products, self._keys, self._of_tenant, self._entries):
            known.clear()
        self.revision = 0

    def products_of(self, tenant: str) -> frozenset[str]:
        """The names of a tenant's products."""
        return frozenset(name for owner, name in self._products if owner == tenant)

    def snapshot(self) -> Snapshot:
        """All that is known."""
        return Snapshot(
            self.revision,
            tuple(self._tenants.values()),
            tuple(self._products.values()),
            tuple(self._keys.values()),
        )

    def _entry(self, key: Key) -> _Entry:
        tenant = self._tenants.get(key.tenant, Tenant(key.tenant, suspended=True))
        product = self._products.get((key.tenant, key.product or ""))
        limits = [(key_subject(key.id), key.limits), (tenant_subject(tenant.name), tenant.limits)]
        if product is not None:
            limits.insert(1, (product_subject(product.tenant, product.name), product.limits))
        principal = Principal(
            key.tenant,
            key.product,
            key.id,
            key.scopes,
            key.models,
            tenant.jurisdictions,
            tuple((subject, bound) for subject, bound in limits if bound != Limits()),
        )
        entry = _Entry(bytes.fromhex(key.digest), principal)
        if key.previous_digest is not None and key.previous_until_s is not None:
            entry.previous = bytes.fromhex(key.previous_digest)
            entry.previous_until_s = key.previous_until_s
        if key.expires_s is not None:
            entry.ends_s = key.expires_s
        if key.revoked_s is not None:
            # Whatever the clock here says: revoked is revoked.
            entry.ends_s = -math.inf
            entry.refusal = _revoked
        elif tenant.suspended:
            entry.ends_s = -math.inf
            entry.refusal = _suspended
        return entry


def key_subject(key_id: str) -> str:
    """Whose limits: a key's."""
    return f"key:{key_id}"


def product_subject(tenant: str, product: str) -> str:
    """Whose limits: a product's."""
    return f"product:{tenant}/{product}"


def tenant_subject(tenant: str) -> str:
    """Whose limits: a tenant's."""
    return f"tenant:{tenant}"


def _bearer(authorization: bytes | None) -> bytes:
    scheme, _, presented = (authorization or b"").strip().partition(b" ")
    if scheme.lower() != b"bearer" or not presented.strip():
        raise Unauthenticated(
            "No API key was sent. Send it as a header: Authorization: Bearer nf_…",
            code="missing_api_key",
        )
    return presented.strip()


def _invalid() -> Unauthenticated:
    return Unauthenticated("The API key is not valid: check that it was copied whole.")


def _expired() -> Unauthenticated:
    return Unauthenticated("This API key has expired: ask for a new one.", code="key_expired")


def _revoked() -> Unauthenticated:
    return Unauthenticated("This API key has been revoked: ask for a new one.", code="key_revoked")


def _suspended() -> Forbidden:
    return Forbidden("This tenant is suspended.", code="tenant_suspended")


# ---- keys in a file -----------------------------------------------------------------------------

_SNAPSHOT = pydantic.TypeAdapter(Snapshot)


def usable(snapshot: Snapshot, now_s: float) -> Snapshot:
    """Without the keys that nobody can use any more."""
    keys = tuple(
        key
        for key in snapshot.keys
        if key.revoked_s is None and (key.expires_s is None or key.expires_s > now_s)
    )
    return replace(snapshot, keys=keys)


def save_keys(path: Path, snapshot: Snapshot, *, pepper: bytes | None) -> None:
    """Write a snapshot to a file of mode 0600.

    With the pepper it is all that a region needs to check keys by itself. Without, it is the last
    good state of somebody who has the pepper.

    Raises:
        OSError: it cannot be written.
    """
    data: dict[str, Any] = {
        "version": _FILE_VERSION,
        **_SNAPSHOT.dump_python(snapshot, mode="json"),
    }
    if pepper is not None:
        data["pepper"] = pepper.hex()
    write_private(path, json.dumps(data).encode())


def load_keys(path: Path) -> tuple[Snapshot, bytes | None]:
    """What `save_keys` wrote: the snapshot, and the pepper if it is there.

    Raises:
        BadRequest: the file cannot be used; the message says why.
    """
    data = read_private_json(path, "API keys")
    if not isinstance(data, dict) or data.pop("version", None) != _FILE_VERSION:
        raise BadRequest(f"The file with the API keys is of another version of nearfield: {path}")
    pepper = data.pop("pepper", None)
    try:
        snapshot = _SNAPSHOT.validate_python(data)
        for digest in _digests(snapshot.keys):
            bytes.fromhex(digest)
        return snapshot, None if pepper is None else bytes.fromhex(pepper)
    except (pydantic.ValidationError, ValueError, TypeError):
        raise BadRequest(f"The file with the API keys is malformed: {path}") from None


def _digests(keys: Iterable[Key]) -> Iterable[str]:
    for key in keys:
        yield key.digest
        if key.previous_digest is not None:
            yield key.previous_digest
