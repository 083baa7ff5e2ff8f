"""A store with tenants and keys in every state, and a gateway's table of them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nearfield.api.keys import Key, KeyTable, key_mac, new_key, new_key_id
from nearfield.store.administration import Administration
from nearfield.store.forms import NewProduct, NewTenant, TenantChange, parse
from nearfield.store.sql import Store

PEPPER = b"p" * 32
KEYS: dict[str, dict[str, Any]] = {
    "good": {"tenant": "acme"},
    "expired": {"tenant": "acme", "expires_s": 1.0},
    "revoked": {"tenant": "acme", "revoked_s": 1.0},
    "suspended tenant": {"tenant": "late"},
    "other tenant": {"tenant": "other"},
    "model not allowed": {"tenant": "acme", "models": frozenset({"none-of-these"})},
    "admin": {"tenant": "acme", "scopes": frozenset({"admin"})},
    "other admin": {"tenant": "other", "scopes": frozenset({"admin"})},
    "expired admin": {"tenant": "acme", "scopes": frozenset({"admin"}), "expires_s": 1.0},
    "revoked platform": {"tenant": "ops", "scopes": frozenset({"platform"}), "revoked_s": 1.0},
    "platform": {"tenant": "ops", "scopes": frozenset({"platform"})},
    "platform of a tenant": {"tenant": "acme", "scopes": frozenset({"platform"})},
}


@dataclass
class Accounts:
    """The store, whoever administers it, and what callers present, by the names of `KEYS`."""

    store: Store
    administration: Administration
    table: KeyTable
    presented: dict[str, str] = field(default_factory=dict)
    ids: dict[str, str] = field(default_factory=dict)

    def follow(self) -> None:
        """Take over what changed, as a gateway does every second."""
        self.table.apply(self.store.directory.changes(self.table.revision))

    def headers(self, name: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.presented[name]}"}


def accounts(folder: Path) -> Accounts:
    """Tenants acme (in the EU, with a product), late (suspended), other and ops."""
    store = Store(f"sqlite:///{folder / 'accounts.sqlite3'}")
    administration = Administration(store, PEPPER)
    made = Accounts(store, administration, KeyTable(PEPPER))
    for tenant in ("acme", "late", "other", "ops"):
        administration.create_tenant(parse(NewTenant, {"name": tenant}))
    administration.change_tenant("acme", parse(TenantChange, {"jurisdictions": ["eu"]}))
    administration.create_product("acme", parse(NewProduct, {"name": "web"}))
    for name, fields in KEYS.items():
        key_id = new_key_id()
        made.presented[name], made.ids[name] = new_key(key_id), key_id
        store.directory.add_key(_key(key_id, made.presented[name], **fields))
        if "revoked_s" in fields:
            store.directory.revoke_key(key_id, now_s=fields["revoked_s"])
    administration.change_tenant("late", parse(TenantChange, {"suspended": True}))
    unknown = new_key(new_key_id())
    made.presented["unknown"] = unknown
    made.presented["bad secret"] = made.presented["good"][:-1] + (
        "a" if made.presented["good"][-1] != "a" else "b"
    )
    made.follow()
    return made


def _key(key_id: str, presented: str, **fields: Any) -> Key:
    made: dict[str, Any] = {
        "product": None, "label": "", "scopes": frozenset({"inference"}), "models": None,
        "created_s": time.time(), "digest": key_mac(PEPPER)(presented.encode()).hex(), **fields,
    }  # fmt: skip
    return Key(id=key_id, **made)
