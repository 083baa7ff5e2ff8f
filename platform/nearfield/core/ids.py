"""Identifiers: short, unguessable, and telling by their prefix what they name."""

from __future__ import annotations

import secrets


def new_id(prefix: str) -> str:
    """`prefix-` and 24 hex digits (96 random bits), as OpenAI's ids look."""
    return f"{prefix}-{secrets.token_hex(12)}"
