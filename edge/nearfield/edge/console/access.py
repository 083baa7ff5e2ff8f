"""Who may see the console's data, and whose part of it. The page holds none, and is anybody's.

With a store: keys of scope `platform` see everything; those of scope `admin` see their tenant's
requests, and of the fleet what its callers may know: which regions and endpoints there are, how
they are, how far. How full others' queues are is the platform's business.

Without a store nobody can prove who they are, so only this machine's own users are shown anything,
unless `anybody` says otherwise. Three things pass for local that are not, and are refused: what a
proxy on this machine passes on for somebody else; a web page elsewhere whose name was made to point
here (its browser says that name as `host`); and whoever comes by a socket without addresses.
"""

from __future__ import annotations

import ipaddress
import time
from dataclasses import dataclass
from typing import Final, Protocol

from nearfield.api.keys import KeyTable
from nearfield.core.errors import Forbidden, NearfieldError
from nearfield.edge.proxy.ports import Request

_PASSED_ON: Final = (b"forwarded", b"via", b"x-forwarded-for", b"x-forwarded-host", b"x-real-ip")


@dataclass(frozen=True, slots=True)
class Viewer:
    """What somebody may see.

    Attributes:
        tenant: whose requests; None: everybody's, and the whole fleet.
        products: of that tenant: their pools are no secret to it.
    """

    tenant: str | None = None
    products: frozenset[str] = frozenset()

    @property
    def everything(self) -> bool:
        return self.tenant is None


class Access(Protocol):
    """Says what a request's sender may see."""

    def viewer(self, request: Request) -> Viewer:
        """
        Raises:
            NearfieldError: nothing.
        """
        ...


class KeyAccess:
    """By API key."""

    def __init__(self, keys: KeyTable) -> None:
        self._keys = keys

    def viewer(self, request: Request) -> Viewer:
        principal = self._keys.authenticate(request.headers.get(b"authorization"), time.time())
        if "platform" in principal.scopes:
            return Viewer()
        if "admin" not in principal.scopes:
            raise Forbidden(
                "This API key is for inference: the console needs the scope admin or platform.",
                code="scope_missing",
            )
        return Viewer(principal.tenant, self._keys.products_of(principal.tenant))


class LocalAccess:
    """By where the request comes from: this machine, or anywhere."""

    def __init__(self, *, anybody: bool = False) -> None:
        self._anybody = anybody

    def viewer(self, request: Request) -> Viewer:
        if not self._anybody and (problem := _not_local(request)) is not None:
            raise Forbidden(
                f"{problem} Without a store of keys the console is for this machine's own users: "
                "come through a tunnel (ssh -L), or configure a store.",
                code="not_local",
            )
        return Viewer()


def still(access: Access, request: Request, viewer: Viewer) -> NearfieldError | None:
    """Why whoever began to look may no longer, if so: a key may have been revoked meanwhile."""
    try:
        now = access.viewer(request)
    except NearfieldError as error:
        return error
    if now != viewer:
        return Forbidden("What this key may see has changed: look again.", code="access_changed")
    return None


def _not_local(request: Request) -> str | None:
    if not _is_loopback(request.peer):
        return "You are on another machine."
    for name in _PASSED_ON:
        if name in request.headers:
            return "A proxy passes this request on."
    host = request.headers.get(b"host", b"").decode("latin-1").lower()
    called = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if called != "localhost" and not called.endswith(".localhost") and not _is_loopback(called):
        return f"This machine is not called {called[:100]}."
    return None


def _is_loopback(address: str) -> bool:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
        return found.ipv4_mapped.is_loopback
    return found.is_loopback
