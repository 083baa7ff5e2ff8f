"""Passports: what a gateway grants a region to do, short-lived and signed.

    x-nearfield-passport: 1.<kid>.<payload>.<mac>

The payload is a JSON list, the mac HMAC-SHA256 over all that stands before it; both are base64url
without padding. Gateways and regions share the secrets. There may be two: while one is replaced,
regions take passports that are signed with either.

    keys = PassportKeys.generate()     everywhere the same file, mode 0600
    keys = keys.with_next()            1. a second secret, to verify with only: put it everywhere
    keys = keys.promoted()             2. sign with it: put this everywhere, in any order
    keys = keys.without_previous()     3. once the last old passport has expired

Criticality is what may be dropped first under load; see `policy`.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from hmac import compare_digest
from pathlib import Path
from typing import Any, Literal, Self

from nearfield.api.signing import Mac, read_private_json, write_private
from nearfield.core.errors import BadRequest, Forbidden, Unauthenticated

HEADER = b"x-nearfield-passport"
Criticality = Literal["critical", "default", "sheddable"]

LIFETIME_MS = 60_000
"""How long a passport is good for unless the signer says otherwise."""
CLOCK_SKEW_MS = 30_000
"""How far the clocks of a gateway and a region may be apart."""
MAX_BYTES = 8192

_FORMAT = b"1"
_DOMAIN = b"nearfield passport\n"
_KID = re.compile(r"[A-Za-z0-9_-]{1,32}")
_MOST_KEYS = 2
_encode = json.JSONEncoder(separators=(",", ":")).encode
_decode = json.JSONDecoder().decode
_quote = json.encoder.encode_basestring_ascii


class PassportError(Unauthenticated):
    """A passport that is worth nothing. The subclass says why."""

    default_code = "passport_invalid"


class PassportMalformed(PassportError):
    default_code = "passport_malformed"


class PassportKeyUnknown(PassportError):
    """Signed with a secret that is not, or no longer, known here."""

    default_code = "passport_key_unknown"


class PassportForged(PassportError):
    default_code = "passport_forged"


class PassportExpired(PassportError):
    default_code = "passport_expired"


class PassportNotYetValid(PassportError):
    """Issued in the future: a clock is wrong."""

    default_code = "passport_not_yet_valid"


@dataclass(frozen=True, slots=True)
class Passport:
    """One request's grant. Times are Unix milliseconds.

    Attributes:
        models: names it may ask for; None: any.
        jurisdictions: where its data may be; None: anywhere.
        expires_ms: when it is worth nothing any more: how long it may take to reach a replica.
        deadline_ms: when its answer must be complete.
    """

    tenant: str
    product: str | None
    key_id: str
    models: tuple[str, ...] | None
    jurisdictions: tuple[str, ...] | None
    request_id: str
    criticality: Criticality
    issued_ms: int
    expires_ms: int
    deadline_ms: int

    @property
    def timeout_s(self) -> float:
        """What the request was given in time. A difference of one clock's readings, so it means
        the same where the clock is another."""
        return (self.deadline_ms - self.issued_ms) / 1000

    def require_model(self, model: str) -> None:
        """
        Raises:
            Forbidden: it is for other models.
        """
        if self.models is not None and model not in self.models:
            raise Forbidden(
                "This passport is for other models.", param="model", code="model_not_allowed"
            )

    def require_jurisdiction(self, jurisdiction: str) -> None:
        """
        Raises:
            Forbidden: the request's data may not be here.
        """
        if self.jurisdictions is not None and jurisdiction not in self.jurisdictions:
            raise Forbidden(
                f"This request may not leave {', '.join(self.jurisdictions) or 'its region'}, and "
                f"this region is in {jurisdiction}.",
                code="jurisdiction_not_allowed",
            )


def bearer_part(
    tenant: str,
    product: str | None,
    key_id: str,
    models: tuple[str, ...] | None,
    jurisdictions: tuple[str, ...] | None,
) -> bytes:
    """The part of a passport that is the same for all requests of one key, ready to be signed."""
    claims = _encode((tenant, product, key_id, models, jurisdictions))
    text = (claims[:-1] + ",").encode()
    # Whole groups of base64, so that more can follow: JSON allows the blanks.
    return _to_base64(text.ljust(-(-len(text) // 3) * 3))


class PassportKeys:
    """The secrets by key id, oldest first, and which of them signs."""

    def __init__(self, keys: Mapping[str, bytes], signing: str) -> None:
        """
        Raises:
            BadRequest: a key id or a secret is none, there are too many, or none that signs.
        """
        if not 1 <= len(keys) <= _MOST_KEYS:
            raise BadRequest(f"There must be 1 to {_MOST_KEYS} passport keys, not {len(keys)}.")
        if signing not in keys:
            raise BadRequest(f"The signing passport key {signing!r} is not among the keys.")
        if odd := [kid for kid in keys if not _KID.fullmatch(kid)]:
            raise BadRequest(f"A passport key's id must match {_KID.pattern}, not {odd[0]!r}.")
        self._secrets = dict(keys)
        self.signing = signing
        try:
            self._macs = {kid.encode(): Mac(key, _DOMAIN) for kid, key in keys.items()}
        except ValueError as error:
            raise BadRequest(f"A passport key is unusable: {error}.") from None
        self._head = _FORMAT + b"." + signing.encode() + b"."
        self._mac = self._macs[signing.encode()]

    # ---- a request's part ----

    def sign(self, passport: Passport) -> bytes:
        """The header's value."""
        return self.sign_for(
            bearer_part(
                passport.tenant,
                passport.product,
                passport.key_id,
                passport.models,
                passport.jurisdictions,
            ),
            passport.request_id,
            passport.criticality,
            issued_ms=passport.issued_ms,
            expires_ms=passport.expires_ms,
            deadline_ms=passport.deadline_ms,
        )

    def sign_for(
        self,
        bearer: bytes,
        request_id: str,
        criticality: Criticality,
        *,
        issued_ms: int,
        expires_ms: int,
        deadline_ms: int,
    ) -> bytes:
        """The header's value, for one of many requests of the same `bearer`."""
        who = f"{_quote(request_id)},{_quote(criticality)}"
        claims = f"{who},{issued_ms},{expires_ms},{deadline_ms}]"
        signed = self._head + bearer + _to_base64(claims.encode())
        return signed + b"." + _to_base64(self._mac(signed))

    def verify(self, header: bytes, *, now_ms: int, clock_skew_ms: int = CLOCK_SKEW_MS) -> Passport:
        """What the header grants.

        Raises:
            PassportError: nothing; the subclass says why.
        """
        signed, _, mac = header.rpartition(b".")
        parts = signed.split(b".")
        if len(parts) != 3 or parts[0] != _FORMAT or len(header) > MAX_BYTES:
            raise PassportMalformed("The passport is malformed.")
        expected = self._macs.get(parts[1])
        if expected is None:
            raise PassportKeyUnknown("The passport is signed with a key that is not known here.")
        if not compare_digest(_to_base64(expected(signed)), mac):
            raise PassportForged("The passport's signature is wrong.")
        passport = _parse(parts[2])
        if now_ms > passport.expires_ms + clock_skew_ms:
            raise PassportExpired("The passport has expired.")
        if now_ms < passport.issued_ms - clock_skew_ms:
            raise PassportNotYetValid("The passport was issued in the future.")
        return passport

    # ---- rotation and the file ----

    @classmethod
    def generate(cls) -> Self:
        """One new secret."""
        kid, secret = _new_key()
        return cls({kid: secret}, kid)

    def with_next(self) -> Self:
        """With a new secret beside the one that signs."""
        kid, secret = _new_key()
        return type(self)({self.signing: self._secrets[self.signing], kid: secret}, self.signing)

    def promoted(self) -> Self:
        """Signing with the newest secret."""
        return type(self)(self._secrets, list(self._secrets)[-1])

    def without_previous(self) -> Self:
        """With only the secret that signs."""
        return type(self)({self.signing: self._secrets[self.signing]}, self.signing)

    @property
    def kids(self) -> tuple[str, ...]:
        return tuple(self._secrets)

    @classmethod
    def load(cls, path: Path) -> Self:
        """From a file.

        Raises:
            BadRequest: there is none, others may read it, or it does not hold what `save` writes.
        """
        data = read_private_json(path, "passport keys")
        try:
            keys = {
                kid: base64.b64decode(text, validate=True) for kid, text in data["keys"].items()
            }
            signing = data["signing"]
        except (KeyError, TypeError, AttributeError, ValueError):
            raise BadRequest(f"The file with the passport keys is malformed: {path}") from None
        return cls(keys, signing)

    def save(self, path: Path) -> None:
        """Into a file of mode 0600, all or nothing.

        Raises:
            OSError: it cannot be written.
        """
        keys = {kid: base64.b64encode(secret).decode() for kid, secret in self._secrets.items()}
        content = json.dumps({"signing": self.signing, "keys": keys}, indent=2)
        write_private(path, content.encode())


def _new_key() -> tuple[str, bytes]:
    return f"k{secrets.token_hex(4)}", secrets.token_bytes(32)


def _to_base64(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def _parse(payload: bytes) -> Passport:
    """Signed by one of us, so it is well-formed unless the signer speaks another version."""
    try:
        padded = payload + b"=" * (-len(payload) % 4)
        fields: list[Any] = _decode(base64.urlsafe_b64decode(padded).decode())
        tenant, product, key_id, models, jurisdictions, *rest = fields
        return Passport(
            tenant,
            product,
            key_id,
            None if models is None else tuple(models),
            None if jurisdictions is None else tuple(jurisdictions),
            *rest,
        )
    except (binascii.Error, ValueError, TypeError):
        raise PassportMalformed("The passport is malformed.") from None
