"""The Open Inference Protocol v2 over HTTP: JSON and binary tensors, and the generate extension.

Whatever a body says about sizes is checked in Python's integers before anything is allocated.
Specification: kserve/open-inference-protocol, with Triton's binary data extension.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from nearfield.api.events import (
    Embedded,
    EmbedRequest,
    GenerateRequest,
    Inferred,
    Request,
    Sampling,
    TensorRequest,
)
from nearfield.api.json_body import load_json
from nearfield.core.errors import BadRequest, NearfieldError, UpstreamFailed
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
    "BF16": np.dtype("<f4"),  # numpy has none: widened on the way in, cut on the way out
    "BYTES": np.dtype(object),
}
WIRE_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()} | {"BF16": 2}

MAX_TENSORS = 256
MAX_DIMENSIONS = 16
MAX_DIMENSION = 2**31 - 1
MAX_ELEMENTS = 64 * 2**20
MAX_NAME_CHARACTERS = 256

TEXT_INPUT = "text_input"
TEXT_OUTPUT = "text_output"
EMBEDDING = "embedding"


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


TEXT_INPUTS = (Declared(TEXT_INPUT, "BYTES", (-1,)),)
TEXT_OUTPUTS = (Declared(TEXT_OUTPUT, "BYTES", (-1,)),)


@dataclass(frozen=True, slots=True)
class InferCall:
    """A parsed `infer` body. `binary`: outputs wanted as binary data, by name."""

    id: str | None
    inputs: dict[str, NDArray[Any]]
    outputs: tuple[str, ...]
    parameters: dict[str, Any] = field(default_factory=dict)
    binary: frozenset[str] = frozenset()
    binary_by_default: bool = False

    def request(self) -> TensorRequest:
        return TensorRequest(self.inputs, self.outputs, self.parameters)


# ---- infer: in ---------------------------------------------------------------------------------


def parse_infer(
    body: bytes,
    header_length: int | None,
    inputs: Sequence[Metadata],
    outputs: Sequence[Metadata],
    *,
    max_elements: int = MAX_ELEMENTS,
) -> InferCall:
    """`POST /v2/models/{model}/infer`.

    Args:
        header_length: `Inference-Header-Content-Length`; the JSON's length where binary data
            follows it, None where there is none.
        inputs, outputs: as the model declares them.

    Raises:
        BadRequest: the message names the tensor and what is wrong with it.
    """
    if header_length is None:
        header_length = len(body)
    if not 0 < header_length <= len(body):
        raise BadRequest(
            f"inference-header-content-length is {header_length}, the body {len(body)} bytes.",
            param="inference-header-content-length",
        )
    document = _object(load_json(body[:header_length]), "The body")
    _known(document, {"id", "parameters", "inputs", "outputs"}, "")
    parameters = _parameters(document, "parameters")
    declared = {tensor.name: tensor for tensor in inputs}
    binary = _Binary(memoryview(body)[header_length:])
    arrays: dict[str, NDArray[Any]] = {}
    left = max_elements
    for index, item in enumerate(_list(document.get("inputs"), "inputs")):
        where = f"inputs[{index}]"
        name, array = _input(item, where, declared, binary, left)
        if name in arrays:
            raise BadRequest(f"{where}: {name} is given twice.", param=where)
        arrays[name] = array
        left -= array.size
    if missing := sorted(declared.keys() - arrays.keys()):
        raise BadRequest(f"Missing inputs: {', '.join(missing)}.", param="inputs")
    binary.all_taken()
    wanted, as_binary = _outputs(document, {tensor.name for tensor in outputs})
    return InferCall(
        _identity(document),
        arrays,
        wanted,
        parameters,
        as_binary,
        bool(parameters.get("binary_data_output", False)),
    )


def _input(
    item: Any, where: str, declared: Mapping[str, Metadata], binary: _Binary, max_elements: int
) -> tuple[str, NDArray[Any]]:
    tensor = _object(item, where)
    _known(tensor, {"name", "shape", "datatype", "parameters", "data"}, where)
    name = _name(tensor, where)
    if name not in declared:
        known = ", ".join(sorted(declared)) or "none"
        raise BadRequest(f"{where}: the model has no input {name!r}; it has {known}.", param=where)
    datatype = tensor.get("datatype")
    if datatype != declared[name].datatype:
        raise BadRequest(
            f"{where}: {name} is {declared[name].datatype}, not {str(datatype)[:32]}.",
            param=f"{where}.datatype",
        )
    shape, size = _shape(tensor.get("shape"), f"{where}.shape", max_elements)
    _fits(shape, declared[name], f"{where}.shape")
    parameters = _parameters(tensor, f"{where}.parameters")
    length = parameters.get("binary_data_size")
    if length is not None:
        if "data" in tensor:
            raise BadRequest(f"{where}: give data or binary_data_size, not both.", param=where)
        raw = binary.take(length, f"{where}.parameters.binary_data_size")
        return name, _from_binary(raw, datatype, size, where).reshape(shape)
    if "data" not in tensor:
        raise BadRequest(f"{where}: {name} has no data.", param=f"{where}.data")
    return name, _from_json(tensor["data"], datatype, shape, size, f"{where}.data")


class _Binary:
    """The bytes behind the JSON, handed out in order."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    def take(self, length: Any, param: str) -> memoryview:
        if not _is_int(length) or length < 0:
            raise BadRequest(f"{param} must be a number of bytes.", param=param)
        end = self._at + length
        if end > len(self._data):
            raise BadRequest(
                f"{param} is {length}, but only {len(self._data) - self._at} bytes are left.",
                param=param,
            )
        taken, self._at = self._data[self._at : end], end
        return taken

    def all_taken(self) -> None:
        left = len(self._data) - self._at
        if left:
            raise BadRequest(f"{left} bytes of binary data belong to no input.", param="inputs")


