"""Who a request is: its id and its place in a trace, the caller's where they can be believed."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Mapping

from nearfield.edge.proxy.ports import Trace

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_TRACEPARENT = re.compile(
    rb"(?!ff)[0-9a-f]{2}-((?!0{32})[0-9a-f]{32})-((?!0{16})[0-9a-f]{16})-[0-9a-f]([0-9a-f])(?:-.*)?"
)


def request_id(headers: Mapping[bytes, bytes]) -> bytes:
    """The caller's `x-request-id` where it is sane, else a new one, as `core.ids` makes them."""
    given = headers.get(b"x-request-id")
    if given is not None and _REQUEST_ID.fullmatch(given) is not None:
        return given
    return b"req-" + os.urandom(12).hex().encode("ascii")


def trace(headers: Mapping[bytes, bytes], sample_ratio: float) -> Trace:
    """The caller's trace goes on, with its decision on sampling; else one begins."""
    span_id = b"%016x" % (random.getrandbits(64) or 1)
    given = headers.get(b"traceparent")
    found = None if given is None else _TRACEPARENT.fullmatch(given)
    if found is None:
        trace_id = b"%032x" % (random.getrandbits(128) or 1)
        return Trace(trace_id, span_id, b"", random.random() < sample_ratio)
    trace_id, parent_id, flags = found.groups()
    return Trace(trace_id, span_id, parent_id, int(flags, 16) & 1 == 1)
