"""What is wrong with a config, told so that it can be mended: file, line, field, value, remedy."""

from __future__ import annotations

import difflib
import itertools
import re
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from nearfield.core.serve_config import Application, ServeConfig
from nearfield.core.spec import ENGINE_KINDS, ModelSpec
from nearfield.core.yaml_document import Path
from pydantic import BaseModel
from pydantic_core import ErrorDetails

_MAX_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        field: where, dotted: `applications[0].args.limits.timeout_s`; "" is the whole file.
        value: what stands there, shortened; None where nothing does.
        line: counted from 1, where known.
        level: a warning does not make the config invalid.
    """

    file: str
    field: str
    message: str
    remedy: str
    value: str | None = None
    line: int | None = None
    level: Literal["error", "warning"] = "error"


def dotted(path: Path) -> str:
    """`applications[0].name` for ("applications", 0, "name")."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(
        "."
    )


def shown(value: Any) -> str:
    """A value as a person would write it, shortened."""
    text = repr(value) if isinstance(value, str) else _plain(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 1]}…"


def _plain(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem before it has a file: the path inside the checked section."""

    path: Path
    message: str
    remedy: str
    value: Any = None
    has_value: bool = True


def findings(errors: Sequence[ErrorDetails], schema: type[BaseModel], data: Any) -> list[Finding]:
    """Pydantic's errors on `data` in plain words, one per place."""
    found: dict[Path, Finding] = {}
    for error in errors:
        path = _path(error, data)
        finding = _finding(error, path, schema, data)
        earlier = found.get(finding.path)
        # A value that fits no branch of a union is one problem, not one per branch.
        if earlier is not None and earlier.message != finding.message:
            also = finding.message.removeprefix("must be ")
            finding = Finding(
                finding.path, f"{earlier.message} or {also}", earlier.remedy, finding.value
            )
        found[finding.path] = finding
    return list(found.values())


def did_you_mean(value: str, known: Iterable[str]) -> str | None:
    """The known word that was probably meant."""
    close = difflib.get_close_matches(value, list(known), n=1, cutoff=0.6)
    return close[0] if close else None


_ABSENT = object()
_ROOTS: tuple[tuple[type[BaseModel], tuple[str, ...]], ...] = (
    (ServeConfig, ()),
    (Application, ("applications",)),
    (ModelSpec, ("applications", "args")),
)


def _step(data: Any, part: str | int) -> Any:
    """What stands under a key or index, `_ABSENT` if nothing does."""
    if isinstance(data, dict):
        return data.get(part, _ABSENT)
    if isinstance(data, list) and isinstance(part, int) and part < len(data):
        return data[part]
    return _ABSENT


def _path(error: ErrorDetails, data: Any) -> Path:
    """Where in the data an error is: pydantic's location without the names of union branches."""
    path: list[str | int] = []
    current = data
    last = len(error["loc"]) - 1
    for index, part in enumerate(error["loc"]):
        inner = _step(current, part)
        if inner is not _ABSENT:
            current = inner
            path.append(part)
        elif index == last and error["type"] == "missing":
            path.append(part)
    return tuple(path)


def _finding(error: ErrorDetails, path: Path, schema: type[BaseModel], data: Any) -> Finding:
    kind = error["type"]
    context = error.get("ctx", {})
    value = _value_at(data, path)
    key = next((str(part) for part in reversed(path) if isinstance(part, str)), "")
    if kind == "extra_forbidden":
        return Finding(path, "unknown key", _unknown_key_remedy(path, schema, data), value)
    if kind == "missing":
        return Finding(path, "is missing", _ADD.get(key, f"add {key}"), has_value=False)
    if kind == "union_tag_not_found":
        kinds = ", ".join(_kinds_at(schema, path, data))
        return Finding((*path, "kind"), "is missing", f"add kind: one of {kinds}", has_value=False)
    if key == "engine" and kind in ("union_tag_invalid", "model_attributes_type"):
        kinds = ", ".join(ENGINE_KINDS)
        tag = str(context.get("tag", value))
        meant = did_you_mean(tag, ENGINE_KINDS)
        remedy = f"did you mean {meant}?" if meant else _ADD["engine"]
        return Finding(path, f"must be one of {kinds}, or module:Class", remedy, value)
    if kind == "union_tag_invalid":
        known, tag = _kinds_at(schema, path, data), str(context["tag"])
        meant = did_you_mean(tag, known)
        remedy = f"did you mean {meant}?" if meant else f"write kind: {known[0]}"
        return Finding((*path, "kind"), f"must be {_one_of(known)}", remedy, tag)
    if kind == "literal_error":
        expected = [word.strip("' ") for word in re.split(r", | or ", str(context["expected"]))]
        foreign = _FOREIGN_VALUES.get(str(value).lower())
        meant = foreign if foreign in expected else did_you_mean(str(value), expected)
        remedy = f"did you mean {meant}?" if meant else f"write {key}: {expected[0]}"
        return Finding(path, f"must be {_one_of(expected)}", remedy, value)
    if kind == "value_error":
        return _value_error(str(context["error"]), path, value, schema, data)
    if kind == "string_pattern_mismatch":
        # By the field that has the pattern: `engine: x:y` stands for engine.import_path.
        message, remedy = _PATTERNS.get(str(error["loc"][-1]), _PATTERNS["name"])
        return Finding(path, message, remedy, value)
    if (bound := _BOUNDS.get(kind)) is not None:
        words, limit = bound
        at = _plain(context[limit])
        return Finding(path, f"must be {words} {at}", f"write a value {words} {at}", value)
    return _type_finding(kind, path, key, value, error["msg"])


def _value_error(
    message: str, path: Path, value: Any, schema: type[BaseModel], data: Any
) -> Finding:
    """An error of one of our validators; on a section, it begins with the field it is about."""
    field = message.split(maxsplit=1)[0].strip(":,")
    section = _sections_at(schema, path, data)
    if any(field in model.model_fields for model in section):
        path = (*path, field)
        has_value = isinstance(value, dict) and field in value
        value = value.get(field) if isinstance(value, dict) else None
        message = message.removeprefix(field).strip()
    else:
        has_value = True
        field = str(path[-1]) if path else ""
    rule, separator, remedy = message.partition(": ")
    if not separator:
        rule, remedy = message, _REMEDIES.get(field, f"change {field}")
    return Finding(path, rule, remedy, value, has_value)


def _type_finding(kind: str, path: Path, key: str, value: Any, message: str) -> Finding:
    wanted = next((words for prefix, words in _TYPES if kind.startswith(prefix)), None)
    if wanted is None:
        return Finding(path, message[0].lower() + message[1:], f"change {key}", value)
    if isinstance(value, str) and wanted in ("a number", "a whole number"):
        return Finding(path, f"must be {wanted}", _number_remedy(key, value), value)
    if wanted == "text" and not isinstance(value, dict | list):
        example = "…" if value is None else _plain(value)
        return Finding(path, "must be text", f'put it in quotes: {key}: "{example}"', value)
    return Finding(path, f"must be {wanted}", _EXAMPLES[wanted].format(key=key), value)


def _number_remedy(key: str, value: str) -> str:
    units = {"ms": 0.001, "s": 1, "m": 60, "min": 60, "h": 3600}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", value)
    if match and not match[2]:
        return f"write it without quotes: {key}: {match[1]}"
    if match and match[2] in units and key.endswith(("_s", "_ms")):
        seconds = float(match[1]) * units[match[2]]
        number = seconds * 1000 if key.endswith("_ms") else seconds
        unit = "milliseconds" if key.endswith("_ms") else "seconds"
        return f"write {unit} without a unit: {key}: {number:g}"
    return f"write a number, without quotes or a unit: {key}: 1"


def _unknown_key_remedy(path: Path, schema: type[BaseModel], data: Any) -> str:
    key = str(path[-1])
    siblings = sorted(
        {name for model in _sections_at(schema, path[:-1], data) for name in model.model_fields}
    )
    here = _words(schema) + tuple(part for part in path[:-1] if isinstance(part, str))
    section = here[-1] if here else ""
    meant = _FOREIGN_KEYS.get((section, key)) or _FOREIGN_KEYS.get(("", key)) or key
    if meant in siblings:
        return f"did you mean {meant}?"
    places = [(place, model) for place, model in _sections(schema) if meant in model.model_fields]
    if kinds := [kind for place, model in places if place == here and (kind := _kind_of(model))]:
        return f"remove it: of the engines, only {', '.join(kinds)} knows {meant}"
    if places:
        place, _ = max(places, key=lambda found: (_common(found[0], here), -len(found[0])))
        return f"{meant} belongs {_way(place, here)}"
    if close := did_you_mean(key, siblings):
        return f"did you mean {close}?"
    return f"remove it; known here: {', '.join(siblings)}"


def _way(place: tuple[str, ...], here: tuple[str, ...]) -> str:
    """How to get from one section to another, in words."""
    if not place:
        return "at the top of the file"
    onward = place[_common(place, here) :] or place[-1:]
    written = ", which is then a section with a kind" if place[-1] == "engine" else ""
    return f"under {'.'.join(onward)}{written}"


def _common(place: tuple[str, ...], here: tuple[str, ...]) -> int:
    """How many leading words two places share."""
    pairs = zip(place, here, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _words(schema: type[BaseModel]) -> tuple[str, ...]:
    return next((at for model, at in _ROOTS if model is schema), ())


@cache
def _sections(schema: type[BaseModel]) -> tuple[tuple[tuple[str, ...], type[BaseModel]], ...]:
    """Every section of such a file: where it stands, indices left out, and what describes it."""
    roots = _ROOTS if any(model is schema for model, _ in _ROOTS) else ((schema, ()),)
    return tuple(section for model, at in roots for section in _walk(model, at))


def _walk(
    model: type[BaseModel], at: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], type[BaseModel]]]:
    yield at, model
    for name, field in model.model_fields.items():
        for inner in _models(field.annotation):
            yield from _walk(inner, (*at, name))


