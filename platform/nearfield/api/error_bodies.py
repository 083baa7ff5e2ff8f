"""An error in its caller's dialect. Imports nothing heavy: gateways render errors too."""

from __future__ import annotations

import re
from typing import Any

from nearfield.core.errors import NearfieldError

ERROR_CODE = b"x-nearfield-error-code"
"""The header with the code of an error that is a whole answer, in every dialect: Open Inference's
bodies have no place for it, and gateways judge by it without reading bodies."""
_CODE = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def code_header(error: NearfieldError) -> list[tuple[bytes, bytes]]:
    """That header, where the error has a code that can stand in one: a remote model's may be any
    text."""
    code = error.code
    if code is None or _CODE.fullmatch(code) is None:
        return []
    return [(ERROR_CODE, code.encode("ascii"))]


def openai_error(error: NearfieldError) -> dict[str, Any]:
    """An error as OpenAI's clients expect it: all four fields, always."""
    return {
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
        }
    }


def oip_error(error: NearfieldError) -> dict[str, Any]:
    """An error as the Open Inference Protocol has it."""
    return {"error": error.message}


def oip_error_event(error: NearfieldError) -> dict[str, Any]:
    """An error that ends a stream. No header can tell its code any more."""
    return oip_error(error) if error.code is None else {**oip_error(error), "code": error.code}
