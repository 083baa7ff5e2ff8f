"""Between text and tokens: tokenizer, chat template, incremental detokenising, stop strings.

Reads a model directory's own files (`tokenizer.json`, `tokenizer_config.json`,
`chat_template.jinja`) with `tokenizers` and `jinja2` alone: importing transformers costs a
second of a cold start and is only done for checkpoints without a `tokenizer.json`.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from nearfield.core.errors import BadRequest
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model directory; {} where the file is absent.

    Raises:
        BadRequest: the file is not JSON.
    """
    if not path.is_file():
        return {}
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadRequest(f"source: {path.name} is not JSON: {error}") from error
    return loaded if isinstance(loaded, dict) else {}


def load_tokenizer(directory: Path) -> Tokenizer:
    """The directory's tokenizer.

    Raises:
        BadRequest: there is none, or it cannot be read.
    """
    file = directory / "tokenizer.json"
    try:
        if file.is_file():
            return Tokenizer.from_file(str(file))
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False).backend_tokenizer
    except Exception as error:
        raise BadRequest(
            "source: the tokenizer cannot be read; the model needs a tokenizer.json "
            "(AutoTokenizer.from_pretrained(…).save_pretrained(…) writes one)."
        ) from error


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment chat templates are written for, sandboxed: a template is a download."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda f: dt.datetime.now(dt.UTC).strftime(f)
    return environment


def _gpt2_bytes() -> dict[str, int]:
    """The byte each character of a byte-level vocabulary stands for (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in printable}
    hidden = [b for b in range(256) if b not in set(printable)]
    return table | {chr(256 + i): b for i, b in enumerate(hidden)}


class TextModel:
    """A model's tokenizer and chat template."""

    def __init__(self, directory: Path, chat_template: str | None = None) -> None:
        self._config = read_json(directory / "tokenizer_config.json")
        self.tokenizer = load_tokenizer(directory)
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.vocab_size = self.tokenizer.get_vocab_size(with_added_tokens=True)
        self.eos_ids = self._eos_ids(directory)
        self.template_source = chat_template or self._template(directory)
        self._template_object = (
            _environment().from_string(self.template_source) if self.template_source else None
        )

    def _eos_ids(self, directory: Path) -> frozenset[int]:
        ids: set[int] = set()
        for name in ("generation_config.json", "config.json"):
            value = read_json(directory / name).get("eos_token_id")
            ids.update([value] if isinstance(value, int) else value or [])
        if isinstance(token := self._special("eos_token"), str):
            found = self.tokenizer.token_to_id(token)
            ids.update([] if found is None else [found])
        return frozenset(ids)

    def _special(self, name: str) -> str | None:
        value = self._config.get(name)
        return value.get("content") if isinstance(value, dict) else value

    def _template(self, directory: Path) -> str | None:
        file = directory / "chat_template.jinja"
        if file.is_file():
            return file.read_text(encoding="utf-8")
        template = self._config.get("chat_template")
        if isinstance(template, list):
            named = {entry["name"]: entry["template"] for entry in template}
            return named.get("default")
        return template if isinstance(template, str) else None

    @cached_property
    def _bytes(self) -> dict[str, int] | None:
        decoder = json.loads(self.tokenizer.to_str()).get("decoder") or {}
        kinds = {decoder.get("type")} | {d.get("type") for d in decoder.get("decoders", [])}
        return _gpt2_bytes() if "ByteLevel" in kinds else None

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids; `special`: with the model's own BOS and the like around them."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special).ids
        return ids

    def chat(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]],
        kwargs: dict[str, Any],
    ) -> list[int]:
        """A conversation's token ids, through the chat template.

        Raises:
            BadRequest: there is no template, or it refuses these messages.
        """
        if self._template_object is None:
            raise BadRequest(
                "This model has no chat template. Use /v1/completions, or set "
                "engine.chat_template in the model's spec.",
                code="no_chat_template",
            )
        try:
            text = self._template_object.render(
                messages=[_plain(message) for message in messages],
                tools=list(tools) or None,
                add_generation_prompt=True,
                bos_token=self._special("bos_token") or "",
                eos_token=self._special("eos_token") or "",
                pad_token=self._special("pad_token") or "",
                **kwargs,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise BadRequest(
                f"The model's chat template refuses these messages: {error}", param="messages"
            ) from error
        return self.encode(text, special=False)

    def decoder(self) -> DecodeStream:
        return DecodeStream(skip_special_tokens=True)

    def step(self, decoder: DecodeStream, token: int) -> str:
        """The text this token completes; "" while a character is incomplete."""
        return decoder.step(self.tokenizer, token) or ""

    def token(self, token: int) -> tuple[str, bytes]:
        """A single token as text and as the bytes it stands for."""
        piece = self.tokenizer.id_to_token(token)
        if piece is None:
            return "", b""
        if self._bytes is not None and all(c in self._bytes for c in piece):
            raw = bytes(self._bytes[c] for c in piece)
            return raw.decode("utf-8", errors="replace"), raw
        text = self.tokenizer.decode([token], skip_special_tokens=False) or piece
        return text, text.encode()


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """Text parts joined (most templates want a string), tool arguments as objects."""
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(part.get("text", "") for part in content)
    plain = {**message, "content": content}
    if calls := message.get("tool_calls"):
        plain["tool_calls"] = [_plain_call(call) for call in calls]
    return plain


def _plain_call(call: dict[str, Any]) -> dict[str, Any]:
    function = dict(call.get("function") or {})
    if isinstance(function.get("arguments"), str):
        # What is not JSON the template gets as the string that the client sent.
        with contextlib.suppress(ValueError):
            function["arguments"] = json.loads(function["arguments"])
    return {**call, "function": function}


class StopScanner:
    """Finds stop strings in a stream and holds back what could still become one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """(text that may go out now, the stop string that was met or None)."""
        if not self._stops:
            return text, None
        window = self._held + text
        found = [(at, stop) for stop in self._stops if (at := window.find(stop)) >= 0]
        if found:
            at, stop = min(found)
            self._held = ""
            return window[:at], stop
        keep = 0
        for size in range(min(self._longest - 1, len(window)), 0, -1):
            if any(stop.startswith(window[-size:]) for stop in self._stops):
                keep = size
                break
        self._held = window[len(window) - keep :]
        return window[: len(window) - keep], None

    def flush(self) -> str:
        """What was held back, when the sequence ends otherwise."""
        held, self._held = self._held, ""
        return held
