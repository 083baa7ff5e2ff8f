"""`ModelInfer` between gRPC's messages and the HTTP form of the same protocol.

A request becomes JSON with all tensors behind it as binary data, which is what a replica reads
fastest; its outputs come back the same way. No element is looked at where that can be avoided:
raw contents and floats pass as they are.

Whatever a message says about sizes is checked before it is parsed: a message of two-byte empty
tensors takes forty times its size in memory.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from nearfield.api import oip_bounds
from nearfield.core.errors import BadRequest, UpstreamFailed
from nearfield.edge.oip_messages import ModelInferResponse

MAX_PARAMETERS = 64
"""Of a call, of an input, or of an output."""
MAX_TYPED_ELEMENTS = 2**18
"""Whole numbers and BYTES in typed contents are copied one by one, 0.1 to 0.3 µs each, and all
others wait: more have to come raw. Floats and booleans are not counted."""

_MAX_FIELDS = 4096
"""In one message and its tensors: each costs a look before it is parsed."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_INPUTS, _OUTPUTS, _RAW = 5, 6, 7
_SHAPE = 3
_VARINT_BYTES = 10
_MAX_SHAPE_BYTES = oip_bounds.MAX_DIMENSIONS * _VARINT_BYTES

_FLOATS = {"FP32": ("fp32_contents", b"\x32"), "FP64": ("fp64_contents", b"\x3a")}
"""Datatypes whose packed contents are their binary data: the field, and its tag."""
_BOOLEANS = ("bool_contents", b"\x0a")
_INTEGERS = {
    "INT8": ("int_contents", "b"),
    "INT16": ("int_contents", "h"),
    "INT32": ("int_contents", "i"),
    "INT64": ("int64_contents", "q"),
    "UINT8": ("uint_contents", "B"),
    "UINT16": ("uint_contents", "H"),
    "UINT32": ("uint_contents", "I"),
    "UINT64": ("uint64_contents", "Q"),
}
"""The field, and how `array` stores them."""
_BINARY_PARAMETERS = ("binary_data", "binary_data_size", "binary_data_output")

_encode = msgspec.json.Encoder().encode


# ---- before a message is parsed ----------------------------------------------------------------


def check_size(message: bytes) -> None:
    """Refuse a `ModelInferRequest` of more parts than one may have.

    Raises:
        BadRequest: it has, or it is not protobuf.
    """
    left = _MAX_FIELDS
    counts = {_INPUTS: 0, _OUTPUTS: 0, _RAW: 0}
    view = memoryview(message)
    for number, value in _walk(view):
        left -= 1
        if number in counts:
            counts[number] += 1
            if counts[number] > oip_bounds.MAX_TENSORS:
                raise _too_many(f"more than {oip_bounds.MAX_TENSORS} tensors")
        if number in (_INPUTS, _OUTPUTS) and value is not None:
            for inner, packed in _walk(value):
                left -= 1
                if inner == _SHAPE and packed is not None and len(packed) > _MAX_SHAPE_BYTES:
                    raise _too_many("a shape of too many dimensions")
                if left < 0:
                    break
        if left < 0:
            raise _too_many(f"more than {_MAX_FIELDS} fields")


def _walk(view: memoryview) -> Iterator[tuple[int, memoryview | None]]:
    """The fields of one message: number, and the value where that has a length."""
    at, end = 0, len(view)
    while at < end:
        tag, at = _varint(view, at)
        kind = tag & 7
        if kind == _VARINT:
            _, at = _varint(view, at)
        elif kind == _BYTES:
            length, at = _varint(view, at)
            if length > end - at:
                raise _not_protobuf()
            yield tag >> 3, view[at : at + length]
            at += length
            continue
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:
            raise _not_protobuf()  # groups, which this protocol has none of
        yield tag >> 3, None
    if at > end:
        raise _not_protobuf()


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(view) and shift < 7 * _VARINT_BYTES:
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise _not_protobuf()


def _not_protobuf() -> BadRequest:
    return BadRequest("The message is not a ModelInferRequest.")


def _too_many(what: str) -> BadRequest:
    return BadRequest(f"The message has {what}.")


# ---- the request -------------------------------------------------------------------------------


