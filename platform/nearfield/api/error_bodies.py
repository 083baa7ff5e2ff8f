"""An error in its caller's dialect. Imports nothing heavy: gateways render errors too."""

from __future__ import annotations

from typing import Any

from nearfield.core.errors import NearfieldError


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
