"""What is wrong with a body, in words: which field, what it must be, what it is.

pydantic finds the problems; here one of them becomes the error that the caller gets. A value is
repeated only where it is a number or a name: anything else may be somebody's prompt.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import pydantic
from nearfield.api import openai_types as types
from nearfield.core.errors import BadRequest

Body = TypeVar("Body", bound=types.RequestBody)

_UNSUPPORTED = {
    "audio": "Only text is generated: leave it out.",
    "best_of": "Every choice that is generated is returned: ask for n.",
    "function_call": "Use tool_choice.",
    "functions": "Use tools.",
    "logit_bias": "Leave it out.",
    "modalities": "Only text is generated: leave it out.",
    "moderation": "Leave it out.",
    "suffix": "Leave it out.",
    "web_search_options": "Leave it out.",
}

_TEXT_OR_TOKENS = "a string, a list of strings, a list of token ids or a list of such lists"

# What a value must do, by pydantic's name of the problem.
_RULES = {
    "bool_type": "be true or false",
    "dict_type": "be an object",
    "finite_number": "be a finite number",
    "float_type": "be a number",
    "greater_than": "be more than {gt}",
    "greater_than_equal": "be at least {ge}",
    "int_type": "be a whole number",
    "less_than": "be less than {lt}",
    "less_than_equal": "be at most {le}",
    "list_type": "be a list",
    "literal_error": "be {expected}",
    "model_attributes_type": "be an object",
    "model_type": "be an object",
    "string_pattern_mismatch": "match {pattern}",
    "string_too_long": "have at most {max_length} characters",
    "string_too_short": "have at least {min_length} characters",
    "string_type": "be a string",
    "too_long": "have at most {max_length} entries",
    "too_many_fields": "have at most {most} fields",
    "too_short": "have at least {min_length} entries",
    "union_tag_invalid": "be one of {expected_tags}",
}
_NAMED_VALUES = ("literal_error", "string_pattern_mismatch", "union_tag_invalid")
"""Problems of strings that are names: only these are repeated. Others may be someone's prompt."""


def validate(kind: type[Body], body: Any, within: str = "") -> Body:
    """The body as `kind`. `within`: the field of the caller's body that holds it, if one does.

    Raises:
        BadRequest: `param` is the field at fault.
    """
    if not isinstance(body, dict):
        raise BadRequest(
            f"{within or 'The body'} must be a JSON object.",
            param=within or None,
            code="invalid_json" if not within else None,
        )
    try:
        return kind.model_validate(body)
    except pydantic.ValidationError as error:
        raise _bad_request(kind, body, error, within) from None


def unsupported(param: str, field: str | None = None) -> BadRequest:
    """The refusal of a field that OpenAI has and we do not. `field`: the top-level one, if
    `param` is inside it."""
    return BadRequest(
        f"{param} is not supported here. {_UNSUPPORTED[field or param]}",
        param=param,
        code="unsupported_parameter",
    )


def _bad_request(
    kind: type[types.RequestBody],
    body: dict[str, Any],
    error: pydantic.ValidationError,
    within: str,
) -> BadRequest:
    """The deepest problem of a body, in words. Alternatives of a union are one problem."""
    found = [(_path(e, body), e) for e in error.errors(include_url=False)]
    path, first = max(found, key=lambda item: _depth(item[0]))
    param, problem = _dotted([within, *path] if within else path), first["type"]
    name = str(path[-1]) if path else ""
    if problem == "extra_forbidden":
        hint = difflib.get_close_matches(name, _known_fields(kind, len(path) == 1), n=1)
        remedy = f"Did you mean {hint[0]}?" if hint else "Leave it out."
        return BadRequest(f"Unknown field {param}. {remedy}", param=param, code="unknown_parameter")
    if path and path[0] in _UNSUPPORTED:
        return unsupported(param, str(path[0]))
    if problem in ("missing", "union_tag_not_found"):
        return BadRequest(f"{param} is missing.", param=param, code="missing_parameter")
    value = first["input"]
    if problem == "union_tag_invalid":
        value = first["ctx"]["tag"]
    if name == "type" and "content" in path and isinstance(value, str):
        return BadRequest(
            f"{param} is {_shown(value)}: only text parts are supported here.",
            param=param,
            code="unsupported_parameter",
        )
    shown = _shown(value) if problem in _NAMED_VALUES and isinstance(value, str) else _kind(value)
    here = [e for p, e in found if p == path]
    if path and path[0] in ("prompt", "input"):
        here = [e for e in here if e["type"] in ("greater_than_equal", "less_than", "too_long")]
        if not here:
            it = "it" if len(path) == 1 else param
            return BadRequest(f"{path[0]} must be {_TEXT_OR_TOKENS}; {it} is {shown}.", param=param)
    rules = dict.fromkeys(_rule(e) for e in here)
    must = " or ".join(list(rules)[:4]).replace(" or be ", " or ")
    return BadRequest(f"{param or 'The body'} must {must}; it is {shown}.", param=param or None)


def _rule(error: Any) -> str:
    known = _RULES.get(error["type"])
    if known is None:
        message: str = error["msg"]
        return f"be valid ({message[:200]})"
    bounds = error.get("ctx", {}).items()
    whole = {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in bounds}
    return known.format(**whole)


def _kind(value: Any) -> str:
    """A number as it is; of anything longer, only what it is."""
    if isinstance(value, str):
        return "a string"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    return _shown(value)


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value[:100] if isinstance(value, str) else value)
    except ValueError:  # an integer of thousands of digits
        return "a number"
    return text if len(text) <= 60 else text[:57] + "..."


def _depth(path: Sequence[int | str]) -> tuple[int, int]:
    """Deeper is more to the point; in a list, so is farther on: other alternatives of a union
    already gave up on the first item."""
    last = path[-1] if path else 0
    return len(path), last if isinstance(last, int) else 0


def _path(error: Any, body: Any) -> list[int | str]:
    """The keys and indices of a problem's place, without the names of union alternatives."""
    path: list[int | str] = []
    value = body
    for position, part in enumerate(error["loc"]):
        last = position == len(error["loc"]) - 1
        if isinstance(value, dict) and (part in value or (last and error["type"] == "missing")):
            path.append(part)
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            path.append(part)
            value = value[part]
    if error["type"].startswith("union_tag_"):
        path.append(error["ctx"]["discriminator"].strip("'"))
    return path


def _dotted(path: Sequence[int | str]) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text[:200]


def _known_fields(kind: type[types.RequestBody], top: bool) -> Iterable[str]:
    if top:
        return kind.model_fields
    bodies = [b for b in vars(types).values() if isinstance(b, type)]
    nested = [b for b in bodies if issubclass(b, types.RequestBody)]
    return {name for body in nested for name in body.model_fields}
