"""Long tool calls arrive in pieces, and still join to what was written, however they are cut."""

from __future__ import annotations

import json
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nearfield.api.tools import (
    FORMATS,
    HOLD_CHARACTERS,
    MAX_CALL_CHARACTERS,
    Content,
    Part,
    ToolCall,
    ToolCallArguments,
    ToolParser,
)

FILE = 'line "one"\n\\ </tool_call> {[ é\n' * 60
Read = tuple[str, list[tuple[str, str]]]


def parts_of(form: str, pieces: Iterable[str], names: set[str] | None = None) -> list[Part]:
    parser = ToolParser(FORMATS[form], names)
    parts: list[Part] = []
    for piece in pieces:
        parts += parser.feed(piece)
    return parts + parser.end()


def joined(parts: Iterable[Part]) -> Read:
    content = ""
    calls: list[tuple[str, str]] = []
    for part in parts:
        if isinstance(part, Content):
            content += part.text
        elif isinstance(part, ToolCall):
            assert part.index == len(calls)
            calls.append((part.name, part.arguments))
        else:
            name, arguments = calls[part.index]
            calls[part.index] = name, arguments + part.fragment
    return content, calls


def cut(text: str, sizes: list[int]) -> list[str]:
    pieces, at = [], 0
    for size in sizes:
        pieces.append(text[at : at + size])
        at += size
    return [*pieces, text[at:]]


def written(form: str, calls: list[dict[str, object]]) -> str:
    """Calls as a model of this family writes them."""
    key = FORMATS[form].arguments
    objects = [{"name": call["name"], key: call["arguments"]} for call in calls]
    if FORMATS[form].many:
        return "[TOOL_CALLS]" + json.dumps(objects) if objects else ""
    opening, closing = FORMATS[form].opening, FORMATS[form].closing
    return "\n".join(f"{opening}{json.dumps(o)}{closing}" for o in objects)


arguments = st.sampled_from(
    [{}, {"a": 1}, {"a": {"b": [1, 2, {"c": None}]}}, {"path": "x", "text": FILE}, {"</": '"\\'}]
)
calls_made = st.lists(
    st.fixed_dictionaries({"name": st.sampled_from(["f", "write"]), "arguments": arguments}),
    max_size=3,
)
cuts = st.lists(st.integers(1, 40), max_size=60)


@pytest.mark.parametrize("form", FORMATS)
@given(before=st.sampled_from(["", "Sure: ", "a < b\n"]), calls=calls_made, sizes=cuts)
def test_calls_of_any_length_come_out_as_they_were_written(
    form: str, before: str, calls: list[dict[str, object]], sizes: list[int]
) -> None:
    content, found = joined(parts_of(form, cut(before + written(form, calls), sizes)))
    assert content == before
    assert [(name, json.loads(text)) for name, text in found] == [
        (call["name"], call["arguments"]) for call in calls
    ]


@pytest.mark.parametrize("form", FORMATS)
@given(data=st.data(), sizes=cuts)
def test_a_long_text_cut_anywhere_reads_the_same(
    form: str, data: st.DataObject, sizes: list[int]
) -> None:
    calls = data.draw(calls_made)
    text = written(form, calls)
    mangled = text[: data.draw(st.integers(0, len(text)))] + data.draw(
        st.sampled_from(["", "}", '"', "<", "</tool_call>", "[TOOL_CALLS]", " and so on"])
    )
    assert joined(parts_of(form, cut(mangled, sizes))) == joined(parts_of(form, [mangled]))


def test_a_long_call_is_announced_before_it_is_complete() -> None:
    text = written("hermes", [{"name": "write", "arguments": {"text": "x" * 5000}}])
    parser = ToolParser(FORMATS["hermes"])
    early = [part for c in text[: HOLD_CHARACTERS + 200] for part in parser.feed(c)]
    assert isinstance(early[0], ToolCall)
    assert all(isinstance(part, ToolCallArguments) for part in early[1:])
    assert len(joined(early)[1][0][1]) > HOLD_CHARACTERS
    parser.feed(text[HOLD_CHARACTERS + 200 :])
    assert parser.end() == []


