"""Reading a JSON body that anyone may have sent."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pydantic_core
from nearfield.core.errors import BadRequest

MAX_DEPTH = 64
MAX_BRACKETS = 2**20
"""Lists and objects take twenty times their size in memory: 16 MB of `[],` would take 350 MB."""

_NESTING = b"[{]}"
_BLOCK_BYTES = 2**16
_STRINGS = re.compile(rb'"[^"]*"?')
_OTHERS = bytes(set(range(256)) - set(_NESTING + b'"'))
_STEPS = bytes.maketrans(_NESTING, b"\x01\x01\xff\xff")


def load_json(body: bytes, *, max_depth: int = MAX_DEPTH) -> Any:
    """Parse a body: strict UTF-8, no NaN or Infinity, nested at most `max_depth` deep.

    A number beyond a double's range (`1e999`) is JSON and becomes infinite here: whoever takes
    numbers refuses it.

    Raises:
        BadRequest: the message says what is wrong and where.
    """
    if not body.strip():
        raise BadRequest("The body is empty: send a JSON object.", code="invalid_json")
    brackets = body.count(b"[") + body.count(b"{")
    if brackets > MAX_BRACKETS:
        raise BadRequest(
            f"The body has {brackets} opening brackets; at most {MAX_BRACKETS} are taken. "
            "Send flat lists, or binary tensors.",
            code="invalid_json",
        )
    try:
        # Its own limit is 200: what is far too deep ends there, before more of it is built.
        parsed = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        if "recursion limit" in str(error):
            raise _too_deep(max_depth) from None
        raise BadRequest(f"The body is not valid JSON: {error}.", code="invalid_json") from None
    if brackets > max_depth and _depth(body) > max_depth:
        raise _too_deep(max_depth)
    return parsed


def _too_deep(max_depth: int) -> BadRequest:
    return BadRequest(
        f"The body is nested more than {max_depth} deep. Send a flatter one.", code="invalid_json"
    )


def _depth(body: bytes) -> int:
    """How deep valid JSON is nested: cheaper over its bytes than over what was parsed."""
    if b"\\" in body:
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    brackets = _STRINGS.sub(b"", body.translate(None, _OTHERS))
    steps = np.frombuffer(brackets.translate(_STEPS), np.int8)
    depth = deepest = 0
    for at in range(0, steps.size, _BLOCK_BYTES):
        sums = np.cumsum(steps[at : at + _BLOCK_BYTES], dtype=np.int32)
        deepest = max(deepest, depth + int(sums.max()))
        depth += int(sums[-1])
    return deepest
