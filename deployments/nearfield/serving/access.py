"""Who may call this replica: everybody, until the region has passport secrets or keys of its own.

    NEARFIELD_PASSPORT_KEYS_FILE   then a gateway's passport lets in
    NEARFIELD_KEYS_FILE            then a key lets in, without any gateway

Where one of them is set, a request that carries neither is refused. Both files are looked at every
second: what is rotated or revoked there holds here without a restart. A file that breaks while
the replica runs changes nothing: what was read last still counts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, Self, TypeVar

from nearfield.api.keys import KeyTable, load_keys
from nearfield.api.load import is_gateways
from nearfield.api.passport import HEADER, PassportKeys, PassportKeyUnknown
from nearfield.core.errors import BadRequest, Forbidden, Unauthenticated
from nearfield.core.settings import Settings
from nearfield.core.watched_file import WatchedFile
from nearfield.policy.endpoints import CRITICALITIES, DEFAULT, QUEUE_SHARES

log = logging.getLogger("nearfield.access")

LOOK_S = 1.0
Content = TypeVar("Content")

Door = Literal["inference", "operation"]
"""What a route is for: asking the model; watching the replica, which tells of all tenants alike."""

_SHARES = dict(zip(CRITICALITIES, QUEUE_SHARES, strict=True))


@dataclass(frozen=True, slots=True)
class Caller:
    """Who was let in.

    Attributes:
        timeout_s: what the gateway still gives the request, if one sent it.
        queue_share: of the replica's queue that it may fill: less for what can wait.
    """

    tenant: str
    product: str | None
    key_id: str
    timeout_s: float | None = None
    queue_share: float = QUEUE_SHARES[DEFAULT]


class _Watched(Generic[Content]):
    """A file that is looked at by whoever asks, and before the answer: a key that was revoked while
    nobody called must not be let in once more because the new file is still being read.
    """

    def __init__(self, path: Path, read: Callable[[Path], Content]) -> None:
        """
        Raises:
            BadRequest: the file cannot be used.
        """
        self._looked_s = time.monotonic()
        self._file = WatchedFile(path, read, log)

    def current(self, now_s: float) -> Content:
        if now_s >= self._looked_s + LOOK_S:
            self._looked_s = now_s
            return self._file.refresh()
        return self._file.content


class Access:
    """The doors of one model's replica."""

    def __init__(
        self,
        model: str,
        *,
        passport_keys_file: Path | None = None,
        keys_file: Path | None = None,
        jurisdiction: str | None = None,
    ) -> None:
        """
        Args:
            jurisdiction: where this region is; None: it does not know, and takes nothing that is
                bound to a place.

        Raises:
            BadRequest: a file cannot be used.
        """
        self._model = model
        self._jurisdiction = jurisdiction
        self._passports: _Watched[PassportKeys] | None = None
        if passport_keys_file is not None:
            self._passports = _Watched(passport_keys_file, PassportKeys.load)
        self._keys: _Watched[KeyTable] | None = None
        if keys_file is not None:
            self._keys = _Watched(keys_file, _read_table)

    @classmethod
    def from_settings(cls, settings: Settings, model: str) -> Self | None:
        """None: everybody may call.

        Raises:
            BadRequest: a file cannot be used. A region that should be closed does not open.
        """
        if settings.passport_keys_file is None and settings.keys_file is None:
            return None
        return cls(
            model,
            passport_keys_file=settings.passport_keys_file,
            keys_file=settings.keys_file,
            jurisdiction=settings.jurisdiction,
        )

    def admit(self, headers: Mapping[bytes, bytes], door: Door) -> Caller:
        """Let a request in.

        Raises:
            Unauthenticated: it has neither a passport nor a key that is good here.
            Forbidden: it has one, but not for this door, this model or this place.
        """
        passport = headers.get(HEADER)
        if passport is not None:
            return self._by_passport(passport, door)
        if self._keys is not None:
            return self._by_key(headers.get(b"authorization"), self._keys, door)
        raise Unauthenticated(
            "This region takes requests from its gateways only: call one of those.",
            code="passport_missing",
        )

    def _by_passport(self, header: bytes, door: Door) -> Caller:
        if self._passports is None:
            raise PassportKeyUnknown("This region takes no passports.")
        keys = self._passports.current(time.monotonic())
        passport = keys.verify(header, now_ms=int(time.time() * 1000))
        if door == "operation" and not is_gateways(passport):
            raise Forbidden("This passport is for inference only.", code="scope_missing")
        passport.require_model(self._model)
        self._require_place(passport.jurisdictions)
        return Caller(
            passport.tenant,
            passport.product,
            passport.key_id,
            passport.timeout_s,
            # A criticality that is not known here was named by a newer gateway: it can wait.
            _SHARES.get(passport.criticality, QUEUE_SHARES[-1]),
        )

    def _by_key(self, authorization: bytes | None, keys: _Watched[KeyTable], door: Door) -> Caller:
        principal = keys.current(time.monotonic()).authenticate(authorization, time.time())
        if door == "operation":
            principal.require_scope("platform")
        else:
            principal.require_scope("inference")
            principal.require_model(self._model)
            self._require_place(principal.jurisdictions)
        return Caller(principal.tenant, principal.product, principal.key_id)

    def _require_place(self, allowed: Collection[str] | None) -> None:
        if allowed is None or self._jurisdiction in allowed:
            return
        bound = ", ".join(sorted(allowed)) or "its region"
        if self._jurisdiction is None:
            raise Forbidden(
                f"This request may not leave {bound}, and this region does not say where it is: "
                "its operator must set NEARFIELD_JURISDICTION.",
                code="jurisdiction_unknown",
            )
        raise Forbidden(
            f"This request may not leave {bound}, and this region is in {self._jurisdiction}.",
            code="jurisdiction_not_allowed",
        )


def _read_table(path: Path) -> KeyTable:
    snapshot, pepper = load_keys(path)
    if pepper is None:
        raise BadRequest(
            f"The file with the API keys has no pepper: make it with nearfield keys export: {path}"
        )
    try:
        table = KeyTable(pepper)
    except ValueError as error:
        raise BadRequest(f"The file with the API keys is unusable: {error}: {path}") from None
    table.apply(snapshot)
    return table
