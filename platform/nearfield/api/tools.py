"""Tool calls in generated text: how models write them, and how to find them in a stream.

Every model family has its own way of writing a call. `FORMATS` lists those we read; `detect`
tells a model's from its chat template; `ToolParser` turns a stream of text into content and
calls without losing a character.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MAX_CALL_CHARACTERS = 256 * 1024
"""Longer than this, what looks like a call is passed on as content."""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a model family writes calls.

    Attributes:
        opening: what begins a call, and `closing` what ends it ("" where the JSON's end does).
        many: the JSON is a list of calls.
        arguments: the key that holds a call's arguments.
        marks: what a chat template contains that teaches this format.
        wrap: what stands around the JSON of a call whose form is enforced.
    """

    opening: str
    closing: str
    many: bool
    arguments: str
    marks: tuple[str, ...]

    @property
    def wrap(self) -> tuple[str, str]:
        return self.opening, self.closing

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
    "hermes": ToolFormat("<tool_call>", "</tool_call>", False, "arguments", ("<tool_call>",)),
    "mistral": ToolFormat("[TOOL_CALLS]", "", True, "arguments", ("[TOOL_CALLS]",)),
    # The whole answer is the call, after a tag that is a special token and seldom shown.
    "llama3": ToolFormat("", "", False, "parameters", ("<|python_tag|>", '"parameters":')),
}


def detect(chat_template: str) -> str | None:
    """The key of the format a chat template teaches, None if it takes no tools."""
    if "tools" not in chat_template:
        return None
    for key, known in FORMATS.items():
        if any(mark in chat_template for mark in known.marks):
            return key
    return None


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the caller."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A complete call: `arguments` is JSON text, as OpenAI's clients expect it."""

    index: int
    id: str
    name: str
    arguments: str


class ToolParser:
    """Finds calls in a stream of text.

    A call comes out whole, once it is complete; text that begins like a call and is not one
    comes out as content. Fed a text in any pieces, the results join to the same content and
    calls.
    """

    def __init__(self, form: ToolFormat) -> None:
        self._form = form
        self._held = ""
        self._in_call = False
        self._content_seen = False
        self._calls = 0

    @property
    def called(self) -> bool:
        """Whether a call has come out."""
        return self._calls > 0

    def feed(self, text: str) -> list[Content | ToolCall]:
        self._held += text
        out: list[Content | ToolCall] = []
        while self._held and self._step(out):
            pass
        return _joined(out)

    def end(self) -> list[Content | ToolCall]:
        """What was held back when the text is over."""
        held, self._held = self._held, ""
        if not held:
            return []
        if self._in_call and not self._form.closing:
            calls = self._read(held.removeprefix(self._form.opening))
            if calls is not None:
                return list(calls)
        return [Content(held)]

    def _step(self, out: list[Content | ToolCall]) -> bool:
        """Make one step over what is held; False: more text is needed."""
        form = self._form
        if self._in_call:
            return self._finish_call(out)
        if not form.opening:
            # The first character decides: an answer that is a JSON object may be a call.
            stripped = self._held.lstrip()
            if not stripped and not self._content_seen:
                return False
            if stripped.startswith("{") and not self._content_seen:
                self._in_call = True
                return False
            self._emit_all(out)
            return False
        at = self._held.find(form.opening)
        if at >= 0:
            self._emit(out, self._held[:at])
            self._held = self._held[at:]
            self._in_call = True
            return True
        keep = _overlap(self._held, form.opening)
        self._emit(out, self._held[: len(self._held) - keep])
        self._held = self._held[len(self._held) - keep :]
        return False

    def _finish_call(self, out: list[Content | ToolCall]) -> bool:
        form = self._form
        if not form.closing:
            if len(self._held) > MAX_CALL_CHARACTERS:
                self._emit_all(out)
                self._in_call = False
            return False  # ends with the text
        at = self._held.find(form.closing, len(form.opening))
        if at < 0:
            if len(self._held) > MAX_CALL_CHARACTERS:
                self._emit_all(out)
                self._in_call = False
            return False
        end = at + len(form.closing)
        calls = self._read(self._held[len(form.opening) : at])
        if calls is None:
            self._emit(out, self._held[:end])
        else:
            out += calls
        self._held = self._held[end:]
        self._in_call = False
        return True

    def _read(self, text: str) -> list[ToolCall] | None:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return None
        values = value if self._form.many and isinstance(value, list) else [value]
        calls: list[ToolCall] = []
        for call in values:
            if not isinstance(call, dict) or not isinstance(call.get("name"), str):
                return None
            arguments = call.get(self._form.arguments, call.get("arguments", {}))
            if not isinstance(arguments, dict | str):
                return None
            shown = arguments if isinstance(arguments, str) else json.dumps(arguments)
            number = self._calls + len(calls)
            calls.append(ToolCall(number, f"call_{secrets.token_hex(12)}", call["name"], shown))
        if not calls:
            return None
        self._calls += len(calls)
        return calls

    def _emit(self, out: list[Content | ToolCall], text: str) -> None:
        # White space around calls is the template's, not the answer's.
        if text and (self._calls == 0 or text.strip()):
            self._content_seen = True
            out.append(Content(text))

    def _emit_all(self, out: list[Content | ToolCall]) -> None:
        self._emit(out, self._held)
        self._held = ""


def _overlap(text: str, opening: str) -> int:
    """How many characters at the end of `text` could be the beginning of `opening`."""
    for size in range(min(len(opening) - 1, len(text)), 0, -1):
        if text.endswith(opening[:size]):
            return size
    return 0


def _joined(parts: list[Content | ToolCall]) -> list[Content | ToolCall]:
    joined: list[Content | ToolCall] = []
    for part in parts:
        if joined and isinstance(part, Content) and isinstance(joined[-1], Content):
            joined[-1] = Content(joined[-1].text + part.text)
        else:
            joined.append(part)
    return joined