def _from_binary(raw: memoryview, datatype: str, size: int, where: str) -> NDArray[Any]:
    param = f"{where}.parameters.binary_data_size"
    if datatype == "BYTES":
        return _bytes_elements(raw, size, param)
    if len(raw) != size * WIRE_BYTES[datatype]:
        raise BadRequest(
            f"{where}: the shape has {size} elements of {WIRE_BYTES[datatype]} bytes, the data "
            f"{len(raw)} bytes.",
            param=param,
        )
    if datatype == "BF16":
        widened: NDArray[Any] = np.frombuffer(raw, "<u2").astype("<u4") << 16
        floats: NDArray[Any] = widened.view("<f4")
        return floats
    if datatype == "BOOL":
        flags: NDArray[Any] = np.frombuffer(raw, np.uint8) != 0
        return flags
    return np.frombuffer(raw, DTYPES[datatype])


def _bytes_elements(raw: memoryview, size: int, param: str) -> NDArray[Any]:
    """Elements that each begin with their length, 4 bytes little-endian."""
    if size * 4 > len(raw):
        raise BadRequest(f"{param}: {size} elements do not fit {len(raw)} bytes.", param=param)
    elements = np.empty(size, dtype=object)
    at = 0
    for index in range(size):
        if at + 4 > len(raw):
            raise BadRequest(f"{param}: the data ends before element {index}.", param=param)
        (length,) = struct.unpack_from("<I", raw, at)
        at += 4
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


def _from_json(
    data: Any, datatype: str, shape: tuple[int, ...], size: int, param: str
) -> NDArray[Any]:
    """Data as a flat list or nested like the shape."""
    if not isinstance(data, list):
        raise BadRequest(f"{param} must be a list.", param=param)
    flat = data
    if flat and isinstance(flat[0], list):
        rows: list[Any] = [data]
        for dimension in shape:
            if any(not isinstance(row, list) or len(row) != dimension for row in rows):
                raise BadRequest(f"{param} is not nested like the shape.", param=param)
            rows = [element for row in rows for element in row]
        flat = rows
    if len(flat) != size:
        raise BadRequest(f"{param} has {len(flat)} elements, the shape {size}.", param=param)
    return _elements(flat, datatype, param).reshape(shape)


