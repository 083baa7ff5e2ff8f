"""What administrators are shown: the same documents from the command line and the admin API.

Times are Unix seconds. A key's digest is nobody's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from nearfield.api.keys import Key, Product, Tenant
from nearfield.store.ports import GroupBy, UsageTotal

Document = dict[str, Any]


def tenant_document(tenant: Tenant) -> Document:
    return {
        "name": tenant.name,
        "jurisdictions": _sorted(tenant.jurisdictions),
        "suspended": tenant.suspended,
        "limits": asdict(tenant.limits),
        "created_s": tenant.created_s,
    }


def product_document(product: Product) -> Document:
    return {
        "tenant": product.tenant,
        "name": product.name,
        "limits": asdict(product.limits),
        "created_s": product.created_s,
    }


def key_document(key: Key, now_s: float, *, presented: str | None = None) -> Document:
    """
    Args:
        presented: what its owner must keep; shown where it was made, and nowhere else.
    """
    document = {
        "id": key.id,
        "tenant": key.tenant,
        "product": key.product,
        "label": key.label,
        "state": state_of(key, now_s),
        "scopes": sorted(key.scopes),
        "models": _sorted(key.models),
        "limits": asdict(key.limits),
        "created_s": key.created_s,
        "expires_s": key.expires_s,
        "revoked_s": key.revoked_s,
        "rotated_s": key.rotated_s,
        "former_secret_until_s": key.previous_until_s,
    }
    if presented is not None:
        document["key"] = presented
    return document


def usage_document(total: UsageTotal, by: Sequence[GroupBy]) -> Document:
    return {
        **dict(zip(by, total.group, strict=True)),
        "requests": total.requests,
        "guessed_requests": total.guessed_requests,
        "input_tokens": total.input_tokens,
        "cached_tokens": total.cached_tokens,
        "output_tokens": total.output_tokens,
        "duration_s": round(total.duration_s, 6),
    }


def _sorted(names: frozenset[str] | None) -> list[str] | None:
    return None if names is None else sorted(names)


def state_of(key: Key, now_s: float) -> str:
    """`active`, `expired` or `revoked`."""
    if key.revoked_s is not None:
        return "revoked"
    return "expired" if key.expires_s is not None and key.expires_s <= now_s else "active"
