"""How much one Open Inference call may say, and the shapes that are believed.

Without numpy: gateways check the same bounds as replicas do. Whatever is said about sizes is
checked in Python's integers before anything is allocated.
"""

from __future__ import annotations

from typing import Any

from nearfield.core.errors import BadRequest

MAX_TENSORS = 256
MAX_NAME_CHARACTERS = 256
MAX_DIMENSIONS = 16
MAX_DIMENSION = 2**31 - 1
MAX_ELEMENTS = 64 * 2**20

WIRE_BYTES = {
    "BOOL": 1,
    "UINT8": 1,
    "UINT16": 2,
    "UINT32": 4,
    "UINT64": 8,
    "INT8": 1,
    "INT16": 2,
    "INT32": 4,
    "INT64": 8,
    "FP16": 2,
    "FP32": 4,
    "FP64": 8,
    "BF16": 2,
}
"""Of one element as binary data. BYTES is not here: each of its elements begins with its length."""

BYTES = "BYTES"
BYTES_LENGTH_BYTES = 4
"""The length before each element of BYTES: an unsigned little-endian integer."""


def is_int(value: Any) -> bool:
    """A whole number as JSON has it: true and 1.0 are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """A value in a message: numbers as they are, of anything else only what it is."""
    if is_int(value):
        return str(value) if abs(value) < 2**64 else "a larger number"
    if isinstance(value, float):
        return repr(value)
    names = {bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "null")


def read_shape(value: Any, param: str, max_elements: int) -> tuple[tuple[int, ...], int]:
    """A shape and its number of elements.

    Raises:
        BadRequest: not a list of whole numbers, too many of them, or more than `max_elements`.
    """
    if not isinstance(value, list):
        raise BadRequest(f"{param} must be a list.", param=param)
    if len(value) > MAX_DIMENSIONS:
        raise BadRequest(
            f"{param} has {len(value)} dimensions; at most {MAX_DIMENSIONS} go.", param=param
        )
    size = 1
    for dimension in value:
        if not is_int(dimension) or not 0 <= dimension <= MAX_DIMENSION:
            raise BadRequest(
                f"{param}: a dimension is {shown(dimension)}; it must be a whole number from 0 to "
                f"{MAX_DIMENSION}.",
                param=param,
            )
        size *= dimension
    if size > max_elements:
        raise BadRequest(
            f"{param}: {size} elements are more than the {max_elements} that fit.", param=param
        )
    return tuple(value), size


def check_length(datatype: str, size: int, given_bytes: int, param: str) -> None:
    """Refuse binary data that is not as long as its elements. Of BYTES only the least is checked.

    Raises:
        BadRequest: the data is longer or shorter.
    """
    if datatype == BYTES:
        if size * BYTES_LENGTH_BYTES > given_bytes:
            raise BadRequest(
                f"{param}: {size} elements do not fit {given_bytes} bytes.", param=param
            )
        return
    element_bytes = WIRE_BYTES[datatype]
    if given_bytes != size * element_bytes:
        raise BadRequest(
            f"{param}: the shape has {size} elements of {element_bytes} bytes, the data "
            f"{given_bytes} bytes.",
            param=param,
        )