def _elements(flat: list[Any], datatype: str, param: str) -> NDArray[Any]:
    def wrong(index: int, wanted: str) -> BadRequest:
        shown = repr(flat[index])[:40]
        return BadRequest(f"{param}[{index}] is {shown}: {datatype} takes {wanted}.", param=param)

    dtype = DTYPES[datatype]
    if datatype == "BYTES":
        elements = np.empty(len(flat), dtype=object)
        for index, value in enumerate(flat):
            if not isinstance(value, str):
                raise wrong(index, "strings")
            elements[index] = value.encode()
        return elements
    if datatype == "BOOL":
        for index, value in enumerate(flat):
            if not isinstance(value, bool):
                raise wrong(index, "true or false")
        return np.array(flat, dtype=dtype)
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        low, high = int(limits.min), int(limits.max)
        for index, value in enumerate(flat):
            if not _is_int(value) or not low <= value <= high:
                raise wrong(index, f"whole numbers from {low} to {high}")
        return np.array(flat, dtype=dtype)
    for index, value in enumerate(flat):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong(index, "numbers")
    try:
        with np.errstate(over="raise"):
            return np.array(flat, dtype=np.float64).astype(dtype)
    except (OverflowError, FloatingPointError):
        raise BadRequest(f"{param} holds a number too large for {datatype}.", param=param) from None


def _shape(value: Any, param: str, max_elements: int) -> tuple[tuple[int, ...], int]:
    """A shape and its number of elements, in Python's integers. A dimension may be 0."""
    dimensions = _list(value, param, MAX_DIMENSIONS)
    size = 1
    for dimension in dimensions:
        if not _is_int(dimension) or not 0 <= dimension <= MAX_DIMENSION:
            raise BadRequest(
                f"{param}: dimension {str(dimension)[:40]} must be a whole number from 0 to "
                f"{MAX_DIMENSION}.",
                param=param,
            )
        size *= dimension
    if size > max_elements:
        raise BadRequest(
            f"{param}: {size} elements are more than the {max_elements} that fit.", param=param
        )
    return tuple(dimensions), size


def _fits(shape: tuple[int, ...], declared: Metadata, param: str) -> None:
    same = len(shape) == len(declared.shape)
    if not same or any(d not in (-1, s) for s, d in zip(shape, declared.shape, strict=True)):
        raise BadRequest(
            f"{param} is {list(shape)}; {declared.name} takes {list(declared.shape)} "
            "(-1: any size).",
            param=param,
        )


def _outputs(
    document: Mapping[str, Any], known: set[str]
) -> tuple[tuple[str, ...], frozenset[str]]:
    if "outputs" not in document:
        return (), frozenset()
    wanted: list[str] = []
    binary: set[str] = set()
    default = _parameters(document, "parameters").get("binary_data_output", False)
    for index, item in enumerate(_list(document["outputs"], "outputs")):
        where = f"outputs[{index}]"
        output = _object(item, where)
        _known(output, {"name", "parameters"}, where)
        name = _name(output, where)
        if name not in known:
            raise BadRequest(
                f"{where}: the model has no output {name!r}; it has {', '.join(sorted(known))}.",
                param=where,
            )
        if name in wanted:
            raise BadRequest(f"{where}: {name} is asked for twice.", param=where)
        wanted.append(name)
        parameters = _parameters(output, f"{where}.parameters")
        if "classification" in parameters:
            raise BadRequest(
                f"{where}: classification is not supported here.",
                param=f"{where}.parameters.classification",
            )
        if parameters.get("binary_data", default):
            binary.add(name)
    return tuple(wanted), frozenset(binary)


# ---- infer: out --------------------------------------------------------------------------------


