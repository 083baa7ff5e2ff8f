"""What the real `openai` types make of our answers, in the cases that go wrong easily."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import pytest
from nearfield.api import openai
from nearfield.api.events import Completed, Embedded, Text, Timings, TokenLogprob
from nearfield.core.errors import EngineFailed
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion, ChatCompletionChunk

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TOOLS = [{"type": "function", "function": {"name": "write"}}]
DONE = Completed(5, 3, Timings(0.0), cached_tokens=2)


def streamed(call: openai.Call, events: Sequence[Text], form: str | None = None) -> list[Any]:
    renderer = openai.Renderer(call, "id-1", 1, form)
    frames = renderer.first_chunks()
    for event in events:
        frames += renderer.chunk(event)
    frames += renderer.finish([DONE])
    assert frames.pop() == b"data: [DONE]\n\n"
    assert all(frame.startswith(b"data: ") and frame.endswith(b"\n\n") for frame in frames)
    assert all(b"\n" not in frame[:-2] for frame in frames)
    return [json.loads(frame[6:]) for frame in frames]


def whole(call: openai.Call, events: Sequence[Text], form: str | None = None) -> Any:
    renderer = openai.Renderer(call, "id-1", 1, form)
    for event in events:
        renderer.add(event)
    return json.loads(renderer.full([DONE]))


def logprob(text: str, value: float = -0.5) -> TokenLogprob:
    return TokenLogprob(text, text.encode(), value, ((text, text.encode(), value),))


def test_a_plain_chunk_to_the_last_byte() -> None:
    renderer = openai.Renderer(openai.parse_chat({**CHAT, "stream": True}), "id-1", 7, None)
    (frame,) = renderer.chunk(Text('say "hé"\n\u2028'))
    fingerprint = f"nf-{version('nearfield')}"
    assert frame.decode("ascii") == (
        'data: {"id":"id-1","object":"chat.completion.chunk","created":7,"model":"m",'
        f'"system_fingerprint":"{fingerprint}","choices":[{{"index":0,"delta":{{"content":'
        '"say \\"h\\u00e9\\"\\n\\u2028"},"logprobs":null,"finish_reason":null}]}\n\n'
    )
    assert renderer.chunk(Text("", tokens=0)) == []


@pytest.mark.parametrize("name", ["m%d", "a%sb", "ünï", 'q"uote'])
def test_a_model_of_any_name_has_whole_chunks(name: str) -> None:
    call = openai.parse_chat({**CHAT, "model": name, "stream": True, "n": 2})
    chunks = streamed(call, [Text("a", 1)])
    assert [chunk["model"] for chunk in chunks] == [name] * 3
    assert chunks[-1]["choices"][0]["index"] == 1


def test_choices_do_not_mix() -> None:
    call = openai.parse_chat({**CHAT, "stream": True, "n": 3})
    events = [Text(f"{c}", c) for c in (2, 0, 1, 2)] + [Text("", c, 0, "stop") for c in range(3)]
    texts = ["", "", ""]
    for chunk in map(ChatCompletionChunk.model_validate, streamed(call, events)):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ["0", "1", "22"]
    answer = ChatCompletion.model_validate(whole(call, events))
    assert [choice.message.content for choice in answer.choices] == texts


def test_usage_comes_last_and_only_when_asked_for() -> None:
    plain = streamed(openai.parse_chat({**CHAT, "stream": True}), [Text("a", finish_reason="stop")])
    assert all("usage" not in chunk for chunk in plain)
    body = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = streamed(openai.parse_chat(body), [Text("a", finish_reason="stop")])
    assert all(chunk["usage"] is None for chunk in chunks)
    usage = ChatCompletionChunk.model_validate(last).usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (5, 3, 8)
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 2


def test_a_long_call_streams_its_arguments() -> None:
    text = json.dumps({"name": "write", "arguments": {"text": "é " * 3000}})
    events = [Text(text[at : at + 7]) for at in range(0, len(text), 7)]
    events = [Text("<tool_call>"), *events, Text("</tool_call>"), Text("", finish_reason="stop")]
    call = openai.parse_chat({**CHAT, "tools": TOOLS, "stream": True})
    chunks = [ChatCompletionChunk.model_validate(c) for c in streamed(call, events, "hermes")]
    calls = [c.choices[0].delta.tool_calls[0] for c in chunks if c.choices[0].delta.tool_calls]
    assert len(calls) > 100
    first, *rest = calls
    assert (first.index, first.type) == (0, "function")
    assert first.id is not None
    assert first.function is not None
    assert first.function.name == "write"
    assert all((c.id, c.index) == (None, 0) for c in rest)
    arguments = "".join(c.function.arguments or "" for c in calls if c.function)
    assert json.loads(arguments) == {"text": "é " * 3000}
    assert chunks[-1].choices[0].finish_reason == "tool_calls"

    answer = ChatCompletion.model_validate(whole(call, events, "hermes"))
    message = answer.choices[0].message
    assert message.content is None
    assert message.tool_calls is not None
    assert message.tool_calls[0].type == "function"
    assert json.loads(message.tool_calls[0].function.arguments) == json.loads(arguments)


def test_a_call_that_is_cut_off_says_length() -> None:
    events = [Text('<tool_call>{"name": "wri'), Text("", finish_reason="length")]
    call = openai.parse_chat({**CHAT, "tools": TOOLS})
    choice = ChatCompletion.model_validate(whole(call, events, "hermes")).choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.content == '<tool_call>{"name": "wri'
    assert choice.message.tool_calls is None


@pytest.mark.parametrize(("tools", "choice"), [(None, None), (TOOLS, "none")])
def test_without_tools_a_call_is_text(tools: Any, choice: Any) -> None:
    text = '<tool_call>{"name": "write", "arguments": {}}</tool_call>'
    call = openai.parse_chat({**CHAT, "tools": tools, "tool_choice": choice})
    message = whole(call, [Text(text, finish_reason="stop")], "hermes")["choices"][0]["message"]
    assert message["content"] == text
    assert "tool_calls" not in message


def test_offsets_of_tokens_count_from_the_echoed_prompt() -> None:
    body = {"model": "m", "prompt": "ab", "echo": True, "logprobs": 1}
    events = [
        Text("ab", tokens=0),
        Text("cd", logprobs=(logprob("c"), logprob("d"))),
        Text("e", finish_reason="length", logprobs=(logprob("e"),)),
    ]
    answer = Completion.model_validate(whole(openai.parse_completion(body), events))
    assert answer.choices[0].text == "abcde"
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.text_offset == [2, 3, 4]
    assert answer.choices[0].logprobs.top_logprobs == [{"c": -0.5}, {"d": -0.5}, {"e": -0.5}]
    call = openai.parse_completion({**body, "stream": True})
    choices = [chunk["choices"][0] for chunk in streamed(call, events)]
    assert "".join(choice["text"] for choice in choices) == "abcde"
    found = [choice["logprobs"]["text_offset"] for choice in choices if choice["logprobs"]]
    assert found == [[2, 3], [4]]


@pytest.mark.parametrize("value", [float("-inf"), float("nan"), -1e30])
def test_a_logprob_is_a_number(value: float) -> None:
    events = [Text("a", finish_reason="stop", logprobs=(logprob("a", value),))]
    body = {**CHAT, "logprobs": True, "top_logprobs": 1}
    (choice,) = ChatCompletion.model_validate(whole(openai.parse_chat(body), events)).choices
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert choice.logprobs.content[0].logprob == -9999
    assert choice.logprobs.content[0].bytes == [97]


def test_half_a_character_is_escaped() -> None:
    """A model may write half of a surrogate pair; that is no UTF-8."""
    events = [Text("\ud83d"), Text("", finish_reason="stop")]
    for body in (CHAT, {**CHAT, "stream": True}):
        call = openai.parse_chat(body)
        assert whole(call, events)["choices"][0]["message"]["content"] == "\ud83d"
        assert streamed(call, events)[1]["choices"][0]["delta"]["content"] == "\ud83d"


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_vectors_are_exact_or_refused(encoding: str) -> None:
    call = openai.parse_embeddings({"model": "m", "input": "a", "encoding_format": encoding})
    vectors = np.array([[1 / 3, -0.0, 3e-45, 3.4e38]], dtype=np.float32)
    body = openai.embeddings_body(call, [Embedded(vectors, 1, Timings(0.0))])
    answer = CreateEmbeddingResponse.model_validate_json(body) if encoding == "float" else None
    if answer is not None:
        assert np.array_equal(np.array(answer.data[0].embedding, np.float32), vectors[0])
    for bad in (np.nan, np.inf):
        with pytest.raises(EngineFailed):
            openai.embeddings_body(call, [Embedded(np.array([[bad]], np.float32), 1, Timings(0.0))])
