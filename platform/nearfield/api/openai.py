"""OpenAI's API: bodies to neutral requests, events to bodies and server-sent events."""

from __future__ import annotations

import base64
import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import pydantic
import pydantic_core
from nearfield.api import openai_types as types
from nearfield.api.events import (
    Completed,
    Constraint,
    Embedded,
    EmbedRequest,
    GenerateRequest,
    Request,
    Sampling,
    Text,
    TokenLogprob,
)
from nearfield.api.tools import FORMATS, Content, ToolCall, ToolParser
from nearfield.core.errors import BadRequest, NearfieldError

DONE = b"data: [DONE]\n\n"
FINGERPRINT = "nearfield"
Kind = Literal["chat", "completion", "embedding"]
Body = TypeVar("Body", bound=types.RequestBody)


@dataclass(frozen=True, slots=True)
class Call:
    """A parsed body: what the engine is asked, and how to answer.

    `requests` has one entry per prompt; `choices` is how many choices each of them gets.
    """

    kind: Kind
    model: str
    requests: tuple[Request, ...]
    choices: int = 1
    stream: bool = False
    include_usage: bool = False
    reads_tool_calls: bool = False
    encoding_format: Literal["float", "base64"] = "float"


# ---- parsing -----------------------------------------------------------------------------------


def parse_chat(body: Any) -> Call:
    """`POST /v1/chat/completions`.

    Raises:
        BadRequest: `param` is the field at fault.
    """
    parsed = _validate(types.ChatBody, body)
    top = parsed.top_logprobs
    if top is not None and not parsed.logprobs:
        raise BadRequest("top_logprobs needs logprobs: true.", param="top_logprobs")
    tools = [tool.model_dump(exclude_none=True) for tool in parsed.tools or []]
    _check_calls(parsed.messages)
    request = GenerateRequest(
        messages=tuple(m.model_dump(exclude_none=True) for m in parsed.messages),
        tools=() if parsed.tool_choice == "none" else tuple(tools),
        sampling=_sampling(
            parsed,
            max_tokens=parsed.max_completion_tokens or parsed.max_tokens,
            logprobs=(top or 0) if parsed.logprobs else None,
        ),
        constraint=_tool_constraint(parsed) or _format_constraint(parsed.response_format),
        n=parsed.n or 1,
        chat_template_kwargs=parsed.chat_template_kwargs or {},
    )
    return Call(
        "chat",
        parsed.model,
        (request,),
        choices=parsed.n or 1,
        stream=bool(parsed.stream),
        include_usage=_wants_usage(parsed),
        reads_tool_calls=bool(request.tools),
    )


def parse_completion(body: Any) -> Call:
    """`POST /v1/completions`; several prompts become several requests.

    Raises:
        BadRequest: `param` is the field at fault.
    """
    parsed = _validate(types.CompletionBody, body)
    prompts = _inputs(parsed.prompt, "prompt")
    choices = parsed.n or 1
    if len(prompts) * choices > types.MAX_CHOICES:
        raise BadRequest(
            f"{len(prompts)} prompts with n = {choices} are more than {types.MAX_CHOICES} choices. "
            "Send several requests.",
            param="n",
        )
    sampling = _sampling(parsed, max_tokens=parsed.max_tokens, logprobs=parsed.logprobs)
    requests = tuple(
        GenerateRequest(
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_tokens=None if isinstance(prompt, str) else tuple(prompt),
            sampling=sampling,
            n=choices,
            echo=bool(parsed.echo),
        )
        for prompt in prompts
    )
    return Call(
        "completion",
        parsed.model,
        requests,
        choices=choices,
        stream=bool(parsed.stream),
        include_usage=_wants_usage(parsed),
    )


def parse_embeddings(body: Any) -> Call:
    """`POST /v1/embeddings`.

    Raises:
        BadRequest: `param` is the field at fault.
    """
    parsed = _validate(types.EmbeddingBody, body)
    inputs = _inputs(parsed.input, "input")
    if len(inputs) > types.MAX_INPUTS:
        raise BadRequest(
            f"input has {len(inputs)} entries; at most {types.MAX_INPUTS} go in one request.",
            param="input",
        )
    if isinstance(inputs[0], str):
        request = EmbedRequest(tuple(str(text) for text in inputs), parsed.dimensions)
    else:
        request = EmbedRequest(tuple(tuple(int(t) for t in i) for i in inputs), parsed.dimensions)
    return Call(
        "embedding",
        parsed.model,
        (request,),
        encoding_format=parsed.encoding_format or "float",
    )