def to_http(message: Any, max_bytes: int) -> tuple[bytes, int]:
    """(body, length of its JSON part) of a `ModelInferRequest`.

    Raises:
        BadRequest: `param` is the field at fault.
    """
    raw = message.raw_input_contents
    count = len(message.inputs)
    if len(raw) not in (0, count):
        raise BadRequest(
            f"raw_input_contents has {len(raw)} entries, inputs {count}: give one for each, or "
            "none.",
            param="raw_input_contents",
        )
    inputs: list[dict[str, Any]] = []
    tail: list[bytes | memoryview] = []
    left_elements, left_bytes = oip_bounds.MAX_ELEMENTS, max_bytes
    left_typed = MAX_TYPED_ELEMENTS
    for index, tensor in enumerate(message.inputs):
        where = f"inputs[{index}]"
        parameters = _parameters(tensor.parameters, f"{where}.parameters")
        datatype, (shape, size) = _described(tensor, where, left_elements)
        left_elements -= size
        if raw:
            if tensor.contents.ListFields():
                raise BadRequest(
                    f"{where}: give contents or raw_input_contents, not both.", param=where
                )
            data: bytes | memoryview = raw[index]
            oip_bounds.check_length(datatype, size, len(data), f"raw_input_contents[{index}]")
        else:
            if datatype in _INTEGERS or datatype == oip_bounds.BYTES:
                left_typed -= size
                if left_typed < 0:
                    raise BadRequest(
                        f"contents hold more than {MAX_TYPED_ELEMENTS} elements: send "
                        "raw_input_contents.",
                        param=f"{where}.contents",
                    )
            data = _typed(tensor.contents, datatype, size, f"{where}.contents")
        left_bytes -= len(data)
        if left_bytes < 0:
            raise BadRequest(f"The inputs are larger than {max_bytes} bytes.", param="inputs")
        tail.append(data)
        inputs.append(
            {
                "name": _name(tensor.name, where),
                "shape": shape,
                "datatype": datatype,
                "parameters": parameters | {"binary_data_size": len(data)},
            }
        )
    own = _parameters(message.parameters, "parameters")
    document: dict[str, Any] = {"parameters": own | {"binary_data_output": True}, "inputs": inputs}
    if message.id:
        document["id"] = message.id
    if message.outputs:
        document["outputs"] = [
            {
                "name": _name(output.name, f"outputs[{index}]"),
                "parameters": _parameters(output.parameters, f"outputs[{index}].parameters")
                | {"binary_data": True},
            }
            for index, output in enumerate(message.outputs)
        ]
    head = _encode(document)
    return b"".join([head, *tail]), len(head)


def _described(
    tensor: Any, where: str, max_elements: int
) -> tuple[str, tuple[tuple[int, ...], int]]:
    datatype: str = tensor.datatype
    if datatype not in oip_bounds.WIRE_BYTES and datatype != oip_bounds.BYTES:
        known = ", ".join([*oip_bounds.WIRE_BYTES, oip_bounds.BYTES])
        raise BadRequest(f"{where}.datatype must be one of {known}.", param=f"{where}.datatype")
    return datatype, oip_bounds.read_shape(list(tensor.shape), f"{where}.shape", max_elements)


def _name(name: str, where: str) -> str:
    if not 0 < len(name) <= oip_bounds.MAX_NAME_CHARACTERS:
        raise BadRequest(
            f"{where}.name must have 1 to {oip_bounds.MAX_NAME_CHARACTERS} characters.",
            param=f"{where}.name",
        )
    return name


def _parameters(given: Mapping[str, Any], param: str) -> dict[str, Any]:
    """In the order of their names: a message that is sent again has to be the same request."""
    if len(given) > MAX_PARAMETERS:
        raise BadRequest(f"{param} has more than {MAX_PARAMETERS} entries.", param=param)
    parameters: dict[str, Any] = {}
    for name in sorted(given):
        if name.startswith("shared_memory"):
            raise BadRequest(
                f"{param}: shared memory is not supported; send the data.", param=param
            )
        if name in _BINARY_PARAMETERS:
            raise BadRequest(f"{param}: {name} has no meaning over gRPC.", param=param)
        choice = given[name].WhichOneof("parameter_choice")
        parameters[name] = None if choice is None else getattr(given[name], choice)
    return parameters