def render_infer(
    call: InferCall,
    model: str,
    version: str,
    outputs: Sequence[Metadata],
    answer: Inferred,
) -> tuple[bytes, int | None]:
    """(body, length of its JSON part where binary data follows, else None).

    Raises:
        ValueError: the engine answered with a tensor it did not declare.
    """
    datatypes = {tensor.name: tensor.datatype for tensor in outputs}
    tail: list[bytes] = []
    rendered: list[dict[str, Any]] = []
    for name, array in answer.outputs.items():
        if name not in datatypes:
            raise ValueError(f"undeclared output {name!r}")
        entry: dict[str, Any] = {
            "name": name,
            "datatype": datatypes[name],
            "shape": list(array.shape),
        }
        if name in call.binary or (not call.outputs and call.binary_by_default):
            raw = to_binary(array, datatypes[name])
            entry["parameters"] = {"binary_data_size": len(raw)}
            tail.append(raw)
        else:
            entry["data"] = _to_json(array, datatypes[name])
        rendered.append(entry)
    document: dict[str, Any] = {"model_name": model, "model_version": version}
    if call.id is not None:
        document["id"] = call.id
    head = json.dumps(document | {"outputs": rendered}, allow_nan=False).encode()
    if not tail:
        return head, None
    return b"".join([head, *tail]), len(head)


def to_binary(array: NDArray[Any], datatype: str) -> bytes:
    """A tensor's bytes as the binary extension has them, row-major."""
    if datatype == "BYTES":
        parts: list[bytes] = []
        for element in array.ravel():
            raw = element if isinstance(element, bytes) else str(element).encode()
            parts += (struct.pack("<I", len(raw)), raw)
        return b"".join(parts)
    if datatype == "BF16":
        bits = np.ascontiguousarray(array, "<f4").view("<u4")
        # Round to nearest, ties to even, as hardware does.
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        nan = np.isnan(array)
        return np.where(nan, 0x7FC0, rounded >> 16).astype("<u2").tobytes()
    return np.ascontiguousarray(array, DTYPES[datatype]).tobytes()


def _to_json(array: NDArray[Any], datatype: str) -> list[Any]:
    if datatype == "BYTES":
        elements = array.ravel()
        return [e.decode(errors="replace") if isinstance(e, bytes) else str(e) for e in elements]
    flat: list[Any] = array.ravel().tolist()
    if DTYPES[datatype].kind == "f" and not np.isfinite(array).all():
        # JSON has no NaN or Infinity: null says that there is no number.
        flat = [value if math.isfinite(value) else None for value in flat]
    return flat


# ---- the client's side: for upstreams ---------------------------------------------------------


def render_request(request: TensorRequest) -> tuple[bytes, int]:
    """(body, length of its JSON part) of an `infer` call, all tensors binary."""
    tail: list[bytes] = []
    inputs: list[dict[str, Any]] = []
    for name, array in request.inputs.items():
        datatype = next(key for key, dtype in DTYPES.items() if dtype == array.dtype)
        raw = to_binary(array, datatype)
        tail.append(raw)
        parameters = {"binary_data_size": len(raw)}
        described = {"name": name, "datatype": datatype, "shape": list(array.shape)}
        inputs.append(described | {"parameters": parameters})
    document: dict[str, Any] = {"inputs": inputs, "parameters": {"binary_data_output": True}}
    if request.outputs:
        wanted = {"binary_data": True}
        document["outputs"] = [{"name": n, "parameters": wanted} for n in request.outputs]
    head = json.dumps(document).encode()
    return b"".join([head, *tail]), len(head)


