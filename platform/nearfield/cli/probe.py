"""Asking each model a real question, as a client would: does it answer, and what?"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import httpx
from nearfield.api.load import gateways_passport
from nearfield.api.passport import HEADER, PassportKeys
from nearfield.core.ids import new_id
from nearfield.core.settings import Settings
from nearfield.core.spec import ModelSpec

Kind = Literal["chat", "embeddings", "ready"]

QUESTION = "What is 47 + 85?"
SENTENCE = "The region is close to the user."
_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said. `text` is for people; `error` is why there is none."""

    model: str
    kind: Kind
    text: str | None
    error: str | None
    seconds: float


def kind_of(spec: ModelSpec) -> Kind:
    """What can be asked of a model without knowing its inputs."""
    engine = spec.engine
    task = engine.task if engine.kind == "remote" else None
    if engine.kind in ("generate", "vllm") or task == "generate":
        return "chat"
    if engine.kind == "embed" or task == "embed":
        return "embeddings"
    return "ready"


def ask(base_url: str, spec: ModelSpec, *, timeout_s: float, settings: Settings) -> Answer:
    """Ask until there is an answer, or `timeout_s` is over.

    The first tries may find no route yet, or a replica on its way up from zero. A region that is
    closed is asked with a passport. If only keys open it, which are not known here, it is asked
    whether it is ready.
    """
    kind = kind_of(spec)
    path, body = _request(kind, spec.model)
    if settings.keys_file is not None and settings.passport_keys_file is None:
        kind, path, body = "ready", "/readyz", None
    started_s = time.monotonic()
    with httpx.Client(timeout=timeout_s, trust_env=False) as client:
        while True:
            asked_s = time.monotonic()
            left_s = timeout_s - (asked_s - started_s)
            error = "no answer in time"
            try:
                response = client.request(
                    "GET" if body is None else "POST",
                    base_url + path,
                    json=body,
                    timeout=left_s,
                    headers=_passport(settings, timeout_s),
                )
                if response.is_success:
                    text = _text(kind, response)
                    return Answer(spec.model, kind, text, None, time.monotonic() - asked_s)
                error = f"{response.status_code}: {response.text.strip()[:300]}"
            except httpx.TransportError as failed:
                error = f"{type(failed).__name__}: {failed}"
            if time.monotonic() - started_s + _POLL_S > timeout_s:
                return Answer(spec.model, kind, None, error, time.monotonic() - started_s)
            time.sleep(_POLL_S)


def _passport(settings: Settings, timeout_s: float) -> dict[bytes, bytes]:
    if settings.passport_keys_file is None:
        return {}
    passport = gateways_passport(
        new_id("req"), now_ms=int(time.time() * 1000), timeout_ms=int(timeout_s * 1000)
    )
    return {HEADER: PassportKeys.load(settings.passport_keys_file).sign(passport)}


def _request(kind: Kind, model: str) -> tuple[str, Mapping[str, Any] | None]:
    if kind == "chat":
        message = {"role": "user", "content": QUESTION}
        return "/v1/chat/completions", {
            "model": model,
            "messages": [message],
            "temperature": 0,
            "max_tokens": 64,
        }
    if kind == "embeddings":
        return "/v1/embeddings", {"model": model, "input": SENTENCE}
    return f"/v2/models/{model}/ready", None


def _text(kind: Kind, response: httpx.Response) -> str:
    if kind == "chat":
        return str(response.json()["choices"][0]["message"]["content"])
    if kind == "embeddings":
        vector = response.json()["data"][0]["embedding"]
        first = ", ".join(f"{number:.4f}" for number in vector[:3])
        return f"{len(vector)} numbers: [{first}, …]"
    return "ready"
