"""Tool calls in generated text: how models write them, and how to find them in a stream.

Every model family has its own way of writing a call. `FORMATS` lists those we read; `detect`
tells a model's from its chat template; `ToolParser` turns a stream of text into content and
calls without losing a character.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

HOLD_CHARACTERS = 1024
"""A call is held back until it is complete, and so known to be one. When it is longer than this
and begins as a call does, it is announced and its arguments follow in pieces: nobody waits in
silence while a model writes a file."""
MAX_CALL_CHARACTERS = 256 * 1024
"""Longer than this, what looks like a call and cannot be announced is passed on as content."""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a model family writes calls: JSON objects with a name and arguments, marked somehow.

    Attributes:
        opening: what begins a call, and `closing` what ends it ("" where the JSON's end does).
        many: the JSON is a list of calls.
        arguments: the key that holds a call's arguments.
        marks: what a chat template contains that teaches this format; `other_marks` tell that it
            teaches another one that begins alike.
        bare: an answer may begin with the call itself: `opening` is a special token of the
            model, which is not text. Then the call must name one of the request's functions.
        wrap: what stands around the JSON of a call whose form is enforced.
    """

    opening: str
    closing: str
    many: bool
    arguments: str
    marks: tuple[str, ...]
    other_marks: tuple[str, ...] = ()
    bare: bool = False
    wrap: tuple[str, str] = ("", "")

    def grammar_schema(
        self, names: Sequence[str], schemas: dict[str, dict[str, Any]]
    ) -> dict[str, Any]:
        """JSON schema of one call to one of the functions `names`, arguments by `schemas`."""
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": name},
                    self.arguments: schemas.get(name) or {"type": "object"},
                },
                "required": ["name", self.arguments],
                "additionalProperties": False,
            }
            for name in names
        ]
        call: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
        if self.many:
            return {"type": "array", "items": call, "minItems": 1, "maxItems": 1}
        return call


FORMATS: dict[str, ToolFormat] = {
    # Qwen, Hermes, abacus
    "hermes": ToolFormat(
        "<tool_call>",
        "</tool_call>",
        many=False,
        arguments="arguments",
        marks=("<tool_call>",),
        other_marks=("<function=", "<arg_key>"),
        wrap=("<tool_call>", "</tool_call>"),
    ),
    "mistral": ToolFormat(
        "[TOOL_CALLS]",
        "",
        many=True,
        arguments="arguments",
        marks=("[TOOL_CALLS]",),
        other_marks=("[ARGS]",),
        bare=True,
        wrap=("[TOOL_CALLS]", ""),
    ),
    "llama3": ToolFormat(
        "<|python_tag|>",
        "",
        many=False,
        arguments="parameters",
        marks=("<|python_tag|>", '"parameters":'),
        bare=True,
    ),
}


