"""OpenAI's API: bodies to neutral requests, events to bodies and server-sent events."""

from __future__ import annotations

from nearfield.api.error_bodies import openai_error as error_body
from nearfield.api.openai_answers import (
    DONE,
    FINGERPRINT,
    Renderer,
    dump,
    embeddings_body,
    model_body,
    models_body,
)
from nearfield.api.openai_requests import (
    Call,
    Kind,
    parse_chat,
    parse_completion,
    parse_embeddings,
)

__all__ = [
    "DONE",
    "FINGERPRINT",
    "Call",
    "Kind",
    "Renderer",
    "dump",
    "embeddings_body",
    "error_body",
    "model_body",
    "models_body",
    "parse_chat",
    "parse_completion",
    "parse_embeddings",
]
