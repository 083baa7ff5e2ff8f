"""Tool calls are found however the text is cut, and no text is lost."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nearfield.api.tools import FORMATS, Content, ToolCall, ToolParser, detect

CALL = {"name": "f", "arguments": {"city": "Zürich </tool"}}


def read(form: str, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    parser = ToolParser(FORMATS[form])
    parts: list[Content | ToolCall] = []
    for piece in pieces:
        parts += parser.feed(piece)
    parts += parser.end()
    content = "".join(part.text for part in parts if isinstance(part, Content))
    return content, [(p.name, p.arguments) for p in parts if isinstance(p, ToolCall)]


def cut(text: str, sizes: list[int]) -> list[str]:
    pieces, at = [], 0
    for size in sizes:
        pieces.append(text[at : at + size])
        at += size
    return [*pieces, text[at:]]


texts = st.lists(
    st.sampled_from(
        [
            "hello ",
            "<tool",
            "<tool_call>",
            "</tool_call>",
            "{",
            "[TOOL_CALLS]",
            f"<tool_call>{json.dumps(CALL)}</tool_call>",
            "<tool_call>not json</tool_call>",
        ]
    ),
    max_size=6,
).map("".join)


@pytest.mark.parametrize("form", FORMATS)
@given(text=texts, sizes=st.lists(st.integers(1, 9), max_size=30))
def test_the_cut_does_not_matter(form: str, text: str, sizes: list[int]) -> None:
    assert read(form, cut(text, sizes)) == read(form, [text])


@pytest.mark.parametrize("form", FORMATS)
@given(text=st.text("<>/tool_caTOLCS[]{} \n", max_size=60))
def test_text_without_a_call_comes_out_as_it_is(form: str, text: str) -> None:
    content, calls = read(form, [text])
    if not calls:
        assert content == text


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("hermes", 'x <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'),
        ("llama3", '{"name": "f", "parameters": {"a": 1}}'),
        ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}]'),
    ],
)
def test_each_format_is_read(form: str, text: str) -> None:
    _, calls = read(form, [text])
    assert [(name, json.loads(arguments)) for name, arguments in calls] == [("f", {"a": 1})]


def test_two_calls_in_one_answer() -> None:
    one = f"<tool_call>{json.dumps(CALL)}</tool_call>"
    content, calls = read("hermes", [f"{one}\n{one}"])
    assert (content, len(calls)) == ("", 2)


def test_formats_are_told_from_templates() -> None:
    assert detect("{% if tools %}<tool_call>{% endif %}") == "hermes"
    assert detect("{{ tools }} [TOOL_CALLS]") == "mistral"
    assert detect("{{ messages }} <tool_call>") is None
    assert detect("") is None
