"""Requests, keys and grants for what stands at a gateway's door."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from nearfield.api.keys import (
    Key,
    KeyTable,
    Principal,
    Product,
    Snapshot,
    Tenant,
    key_mac,
    new_key,
    new_key_id,
)
from nearfield.core.errors import Unavailable
from nearfield.edge.decisions import Admission, Routed
from nearfield.edge.proxy.ports import (
    Attempt,
    FailureKind,
    Grant,
    Leg,
    Request,
    Soon,
    Target,
    Trace,
)
from nearfield.policy.endpoints import Caller
from nearfield.policy.quota import Limits

PEPPER = b"p" * 32
CHAT = b"/v1/chat/completions"


def key_of(tenant: str = "acme", **fields: Any) -> tuple[Key, bytes]:
    """A key, and the `authorization` of its owner."""
    key_id = new_key_id()
    presented = new_key(key_id)
    known: dict[str, Any] = {
        "product": None,
        "label": "",
        "scopes": frozenset({"inference"}),
        "models": None,
        "limits": Limits(),
        **fields,
    }
    digest = key_mac(PEPPER)(presented.encode()).hex()
    return Key(id=key_id, tenant=tenant, digest=digest, **known), b"Bearer " + presented.encode()


def table_of(*keys: Key, jurisdictions: frozenset[str] | None = None) -> KeyTable:
    """A table of these keys, their tenants and products."""
    table = KeyTable(PEPPER)
    tenants = {key.tenant: Tenant(key.tenant, jurisdictions) for key in keys}
    products = {(k.tenant, k.product): Product(k.tenant, k.product) for k in keys if k.product}
    table.apply(Snapshot(1, tuple(tenants.values()), tuple(products.values()), keys))
    return table


def request_of(
    body: Any = None,
    *,
    path: bytes = CHAT,
    method: bytes = b"POST",
    model: str | None = "chat",
    headers: Mapping[bytes, bytes] | None = None,
    timeout_s: float = 30.0,
    **fields: Any,
) -> Request:
    """A request as the proxy hands it to the Gate."""
    if body is None:
        body = {"model": model}
    now_s = time.monotonic()
    return Request(
        method,
        path,
        path,
        "oip" if path.startswith(b"/v2") else "openai",
        dict(headers or {}),
        b"req-1",
        Trace(b"0" * 32, b"0" * 16, b"", False),
        now_s,
        now_s + timeout_s,
        model,
        body=body if isinstance(body, bytes) else json.dumps(body).encode(),
        **fields,
    )


def granted(**fields: Any) -> Grant:
    """A grant to somebody without limits."""
    nobody = Principal("acme", None, "k", frozenset({"inference"}), None, None)
    return Grant(replayable=True, about=Admission(nobody, Caller(), **fields))


def leg_of(target: Target, region: str = "eu", replica: str | None = "r", **fields: Any) -> Routed:
    """To a replica at home, unless it is said otherwise."""
    known = {"endpoint": f"{region}/chat@1/default", "model": "chat", **fields}
    return Routed(target, region=region, replica=replica, **known)


def try_of(
    target: Target,
    grant: Grant,
    *,
    at_s: float = 0.0,
    request: Request | None = None,
    leg: Routed | None = None,
    reused: bool = False,
) -> Attempt:
    """A try that begins."""
    attempt = Attempt(leg or leg_of(target), at_s, reused)
    attempt.request, attempt.grant = request or request_of(), grant
    return attempt


def end(
    attempt: Attempt, at_s: float, failure: FailureKind | None = None, status: int = 200
) -> Attempt:
    """It ends."""
    attempt.ended_s, attempt.failure = at_s, failure
    if failure in (None, "status", "truncated"):
        attempt.status, attempt.first_byte_s = status, at_s
    return attempt


class InOrder:
    """The first leg that was not tried. Counts like every Router."""

    def __init__(self, *legs: Leg) -> None:
        self.legs = legs
        self.running = 0
        self.asked = 0

    def pick(self, request: Request, grant: Grant, attempts: Sequence[Attempt]) -> Soon[Leg]:
        self.asked += 1
        tried = {attempt.leg.target for attempt in attempts}
        for leg in self.legs:
            if leg.target not in tried:
                return leg
        return Unavailable("nobody", code="nobody")

    def began(self, attempt: Attempt) -> None:
        self.running += 1

    def ended(self, attempt: Attempt) -> None:
        self.running -= 1
