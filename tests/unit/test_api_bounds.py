"""Bodies made to hurt: refused in little time and memory, by name, without repeating a prompt."""

from __future__ import annotations

import json
import math
import time
import tracemalloc
from collections.abc import Callable
from typing import Any, get_type_hints

import pytest
from nearfield.api import openai
from nearfield.api import openai_types as types
from nearfield.api.events import EmbedRequest, GenerateRequest
from nearfield.api.json_body import MAX_BRACKETS, MAX_DEPTH, load_json
from nearfield.core.errors import BadRequest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params

MEGABYTES = 2**20
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TOOL = {"type": "function", "function": {"name": "f"}}


def refused(call: Callable[[], Any]) -> BadRequest:
    with pytest.raises(BadRequest) as raised:
        call()
    assert raised.value.message.endswith((".", "?"))
    return raised.value


# ---- JSON -------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [b"[", b'{"a":', b"[[],", b'[{"":['])
def test_a_body_of_brackets_is_refused_at_once(piece: bytes) -> None:
    body = piece * (8 * MEGABYTES // len(piece))
    started_s = time.perf_counter()
    assert refused(lambda: load_json(body)).code == "invalid_json"
    assert time.perf_counter() - started_s < 0.5


def test_the_depth_is_bounded_exactly() -> None:
    assert load_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
    assert "64 deep" in refused(lambda: load_json(b"[" * 65 + b"]" * 65)).message
    mixed = b'{"a":[' * 32 + b"]}" * 32
    assert load_json(mixed)
    refused(lambda: load_json(b"[" + mixed + b"]"))
    assert load_json(b"[[1],[2]]", max_depth=2) == [[1], [2]]
    refused(lambda: load_json(b"[[1],[[2]]]", max_depth=2))


@pytest.mark.parametrize("text", ["[" * 100, '\\"[' * 50, "\\\\" * 3 + "{" * 100, '"{["' * 40])
def test_brackets_in_strings_do_not_count(text: str) -> None:
    assert load_json(json.dumps([text, [text]]).encode(), max_depth=2) == [text, [text]]


def test_the_number_of_lists_is_bounded() -> None:
    rows = b"[" + b"[1]," * (MAX_BRACKETS - 2) + b"[1]]"
    assert len(load_json(rows)) == MAX_BRACKETS - 1
    refused(lambda: load_json(b"[" + rows + b"]"))


# ---- OpenAI -----------------------------------------------------------------------------------


def listed(item: Any, field: str, count: int = 300_000) -> dict[str, Any]:
    return {"model": "m", field: [item] * count}


HOSTILE: list[tuple[Callable[[Any], Any], dict[str, Any], str | None]] = [
    (openai.parse_embeddings, listed(1, "input", 2**20 + 1), "input"),
    (openai.parse_embeddings, listed("", "input"), "input"),
    (openai.parse_embeddings, listed(None, "input"), "input"),
    (openai.parse_embeddings, listed([None] * 1000, "input", 2000), "input[0][0]"),
    (openai.parse_completion, listed(None, "prompt"), "prompt"),
    (openai.parse_completion, listed([1], "prompt"), "prompt"),
    (openai.parse_chat, listed(1, "messages"), "messages[0]"),
    (openai.parse_chat, listed({}, "messages"), "messages[0].role"),
    (openai.parse_chat, {**CHAT, "stop": [1] * 300_000}, "stop[0]"),
    (openai.parse_chat, {**CHAT, "stop": ["a"] * 300_000}, "stop"),
    (openai.parse_chat, {**CHAT, "tools": [1] * 300_000}, "tools[0]"),
    (openai.parse_chat, {**CHAT, "tools": [TOOL] * 300_000}, "tools"),
    (openai.parse_chat, {**CHAT, "modalities": [1] * 300_000}, "modalities[0]"),
    (openai.parse_chat, {**CHAT, **dict.fromkeys(map(str, range(300_000)))}, None),
    (
        openai.parse_chat,
        {"model": "m", "messages": [dict.fromkeys(map(str, range(300_000)), 1) | {"role": "user"}]},
        "messages[0]",
    ),
    (
        openai.parse_chat,
        {"model": "m", "messages": [{"role": "user", "content": [0] * 300_000}]},
        "messages[0].content[0]",
    ),
    (
        openai.parse_chat,
        {"model": "m", "messages": [{"role": "assistant", "tool_calls": [0] * 300_000}]},
        "messages[0].tool_calls[0]",
    ),
]


@pytest.mark.parametrize(("parse", "body", "param"), HOSTILE, ids=lambda v: v if v is str else "")
def test_many_mistakes_are_one_report(
    parse: Callable[[Any], Any], body: dict[str, Any], param: str | None
) -> None:
    """Each wrong item would be reported, in each alternative of a union: gigabytes of reports."""
    tracemalloc.start()
    try:
        error = refused(lambda: parse(body))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert error.param == param, error.message
    assert len(error.message) < 500
    assert peak < 8 * MEGABYTES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 3}, "temperature must be at most 2; it is 3."),
        ({"temperature": "hot"}, "temperature must be a number; it is a string."),
        ({"temperature": math.inf}, "temperature must be a finite number; it is Infinity."),
        ({"n": None, "stop": 5}, "stop must be a string or a list; it is 5."),
        ({"max_tokens": 0}, "max_tokens must be at least 1; it is 0."),
        ({"mesages": []}, "Unknown field mesages. Did you mean messages?"),
        ({"functions": []}, "functions is not supported here. Use tools."),
        (
            {"messages": [{"role": "wizard", "content": "x"}]},
            "messages[0].role must be one of 'system', 'developer', 'user', 'assistant', 'tool'; "
            'it is "wizard".',
        ),
        ({"messages": [{"content": "x"}]}, "messages[0].role is missing."),
        ({"messages": ["my secret"]}, "messages[0] must be an object; it is a string."),
        (
            {"messages": [{"role": "user", "content": {"my": "secret"}}]},
            "messages[0].content must be a string or a list; it is an object.",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            'messages[0].content[0].type is "image_url": only text parts are supported here.',
        ),
    ],
)
def test_messages_name_the_field_the_rule_and_the_value(
    change: dict[str, Any], message: str
) -> None:
    assert refused(lambda: openai.parse_chat({**CHAT, **change})).message == message


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "prompt must be a string, a list of strings, a list of token ids or a list of such "
         "lists; it is null."),
        ([1, "my secret"], "prompt must be a string, a list of strings, a list of token ids or a "
         "list of such lists; prompt[1] is a string."),
        ([[1, 2], [3, -4]], "prompt[1][1] must be at least 0; it is -4."),
        ([], "prompt is empty: send at least one."),
    ],
)  # fmt: skip
def test_messages_about_prompts(value: Any, message: str) -> None:
    body = {"model": "m", "prompt": value}
    assert refused(lambda: openai.parse_completion(body)).message == message


