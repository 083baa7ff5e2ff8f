"""An upstream that speaks OpenAI or the Open Inference Protocol, as an engine.

This is how hardware that Ray does not manage joins as a pool: Triton, vLLM, a hosted API or
another nearfield region. Requests are rendered in the upstream's dialect, its events and errors
come back as ours. A stream that breaks off ends with an error, never as if it were complete.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import AsyncIterator
from typing import Any, cast

import httpx
import numpy as np
from nearfield.api import oip
from nearfield.api.events import (
    Completed,
    Embedded,
    EmbedRequest,
    Event,
    FinishReason,
    GenerateRequest,
    Inferred,
    Request,
    TensorRequest,
    Text,
    Timings,
    TokenLogprob,
)
from nearfield.core.errors import (
    BadRequest,
    DeadlineExceeded,
    Forbidden,
    NearfieldError,
    NotFound,
    PayloadTooLarge,
    RateLimited,
    Unavailable,
    Unprocessable,
    UpstreamFailed,
)
from nearfield.core.spec import RemoteEngine as RemoteSpec
from nearfield.serving.engines.base import (
    Capabilities,
    EngineContext,
    LoopEngine,
    TensorMetadata,
)

log = logging.getLogger("nearfield.engine")

MAX_EVENT_CHARACTERS = 4 * 2**20
_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "tool_calls": "tool_calls"}
_ERRORS: dict[int, type[NearfieldError]] = {
    400: BadRequest,
    404: NotFound,
    413: PayloadTooLarge,
    422: Unprocessable,
    429: RateLimited,
    503: Unavailable,
    504: DeadlineExceeded,
}


class RemoteEngine(LoopEngine):
    """An asynchronous HTTP client."""

    def load(self, context: EngineContext) -> Capabilities:
        spec = self._spec = cast(RemoteSpec, context.spec.engine)
        self._model = spec.upstream_model or context.spec.model
        headers = {"user-agent": "nearfield"}
        if spec.api_key_env is not None:
            key = os.environ.get(spec.api_key_env)
            if not key:
                raise BadRequest(
                    f"engine.api_key_env is {spec.api_key_env}, which is not set in the replica's "
                    "environment. Set it in the application's runtime_env."
                )
            headers["authorization"] = f"Bearer {key}"
        self._client = httpx.AsyncClient(
            base_url=spec.url.rstrip("/"),
            headers=headers,
            timeout=httpx.Timeout(None, connect=spec.connect_timeout_s),
            limits=httpx.Limits(
                max_connections=spec.max_connections,
                max_keepalive_connections=spec.max_connections,
            ),
            follow_redirects=False,
        )
        self.start_loop(context.emit, [spec.task])
        try:
            capabilities = self.run(self._capabilities())
        except (httpx.HTTPError, NearfieldError) as error:
            self.close()
            said = error.message if isinstance(error, NearfieldError) else type(error).__name__
            raise Unavailable(f"engine.url {spec.url} does not answer as it should: {said}") from (
                error
            )
        return capabilities

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):
            self.run(self._client.aclose())
        super().close()

    def failure(self, error: Exception) -> NearfieldError:
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return Unavailable("Upstream cannot be reached.", retry_after_s=5)
        if isinstance(error, httpx.HTTPError):
            return UpstreamFailed("Upstream broke off before its answer was complete.")
        return super().failure(error)

    # ---- in the loop ------------------------------------------------------------------------

    async def _capabilities(self) -> Capabilities:
        detail = {"upstream": self._spec.url, "protocol": self._spec.protocol}
        platform = f"nearfield_remote_{self._spec.protocol}"
        if self._spec.protocol == "openai":
            await self._json("GET", "/models")
            return Capabilities(
                tasks=frozenset({self._spec.task}),
                platform=platform,
                chat=self._spec.task == "generate",
                # Calls arrive parsed; rendering them again in any format lets ours be read.
                tool_format="hermes" if self._spec.task == "generate" else None,
                detail=detail,
            )
        metadata = await self._json("GET", f"/v2/models/{self._model}")
        try:
            inputs, outputs = (_tensors(metadata[key]) for key in ("inputs", "outputs"))
        except (KeyError, TypeError) as error:
            raise UpstreamFailed("its metadata cannot be read") from error
        return Capabilities(
            tasks=frozenset({"tensor"}),
            platform=platform,
            inputs=inputs,
            outputs=outputs,
            detail=detail,
        )

    async def answer(self, request_id: str, request: Request, started_s: float) -> Event:
        if isinstance(request, GenerateRequest):
            return await self._generate(request_id, request, started_s)
        if isinstance(request, EmbedRequest):
            return await self._embed(request, started_s)
        return await self._infer(request, started_s)

    async def _generate(self, request_id: str, request: GenerateRequest, started_s: float) -> Event:
        path = "/completions" if request.messages is None else "/chat/completions"
        usage: dict[str, Any] = {}
        first_s: float | None = None
        tokens = 0
        finished: set[int] = set()
        calls = _Calls()
        async for chunk in self._events(path, _generate_body(self._model, request)):
            usage = chunk.get("usage") or usage
            texts = [_text(choice, calls) for choice in chunk.get("choices", [])]
            first_s = first_s or time.monotonic()
            tokens += sum(text.tokens for text in texts)
            finished |= {text.choice for text in texts if text.finish_reason}
            if texts:
                self._emit([(request_id, text) for text in texts])
        if len(finished) < request.n:
            raise UpstreamFailed("Upstream broke off before its answer was complete.")
        now_s = time.monotonic()
        first_s = first_s or now_s
        timings = Timings(started_s, prefill_s=first_s - started_s, decode_s=now_s - first_s)
        return Completed(
            int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", tokens)), timings
        )

    async def _embed(self, request: EmbedRequest, started_s: float) -> Event:
        body: dict[str, Any] = {"model": self._model, "input": request.inputs}
        if request.dimensions is not None:
            body["dimensions"] = request.dimensions
        answer = await self._json("POST", "/embeddings", body)
        try:
            rows = sorted(answer["data"], key=lambda row: row["index"])
            vectors = np.array([row["embedding"] for row in rows], dtype=np.float32)
            tokens = int(answer.get("usage", {}).get("prompt_tokens", 0))
        except (KeyError, TypeError, ValueError) as error:
            raise UpstreamFailed("Upstream's answer cannot be read.") from error
        if vectors.ndim != 2 or len(vectors) != len(request.inputs):
            raise UpstreamFailed("Upstream answered another number of embeddings.")
        return Embedded(vectors, tokens, Timings(started_s, prefill_s=time.monotonic() - started_s))

    async def _infer(self, request: TensorRequest, started_s: float) -> Event:
        body, length = oip.render_request(request)
        answer = await self._client.post(
            f"/v2/models/{self._model}/infer",
            content=body,
            headers={
                "content-type": "application/octet-stream",
                "inference-header-content-length": f"{length}",
            },
        )
        if answer.status_code != 200:
            raise _error(answer.status_code, answer.content, answer.headers)
        head = answer.headers.get("inference-header-content-length")
        outputs = oip.parse_response(answer.content, int(head) if head else None)
        return Inferred(outputs, Timings(started_s, prefill_s=time.monotonic() - started_s))

    # ---- HTTP -------------------------------------------------------------------------------

    async def _json(self, method: str, path: str, body: Any = None) -> Any:
        answer = await self._client.request(method, path, json=body)
        if answer.status_code != 200:
            raise _error(answer.status_code, answer.content, answer.headers)
        try:
            return answer.json()
        except ValueError as error:
            raise UpstreamFailed("Upstream's answer is not JSON.") from error

    async def _events(self, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Server-sent events up to `[DONE]`; an error event is raised."""
        async with self._client.stream("POST", path, json=body) as answer:
            if answer.status_code != 200:
                raise _error(answer.status_code, await answer.aread(), answer.headers)
            async for line in answer.aiter_lines():
                if not line.startswith("data:"):
                    continue
                data = line[5:].strip()
                if data == "[DONE]":
                    return
                if len(data) > MAX_EVENT_CHARACTERS:
                    raise UpstreamFailed("Upstream sent an event too large to read.")
                try:
                    event = json.loads(data)
                except ValueError as error:
                    raise UpstreamFailed("Upstream sent an event that is not JSON.") from error
                if event.get("error"):
                    raise UpstreamFailed(_said(event) or "Upstream failed on this request.")
                yield event


