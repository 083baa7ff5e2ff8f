"""A request as its upstream gets it: rebuilt, with what only gateways may say put in by us."""

from __future__ import annotations

from nearfield.edge.proxy.head import HOP_BY_HOP
from nearfield.edge.proxy.ports import Grant, Leg, Request

INTERNAL = b"x-nearfield-"
"""Fields that only a gateway or a replica may set."""

_NOT_FORWARDED = HOP_BY_HOP | {
    b"host", b"content-length", b"expect", b"authorization", b"x-api-key", b"cookie",
    b"x-request-id", b"traceparent", b"x-request-timeout-ms",
    b"forwarded", b"via", b"x-real-ip", b"x-forwarded-for", b"x-forwarded-host",
    b"x-forwarded-port", b"x-forwarded-proto", b"x-forwarded-prefix", b"x-forwarded-server",
}  # fmt: skip
"""Written anew, or the caller's secret, or a claim that nobody has checked."""

_WITH_BODY = frozenset((b"POST", b"PUT", b"PATCH"))


def upstream_head(request: Request, leg: Leg, grant: Grant, body: bytes, now_s: float) -> bytes:
    """The head of the request for `leg`, its deadline as the time that is left."""
    target, trace = leg.target, request.trace
    left_ms = max(1, int((request.deadline_s - now_s) * 1000))
    lines = [
        b"%b: %b\r\n" % field for field in request.headers.items() if field[0] not in _NOT_FORWARDED
    ]
    own = b"".join(lines)
    if INTERNAL in own:
        own = b"".join([line for line in lines if not line.startswith(INTERNAL)])
    if body or request.method in _WITH_BODY:
        own += b"content-length: %d\r\n" % len(body)
    for field in grant.headers:
        own += b"%b: %b\r\n" % field
    for field in leg.headers:
        own += b"%b: %b\r\n" % field
    return (
        b"%b %b%b HTTP/1.1\r\nhost: %b\r\n%bx-request-id: %b\r\ntraceparent: 00-%b-%b-%b\r\n"
        b"x-request-timeout-ms: %d\r\n\r\n"
    ) % (
        request.method,
        target.prefix,
        request.path if leg.path is None else leg.path,
        target.authority,
        own,
        request.request_id,
        trace.trace_id,
        trace.span_id,
        b"01" if trace.sampled else b"00",
        left_ms,
    )