def _inputs(value: Any, param: str) -> list[str] | list[list[int]]:
    """One or several texts or token lists, as a list; none of them empty lists."""
    if isinstance(value, str):
        return [value]
    if not value:
        raise BadRequest(f"{param} is empty: send at least one.", param=param)
    if isinstance(value[0], int):
        return [value]
    for index, item in enumerate(value):
        if not isinstance(item, str) and not item:
            raise BadRequest(f"{param}[{index}] has no tokens.", param=f"{param}[{index}]")
    entries: list[str] | list[list[int]] = value
    return entries


def _sampling(
    parsed: types.SamplingBody, *, max_tokens: int | None, logprobs: int | None
) -> Sampling:
    if parsed.logit_bias:
        raise BadRequest(
            "logit_bias is not supported here. Leave it out.",
            param="logit_bias",
            code="unsupported_parameter",
        )
    stops = [parsed.stop] if isinstance(parsed.stop, str) else parsed.stop or []
    if len(stops) > types.MAX_STOPS:
        raise BadRequest(f"stop takes at most {types.MAX_STOPS} strings.", param="stop")
    if "" in stops:
        raise BadRequest("stop may not hold an empty string.", param="stop")
    return Sampling(
        max_tokens=max_tokens,
        temperature=1.0 if parsed.temperature is None else parsed.temperature,
        top_p=1.0 if parsed.top_p is None else parsed.top_p,
        top_k=max(0, parsed.top_k or 0),
        min_p=parsed.min_p or 0.0,
        seed=parsed.seed,
        presence_penalty=parsed.presence_penalty or 0.0,
        frequency_penalty=parsed.frequency_penalty or 0.0,
        repetition_penalty=parsed.repetition_penalty or 1.0,
        stop=tuple(stops),
        logprobs=logprobs,
        ignore_eos=bool(parsed.ignore_eos),
    )


def _wants_usage(parsed: types.SamplingBody) -> bool:
    if parsed.stream_options is not None and not parsed.stream:
        raise BadRequest("stream_options needs stream: true.", param="stream_options")
    return bool(parsed.stream_options and parsed.stream_options.include_usage)


def _check_calls(messages: Sequence[types.Message]) -> None:
    """A tool's answer must answer a call that was made."""
    made: set[str] = set()
    for index, message in enumerate(messages):
        if isinstance(message, types.AssistantMessage):
            made |= {call.id for call in message.tool_calls or []}
            if message.content is None and not message.tool_calls:
                raise BadRequest(
                    "An assistant message needs content or tool_calls.",
                    param=f"messages[{index}].content",
                )
        elif isinstance(message, types.ToolMessage) and message.tool_call_id not in made:
            raise BadRequest(
                "No assistant message before this one made a call with this id.",
                param=f"messages[{index}].tool_call_id",
            )


def _tool_constraint(parsed: types.ChatBody) -> Constraint | None:
    choice = parsed.tool_choice
    names = [tool.function.name for tool in parsed.tools or []]
    if choice is None or choice in ("none", "auto"):
        return None
    if not names:
        raise BadRequest("tool_choice needs tools.", param="tool_choice")
    if isinstance(choice, types.NamedToolChoice):
        if choice.function.name not in names:
            raise BadRequest(
                f"tool_choice names {choice.function.name!r}; tools has {', '.join(names)}.",
                param="tool_choice",
            )
        names = [choice.function.name]
    schemas = {
        tool.function.name: tool.function.parameters
        for tool in parsed.tools or []
        if tool.function.parameters
    }
    return Constraint("tool_call", {"names": names, "schemas": schemas})


def _format_constraint(chosen: types.ResponseFormat | None) -> Constraint | None:
    if isinstance(chosen, types.JsonObjectFormat):
        return Constraint("json_object")
    if isinstance(chosen, types.JsonSchemaFormat):
        schema = chosen.json_schema.schema_
        if schema is None:
            raise BadRequest(
                "json_schema needs a schema.", param="response_format.json_schema.schema"
            )
        return Constraint("json_schema", schema)
    return None


# ---- what is wrong with a body -----------------------------------------------------------------

_UNSUPPORTED_PARTS = ("image_url", "input_audio", "file", "refusal")


def _validate(kind: type[Body], body: Any) -> Body:
    if not isinstance(body, dict):
        raise BadRequest("The body must be a JSON object.", code="invalid_json")
    try:
        return kind.model_validate(body)
    except pydantic.ValidationError as error:
        raise _bad_request(kind, body, error) from None


