"""Tensors of the Open Inference Protocol between the wire and numpy.

JSON data is flat or nested like the shape; binary data is row-major and little-endian, BYTES
elements each begin with their length in 4 bytes. BF16 has no numpy type: it is float32 here,
widened on the way in and rounded to nearest even on the way out.

Shapes are read in `oip_bounds`, before anything is allocated. A dimension may be 0: then there is
no data.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from nearfield.api.oip_bounds import BYTES_LENGTH_BYTES, check_length, is_int, shown
from nearfield.core.errors import BadRequest, EngineFailed
from numpy.typing import NDArray

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BF16": np.dtype("<f4"),
    "BYTES": np.dtype(object),
}


class Metadata(Protocol):
    """A tensor as a model declares it; -1 in the shape: any size."""

    @property
    def name(self) -> str: ...
    @property
    def datatype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class Declared:
    """A declared tensor of our own, for models that are not made of tensors."""

    name: str
    datatype: str
    shape: tuple[int, ...]


def check_fits(shape: Sequence[int], declared: Metadata, param: str) -> None:
    """Refuse a shape that is not the declared one.

    Raises:
        BadRequest: it says what the model takes.
    """
    same = len(shape) == len(declared.shape)
    if not same or any(d not in (-1, s) for s, d in zip(shape, declared.shape, strict=True)):
        raise BadRequest(
            f"{param} is {list(shape)}; {declared.name} takes {list(declared.shape)} "
            "(-1: any size).",
            param=param,
        )


# ---- binary ------------------------------------------------------------------------------------


class BinaryData:
    """The bytes behind the JSON, handed out in order."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    def take(self, length: Any, param: str) -> memoryview:
        """The next `length` bytes.

        Raises:
            BadRequest: there are not as many.
        """
        if not is_int(length) or length < 0:
            raise BadRequest(f"{param} must be a number of bytes.", param=param)
        end = self._at + length
        if end > len(self._data):
            raise BadRequest(
                f"{param} says more bytes than the {len(self._data) - self._at} that are left.",
                param=param,
            )
        taken, self._at = self._data[self._at : end], end
        return taken

    def all_taken(self) -> None:
        """Check that nothing is left.

        Raises:
            BadRequest: something is.
        """
        left = len(self._data) - self._at
        if left:
            raise BadRequest(f"{left} bytes of binary data belong to no input.", param="inputs")


def from_binary(raw: memoryview, datatype: str, size: int, param: str) -> NDArray[Any]:
    """`size` elements, flat and not to be written to.

    Raises:
        BadRequest: the bytes are not as many as the elements take.
    """
    check_length(datatype, size, len(raw), param)
    if datatype == "BYTES":
        return _bytes_elements(raw, size, param)
    if datatype == "BF16":
        widened: NDArray[Any] = np.frombuffer(raw, "<u2").astype("<u4") << 16
        floats: NDArray[Any] = widened.view("<f4")
        return floats
    if datatype == "BOOL":
        flags: NDArray[Any] = np.frombuffer(raw, np.uint8) != 0
        return flags
    return np.frombuffer(raw, DTYPES[datatype])


def _bytes_elements(raw: memoryview, size: int, param: str) -> NDArray[Any]:
    elements = np.empty(size, dtype=object)
    at = 0
    for index in range(size):
        if at + BYTES_LENGTH_BYTES > len(raw):
            raise BadRequest(f"{param}: the data ends before element {index}.", param=param)
        (length,) = struct.unpack_from("<I", raw, at)
        at += BYTES_LENGTH_BYTES
        if at + length > len(raw):
            raise BadRequest(
                f"{param}: element {index} says {length} bytes, {len(raw) - at} are left.",
                param=param,
            )
        elements[index] = bytes(raw[at : at + length])
        at += length
    if at != len(raw):
        raise BadRequest(f"{param}: {len(raw) - at} bytes follow the last element.", param=param)
    return elements


def to_binary(array: NDArray[Any], datatype: str) -> bytes:
    """A tensor's bytes."""
    if datatype == "BYTES":
        parts: list[bytes] = []
        for element in array.ravel():
            raw = _as_bytes(element)
            parts += (struct.pack("<I", len(raw)), raw)
        return b"".join(parts)
    if datatype == "BF16":
        bits = np.ascontiguousarray(array, "<f4").view("<u4")
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        return np.where(np.isnan(array), 0x7FC0, rounded >> 16).astype("<u2").tobytes()
    return np.ascontiguousarray(array, DTYPES[datatype]).tobytes()