def test_an_announced_call_that_is_cut_off_keeps_what_there_was() -> None:
    text = written("hermes", [{"name": "write", "arguments": {"text": "x" * 5000}}])[:3000]
    content, calls = joined(parts_of("hermes", text))
    assert content == ""
    assert calls[0][0] == "write"
    assert text.endswith(calls[0][1])


@pytest.mark.parametrize(
    ("form", "text", "calls"),
    [
        ("llama3", '<|python_tag|>{"name": "f", "parameters": {}}', 1),
        ("llama3", '{"name": "f", "parameters": {}}', 1),
        ("llama3", '{"name": "Bob", "parameters": {}}', 0),  # an answer in JSON, not a call
        ("llama3", '{"name": "f", "age": 3}', 0),
        ("llama3", 'See {"name": "f", "parameters": {}}', 0),
        ("mistral", '[{"name": "f", "arguments": {}}, {"name": "f", "arguments": {}}]', 2),
        ("mistral", "[1, 2, 3]", 0),
        ("mistral", "[]", 0),
        ("hermes", '<tool_call>{"name": "other", "arguments": {}}</tool_call>', 1),
        ("hermes", '<tool_call>\n{"name": "f", "arguments": "{}"}\n</tool_call>', 1),
        ("hermes", '<tool_call>{"name": "f"}</tool_call>', 1),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', 0),
        ("hermes", '<tool_call>{"name": "f", "arguments": 5}</tool_call>', 0),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}}', 1),  # ended by the end of turn
        ("hermes", '<tool_call>{<tool_call>{"name": "f", "arguments": {}}</tool_call>', 1),
    ],
)
def test_what_is_a_call_and_what_is_not(form: str, text: str, calls: int) -> None:
    content, found = joined(parts_of(form, text, {"f"}))
    assert len(found) == calls
    if not calls:
        assert content == text


def test_ids_are_new_each_time() -> None:
    text = written("hermes", [{"name": "f", "arguments": {}}] * 3)
    ids = {part.id for part in parts_of("hermes", text) if isinstance(part, ToolCall)}
    assert len(ids) == 3
    assert all(len(i) == len("call_") + 24 for i in ids)


LONG = '"' + "x" * 5000 + '"'
HUGE = '"' + "x" * MAX_CALL_CHARACTERS + '"'


@pytest.mark.parametrize("piece", [1000, 7])
@pytest.mark.parametrize(
    ("text", "content", "arguments"),
    [
        # what cannot be announced is held back whole: its name comes last
        (f'{{"arguments": {{"a": {LONG}}}, "name": "f"}}', "", [f'{{"a": {LONG}}}']),
        # more than that is not held back
        (f'{{"arguments": {{"a": {HUGE}}}, "name": "f"}}', None, []),
        (f'{{"a": {LONG}}}', None, []),
        # announced, and then no JSON any more: what follows is content
        (f'{{"name": "f", "arguments": {{"a": {LONG}; b', "; b", [f'{{"a": {LONG}']),
        (f'{{"name": "f", "arguments": {{"a": {LONG}}}}} b', " b", [f'{{"a": {LONG}}}']),
        # small arguments in a long object are no reason to announce
        (f'{{"name": "f", "arguments": {{}}, "why": {LONG}}}', "", ["{}"]),
        (f'{{"name": "f", "arguments": {{"a": {LONG}}}, "why": 1}}', "", [f'{{"a": {LONG}}}']),
    ],
)
def test_long_texts_that_are_almost_calls(
    text: str, content: str | None, arguments: list[str], piece: int
) -> None:
    text = f"<tool_call>{text}"
    content = text if content is None else content
    found = joined(parts_of("hermes", (text[i : i + piece] for i in range(0, len(text), piece))))
    assert found == (content, [("f", a) for a in arguments])
