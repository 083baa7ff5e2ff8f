"""Any JSON at all: it is parsed or refused with one sentence, and nothing else happens."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from nearfield.api import openai
from nearfield.api.json_body import load_json
from nearfield.core.errors import BadRequest

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(["[", "{", "\\", '"', '\\"[']),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=20,
)
REFUSED = object()


def depth(value: Any) -> int:
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0


@given(value=json_values, most=st.integers(0, 6), ascii_only=st.booleans())
def test_the_depth_that_is_counted_is_the_depth(value: Any, most: int, ascii_only: bool) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    try:
        parsed = load_json(body, max_depth=most)
    except BadRequest:
        parsed = REFUSED
    assert parsed == (value if depth(value) <= most else REFUSED)


def check(parse: Any, body: Any) -> None:
    try:
        parse(body)
    except BadRequest as error:
        good = error.message.endswith((".", "?")) and len(error.message) < 500
    else:
        good = True
    assert good


@given(body=json_values, parse=st.sampled_from(["chat", "completion", "embeddings"]))
def test_any_json_is_parsed_or_refused(body: Any, parse: str) -> None:
    check(getattr(openai, f"parse_{parse}"), body)


VALID: dict[str, Any] = {
    "model": "m",
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "t"}]},
        {
            "role": "assistant",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "content": "r", "tool_call_id": "1"},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}},
    "stream": True,
    "stream_options": {"include_usage": True},
    "stop": ["a"],
    "logprobs": True,
    "top_logprobs": 2,
}


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    found = [(*path, key) for key, _ in inner]
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in inner:
        if isinstance(item, dict | list):
            found += places(item, (*path, key))
    return found


@settings(max_examples=200)
@given(place=st.sampled_from(places(VALID)), value=json_values)
def test_one_wrong_value_anywhere_is_parsed_or_refused(place: tuple[Any, ...], value: Any) -> None:
    body = json.loads(json.dumps(VALID))
    target = body
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    check(openai.parse_chat, body)