def _bad_request(
    kind: type[types.RequestBody], body: dict[str, Any], error: pydantic.ValidationError
) -> BadRequest:
    """The deepest problem of a body, in words. Alternatives of a union are one problem."""
    found = [(_path(e["loc"], body, e["type"]), e) for e in error.errors(include_url=False)]
    path, first = max(found, key=lambda item: len(item[0]))
    param = _dotted(path)
    name = str(path[-1]) if path else ""
    problem = first["type"]
    if problem == "extra_forbidden":
        hint = difflib.get_close_matches(name, _known_fields(kind, len(path) == 1), n=1)
        remedy = f"Did you mean {hint[0]}?" if hint else "Leave it out."
        return BadRequest(f"Unknown field {param}. {remedy}", param=param, code="unknown_parameter")
    if problem == "none_required":
        return BadRequest(
            f"{param} is not supported here. Leave it out.",
            param=param,
            code="unsupported_parameter",
        )
    if problem == "missing":
        return BadRequest(f"{param} is missing.", param=param, code="missing_parameter")
    if name == "type" and first["input"] in _UNSUPPORTED_PARTS:
        return BadRequest(
            f"{param}: {first['input']} parts are not supported here; send text parts.",
            param=param,
            code="unsupported_parameter",
        )
    reasons = list(dict.fromkeys(_lower(e["msg"]) for p, e in found if p == path))
    shown = repr(first["input"])
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return BadRequest(f"{param} is {shown}: {', or '.join(reasons[:4])}.", param=param)


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]


def _path(loc: Sequence[int | str], body: Any, problem: str) -> list[int | str]:
    """The keys and indices of a location, without the names of union alternatives."""
    path: list[int | str] = []
    value = body
    for position, part in enumerate(loc):
        last = position == len(loc) - 1
        if isinstance(value, dict) and (part in value or (last and problem == "missing")):
            path.append(part)
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            path.append(part)
            value = value[part]
    return path


def _dotted(path: Sequence[int | str]) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text[:200]


def _known_fields(kind: type[types.RequestBody], top: bool) -> Iterable[str]:
    if top:
        return kind.model_fields
    bodies = [b for b in vars(types).values() if isinstance(b, type)]
    nested = [b for b in bodies if issubclass(b, types.RequestBody)]
    return {name for body in nested for name in body.model_fields}


# ---- rendering ---------------------------------------------------------------------------------


def dump(value: Any) -> bytes:
    """Compact JSON."""
    return pydantic_core.to_json(value)


def error_body(error: NearfieldError) -> dict[str, Any]:
    return {
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
        }
    }


def models_body(model: str, created_s: int) -> dict[str, Any]:
    return {"object": "list", "data": [model_body(model, created_s)]}


def model_body(model: str, created_s: int) -> dict[str, Any]:
    return {"id": model, "object": "model", "created": created_s, "owned_by": "nearfield"}