def parse_response(body: bytes, header_length: int | None) -> dict[str, NDArray[Any]]:
    """The outputs of an `infer` answer by name.

    Raises:
        UpstreamFailed: it is not one.
    """
    try:
        document = _object(load_json(body[:header_length]), "The answer")
        binary = _Binary(memoryview(body)[header_length or len(body) :])
        arrays: dict[str, NDArray[Any]] = {}
        for index, item in enumerate(_list(document.get("outputs"), "outputs")):
            where = f"outputs[{index}]"
            tensor = _object(item, where)
            datatype = str(tensor.get("datatype"))
            if datatype not in DTYPES:
                raise BadRequest(f"{where}: unknown datatype {datatype[:32]}.")
            shape, size = _shape(tensor.get("shape"), where, MAX_ELEMENTS)
            length = _parameters(tensor, where).get("binary_data_size")
            if length is None:
                array = _from_json(tensor.get("data"), datatype, shape, size, where)
            else:
                array = _from_binary(binary.take(length, where), datatype, size, where)
            arrays[_name(tensor, where)] = array.reshape(shape)
        return arrays
    except BadRequest as error:
        raise UpstreamFailed(f"Upstream's answer cannot be read: {error.message}") from error


# ---- metadata and health -----------------------------------------------------------------------


def server_metadata(version: str) -> dict[str, Any]:
    return {
        "name": "nearfield",
        "version": version,
        "extensions": ["binary_tensor_data", "generate"],
    }


def model_metadata(
    model: str,
    version: str,
    platform: str,
    inputs: Sequence[Metadata],
    outputs: Sequence[Metadata],
) -> dict[str, Any]:
    def shown(tensors: Sequence[Metadata]) -> list[dict[str, Any]]:
        return [{"name": t.name, "datatype": t.datatype, "shape": list(t.shape)} for t in tensors]

    return {
        "name": model,
        "versions": [version],
        "platform": platform,
        "inputs": shown(inputs),
        "outputs": shown(outputs),
    }


def error_body(error: NearfieldError) -> dict[str, Any]:
    return {"error": error.message}


# ---- text models behind infer, and the generate extension --------------------------------------

_SAMPLING: dict[str, tuple[type, ...]] = {
    "max_tokens": (int,),
    "temperature": (int, float),
    "top_p": (int, float),
    "top_k": (int,),
    "min_p": (int, float),
    "seed": (int,),
    "presence_penalty": (int, float),
    "frequency_penalty": (int, float),
    "repetition_penalty": (int, float),
    "ignore_eos": (bool,),
}
_BOUNDS: dict[str, tuple[float, float]] = {
    "max_tokens": (1, 2**31),
    "temperature": (0, 2),
    "top_p": (1e-9, 1),
    "top_k": (0, 2**31),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (1e-9, 10),
    "seed": (-(2**63), 2**63 - 1),
}


def sampling_parameters(parameters: Mapping[str, Any], where: str = "parameters") -> Sampling:
    """Sampling from a `parameters` object (names as in OpenAI's API, and `stop`).

    Raises:
        BadRequest: an unknown one, or a value out of bounds.
    """
    chosen: dict[str, Any] = {}
    value: Any
    for name, value in parameters.items():
        param = f"{where}.{name}"[:200]
        if name == "stop":
            stops = [value] if isinstance(value, str) else value
            good = isinstance(stops, list) and len(stops) <= 16
            if not good or not all(isinstance(s, str) and s for s in stops):
                raise BadRequest(f"{param} takes a string or up to 16.", param=param)
            chosen["stop"] = tuple(stops)
            continue
        if name not in _SAMPLING:
            raise BadRequest(
                f"Unknown parameter {param}; known: {', '.join([*_SAMPLING, 'stop'])}.", param=param
            )
        wanted = _SAMPLING[name]
        if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
            raise BadRequest(f"{param} must be a {wanted[-1].__name__}.", param=param)
        low, high = _BOUNDS.get(name, (0, 1))
        number: Any = value
        if not low <= number <= high:
            raise BadRequest(f"{param} is {value}: from {low:g} to {high:g}.", param=param)
        chosen[name] = value
    return Sampling(**chosen)


