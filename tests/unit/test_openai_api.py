"""OpenAI bodies in and out, held to the openai package's own types."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest
from nearfield.api import openai
from nearfield.api.events import (
    Completed,
    Embedded,
    EmbedRequest,
    GenerateRequest,
    Text,
    Timings,
    TokenLogprob,
)
from nearfield.core.errors import BadRequest, RateLimited
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion, ChatCompletionChunk

USER = [{"role": "user", "content": "hi"}]
CHAT: dict[str, Any] = {"model": "m", "messages": USER}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
DONE = Completed(5, 3, Timings(0.0))


def chunks(frames: list[bytes]) -> list[Any]:
    text = b"".join(frames).decode()
    assert text.endswith("\n\n")
    events = [event.removeprefix("data: ") for event in text.split("\n\n")[:-1]]
    return [event if event == "[DONE]" else json.loads(event) for event in events]


def stream(call: openai.Call, events: list[Text], tool_format: str | None = None) -> list[Any]:
    renderer = openai.Renderer(call, "id-1", 1, tool_format)
    frames = renderer.first_chunks()
    for event in events:
        frames += renderer.chunk(event)
    return chunks(frames + renderer.finish([DONE]))


def whole(call: openai.Call, events: list[Text], tool_format: str | None = None) -> Any:
    renderer = openai.Renderer(call, "id-1", 1, tool_format)
    for event in events:
        renderer.add(event)
    return json.loads(renderer.full([DONE]))


def test_chat_becomes_a_neutral_request() -> None:
    call = openai.parse_chat(
        {
            **CHAT,
            "max_completion_tokens": 7,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 3,
            "min_p": 0.1,
            "seed": 4,
            "stop": "x",
            "n": 2,
            "presence_penalty": 0.1,
            "frequency_penalty": 0.2,
            "repetition_penalty": 1.1,
            "logprobs": True,
            "top_logprobs": 2,
            "stream": True,
            "stream_options": {"include_usage": True},
            "user": "u",
            "store": False,
            "metadata": {"a": "b"},
            "service_tier": "auto",
            "parallel_tool_calls": True,
            "reasoning_effort": "low",
        }
    )
    (request,) = call.requests
    assert isinstance(request, GenerateRequest)
    s = request.sampling
    assert (s.max_tokens, s.temperature, s.top_p, s.top_k, s.min_p) == (7, 0.5, 0.9, 3, 0.1)
    assert (s.seed, s.stop, s.logprobs, request.n) == (4, ("x",), 2, 2)
    assert (s.presence_penalty, s.frequency_penalty, s.repetition_penalty) == (0.1, 0.2, 1.1)
    assert (call.stream, call.include_usage, call.choices) == (True, True, 2)


def test_tool_choices_become_constraints() -> None:
    def constraint(choice: Any) -> Any:
        (request,) = openai.parse_chat({**CHAT, "tools": TOOLS, "tool_choice": choice}).requests
        assert isinstance(request, GenerateRequest)
        return request.constraint

    assert constraint("auto") is None
    assert constraint("required").value["names"] == ["f"]
    named = {"type": "function", "function": {"name": "f"}}
    assert constraint(named).kind == "tool_call"
    off = openai.parse_chat({**CHAT, "tools": TOOLS, "tool_choice": "none"})
    assert not off.reads_tool_calls


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [(1, 2)]),
        ([[1], [2, 3]], [(1,), (2, 3)]),
    ],
)
def test_prompts_come_in_four_shapes(prompt: Any, expected: list[Any]) -> None:
    requests = openai.parse_completion({"model": "m", "prompt": prompt}).requests
    found = [r.prompt or r.prompt_tokens for r in requests if isinstance(r, GenerateRequest)]
    assert found == expected
    (request,) = openai.parse_embeddings({"model": "m", "input": prompt}).requests
    assert isinstance(request, EmbedRequest)
    assert list(request.inputs) == expected


BAD_CHAT: list[tuple[dict[str, Any], str]] = [
    ({"temprature": 1}, "temprature"),
    ({"temperature": 3}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": 1000}, "n"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": [""]}, "stop[0]"),
    ({"stop": [1]}, "stop[0]"),
    ({"seed": 2**70}, "seed"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x", "mood": "?"}]}, "messages[0].mood"),
    ({"messages": [{"role": "assistant"}]}, "messages[0].content"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
    (
        {"messages": [{"role": "tool", "content": "x", "tool_call_id": "c"}]},
        "messages[0].tool_call_id",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].type",
    ),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": "yes"}, "stream"),
    ({"tool_choice": "required"}, "tool_choice"),
    (
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}},
        "tool_choice",
    ),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "search"}]}, "tools[0].type"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format.json_schema.schema",
    ),
    ({"functions": []}, "functions"),
    ({"audio": {}}, "audio"),
    ({"modalities": ["audio"]}, "modalities[0]"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"model": ""}, "model"),
    ({"model": None}, "model"),
]


@pytest.mark.parametrize(
    ("change", "param"), BAD_CHAT, ids=lambda v: v if isinstance(v, str) else ""
)
def test_what_is_wrong_is_named(change: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as raised:
        openai.parse_chat({**CHAT, **change})
    assert raised.value.param == param, raised.value.message
    assert raised.value.message.endswith((".", "?"))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": "m"}, "prompt"),
        ({"model": "m", "prompt": []}, "prompt"),
        ({"model": "m", "prompt": [[]]}, "prompt[0]"),
        ({"model": "m", "prompt": [-1]}, "prompt[0]"),
        ({"model": "m", "prompt": ["a"] * 65, "n": 2}, "n"),
        ({"model": "m", "prompt": "a", "best_of": 3}, "best_of"),
        ({"model": "m", "prompt": "a", "suffix": "b"}, "suffix"),
    ],
)
def test_what_is_wrong_with_a_completion_is_named(body: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as raised:
        openai.parse_completion(body)
    assert raised.value.param == param, raised.value.message


def test_a_typo_is_answered_with_the_field_that_was_meant() -> None:
    with pytest.raises(BadRequest, match="Did you mean temperature"):
        openai.parse_chat({**CHAT, "temprature": 1})


def test_a_stream_reads_as_openais_chunks() -> None:
    body = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    frames = stream(
        openai.parse_chat(body),
        [Text('He said "hé"\n'), Text(""), Text("!", finish_reason="length")],
    )
    assert frames[-1] == "[DONE]"
    parsed = [ChatCompletionChunk.model_validate(frame) for frame in frames[:-1]]
    text = "".join(c.choices[0].delta.content or "" for c in parsed if c.choices)
    assert text == 'He said "hé"\n!'
    assert parsed[0].choices[0].delta.role == "assistant"
    assert parsed[-2].choices[0].finish_reason == "length"
    assert parsed[-1].usage is not None
    assert parsed[-1].usage.total_tokens == 8


def test_a_whole_answer_reads_as_openais() -> None:
    call = openai.parse_chat({**CHAT, "n": 2, "logprobs": True, "top_logprobs": 1})
    logprob = TokenLogprob("a", b"a", -0.5, (("b", b"b", float("-inf")),))
    answer = ChatCompletion.model_validate(
        whole(
            call,
            [
                Text("a", 0, finish_reason="stop", logprobs=(logprob,)),
                Text("b", 1, finish_reason="stop", logprobs=(logprob,)),
            ],
        )
    )
    assert [c.message.content for c in answer.choices] == ["a", "b"]
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    assert answer.choices[0].logprobs.content[0].top_logprobs[0].logprob == -9999.0


def test_tool_calls_whole_and_streamed() -> None:
    text = 'Sure. <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    events = [Text(c) for c in text] + [Text("", finish_reason="stop")]
    call = openai.parse_chat({**CHAT, "tools": TOOLS})
    answer = ChatCompletion.model_validate(whole(call, events, "hermes"))
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Sure. "
    assert choice.message.tool_calls is not None
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"a": 1}
    frames = stream(openai.parse_chat({**CHAT, "tools": TOOLS, "stream": True}), events, "hermes")
    deltas = [f["choices"][0]["delta"] for f in frames[:-1]]
    (calls,) = [d["tool_calls"] for d in deltas if "tool_calls" in d]
    assert calls[0]["function"]["name"] == "f"
    assert frames[-2]["choices"][0]["finish_reason"] == "tool_calls"


def test_completions_count_choices_over_prompts() -> None:
    call = openai.parse_completion({"model": "m", "prompt": ["a", "b"], "n": 2, "logprobs": 1})
    renderer = openai.Renderer(call, "id", 1, None)
    logprob = TokenLogprob("xy", b"xy", -1.0, (("xy", b"xy", -1.0),))
    for prompt in range(2):
        for choice in range(2):
            text = f"{prompt}{choice}"
            event = Text(text, choice, finish_reason="stop", logprobs=(logprob, logprob))
            renderer.add(event, prompt)
    answer = Completion.model_validate_json(renderer.full([DONE, DONE]))
    assert [(c.index, c.text) for c in answer.choices] == [
        (0, "00"),
        (1, "01"),
        (2, "10"),
        (3, "11"),
    ]
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.text_offset == [0, 2]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6


def test_embeddings_as_numbers_and_as_base64() -> None:
    vectors = np.array([[0.25, -1.5], [1e-7, 3.0]], dtype=np.float32)
    answer = Embedded(vectors, 4, Timings(0.0))
    call = openai.parse_embeddings({"model": "m", "input": ["a", "b"]})
    plain = CreateEmbeddingResponse.model_validate_json(openai.embeddings_body(call, [answer]))
    assert np.allclose([d.embedding for d in plain.data], vectors)
    assert plain.usage.prompt_tokens == 4
    coded = openai.parse_embeddings(
        {"model": "m", "input": ["a", "b"], "encoding_format": "base64"}
    )
    body = json.loads(openai.embeddings_body(coded, [answer]))
    raw = base64.b64decode(body["data"][1]["embedding"])
    assert np.array_equal(np.frombuffer(raw, "<f4"), vectors[1])


def test_an_error_in_a_stream_is_the_last_word() -> None:
    call = openai.parse_chat({**CHAT, "stream": True})
    renderer = openai.Renderer(call, "id", 1, None)
    (frame,) = chunks(renderer.error(RateLimited("full")))
    assert frame["error"] == {
        "message": "full",
        "type": "rate_limit_error",
        "param": None,
        "code": "queue_full",
    }
