"""OpenAI bodies to neutral requests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nearfield.api import openai_types as types
from nearfield.api.events import (
    Constraint,
    EmbedRequest,
    GenerateRequest,
    Request,
)
from nearfield.api.validation import unsupported, validate
from nearfield.core.errors import BadRequest

Kind = Literal["chat", "completion", "embedding"]


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
    parsed = validate(types.ChatBody, body)
    top = parsed.top_logprobs
    if top is not None and not parsed.logprobs:
        raise BadRequest("top_logprobs needs logprobs: true.", param="top_logprobs")
    if parsed.logit_bias:
        raise unsupported("logit_bias")
    _check_calls(parsed.messages)
    for index, tool in enumerate(parsed.tools or []):
        _check_size(tool.function.parameters, f"tools[{index}].function.parameters")
    tools = [tool.model_dump(exclude_none=True) for tool in parsed.tools or []]
    choices = parsed.n or 1
    request = GenerateRequest(
        messages=tuple(_message(message) for message in parsed.messages),
        tools=() if parsed.tool_choice == "none" else tuple(tools),
        sampling=parsed.sampling(
            max_tokens=parsed.max_completion_tokens,
            logprobs=(top or 0) if parsed.logprobs else None,
        ),
        constraint=_tool_constraint(parsed) or _format_constraint(parsed.response_format),
        n=choices,
        chat_template_kwargs=parsed.chat_template_kwargs or {},
    )
    return Call(
        "chat",
        parsed.model,
        (request,),
        choices=choices,
        stream=bool(parsed.stream),
        include_usage=_wants_usage(parsed),
        reads_tool_calls=bool(request.tools),
    )


def parse_completion(body: Any) -> Call:
    """`POST /v1/completions`; several prompts become several requests.

    Raises:
        BadRequest: `param` is the field at fault.
    """
    _check_count(body, "prompt", types.MAX_CHOICES)
    parsed = validate(types.CompletionBody, body)
    prompts = _as_list(parsed.prompt, "prompt")
    choices = parsed.n or 1
    if len(prompts) * choices > types.MAX_CHOICES:
        raise BadRequest(
            f"{len(prompts)} prompts with n = {choices} are more than {types.MAX_CHOICES} choices. "
            "Send several requests.",
            param="n",
        )
    if parsed.best_of not in (None, choices):
        raise unsupported("best_of")
    if parsed.logit_bias:
        raise unsupported("logit_bias")
    sampling = parsed.sampling(logprobs=parsed.logprobs)
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
    _check_count(body, "input", types.MAX_INPUTS)
    parsed = validate(types.EmbeddingBody, body)
    inputs = _as_list(parsed.input, "input")
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


def _check_count(body: Any, param: str, most: int) -> None:
    """Before validation, where each alternative of the union would have its own complaint."""
    value = body.get(param) if isinstance(body, dict) else None
    if not isinstance(value, list) or not value:
        return
    tokens = isinstance(value[0], int)
    most = types.MAX_PROMPT_TOKENS if tokens else most
    if len(value) > most:
        raise BadRequest(
            f"{param} has {len(value)} {'tokens' if tokens else 'entries'}; at most {most} go in "
            "one request.",
            param=param,
        )


def _as_list(value: Any, param: str) -> list[str] | list[list[int]]:
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


def _message(message: types.Message) -> dict[str, Any]:
    """A message as chat templates know it: no other roles than theirs, and always content."""
    plain = message.model_dump(exclude_none=True, exclude={"refusal", "annotations"})
    plain.setdefault("content", "")
    if plain["role"] == "developer":
        plain["role"] = "system"
    return plain


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
        param = "response_format.json_schema.schema"
        schema = chosen.json_schema.schema_
        if schema is None:
            raise BadRequest("json_schema needs a schema.", param=param)
        _check_size(schema, param)
        return Constraint("json_schema", schema)
    return None


def _check_size(schema: dict[str, Any] | None, param: str) -> None:
    if schema and len(json.dumps(schema)) > types.MAX_SCHEMA_BYTES:
        raise BadRequest(
            f"{param} is larger than {types.MAX_SCHEMA_BYTES} bytes. Send a smaller schema.",
            param=param,
        )