def _typed(contents: Any, datatype: str, size: int, param: str) -> bytes | memoryview:
    """Typed contents as binary data."""
    if datatype == oip_bounds.BYTES:
        field = "bytes_contents"
    elif datatype in _INTEGERS:
        field = _INTEGERS[datatype][0]
    elif datatype == "BOOL":
        field = _BOOLEANS[0]
    elif datatype in _FLOATS:
        field = _FLOATS[datatype][0]
    else:
        raise BadRequest(f"{param}: {datatype} goes in raw_input_contents only.", param=param)
    given = [descriptor.name for descriptor, _ in contents.ListFields()]
    if given not in ([], [field]):
        raise BadRequest(f"{param}: {datatype} goes in {field} alone.", param=param)
    values = getattr(contents, field)
    if len(values) != size:
        raise BadRequest(f"{param} has {len(values)} elements, the shape {size}.", param=param)
    if datatype == oip_bounds.BYTES:
        return _lengths_first(values)
    if datatype == "BOOL":
        return _packed(contents, _BOOLEANS[1], size)
    if datatype in _FLOATS:
        return _packed(contents, _FLOATS[datatype][1], size * oip_bounds.WIRE_BYTES[datatype])
    try:
        return array(_INTEGERS[datatype][1], values).tobytes()
    except OverflowError:
        raise BadRequest(f"{param} has a number that is no {datatype}.", param=param) from None


def _packed(contents: Any, tag: bytes, length: int) -> memoryview:
    """The one field of `contents` as the wire has it: dense, and little-endian."""
    if length == 0:
        return memoryview(b"")
    wire = memoryview(contents.SerializeToString())
    said, at = _varint(wire, len(tag))
    assert (bytes(wire[: len(tag)]), said) == (tag, length), "packed as protobuf packs it"
    return wire[at : at + length]


def _lengths_first(values: Any) -> bytes:
    parts: list[bytes] = []
    for value in values:
        parts += (len(value).to_bytes(oip_bounds.BYTES_LENGTH_BYTES, "little"), value)
    return b"".join(parts)


# ---- the answer --------------------------------------------------------------------------------


class _Output(msgspec.Struct):
    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] = {}


class _Answer(msgspec.Struct):
    outputs: list[_Output]
    model_name: str = ""
    model_version: str = ""
    id: str = ""
    parameters: dict[str, Any] = {}


_decode = msgspec.json.Decoder(_Answer).decode


def from_http(body: bytes, header_length: int | None) -> Any:
    """The `ModelInferResponse` that a replica's answer is.

    Raises:
        UpstreamFailed: it is none.
    """
    length = len(body) if header_length is None else header_length
    try:
        answer = _decode(memoryview(body)[:length])
        return _response(answer, memoryview(body)[length:])
    except (msgspec.MsgspecError, BadRequest, ValueError, TypeError) as error:
        raise UpstreamFailed("The replica's answer cannot be read.") from error


def _response(answer: _Answer, data: memoryview) -> Any:
    response = ModelInferResponse(
        model_name=answer.model_name, model_version=answer.model_version, id=answer.id
    )
    _put_parameters(response.parameters, answer.parameters)
    if len(answer.outputs) > oip_bounds.MAX_TENSORS:
        raise ValueError("too many outputs")
    at = 0
    for output in answer.outputs:
        length = output.parameters.pop("binary_data_size", None)
        if not oip_bounds.is_int(length) or not 0 <= length <= len(data) - at:
            raise ValueError("an output is not binary data, or not as long as it says")
        shape, size = oip_bounds.read_shape(output.shape, output.name, oip_bounds.MAX_ELEMENTS)
        if output.datatype not in oip_bounds.WIRE_BYTES and output.datatype != oip_bounds.BYTES:
            raise ValueError("an output of an unknown datatype")
        oip_bounds.check_length(output.datatype, size, length, output.name)
        tensor = response.outputs.add(name=output.name, datatype=output.datatype, shape=shape)
        _put_parameters(tensor.parameters, output.parameters)
        response.raw_output_contents.append(bytes(data[at : at + length]))
        at += length
    if at != len(data):
        raise ValueError("data that belongs to no output")
    return response


def _put_parameters(into: Any, parameters: Mapping[str, Any]) -> None:
    for name, value in parameters.items():
        if isinstance(value, bool):
            into[name].bool_param = value
        elif isinstance(value, int):
            into[name].int64_param = value
        elif isinstance(value, float):
            into[name].double_param = value
        elif isinstance(value, str):
            into[name].string_param = value
