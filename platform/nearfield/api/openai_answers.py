"""Events as OpenAI's bodies and server-sent events."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
import orjson
import pydantic_core
from nearfield.api.error_bodies import openai_error as error_body
from nearfield.api.events import (
    Completed,
    Embedded,
    GenerateRequest,
    Text,
    TokenLogprob,
)
from nearfield.api.openai_requests import Call
from nearfield.api.tools import (
    FORMATS,
    Content,
    Part,
    ToolCall,
    ToolParser,
)
from nearfield.core.errors import EngineFailed, NearfieldError

DONE = b"data: [DONE]\n\n"
FINGERPRINT = f"nf-{version('nearfield')}"
LEAST_LOGPROB = -9999.0
"""JSON has no -inf; OpenAI writes this for a token that cannot be."""


def dump(value: Any) -> bytes:
    """Compact JSON."""
    try:
        return pydantic_core.to_json(value)
    except pydantic_core.PydanticSerializationError:
        # A model may write half a surrogate pair, in a call's arguments for instance. Such a
        # character has no UTF-8; JSON can escape it.
        return json.dumps(value, separators=(",", ":")).encode()


def models_body(model: str, created_s: int) -> dict[str, Any]:
    """`GET /v1/models` of a replica: its one model. `created_s` is Unix time."""
    return {"object": "list", "data": [model_body(model, created_s)]}


def model_body(model: str, created_s: int) -> dict[str, Any]:
    """`GET /v1/models/{model}`."""
    return {"id": model, "object": "model", "created": created_s, "owned_by": "nearfield"}


def embeddings_body(call: Call, answers: Sequence[Embedded]) -> bytes:
    """The vectors as JSON: numbers, or base64 of little-endian float32.

    Raises:
        EngineFailed: a vector holds NaN or Infinity.
    """
    parts = [answer.vectors for answer in answers]
    vectors = np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts), "<f4")
    if not np.isfinite(vectors).all():
        raise EngineFailed("The model answered with vectors that are not finite numbers.")
    tokens = sum(answer.prompt_tokens for answer in answers)
    rows: Sequence[Any]
    if call.encoding_format == "base64":
        rows = [base64.b64encode(row.tobytes()).decode("ascii") for row in vectors]
    else:
        rows = list(vectors)
    data = [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(rows)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    body = {"object": "list", "data": data, "model": call.model, "usage": usage}
    # Every float32 with as many digits as tell it apart: half as many as those of its double.
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


@dataclass(slots=True)
class _Choice:
    """One choice of the answer, as far as it is known. `offset`: characters of text so far."""

    index: int
    before: bytes = b""
    parser: ToolParser | None = None
    text: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    arguments: list[list[str]] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    offset: int = 0


class Renderer:
    """Answers of one chat or completion call.

    Streaming: send `first_chunks()`, then `chunk(event, prompt)` for every `Text`, then
    `finish(...)`; or `error(...)` in place of what is left. Otherwise: `add` every `Text`, then
    `full(...)`. All chunks are complete server-sent events.
    """

    def __init__(self, call: Call, id: str, created_s: int, tool_format: str | None) -> None:
        """
        Args:
            id: of the answer, in every chunk. created_s: Unix time.
            tool_format: how the model writes calls, a key of `tools.FORMATS`.
        """
        self._call = call
        self._chat = call.kind == "chat"
        request = call.requests[0]
        assert isinstance(request, GenerateRequest)
        self._asks_logprobs = request.sampling.logprobs is not None
        self._head = {
            "id": id,
            "object": "chat.completion" if self._chat else "text_completion",
            "created": created_s,
            "model": call.model,
            "system_fingerprint": FINGERPRINT,
        }
        chunk_object = "chat.completion.chunk" if self._chat else "text_completion"
        self._chunk_head = self._head | {"object": chunk_object}
        form = None
        if call.reads_tool_calls and tool_format is not None:
            form = FORMATS[tool_format]
        names = {tool["function"]["name"] for tool in request.tools}
        self._choices = [
            _Choice(index, parser=None if form is None else ToolParser(form, names))
            for index in range(len(call.requests) * call.choices)
        ]
        # A plain delta is these bytes around the text: it is rendered thousands of times a second.
        start = b"data: " + dump(self._chunk_head)[:-1] + b',"choices":[{"index":'
        no_usage = b',"usage":null' if call.include_usage else b""
        inner = b',"delta":{"content":' if self._chat else b',"text":'
        close = b"}" if self._chat else b""
        self._after = close + b',"logprobs":null,"finish_reason":null}]' + no_usage + b"}\n\n"
        for choice in self._choices:
            choice.before = start + str(choice.index).encode() + inner

    # streaming

    def first_chunks(self) -> list[bytes]:
        """What is sent before any text: the role of each choice of a chat."""
        if not self._chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(choice, {"delta": delta}) for choice in self._choices]

    def chunk(self, event: Text, prompt: int = 0) -> list[bytes]:
        """The events that bring this text; none where there is nothing to say yet."""
        choice = self._choices[prompt * self._call.choices + event.choice]
        if choice.parser is None and event.finish_reason is None and event.logprobs is None:
            return [self._plain(choice, event.text)] if event.text else []
        chunks: list[bytes] = []
        parts = self._parts(choice, event)
        logprobs = self._logprobs(choice, event)
        if not parts and logprobs is not None:
            parts = [Content("")]
        for part in parts:
            if logprobs is None and isinstance(part, Content):
                chunks.append(self._plain(choice, part.text))
            else:
                chunks.append(self._chunk(choice, self._delta(part), logprobs=logprobs))
            logprobs = None
        if event.finish_reason is not None:
            reason = self._reason(choice, event)
            end: dict[str, Any] = {"delta": {}} if self._chat else {"text": ""}
            chunks.append(self._chunk(choice, end, finish_reason=reason))
        return chunks

    def finish(self, completed: Sequence[Completed]) -> list[bytes]:
        """The end of a stream: usage if it was asked for, and the mark."""
        if not self._call.include_usage:
            return [DONE]
        last: dict[str, Any] = {**self._chunk_head, "choices": [], "usage": _usage(completed)}
        return [b"data: " + dump(last) + b"\n\n", DONE]

    def error(self, error: NearfieldError) -> list[bytes]:
        """An error in place of the rest: clients raise it, nobody takes what came for the whole."""
        return [b"data: " + dump(error_body(error)) + b"\n\n"]

    # whole

    def add(self, event: Text, prompt: int = 0) -> None:
        """Take a part of an answer that is sent whole."""
        choice = self._choices[prompt * self._call.choices + event.choice]
        for part in self._parts(choice, event):
            if isinstance(part, Content):
                choice.text.append(part.text)
            elif isinstance(part, ToolCall):
                choice.calls.append(part)
                choice.arguments.append([part.arguments])
            else:
                choice.arguments[part.index].append(part.fragment)
        if event.logprobs is not None:
            choice.logprobs += event.logprobs
            choice.offsets += _offsets(event.logprobs, choice.offset)
        choice.offset += len(event.text)
        if event.finish_reason is not None:
            choice.finish_reason = self._reason(choice, event)

    def full(self, completed: Sequence[Completed]) -> bytes:
        """The whole answer; `completed` holds one entry a prompt."""
        choices = [self._whole(choice) for choice in self._choices]
        return dump({**self._head, "choices": choices, "usage": _usage(completed)})

    # both

    def _parts(self, choice: _Choice, event: Text) -> Sequence[Part]:
        if choice.parser is None:
            return [Content(event.text)] if event.text else []
        parts = choice.parser.feed(event.text)
        if event.finish_reason is not None:
            parts += choice.parser.end()
        return parts

    def _reason(self, choice: _Choice, event: Text) -> str:
        if choice.parser is not None and choice.parser.called and event.finish_reason == "stop":
            return "tool_calls"
        return event.finish_reason or "stop"

    def _plain(self, choice: _Choice, text: str) -> bytes:
        encoded = json.encoder.encode_basestring_ascii(text).encode("ascii")
        choice.offset += len(text)
        return choice.before + encoded + self._after

    def _delta(self, part: Part) -> dict[str, Any]:
        if isinstance(part, Content):
            return {"delta": {"content": part.text}} if self._chat else {"text": part.text}
        if isinstance(part, ToolCall):
            return {"delta": {"tool_calls": [{"index": part.index} | _call(part)]}}
        more = {"index": part.index, "function": {"arguments": part.fragment}}
        return {"delta": {"tool_calls": [more]}}

    def _chunk(
        self,
        choice: _Choice,
        body: dict[str, Any],
        *,
        logprobs: Any = None,
        finish_reason: str | None = None,
    ) -> bytes:
        entry = {
            "index": choice.index,
            **body,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        chunk: dict[str, Any] = {**self._chunk_head, "choices": [entry]}
        if self._call.include_usage:
            chunk["usage"] = None
        return b"data: " + dump(chunk) + b"\n\n"

    def _logprobs(self, choice: _Choice, event: Text) -> Any:
        if event.logprobs is None:
            return None
        if self._chat:
            return _chat_logprobs(event.logprobs)
        offsets = _offsets(event.logprobs, choice.offset)
        choice.offset += len(event.text)
        return _completion_logprobs(event.logprobs, offsets)

    def _whole(self, choice: _Choice) -> dict[str, Any]:
        text = "".join(choice.text)
        logprobs: Any = None
        if self._asks_logprobs and self._chat:
            logprobs = _chat_logprobs(choice.logprobs)
        elif self._asks_logprobs:
            logprobs = _completion_logprobs(choice.logprobs, choice.offsets)
        entry: dict[str, Any] = {"index": choice.index}
        if self._chat:
            calls = [
                _call(call, "".join(arguments))
                for call, arguments in zip(choice.calls, choice.arguments, strict=True)
            ]
            message = {
                "role": "assistant",
                "content": text or (None if calls else ""),
                "refusal": None,
            }
            entry["message"] = message | ({"tool_calls": calls} if calls else {})
        else:
            entry["text"] = text
        return entry | {"logprobs": logprobs, "finish_reason": choice.finish_reason or "stop"}


def _call(call: ToolCall, arguments: str | None = None) -> dict[str, Any]:
    given = call.arguments if arguments is None else arguments
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": given},
    }


def _chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    content = [
        {
            "token": token.token,
            "logprob": _finite(token.logprob),
            "bytes": list(token.raw),
            "top_logprobs": [
                {"token": text, "logprob": _finite(logprob), "bytes": list(raw)}
                for text, raw, logprob in token.top
            ],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _completion_logprobs(tokens: Sequence[TokenLogprob], offsets: Sequence[int]) -> dict[str, Any]:
    return {
        "tokens": [token.token for token in tokens],
        "token_logprobs": [_finite(token.logprob) for token in tokens],
        "top_logprobs": [{text: _finite(lp) for text, _, lp in token.top} for token in tokens],
        "text_offset": offsets,
    }


def _offsets(tokens: Sequence[TokenLogprob], offset: int) -> list[int]:
    """Where each token's text begins, if the first one's begins at `offset`."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.token)
    return offsets


def _finite(logprob: float) -> float:
    return logprob if logprob > LEAST_LOGPROB else LEAST_LOGPROB


def _usage(completed: Sequence[Completed]) -> dict[str, Any]:
    prompt = sum(c.prompt_tokens for c in completed)
    completion = sum(c.completion_tokens for c in completed)
    cached = sum(c.cached_tokens for c in completed)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