def _as_bytes(element: Any) -> bytes:
    return element if isinstance(element, bytes) else str(element).encode()


# ---- JSON --------------------------------------------------------------------------------------


def from_json(
    data: Any, datatype: str, shape: Sequence[int], size: int, param: str
) -> NDArray[Any]:
    """Data as a flat list or nested like the shape, in that shape.

    Raises:
        BadRequest: it is neither, or an element does not go with the datatype.
    """
    if not isinstance(data, list):
        raise BadRequest(f"{param} must be a list.", param=param)
    flat = data
    if flat and isinstance(flat[0], list):
        rows: list[Any] = [data]
        for dimension in shape:
            if set(map(type, rows)) - {list} or set(map(len, rows)) - {dimension}:
                raise BadRequest(f"{param} is not nested like the shape.", param=param)
            rows = list(itertools.chain.from_iterable(rows))
        flat = rows
    if len(flat) != size:
        raise BadRequest(f"{param} has {len(flat)} elements, the shape {size}.", param=param)
    return _elements(flat, datatype, param).reshape(shape)


def _elements(flat: list[Any], datatype: str, param: str) -> NDArray[Any]:
    dtype = DTYPES[datatype]
    takes: tuple[set[type], str]
    if datatype == "BYTES":
        takes = {str}, "strings"
    elif datatype == "BOOL":
        takes = {bool}, "true or false"
    elif dtype.kind == "f":
        takes = {int, float}, "numbers"
    else:
        limits = np.iinfo(dtype)
        takes = {int}, f"whole numbers from {limits.min} to {limits.max}"
    types, wanted = takes

    def wrong(index: int) -> BadRequest:
        given = shown(flat[index])
        return BadRequest(f"{param}[{index}] is {given}: {datatype} takes {wanted}.", param=param)

    if set(map(type, flat)) - types:
        raise wrong(next(i for i, value in enumerate(flat) if type(value) not in types))
    if datatype == "BYTES":
        elements = np.empty(len(flat), dtype=object)
        elements[:] = [value.encode() for value in flat]
        return elements
    if dtype.kind == "f":
        return _floats(flat, dtype, datatype, param)
    if dtype.kind != "b" and flat and not limits.min <= min(flat) <= max(flat) <= limits.max:
        raise wrong(next(i for i, v in enumerate(flat) if not limits.min <= v <= limits.max))
    return np.array(flat, dtype=dtype)


def _floats(flat: list[Any], dtype: np.dtype[Any], datatype: str, param: str) -> NDArray[Any]:
    try:
        with np.errstate(over="ignore"):
            floats = np.array(flat, dtype=np.float64).astype(dtype)
    except OverflowError:  # an integer of hundreds of digits
        floats = np.array([math.inf])
    if not np.isfinite(floats).all():
        raise BadRequest(f"{param} holds a number too large for {datatype}.", param=param)
    return floats


def to_json(array: NDArray[Any], datatype: str, name: str) -> list[Any]:
    """A flat list. JSON has no NaN or Infinity: null says that there is no number.

    Raises:
        BadRequest: BYTES that are no text, which only go as binary data.
    """
    if datatype == "BYTES":
        try:
            return [_as_bytes(element).decode() for element in array.ravel()]
        except UnicodeDecodeError:
            raise BadRequest(
                f"Output {name} is not UTF-8 text: ask for it with binary_data: true.",
                param="outputs",
            ) from None
    flat: list[Any] = array.ravel().tolist()
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        return [value if math.isfinite(value) else None for value in flat]
    return flat


def as_declared(array: NDArray[Any], datatype: str, name: str) -> NDArray[Any]:
    """An engine's answer in the type that it declared.

    Raises:
        EngineFailed: it is of another kind.
    """
    dtype = DTYPES[datatype]
    fits = array.dtype.kind in "OSU" if dtype.kind == "O" else array.dtype.kind != "O"
    if not fits or not np.can_cast(array.dtype, dtype, "same_kind"):
        raise EngineFailed(
            f"The model declares its output {name} as {datatype} and answered {array.dtype}."
        )
    return array if dtype.kind == "O" else array.astype(dtype, copy=False)