def _sections_at(schema: type[BaseModel], path: Path, data: Any) -> list[type[BaseModel]]:
    """The models that describe the section at a path; several where an engine's kind is unknown."""
    models: list[type[BaseModel]] = [schema]
    current = data
    for part in path:
        if isinstance(part, int):
            current = current[part] if isinstance(current, list) else None
            continue
        current = current.get(part) if isinstance(current, dict) else None
        models = [
            inner
            for model in models
            if part in model.model_fields
            for inner in _models(model.model_fields[part].annotation)
        ]
        kind = current.get("kind") if isinstance(current, dict) else None
        models = [m for m in models if _kind_of(m) == kind] or models
    return models


def _kinds_at(schema: type[BaseModel], path: Path, data: Any) -> list[str]:
    """The kinds that a section may be of."""
    models = _sections_at(schema, path, data)
    return [kind for model in models if (kind := _kind_of(model)) is not None]


def _kind_of(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("kind")
    return None if field is None else str(field.default)


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models inside an annotation: `list[A | B] | None` gives A and B."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list, typing.Annotated):
        return [model for inner in typing.get_args(annotation) for model in _models(inner)]
    return []


def _value_at(data: Any, path: Path) -> Any:
    for part in path:
        data = _step(data, part)
    return None if data is _ABSENT else data


def _one_of(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"one of {', '.join(words)}"


_BOUNDS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}
_TYPES = (
    ("int", "a whole number"),
    ("float", "a number"),
    ("finite", "a finite number"),
    ("string_too_short", "text that is not empty"),
    ("string", "text"),
    ("bool", "true or false"),
    ("too_short", "a list with at least one entry"),
    ("list", "a list"),
    ("dict", "a section of keys"),
    ("model", "a section of keys"),
)
_EXAMPLES = {
    "a whole number": "write {key}: 1",
    "a number": "write {key}: 1.0",
    "a finite number": "write a number with an end",
    "text that is not empty": "give {key} a name",
    "text": "write {key} as text",
    "true or false": "write {key}: true or {key}: false",
    "a list with at least one entry": "add an entry under {key}, each beginning with `- `",
    "a list": "begin each entry under {key} with `- `",
    "a section of keys": "write its keys below {key}, indented, as `key: value`",
}
_ADD = {
    "applications": "add applications, a list with one entry per model",
    "name": "add name: chat",
    "import_path": "add import_path: nearfield.serving:app",
    "model": "add model: chat, the name clients ask for",
    "engine": "write engine: generate, embed, tensor, remote or vllm, or module:Class for your own",
    "url": "write engine as a section: {kind: remote, url: https://host/v1}",
    "label_selector": "each fallback names labels: label_selector: {key: value}",
}
_PATTERNS = {
    "name": (
        "must begin with a letter or digit and hold only letters, digits, '.', '_' and '-'",
        "choose a name like chat or chat-v2",
    ),
    "import_path": (
        "must name a class in a module: module:Class",
        "write my_engine:MyEngine, for a class MyEngine in my_engine.py next to this file",
    ),
    "url": (
        "must be an http(s) URL without user, query or fragment",
        "write url: https://host/v1",
    ),
    "api_key_env": (
        "must be the name of an environment variable, in capitals",
        "write api_key_env: MY_API_KEY and set that variable where replicas run",
    ),
    "file": ("must be a relative path that ends in .onnx", "write file: model.onnx"),
    "s3_endpoint_url": ("must be an http(s) URL", "write s3_endpoint_url: http://host:9000"),
    "serve": (
        "must be an http(s) URL of scheme, host and port alone",
        "write serve: http://127.0.0.1:8000",
    ),
    "gateway_url": (
        "must be an http(s) URL of scheme, host and port alone",
        "write gateway_url: https://eu-west.example.com",
    ),
}
_REMEDIES = {
    "source": "write builtin://name, hf://org/model, s3://bucket/prefix or file:///path/to/model",
    "import_path": "write import_path: nearfield.serving:app",
    "protocol": "change protocol or task",
    "model": "choose a name like chat",
    "version": 'choose a name like "2"',
    "min_replicas": "lower min_replicas or raise max_replicas",
    "initial_replicas": "choose a number between them, or leave initial_replicas out",
    "max_queued_requests": "write max_queued_requests: -1, or at least 1",
}
_FOREIGN_VALUES = {
    "fp32": "float32",
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "gpu": "cuda",
    "8bit": "int8",
    "bitsandbytes": "int8",
    "warn": "WARNING",
}
# What people bring along from other servers, and from before: (section, key) → ours; "" is any.
_FOREIGN_KEYS = {
    ("args", "name"): "model",
    ("args", "model_name"): "model",
    ("args", "backend"): "engine",
    ("args", "type"): "engine",
    ("args", "runtime"): "engine",
    ("engine", "base_url"): "url",
    ("engine", "endpoint"): "url",
    ("engine", "upstream"): "url",
    ("engine", "api_key"): "api_key_env",
    ("engine", "type"): "kind",
    ("engine", "name"): "kind",
    ("", "apps"): "applications",
    ("", "models"): "applications",
    ("", "services"): "applications",
    ("", "route"): "route_prefix",
    ("", "prefix"): "route_prefix",
    ("", "replicas"): "num_replicas",
    ("", "workers"): "num_replicas",
    ("", "autoscaling"): "autoscaling_config",
    ("", "min_workers"): "min_replicas",
    ("", "max_workers"): "max_replicas",
    ("", "target_num_ongoing_requests_per_replica"): "target_ongoing_requests",
    ("", "max_concurrent_queries"): "max_ongoing_requests",
    ("", "concurrency"): "max_running",
    ("", "cpu"): "num_cpus",
    ("", "cpus"): "num_cpus",
    ("", "gpu"): "num_gpus",
    ("", "gpus"): "num_gpus",
    ("", "env"): "env_vars",
    ("", "environment"): "env_vars",
    ("", "timeout"): "timeout_s",
    ("", "request_timeout"): "timeout_s",
    ("", "model_path"): "source",
    ("", "model_id"): "source",
    ("", "checkpoint"): "source",
    ("", "weights"): "source",
    ("", "max_batch_size"): "max_batch",
    ("", "batch_size"): "max_batch",
    ("", "max_num_seqs"): "max_batch",
    ("", "batch_wait_timeout_s"): "max_wait_ms",
    ("", "max_seq_len"): "max_model_len",
    ("", "max_length"): "max_model_len",
    ("", "context_length"): "max_model_len",
    ("", "precision"): "dtype",
    ("", "torch_dtype"): "dtype",
    ("", "quantize"): "quantization",
    ("", "load_in_8bit"): "quantization",
}