def test_a_schema_is_bounded() -> None:
    schema = {"type": "object", "description": "x" * types.MAX_SCHEMA_BYTES}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    for change, param in (
        ({"response_format": form}, "response_format.json_schema.schema"),
        ({"tools": [TOOL, tool]}, "tools[1].function.parameters"),
    ):
        error = refused(lambda change=change: openai.parse_chat({**CHAT, **change}))  # type: ignore[misc]
        assert error.param == param


# ---- every field that clients may send --------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "body"),
    [
        (chat_create_params.CompletionCreateParamsStreaming, types.ChatBody),
        (chat_create_params.CompletionCreateParamsNonStreaming, types.ChatBody),
        (completion_create_params.CompletionCreateParamsStreaming, types.CompletionBody),
        (embedding_create_params.EmbeddingCreateParams, types.EmbeddingBody),
    ],
)
def test_every_field_of_the_openai_client_is_known(
    params: Any, body: type[types.RequestBody]
) -> None:
    assert set(get_type_hints(params)) <= set(body.model_fields)


@pytest.mark.parametrize(
    "ignored",
    [
        {"user": "u", "store": True, "metadata": {"a": "b"}, "service_tier": "flex"},
        {"parallel_tool_calls": False, "safety_identifier": "s", "prompt_cache_key": "k"},
        {"reasoning_effort": "low", "verbosity": "high", "prediction": {"type": "content"}},
        {"logit_bias": {}, "modalities": ["text"], "functions": None, "audio": None},
        {"stream_options": None, "tools": None, "tool_choice": None, "response_format": None},
    ],
)
def test_what_cannot_change_the_answer_is_taken(ignored: dict[str, Any]) -> None:
    assert openai.parse_chat({**CHAT, **ignored}).requests == openai.parse_chat(CHAT).requests


@pytest.mark.parametrize(
    "change",
    [
        {"audio": {"voice": "alloy"}},
        {"modalities": ["text", "audio"]},
        {"web_search_options": {}},
        {"functions": []},
        {"function_call": "auto"},
        {"logit_bias": {"1": 5}},
        {"moderation": {}},
    ],
)
def test_what_would_change_it_is_refused_by_name(change: dict[str, Any]) -> None:
    error = refused(lambda: openai.parse_chat({**CHAT, **change}))
    assert error.code == "unsupported_parameter"
    assert (error.param or "").startswith(next(iter(change)))


@pytest.mark.parametrize(
    ("change", "good"),
    [
        ({"best_of": 2, "n": 2}, True),
        ({"best_of": 1}, True),
        ({"best_of": 3, "n": 2}, False),
        ({"suffix": ""}, True),
        ({"suffix": "x"}, False),
        ({"logit_bias": {"1": 1}}, False),
    ],
)
def test_completions_refuse_what_they_cannot_do(change: dict[str, Any], good: bool) -> None:
    body = {"model": "m", "prompt": "p", **change}
    if good:
        assert openai.parse_completion(body)
    else:
        assert refused(lambda: openai.parse_completion(body)).code == "unsupported_parameter"


def test_messages_reach_the_template_in_its_own_words() -> None:
    called = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    body = {
        "model": "m",
        "messages": [
            {"role": "developer", "content": "d", "name": None},
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "tool_calls": [called], "refusal": None, "annotations": []},
            {"role": "tool", "content": "r", "tool_call_id": "1"},
        ],
    }
    (request,) = openai.parse_chat(body).requests
    assert isinstance(request, GenerateRequest)
    assert request.messages is not None
    system, user, assistant, tool = request.messages
    assert system == {"role": "system", "content": "d"}
    assert user["content"] == [{"type": "text", "text": "a"}]
    assert set(assistant) == {"role", "content", "tool_calls"}
    assert assistant["content"] == ""
    assert tool["tool_call_id"] == "1"


def test_null_means_the_default() -> None:
    nulls = dict.fromkeys(set(types.ChatBody.model_fields) - {"model", "messages"})
    assert openai.parse_chat({**CHAT, **nulls}) == openai.parse_chat(CHAT)
    plain = {"model": "m", "input": "x"}
    call = openai.parse_embeddings({**plain, "dimensions": None, "encoding_format": None})
    assert call.requests == (EmbedRequest(("x",)),)