def detect(chat_template: str) -> str | None:
    """The key of the format a chat template teaches, None if it takes no tools that we read."""
    if "tools" not in chat_template:
        return None
    for key, known in FORMATS.items():
        if any(mark in chat_template for mark in known.marks):
            other = any(mark in chat_template for mark in known.other_marks)
            return None if other else key
    return None


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the caller."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call. `arguments` is JSON text, as OpenAI's clients expect it: all of it, or what there is
    so far of a long one, which `ToolCallArguments` of the same index continue."""

    index: int
    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """More of the arguments of call `index`, as the model wrote them."""

    index: int
    fragment: str


Part = Content | ToolCall | ToolCallArguments


class ToolParser:
    """Finds calls in a stream of text.

    Text that begins like a call and is not one comes out as content; white space behind a call
    is dropped where nothing but another call follows. Fed a text in any pieces, the parts join
    to the same content and calls.
    """

    def __init__(self, form: ToolFormat, names: Collection[str] | None = None) -> None:
        """`names`: the functions that were offered, None: unknown (then any name will do)."""
        self._form = form
        self._names = names
        self._held = ""
        self._calls = 0
        self._step: Callable[[list[Part]], bool] = self._start if form.bare else self._text
        self._value = _Value()
        self._value_at = 0  # where it begins in what is held, and how far it has been read
        self._read_to = 0
        self._window = HOLD_CHARACTERS
        self._marked = False  # the value being read has the opening before it
        self._listed = False  # it is a list of calls

    @property
    def called(self) -> bool:
        """Whether a call has come out."""
        return self._calls > 0

    def feed(self, text: str) -> list[Part]:
        """What is certain now."""
        self._held += text
        out: list[Part] = []
        while self._held and self._step(out):
            pass
        return _joined(out)

    def end(self) -> list[Part]:
        """What was held back when the text is over."""
        held, self._held = self._held, ""
        if self._step == self._arguments:
            return [ToolCallArguments(self._calls - 1, held)] if held else []
        if self._step == self._closing:
            held = "" if self._form.closing.startswith(held.strip()) else held
        elif self._step in (self._after, self._tail):
            held = held if held.strip() else ""
        return [Content(held)] if held else []

    # Each of these reads on from the beginning of what is held. False: more text is needed.

    def _start(self, out: list[Part]) -> bool:
        """At the beginning of an answer that may be a call itself."""
        stripped = self._held.lstrip()
        if self._form.opening.startswith(stripped):
            return False
        marked = stripped.startswith(self._form.opening)
        if not marked and stripped.startswith("[" if self._form.many else "{"):
            self._begin_value(0, marked=False)
        else:
            self._step = self._text
        return True

    def _text(self, out: list[Part]) -> bool:
        opening = self._form.opening
        at = self._held.find(opening)
        if at < 0:
            self._emit(out, len(self._held) - _overlap(self._held, opening))
            return False
        self._emit(out, at)
        self._begin_value(len(opening), marked=True)
        return True

    def _begin_value(self, at: int, *, marked: bool) -> None:
        """Go on to the JSON that should follow at `at`, after white space."""
        self._value = _Value()
        self._value_at = at
        self._window = HOLD_CHARACTERS
        self._marked = marked
        self._step = self._before_value

    def _before_value(self, out: list[Part]) -> bool:
        at = self._value_at
        while at < len(self._held) and self._held[at].isspace():
            at += 1
        self._value_at = self._read_to = at
        if at == len(self._held):
            return False
        self._listed = self._form.many and self._held[at] == "["
        if not self._listed and self._held[at] != "{":
            return self._not_a_call(out, at)
        self._step = self._in_value
        return True

    def _in_value(self, out: list[Part]) -> bool:
        start, limit = self._value_at, self._value_at + self._window
        end = self._read_to = self._value.scan(self._held, self._read_to, limit)
        if self._value.broken:
            return self._not_a_call(out, end)
        if self._value.complete:
            calls = self._read(self._held[start:end])
            if not calls:
                return self._not_a_call(out, end)
            self._calls += len(calls)
            out += calls
            self._held = self._held[end:]
            self._step = self._closing
            return True
        if len(self._held) < limit:
            return False
        if self._window == HOLD_CHARACTERS:
            self._window = MAX_CALL_CHARACTERS
            self._announce(out, limit)
            return True
        return self._not_a_call(out, limit)

    def _not_a_call(self, out: list[Part], end: int) -> bool:
        self._emit(out, end)
        self._step = self._text
        return True

    def _announce(self, out: list[Part], limit: int) -> None:
        """Let a long call begin, if what is held says enough of it."""
        head = _HEAD.match(self._held, self._value_at, limit)
        if head is None or head["key"] not in (self._form.arguments, "arguments"):
            return
        arguments = _Value()
        at = head.end() - 1
        end = arguments.scan(self._held, at, limit)
        name = _parsed(head["name"])
        if arguments.complete or arguments.broken or not self._may_be_called(name):
            return
        out.append(ToolCall(self._calls, _new_id(), name, self._held[at:end]))
        self._calls += 1
        self._held = self._held[end:]
        self._value = arguments
        self._step = self._arguments

    def _arguments(self, out: list[Part]) -> bool:
        end = self._value.scan(self._held, 0, len(self._held))
        if end:
            out.append(ToolCallArguments(self._calls - 1, self._held[:end]))
            self._held = self._held[end:]
        if self._value.complete:
            self._value = _Value(depth=2 if self._listed else 1)
            self._read_to = 0
            self._step = self._tail
        elif self._value.broken:
            self._step = self._text
        else:
            return False
        return True

    def _tail(self, out: list[Part]) -> bool:
        """What follows the arguments of an announced call: its end, and perhaps more calls."""
        end = self._read_to = self._value.scan(self._held, self._read_to, MAX_CALL_CHARACTERS)
        ends = self._value.complete
        if not ends and not self._value.broken and len(self._held) < MAX_CALL_CHARACTERS:
            return False
        announced = f'{{"name": "", "{self._form.arguments}": {{}}'
        whole = ("[" if self._listed else "") + announced + self._held[:end]
        calls = self._read(whole, announced=1) if ends else None
        if calls is None:
            return self._not_a_call(out, end)
        self._calls += len(calls)
        out += calls
        self._held = self._held[end:]
        self._step = self._closing
        return True

    def _closing(self, out: list[Part]) -> bool:
        closing, rest = self._form.closing, self._held.lstrip()
        if closing and rest.startswith(closing):
            self._held = rest.removeprefix(closing)
        elif closing and closing.startswith(rest):
            return False
        self._step = self._after
        return True

    def _after(self, out: list[Part]) -> bool:
        opening, rest = self._form.opening, self._held.lstrip()
        if rest.startswith(opening):
            self._held = rest
        elif opening.startswith(rest):
            return False
        self._step = self._text
        return True

    def _read(self, text: str, *, announced: int = 0) -> list[ToolCall] | None:
        """The calls that a complete JSON value makes, without the first `announced` of them.

        None: it is something else.
        """
        try:
            value = json.loads(text, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return None
        calls: list[ToolCall] = []
        for call in (value if self._listed else [value])[announced:]:
            if not isinstance(call, dict) or not self._may_be_called(call.get("name")):
                return None
            keys = [k for k in (self._form.arguments, "arguments") if k in call]
            if not keys and not self._marked:
                return None
            arguments = call[keys[0]] if keys else {}
            if not isinstance(arguments, dict | str):
                return None
            shown = arguments if isinstance(arguments, str) else json.dumps(arguments)
            number = self._calls + len(calls)
            calls.append(ToolCall(number, _new_id(), call["name"], shown))
        return calls

    def _may_be_called(self, name: Any) -> bool:
        if not isinstance(name, str):
            return False
        return self._marked or self._names is None or name in self._names

    def _emit(self, out: list[Part], end: int) -> None:
        if end:
            out.append(Content(self._held[:end]))
            self._held = self._held[end:]


_HEAD = re.compile(
    r'\[?\s*\{\s*"name"\s*:\s*(?P<name>"(?:[^"\\]|\\.)*")\s*,\s*"(?P<key>\w+)"\s*:\s*\{'
)
_IN_STRING = re.compile(r'[^"\\]*')
_BETWEEN_STRINGS = re.compile(r"[\s:,0-9.+\-eEtrufalsn]*")


class _Value:
    """Finds the end of a JSON object or list in text that comes in pieces.

    Attributes:
        complete: the end has been seen. broken: a character that JSON has nowhere.
    """

    __slots__ = ("_depth", "_in_string", "broken", "complete")

    def __init__(self, *, depth: int = 0) -> None:
        self._depth = depth
        self._in_string = False
        self.complete = False
        self.broken = False

    def scan(self, text: str, at: int, limit: int) -> int:
        """Read on from `at`, up to `limit` at most; returns how far it got: behind the end, at
        what is broken, or as far as there is text (but never between a backslash and what it
        escapes)."""
        limit = min(limit, len(text))
        while at < limit:
            if self._in_string:
                at = _end(_IN_STRING, text, at, limit)
                if at == limit:
                    break
                if text[at] == '"':
                    self._in_string = False
                    at += 1
                elif at + 1 < limit:
                    at += 2
                else:
                    break
                continue
            at = _end(_BETWEEN_STRINGS, text, at, limit)
            if at == limit:
                break
            character = text[at]
            if character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
            else:
                self.broken = True
                break
            at += 1
            if self._depth == 0:
                self.complete = True
                break
        return at


def _end(pattern: re.Pattern[str], text: str, at: int, limit: int) -> int:
    found = pattern.match(text, at, limit)
    assert found is not None, "it matches the empty text"
    return found.end()


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _new_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _overlap(text: str, opening: str) -> int:
    """How many characters at the end of `text` could be the beginning of `opening`."""
    longest = min(len(opening) - 1, len(text))
    if opening[0] not in text[len(text) - longest :]:
        return 0
    return next((n for n in range(longest, 0, -1) if text.endswith(opening[:n])), 0)


def _joined(parts: list[Part]) -> list[Part]:
    joined: list[Part] = []
    for part in parts:
        if joined and isinstance(part, Content) and isinstance(joined[-1], Content):
            joined[-1] = Content(joined[-1].text + part.text)
        else:
            joined.append(part)
    return joined
