"""What an administrator may say, checked: the same from the command line and the admin API."""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar, get_args

import pydantic
from nearfield.api.keys import Scope
from nearfield.core.errors import BadRequest
from nearfield.core.spec import Name
from nearfield.policy.quota import Limits
from nearfield.store.ports import GroupBy
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

MAX_LIMIT = 10**12
MAX_MODELS = 1000
DAY_S = 24 * 3600
DEFAULT_GRACE_S = DAY_S

Bound = Annotated[StrictInt, Field(ge=0, le=MAX_LIMIT)] | None
Jurisdiction = Annotated[StrictStr, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,31}$")]
Label = Annotated[StrictStr, Field(max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]


class Form(BaseModel):
    """Fields that are not given keep what they were."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    def given(self, *names: str) -> dict[str, Any]:
        """Of these fields, the ones that were given, null included."""
        return {name: getattr(self, name) for name in names if name in self.model_fields_set}


class LimitsForm(Form):
    """null takes a limit away."""

    requests_per_minute: Bound = None
    tokens_per_minute: Bound = None
    concurrent_streams: Bound = None

    def onto(self, limits: Limits) -> Limits:
        """These limits, with what is given here in their place."""
        return replace(limits, **self.given(*type(self).model_fields))


class NewTenant(Form):
    name: Name
    jurisdictions: Annotated[list[Jurisdiction], Field(max_length=100)] | None = None
    limits: LimitsForm = LimitsForm()


class TenantChange(Form):
    jurisdictions: Annotated[list[Jurisdiction], Field(max_length=100)] | None = None
    suspended: StrictBool = False
    limits: LimitsForm = LimitsForm()


class NewProduct(Form):
    name: Name
    limits: LimitsForm = LimitsForm()


class ProductChange(Form):
    limits: LimitsForm = LimitsForm()


class NewKey(Form):
    tenant: Name
    product: Name | None = None
    label: Label = ""
    scopes: Annotated[list[Scope], Field(min_length=1, max_length=10)] = ["inference"]
    models: Annotated[list[Name], Field(max_length=MAX_MODELS)] | None = None
    expires_in_s: Annotated[float, Field(gt=0, le=100 * 366 * DAY_S)] | None = None
    limits: LimitsForm = LimitsForm()


class Rotation(Form):
    """For how long the former secret stays good."""

    grace_s: Annotated[float, Field(ge=0, le=90 * DAY_S)] = DEFAULT_GRACE_S


Kind = TypeVar("Kind", bound=Form)


def parse(kind: type[Kind], data: Any) -> Kind:
    """The form.

    Raises:
        BadRequest: `param` is the field at fault.
    """
    if not isinstance(data, Mapping):
        raise BadRequest("The body must be a JSON object.", code="invalid_json")
    try:
        return kind.model_validate(dict(data))
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
    names = [str(part) for part in first["loc"] if part in data or "[" not in str(part)]
    param = ".".join(names)[:200]
    if first["type"] == "extra_forbidden":
        fields = LimitsForm.model_fields if "limits" in names[:-1] else kind.model_fields
        close = difflib.get_close_matches(names[-1], fields, n=1)
        remedy = f"Did you mean {close[0]}?" if close else f"There are {', '.join(fields)}."
        raise BadRequest(f"Unknown field {param}. {remedy}", param=param, code="unknown_parameter")
    if first["type"] == "missing":
        raise BadRequest(f"{param} is missing.", param=param, code="missing_parameter")
    value = repr(first["input"])[:60]
    raise BadRequest(f"{param} is {value}: {_lower(first['msg'])}.", param=param)


GROUPS: tuple[GroupBy, ...] = get_args(GroupBy)


def groups(names: Sequence[str], param: str) -> list[GroupBy]:
    """What usage is summed by.

    Raises:
        BadRequest: a name is no group, or is there twice.
    """
    found: list[GroupBy] = [group for name in names for group in GROUPS if group == name]
    if len(found) != len(names):
        odd = next(name for name in names if name not in GROUPS)
        raise BadRequest(
            f"{param} is {odd[:60]!r}: usage is summed by {', '.join(GROUPS)}.", param=param
        )
    if len(set(found)) != len(found):
        raise BadRequest(f"{param} names a group twice.", param=param)
    return found


def moment_s(text: str, param: str) -> float:
    """A moment as Unix time: seconds, or ISO 8601 (`2026-11-25`, `2026-11-25T08:00:00Z`; without
    a zone UTC).

    Raises:
        BadRequest: it is neither.
    """
    with contextlib.suppress(ValueError):
        seconds = float(text)
        if math.isfinite(seconds):
            return seconds
    with contextlib.suppress(ValueError):
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    raise BadRequest(
        f"{param} is {text[:60]!r}: send Unix seconds, or a date as 2026-11-25 or "
        "2026-11-25T08:00:00Z.",
        param=param,
    )


def _lower(text: str) -> str:
    return text[0].lower() + text[1:]