def _generate_body(model: str, request: GenerateRequest) -> dict[str, Any]:
    sampling = request.sampling
    body: dict[str, Any] = {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "n": request.n,
    }
    if request.messages is None:
        body["prompt"] = request.prompt if request.prompt is not None else request.prompt_tokens
        body["echo"] = request.echo
        if sampling.logprobs is not None:
            body["logprobs"] = sampling.logprobs
    else:
        body["messages"] = request.messages
        if sampling.logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": sampling.logprobs}
    # What is at its default is left out: not every upstream knows every extension.
    optional = {
        "max_tokens": sampling.max_tokens,
        "top_k": sampling.top_k or None,
        "min_p": sampling.min_p or None,
        "seed": sampling.seed,
        "presence_penalty": sampling.presence_penalty or None,
        "frequency_penalty": sampling.frequency_penalty or None,
        "repetition_penalty": None
        if sampling.repetition_penalty == 1
        else sampling.repetition_penalty,
        "stop": list(sampling.stop) or None,
        "ignore_eos": sampling.ignore_eos or None,
        "tools": list(request.tools) or None,
        "chat_template_kwargs": request.chat_template_kwargs or None,
    }
    body |= {name: value for name, value in optional.items() if value is not None}
    match request.constraint:
        case None:
            pass
        case c if c.kind == "json_object":
            body["response_format"] = {"type": "json_object"}
        case c if c.kind == "json_schema":
            schema = {"name": "answer", "schema": c.value, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        case c if c.kind == "tool_call":
            names = c.value["names"]
            named = {"type": "function", "function": {"name": names[0]}}
            body["tool_choice"] = named if len(names) == 1 else "required"
        case c:
            raise BadRequest(f"An upstream takes no {c.kind} constraint.", param="response_format")
    return body


class _Calls:
    """Tool calls that upstream streams in pieces, written out once they are complete."""

    def __init__(self) -> None:
        self._parts: dict[tuple[int, int], dict[str, str]] = {}

    def add(self, choice: int, deltas: list[dict[str, Any]]) -> None:
        for delta in deltas:
            key = (choice, int(delta.get("index", 0)))
            call = self._parts.setdefault(key, {"name": "", "arguments": ""})
            function = delta.get("function") or {}
            for field in call:
                call[field] += function.get(field) or ""

    def text(self, choice: int) -> str:
        """The choice's calls in the format that our own parser reads."""
        written = ""
        for key in sorted(key for key in self._parts if key[0] == choice):
            call = self._parts.pop(key)
            arguments = call["arguments"] or "{}"
            name = json.dumps(call["name"])
            written += f'<tool_call>{{"name": {name}, "arguments": {arguments}}}</tool_call>'
        return written


def _text(choice: dict[str, Any], calls: _Calls) -> Text:
    index = int(choice.get("index", 0))
    delta = choice.get("delta") or {}
    text = delta.get("content") or choice.get("text") or ""
    calls.add(index, delta.get("tool_calls") or [])
    reason = choice.get("finish_reason")
    finish = None if reason is None else _REASONS.get(reason, "stop")
    if finish is not None:
        text += calls.text(index)
        finish = "stop" if finish == "tool_calls" else finish  # ours is read from the text again
    logprobs = _logprobs(choice.get("logprobs"))
    return Text(text, index, 1 if text else 0, finish, None, logprobs)


def _logprobs(value: Any) -> tuple[TokenLogprob, ...] | None:
    if not isinstance(value, dict):
        return None
    if isinstance(value.get("content"), list):
        return tuple(
            TokenLogprob(
                entry["token"],
                bytes(entry.get("bytes") or entry["token"].encode()),
                float(entry["logprob"]),
                tuple(
                    (top["token"], bytes(top.get("bytes") or top["token"].encode()), top["logprob"])
                    for top in entry.get("top_logprobs") or []
                ),
            )
            for entry in value["content"]
        )
    tops = value.get("top_logprobs") or [{}] * len(value.get("tokens", []))
    return tuple(
        TokenLogprob(
            token, token.encode(), logprob, tuple((t, t.encode(), lp) for t, lp in top.items())
        )
        for token, logprob, top in zip(
            value.get("tokens", []), value.get("token_logprobs", []), tops, strict=False
        )
    )


def _tensors(described: list[dict[str, Any]]) -> tuple[TensorMetadata, ...]:
    return tuple(
        TensorMetadata(t["name"], t["datatype"], tuple(int(size) for size in t["shape"]))
        for t in described
    )


def _said(body: Any) -> str:
    """The message of an error body in either dialect."""
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return str(message)[:500] if message else ""


def _error(status: int, body: bytes, headers: httpx.Headers) -> NearfieldError:
    """Upstream's refusal as ours. What it says of a wrong request is for the caller; what it says
    of itself (its keys, its failures) is not."""
    try:
        parsed = json.loads(body)
    except ValueError:
        parsed = None
    if status in (401, 403):
        log.error("upstream answered %d: its key is missing, wrong or lacks a permission", status)
        return Forbidden("Upstream does not let this model's key in.", code="upstream_forbidden")
    kind = _ERRORS.get(status)
    if kind is None:
        return UpstreamFailed(f"Upstream answered {status}.")
    detail = parsed.get("error") if isinstance(parsed, dict) else None
    fields = detail if isinstance(detail, dict) else {}
    retry = headers.get("retry-after", "")
    return kind(
        _said(parsed) or f"Upstream answered {status}.",
        param=fields.get("param") if isinstance(fields.get("param"), str) else None,
        code=fields.get("code") if isinstance(fields.get("code"), str) else None,
        retry_after_s=float(retry) if retry.isdigit() else None,
    )
