"""Reading a JSON body that anyone may have sent."""

from __future__ import annotations

from typing import Any

import pydantic_core
from nearfield.core.errors import BadRequest


def load_json(body: bytes) -> Any:
    """Parse a body: strict UTF-8, no NaN or Infinity, nested at most 200 deep (the parser's own
    limit, which it checks before it goes deeper).

    Raises:
        BadRequest: the message says what is wrong and where.
    """
    if not body.strip():
        raise BadRequest("The body is empty: send a JSON object.", code="invalid_json")
    try:
        return pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        if "recursion limit" in str(error):
            raise BadRequest("The body is nested too deeply.", code="invalid_json") from None
        raise BadRequest(f"The body is not valid JSON: {error}.", code="invalid_json") from None
