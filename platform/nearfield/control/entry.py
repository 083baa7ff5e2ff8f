"""Who may ask the agent: gateways, by the passports they sign for themselves, and administrators.

A region without passport keys and without API keys asks nobody for anything.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from nearfield.api.keys import KeyTable, load_keys
from nearfield.api.load import is_gateways
from nearfield.api.passport import PassportKeys
from nearfield.core.errors import BadRequest, Forbidden, Unauthenticated
from nearfield.core.settings import Settings

log = logging.getLogger("nearfield.agent")


class Entry:
    """Checks who asks, with what the files say now: `refresh` reads those that have changed."""

    def __init__(self, settings: Settings) -> None:
        """
        Raises:
            BadRequest: a file that the settings name cannot be used.
        """
        self._passports_file = settings.passport_keys_file
        self._keys_file = settings.keys_file
        self._passports: PassportKeys | None = None
        self._keys: KeyTable | None = None
        self._read_ns: dict[Path, int] = {}
        self._read_passports()
        self._read_keys()

    def refresh(self) -> None:
        """Read what has changed. What cannot be used leaves in force what was read before."""
        for read in (self._read_passports, self._read_keys):
            try:
                read()
            except BadRequest as error:
                log.error("kept as it was: %s", error)

    def admit(self, passport: str | None, authorization: str | None) -> None:
        """Let a gateway or a platform administrator pass.

        Args:
            passport, authorization: the values of those headers.

        Raises:
            Unauthenticated, Forbidden: it is neither.
        """
        if self._passports is None and self._keys is None:
            return
        if self._passports is not None and passport is not None:
            found = self._passports.verify(passport.encode(), now_ms=int(time.time() * 1000))
            if not is_gateways(found):
                raise Forbidden("This passport is for inference only.", code="not_a_gateway")
            return
        if self._keys is None:
            raise Unauthenticated("A gateway's passport is missing.", code="missing_passport")
        sent = None if authorization is None else authorization.encode()
        self._keys.authenticate(sent, time.time()).require_scope("platform")

    def _read_passports(self) -> None:
        path = self._passports_file
        if path is not None and self._changed(path):
            self._passports = PassportKeys.load(path)

    def _read_keys(self) -> None:
        path = self._keys_file
        if path is None or not self._changed(path):
            return
        snapshot, pepper = load_keys(path)
        if pepper is None:
            raise BadRequest(f"The file with the API keys lacks the pepper: {path}")
        table = KeyTable(pepper)
        table.apply(snapshot)
        self._keys = table

    def _changed(self, path: Path) -> bool:
        try:
            modified_ns = path.stat().st_mtime_ns
        except OSError as error:
            if path in self._read_ns:
                return False  # somebody is about to put a new one there
            raise BadRequest(f"A file that the agent needs cannot be read: {error}") from None
        changed = self._read_ns.get(path) != modified_ns
        self._read_ns[path] = modified_ns
        return changed