def embeddings_body(call: Call, answers: Sequence[Embedded]) -> bytes:
    """`vectors` as JSON: numbers, or base64 of little-endian float32."""
    vectors = np.concatenate([answer.vectors for answer in answers]).astype("<f4", copy=False)
    tokens = sum(answer.prompt_tokens for answer in answers)
    rows: Sequence[Any]
    if call.encoding_format == "base64":
        rows = [base64.b64encode(row.tobytes()).decode("ascii") for row in vectors]
    else:
        rows = vectors.tolist()
    data = [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(rows)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return dump({"object": "list", "data": data, "model": call.model, "usage": usage})


@dataclass(slots=True)
class _Choice:
    """One choice of the answer, as far as it is known."""

    index: int
    before: bytes = b""
    parser: ToolParser | None = None
    text: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    offset: int = 0


class Renderer:
    """Answers of one chat or completion call.

    Streaming: send `first_chunks()`, then `chunk(event, prompt)` for every `Text`, then
    `finish(...)`; or `error(...)` in place of what is left. Otherwise: `add` every `Text`, then
    `full(...)`. All chunks are complete server-sent events.
    """

    def __init__(self, call: Call, id: str, created_s: int, tool_format: str | None) -> None:
        self._call = call
        self._chat = call.kind == "chat"
        self._head = {
            "id": id,
            "object": "chat.completion" if self._chat else "text_completion",
            "created": created_s,
            "model": call.model,
            "system_fingerprint": FINGERPRINT,
        }
        chunk_object = "chat.completion.chunk" if self._chat else "text_completion"
        self._chunk_head = self._head | {"object": chunk_object}
        reads_calls = call.reads_tool_calls and tool_format is not None
        form = FORMATS[tool_format] if reads_calls and tool_format else None
        self._choices = [
            _Choice(index, parser=None if form is None else ToolParser(form))
            for index in range(len(call.requests) * call.choices)
        ]
        # A plain delta is these bytes around the text: it is rendered thousands of times a second.
        start = b"data: " + dump(self._chunk_head)[:-1] + b',"choices":[{"index":%d,'
        no_usage = b',"usage":null' if call.include_usage else b""
        inner = b'"delta":{"content":' if self._chat else b'"text":'
        close = b"}" if self._chat else b""
        self._after = close + b',"logprobs":null,"finish_reason":null}]' + no_usage + b"}\n\n"
        for choice in self._choices:
            choice.before = start % choice.index + inner

    # streaming

    def first_chunks(self) -> list[bytes]:
        """What is sent before any text: the role of each choice of a chat."""
        if not self._chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(choice, {"delta": delta}) for choice in self._choices]

    def chunk(self, event: Text, prompt: int = 0) -> list[bytes]:
        choice = self._choices[prompt * self._call.choices + event.choice]
        if choice.parser is None and event.finish_reason is None and event.logprobs is None:
            if not event.text:
                return []
            encoded = json.encoder.encode_basestring_ascii(event.text).encode("ascii")
            choice.offset += len(event.text)
            return [choice.before + encoded + self._after]
        chunks: list[bytes] = []
        parts = self._parts(choice, event)
        logprobs = self._logprobs(choice, event.logprobs)
        if not parts and logprobs is not None:
            parts = [Content("")]
        for part in parts:
            if isinstance(part, ToolCall):
                delta: dict[str, Any] = {"tool_calls": [_call_json(part, streamed=True)]}
            else:
                delta = {"content": part.text}
            body = {"delta": delta} if self._chat else {"text": delta.get("content", "")}
            chunks.append(self._chunk(choice, body, logprobs=logprobs))
            logprobs = None
        choice.offset += len(event.text)
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
        choice = self._choices[prompt * self._call.choices + event.choice]
        for part in self._parts(choice, event):
            if isinstance(part, ToolCall):
                choice.calls.append(part)
            else:
                choice.text.append(part.text)
        choice.logprobs += event.logprobs or ()
        if event.finish_reason is not None:
            choice.finish_reason = self._reason(choice, event)

    def full(self, completed: Sequence[Completed]) -> bytes:
        choices = [self._whole(choice) for choice in self._choices]
        return dump({**self._head, "choices": choices, "usage": _usage(completed)})

    # both

    def _parts(self, choice: _Choice, event: Text) -> list[Content | ToolCall]:
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

    def _logprobs(self, choice: _Choice, tokens: Sequence[TokenLogprob] | None) -> Any:
        if tokens is None:
            return None
        if self._chat:
            return {"content": [_chat_logprob(token) for token in tokens], "refusal": None}
        return _completion_logprobs(tokens, choice.offset)

    def _whole(self, choice: _Choice) -> dict[str, Any]:
        text = "".join(choice.text)
        asked = getattr(self._call.requests[0], "sampling", Sampling()).logprobs is not None
        logprobs = self._logprobs(choice, choice.logprobs if asked else None)
        entry: dict[str, Any] = {"index": choice.index}
        if self._chat:
            calls = [_call_json(call, streamed=False) for call in choice.calls]
            message = {
                "role": "assistant",
                "content": text or (None if calls else ""),
                "refusal": None,
            }
            entry["message"] = message | ({"tool_calls": calls} if calls else {})
        else:
            entry["text"] = text
        return entry | {"logprobs": logprobs, "finish_reason": choice.finish_reason or "stop"}


def _call_json(call: ToolCall, *, streamed: bool) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    body: dict[str, Any] = {"id": call.id, "type": "function", "function": function}
    return {"index": call.index, **body} if streamed else body


def _chat_logprob(token: TokenLogprob) -> dict[str, Any]:
    top = [
        {"token": text, "logprob": _finite(logprob), "bytes": list(raw)}
        for text, raw, logprob in token.top
    ]
    return {
        "token": token.token,
        "logprob": _finite(token.logprob),
        "bytes": list(token.raw),
        "top_logprobs": top,
    }


def _completion_logprobs(tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.token)
    return {
        "tokens": [token.token for token in tokens],
        "token_logprobs": [_finite(token.logprob) for token in tokens],
        "top_logprobs": [{text: _finite(lp) for text, _, lp in token.top} for token in tokens],
        "text_offset": offsets,
    }


def _finite(logprob: float) -> float:
    """JSON has no -inf; OpenAI writes -9999 for a token that cannot be."""
    return max(logprob, -9999.0)


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
