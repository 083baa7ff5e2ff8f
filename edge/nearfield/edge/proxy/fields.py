"""The head of an HTTP/2 request, as strict as HTTP/1.1's (RFC 9113, 8.2 and 8.3).

The h2 library checks much of it before; what either refuses is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from nearfield.edge.proxy import head
from nearfield.edge.proxy.head import Bad, bad
from nearfield.edge.proxy.limits import Limits

_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9a-z-]+")
_VALUE = re.compile(rb"(?:[!-~\x80-\xff](?:[\t -~\x80-\xff]*[!-~\x80-\xff])?)?")
_LINE_AROUND_BYTES = 4
"""A field of HTTP/1.1 has a colon, a blank and an end of line besides: bounds mean the same."""

_PSEUDO = frozenset((b":method", b":scheme", b":path", b":authority"))
_SCHEMES = frozenset((b"http", b"https"))
_OF_A_CONNECTION = frozenset(
    (
        b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade",
        b"http2-settings",
    )
)  # fmt: skip

Head = tuple[bytes, bytes, dict[bytes, bytes]]
"""Method, target, headers: names in lower case, repeated ones joined, `host` always there."""


def read(fields: Iterable[tuple[bytes, bytes]], limits: Limits) -> Head:
    """A request's head.

    Raises:
        Bad: it could not be written as a request of HTTP/1.1 that is taken, or is too large.
    """
    pseudo: dict[bytes, bytes] = {}
    headers: dict[bytes, bytes] = {}
    size = 0
    for name, value in fields:
        size += len(name) + len(value) + _LINE_AROUND_BYTES
        if name.startswith(b":"):
            if headers or name in pseudo or name not in _PSEUDO:
                raise bad("A pseudo-header is unknown, given twice, or behind other headers.")
            pseudo[name] = value
            continue
        if _NAME.fullmatch(name) is None or _VALUE.fullmatch(value) is None:
            raise bad("A header has a name or a value that is not well-formed.")
        if name in _OF_A_CONNECTION or (name == b"te" and value != b"trailers"):
            raise bad(f"The header {name.decode('ascii')} has no place in HTTP/2.")
        if name in headers:
            head.join(headers, name, value)
        else:
            headers[name] = value
    if size > limits.max_head_bytes:
        raise Bad(head.HeadTooLarge(f"The head is larger than {limits.max_head_bytes} bytes."))
    if len(headers) > limits.max_headers:
        raise Bad(head.HeadTooLarge(f"There are more than {limits.max_headers} headers."))
    method, target = _line(pseudo, limits)
    _settle_host(pseudo.get(b":authority"), headers)
    _check_length(headers, limits)
    return method, target, headers


def _line(pseudo: dict[bytes, bytes], limits: Limits) -> tuple[bytes, bytes]:
    method, target = pseudo.get(b":method"), pseudo.get(b":path")
    if method is None or target is None or pseudo.get(b":scheme") not in _SCHEMES:
        raise bad("A request has a :method, a :path, and a :scheme that is http or https.")
    if len(target) > limits.max_target_bytes:
        raise Bad(head.TargetTooLong(f"The path is longer than {limits.max_target_bytes}."))
    line = b"%b %b HTTP/1.1\r\n" % (method, target)
    if head.REQUEST_LINE.fullmatch(line) is None:
        raise head.explain_line(line)
    return method, target


def _settle_host(authority: bytes | None, headers: dict[bytes, bytes]) -> None:
    host = headers.get(b"host", authority)
    if authority is not None and host != authority:
        raise bad("The host header and :authority name different hosts.")
    head.check_host(host, b"1")
    assert host is not None
    headers[b"host"] = host


def _check_length(headers: dict[bytes, bytes], limits: Limits) -> None:
    length = headers.get(b"content-length")
    if length is None:
        return
    if not length.isdigit() or len(length) > head.MAX_LENGTH_DIGITS:
        raise bad("content-length must be a number of bytes.")
    if int(length) > limits.max_body_bytes:
        raise head.too_large(limits.max_body_bytes)