def parse_generate(body: bytes, *, chat: bool) -> GenerateRequest:
    """`POST /v2/models/{model}/generate` and `generate_stream`.

    `text_input` is the user's message for a model with a chat template, else the prompt.

    Raises:
        BadRequest: `param` is the field at fault.
    """
    document = _object(load_json(body), "The body")
    _known(document, {"text_input", "parameters", "id"}, "")
    _identity(document)
    text = document.get(TEXT_INPUT)
    if not isinstance(text, str):
        raise BadRequest("text_input must be a string.", param=TEXT_INPUT)
    return text_request(text, sampling_parameters(_parameters(document, "parameters")), chat=chat)


def text_request(text: str, sampling: Sampling, *, chat: bool) -> GenerateRequest:
    if chat:
        return GenerateRequest(messages=({"role": "user", "content": text},), sampling=sampling)
    return GenerateRequest(prompt=text, sampling=sampling)


def to_text_requests(call: InferCall, task: str, *, chat: bool) -> tuple[Request, ...]:
    """What `infer` on a text model asks: one generation per element, or one embedding of all.

    Raises:
        BadRequest: bytes that are not UTF-8, no element, or too many.
    """
    texts: list[str] = []
    for index, element in enumerate(call.inputs[TEXT_INPUT].ravel()):
        try:
            texts.append(element.decode())
        except UnicodeDecodeError:
            raise BadRequest(
                f"{TEXT_INPUT}[{index}] is not valid UTF-8.", param=TEXT_INPUT
            ) from None
    limit = 2048 if task == "embed" else 128
    if not 0 < len(texts) <= limit:
        raise BadRequest(f"{TEXT_INPUT} takes 1 to {limit} elements.", param=TEXT_INPUT)
    own = {k: v for k, v in call.parameters.items() if k != "binary_data_output"}
    if task == "embed":
        if own:
            raise BadRequest(f"Unknown parameter {next(iter(own))}.", param="parameters")
        return (EmbedRequest(tuple(texts)),)
    sampling = sampling_parameters(own)
    return tuple(text_request(text, sampling, chat=chat) for text in texts)


def text_tensor(texts: Sequence[str]) -> NDArray[Any]:
    array = np.empty(len(texts), dtype=object)
    array[:] = [text.encode() for text in texts]
    return array


def embedding_outputs(dimensions: int) -> tuple[Declared, ...]:
    return (Declared(EMBEDDING, "FP32", (-1, dimensions)),)


def embedded_to_inferred(answer: Embedded) -> Inferred:
    return Inferred({EMBEDDING: answer.vectors}, answer.timings)


# ---- small checks ------------------------------------------------------------------------------


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRequest(f"{where} must be a JSON object.", param=None if " " in where else where)
    return value


def _list(value: Any, param: str, limit: int = MAX_TENSORS) -> list[Any]:
    if not isinstance(value, list):
        raise BadRequest(f"{param} must be a list.", param=param)
    if len(value) > limit:
        raise BadRequest(f"{param} has {len(value)} entries; at most {limit}.", param=param)
    return value


def _name(tensor: Mapping[str, Any], where: str) -> str:
    name = tensor.get("name")
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARACTERS:
        raise BadRequest(f"{where}.name must be a string.", param=f"{where}.name")
    return name


def _known(document: Mapping[str, Any], fields: set[str], where: str) -> None:
    for name in document:
        if name not in fields:
            param = (f"{where}.{name}" if where else name)[:200]
            raise BadRequest(f"Unknown field {param}.", param=param, code="unknown_parameter")


def _identity(document: Mapping[str, Any]) -> str | None:
    identity = document.get("id")
    if identity is not None and not isinstance(identity, str):
        raise BadRequest("id must be a string.", param="id")
    return identity


def _parameters(document: Mapping[str, Any], param: str) -> dict[str, Any]:
    parameters = document.get("parameters", {})
    if not isinstance(parameters, dict):
        raise BadRequest(f"{param} must be a JSON object.", param=param)
    for name in parameters:
        if name.startswith("shared_memory"):
            raise BadRequest(
                f"{param}.{name}: shared memory is not supported; send the data.", param=param
            )
    return parameters
