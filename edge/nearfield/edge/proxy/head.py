"""What a request's head must be beyond what llhttp demands of it.

Two readers must agree. The request line and the end of the head are found here, in the raw bytes;
llhttp (strict) reads the same bytes for fields and framing. What either refuses is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from nearfield.core.errors import BadRequest, NearfieldError, PayloadTooLarge
from nearfield.edge.proxy.ports import Dialect

REQUEST_LINE = re.compile(rb"(GET|POST|HEAD|PUT|PATCH|DELETE|OPTIONS) (/[!-~]*) HTTP/1\.([01])\r\n")
"""No other method, form of target, or version; one space between them, and CRLF."""
_ANY_LINE = re.compile(rb"([A-Z-]{1,32}) ([!-~]{1,8192}) HTTP/([0-9]\.[0-9])\r\n")
_LINE_START = re.compile(rb"[A-Z][A-Z-]{0,31}(?: [!-~]*(?: [A-Z0-9/.]*\r?)?)?\Z")

_HOST = re.compile(rb"(?:[A-Za-z0-9_.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?")
_DOTS = re.compile(rb"/\.{1,2}(?:/|\Z)")
_ENCODED = re.compile(rb"%(?:2[eEfF]|5[cC]|00|0[aAdD]|(?![0-9A-Fa-f]{2}))")
MODEL = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_PATH_MODEL = re.compile(rb"/(?!v[12](?:/|\Z))([A-Za-z0-9._-]{1,128})(/v([12])(?:/.*)?)")
_OIP_MODEL = re.compile(rb"/v2/models/([^/]+)(?:/.*)?")

_CACHED_BYTES = 256
MAX_LENGTH_DIGITS = 18
"""Of a content-length: as many as always fit 64 bits."""

ONCE = frozenset(
    (
        b"host", b"content-length", b"transfer-encoding", b"content-type", b"content-encoding",
        b"authorization", b"expect", b"x-request-id", b"traceparent", b"idempotency-key",
        b"x-request-timeout-ms", b"inference-header-content-length",
    )
)  # fmt: skip
"""Two of these could be read as one or the other, depending on who reads."""
HOP_BY_HOP = frozenset(
    (
        b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization",
        b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade",
        b"http2-settings",
    )
)  # fmt: skip
_NOT_TO_BE_LISTED = ONCE | {b"cookie", b"tracestate"}
"""`Connection: authorization` would have us drop it, and the next hop believe it never was."""


class Bad(Exception):
    """A head that is refused, and the connection closed.

    Attributes:
        error: why. data: what has come on the connection, where it does not begin with a request.
    """

    def __init__(self, error: NearfieldError, data: bytes = b"") -> None:
        super().__init__(error.message)
        self.error = error
        self.data = data


def bad(message: str, code: str = "malformed_request") -> Bad:
    """A refusal with 400."""
    return Bad(BadRequest(message, code=code))


class VersionNotSupported(BadRequest):
    status = 505
    default_code = "http_version_not_supported"


class MethodNotAllowed(BadRequest):
    status = 405
    default_code = "method_not_allowed"


class TargetTooLong(BadRequest):
    status = 414
    default_code = "uri_too_long"


class HeadTooLarge(BadRequest):
    status = 431
    default_code = "headers_too_large"


class ExpectationFailed(BadRequest):
    status = 417
    default_code = "expectation_failed"


class RequestTimeout(BadRequest):
    status = 408
    default_code = "request_timeout"


class Place(NamedTuple):
    """What a target says.

    Attributes:
        dialect: in which errors are told. model: where the path names one.
        path: what an upstream is asked for: the target without a leading model.
        says_model: a JSON body here says which model is meant.
    """

    dialect: Dialect
    model: str | None
    path: bytes
    says_model: bool


def join(headers: dict[bytes, bytes], name: bytes, value: bytes) -> None:
    """Add a field to those that are there and have one of its name.

    Raises:
        Bad: there can only be one.
    """
    if name in ONCE:
        raise bad(f"The header {name.decode('latin-1')} must be given once.")
    headers[name] += (b"; " if name == b"cookie" else b", ") + value


def wants_continue(headers: Mapping[bytes, bytes]) -> bool:
    """Whether the client waits for a word before it sends its body.

    Raises:
        Bad: it expects something else.
    """
    expectation = headers.get(b"expect")
    if expectation is None:
        return False
    if expectation.lower() != b"100-continue":
        raise Bad(ExpectationFailed("Only the expectation 100-continue is known here."))
    return True


def too_large(max_body_bytes: int) -> Bad:
    """A body that is not taken."""
    return Bad(
        PayloadTooLarge(f"The body is larger than {max_body_bytes} bytes. Send a smaller one.")
    )


def check_incomplete(data: bytes) -> None:
    """Refuse early what can no longer become a head: its rest need not be waited for.

    Raises:
        Bad: it is not HTTP/1, or has a bare CR, LF or NUL.
    """
    line, ended, rest = data.partition(b"\r\n")
    if ended and _ANY_LINE.fullmatch(line + ended) is None:
        raise explain_line(data)
    if not ended and _LINE_START.match(line) is None and len(line) < 8192:
        raise explain_line(data)
    pairs = rest.count(b"\r\n")
    lone = rest.count(b"\n") != pairs or rest.count(b"\r") - rest.endswith(b"\r") != pairs
    if lone or b"\0" in rest:
        raise bad("A header line must end in CRLF, and hold no other control characters.")


def explain_line(data: bytes) -> Bad:
    """Why `REQUEST_LINE` does not match."""
    found = _ANY_LINE.match(data)
    if found is None:
        return bad("The first line is not an HTTP/1.1 request line.")
    method, target, version = found.groups()
    if version not in (b"1.1", b"1.0"):
        return Bad(VersionNotSupported("Only HTTP/1.1, 1.0 and 2 are spoken here."), data)
    if REQUEST_LINE.match(b"GET " + target + b" HTTP/1.1\r\n"):
        return Bad(MethodNotAllowed(f"The method {method.decode('ascii')} is not taken here."))
    return bad("The request's target must be a path, beginning with '/'.")


def check_host(host: bytes | None, minor: bytes) -> None:
    """A well-formed Host (HTTP/1.0 may leave it out).

    Raises:
        Bad: it is not there, or not a host.
    """
    if host is None:
        if minor == b"0":
            return
        raise bad("A host header is missing.")
    if _HOST.fullmatch(host) is None:
        raise bad("The host header is not a host name or address with an optional port.")


def drop_listed(headers: dict[bytes, bytes], connection: bytes) -> tuple[bool, bool]:
    """Read `Connection`: remove the fields it lists; (says close, says keep-alive).

    Raises:
        Bad: it lists a field that is none of this hop's business to remove.
    """
    close = keep = False
    for token in connection.lower().split(b","):
        name = token.strip(b" \t")
        if name == b"close":
            close = True
        elif name == b"keep-alive":
            keep = True
        elif name in _NOT_TO_BE_LISTED or name.startswith(b"x-nearfield-"):
            raise bad("The connection header lists a field that belongs to the whole way.")
        elif name:
            headers.pop(name, None)
    return close, keep


def check_target(target: bytes) -> None:
    """Refuse what could be resolved to another path by whoever reads it next.

    Raises:
        Bad: a fragment, a backslash, a dot segment, an encoded one, or a broken escape.
    """
    path = target.partition(b"?")[0]
    if b"#" in target or b"\\" in target:
        raise bad("The request's target must not hold '#' or a backslash.")
    if b"/." in path and _DOTS.search(path) is not None:
        raise bad("The request's path must not hold '.' or '..' segments.")
    if b"%" in path and _ENCODED.search(path) is not None:
        raise bad("The request's path must not hold encoded dots, slashes or controls.")


def read_path(target: bytes) -> Place:
    """The dialect, the model where the path names one, and the path without a leading model.

    Raises:
        Bad: the target could be read as another one, or its model is no model name.
    """
    return _read_path(target) if len(target) > _CACHED_BYTES else _read_short_path(target)


def _read_path(target: bytes) -> Place:
    check_target(target)
    path, mark, query = target.partition(b"?")
    named = _PATH_MODEL.fullmatch(path)
    model = None
    if named is not None:
        model, path = named[1], named[2]
    dialect: Dialect = "oip" if path == b"/v2" or path.startswith(b"/v2/") else "openai"
    if dialect == "oip" and model is None and (inside := _OIP_MODEL.fullmatch(path)) is not None:
        model = inside[1]
        if MODEL.fullmatch(model) is None:
            raise bad("A model's name in a path is of letters, digits, '.', '_' and '-'.")
    return Place(
        dialect,
        None if model is None else model.decode("ascii"),
        path + mark + query,
        path.startswith(b"/v1/"),
    )


_read_short_path = lru_cache(maxsize=2048)(_read_path)


def timeout_s(value: bytes, max_s: float) -> float:
    """`x-request-timeout-ms`, in seconds.

    Raises:
        Bad: it is not a whole number of milliseconds within the bounds.
    """
    if value.isdigit() and len(value) <= 12 and 0 < int(value) <= max_s * 1000:
        return int(value) / 1000
    raise Bad(
        BadRequest(
            "x-request-timeout-ms must be a whole number of milliseconds from 1 to "
            f"{max_s * 1000:.0f}.",
            param="x-request-timeout-ms",
        )
    )
