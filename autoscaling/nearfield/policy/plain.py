"""Named tuples of numbers as plain data that JSON can hold, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")

_INFINITE = {math.inf: "inf", -math.inf: "-inf"}
"""JSON has no word for them."""


def plain(value: object) -> object:
    """The value as dicts, lists, numbers and strings."""
    if isinstance(value, tuple):
        if hasattr(value, "_asdict"):
            return {name: plain(field) for name, field in value._asdict().items()}
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return _INFINITE[value]
    return value


def revived(kind: type[T], found: object) -> T:
    """What `plain` was given, when it was of that kind.

    Raises:
        TypeError, ValueError, KeyError: it was not.
    """
    return _revived(kind, found)  # type: ignore[no-any-return]


def _revived(kind: Any, found: object) -> Any:
    origin = get_origin(kind)
    if origin is UnionType:
        if found is None:
            return None
        (kind,) = (part for part in get_args(kind) if part is not NoneType)
        return _revived(kind, found)
    if origin is tuple:
        if not isinstance(found, Sequence) or isinstance(found, str):
            raise TypeError(f"a list was expected, found {found!r}")
        parts = get_args(kind)
        if len(parts) == 2 and parts[1] is Ellipsis:
            return tuple(_revived(parts[0], item) for item in found)
        return tuple(_revived(part, item) for part, item in zip(parts, found, strict=True))
    if hasattr(kind, "_fields"):
        if not isinstance(found, Mapping):
            raise TypeError(f"a section was expected, found {found!r}")
        return kind(**{name: _revived(hint, found[name]) for name, hint in _hints(kind).items()})
    if kind is float:
        return float(found)  # type: ignore[arg-type]
    if not isinstance(found, kind):
        raise TypeError(f"{kind.__name__} was expected, found {found!r}")
    return found


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
