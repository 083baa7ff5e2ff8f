"""The Open Inference Protocol v2 over HTTP: infer, metadata, and the generate extension.

Specification: kserve/open-inference-protocol, with Triton's binary data extension. What is said
here of tensors themselves is in `oip_tensors`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from nearfield.api.error_bodies import oip_error as error_body
from nearfield.api.error_bodies import oip_error_event as error_event
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
from nearfield.api.oip_bounds import (
    MAX_ELEMENTS,
    MAX_NAME_CHARACTERS,
    MAX_TENSORS,
    read_shape,
    shown,
)
from nearfield.api.oip_tensors import (
    DTYPES,
    BinaryData,
    Declared,
    Metadata,
    as_declared,
    check_fits,
    from_binary,
    from_json,
    to_binary,
    to_json,
)
from nearfield.api.openai_answers import dump
from nearfield.api.openai_types import GenerateParameters
from nearfield.api.validation import validate
from nearfield.core.errors import BadRequest, EngineFailed, UpstreamFailed
from numpy.typing import NDArray

__all__ = [
    "DTYPES",
    "MAX_TENSORS",
    "Declared",
    "InferCall",
    "Metadata",
    "embedded_to_inferred",
    "embedding_outputs",
    "error_body",
    "error_event",
    "model_metadata",
    "parse_generate",
    "parse_infer",
    "parse_response",
    "render_infer",
    "render_request",
    "server_metadata",
    "text_tensor",
    "to_text_requests",
]

TEXT_INPUT = "text_input"
TEXT_OUTPUT = "text_output"
EMBEDDING = "embedding"


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
    binary = BinaryData(memoryview(body)[header_length:])
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
        _flag(parameters, "binary_data_output", "parameters"),
    )


def _input(
    item: Any, where: str, declared: Mapping[str, Metadata], binary: BinaryData, max_elements: int
) -> tuple[str, NDArray[Any]]:
    tensor = _object(item, where)
    _known(tensor, {"name", "shape", "datatype", "parameters", "data"}, where)
    name = _name(tensor, where)
    if name not in declared:
        known = ", ".join(sorted(declared)) or "none"
        raise BadRequest(f"{where}: the model has no input {name!r}; it has {known}.", param=where)
    datatype = declared[name].datatype
    if tensor.get("datatype") != datatype:
        raise BadRequest(
            f"{where}.datatype must be {datatype} for {name}.", param=f"{where}.datatype"
        )
    shape, size = read_shape(tensor.get("shape"), f"{where}.shape", max_elements)
    check_fits(shape, declared[name], f"{where}.shape")
    parameters = _parameters(tensor, f"{where}.parameters")
    length = parameters.get("binary_data_size")
    if length is not None:
        if "data" in tensor:
            raise BadRequest(f"{where}: give data or binary_data_size, not both.", param=where)
        param = f"{where}.parameters.binary_data_size"
        raw = binary.take(length, param)
        return name, from_binary(raw, datatype, size, param).reshape(shape)
    if "data" not in tensor:
        raise BadRequest(f"{where}: {name} has no data.", param=f"{where}.data")
    return name, from_json(tensor["data"], datatype, shape, size, f"{where}.data")


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
        if _flag({"binary_data": default} | parameters, "binary_data", f"{where}.parameters"):
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
        EngineFailed: the engine answered with a tensor that it did not declare.
        BadRequest: BYTES that only go as binary data.
    """
    datatypes = {tensor.name: tensor.datatype for tensor in outputs}
    tail: list[bytes] = []
    rendered: list[dict[str, Any]] = []
    for name, answered in answer.outputs.items():
        if name not in datatypes:
            raise EngineFailed(f"The model answered with an output {name} that it did not declare.")
        datatype = datatypes[name]
        array = as_declared(answered, datatype, name)
        entry: dict[str, Any] = {
            "name": name,
            "datatype": datatype,
            "shape": list(array.shape),
        }
        if name in call.binary or (not call.outputs and call.binary_by_default):
            raw = to_binary(array, datatype)
            entry["parameters"] = {"binary_data_size": len(raw)}
            tail.append(raw)
        else:
            entry["data"] = to_json(array, datatype, name)
        rendered.append(entry)
    document: dict[str, Any] = {"model_name": model, "model_version": version}
    if call.id is not None:
        document["id"] = call.id
    head = dump(document | {"outputs": rendered})
    if not tail:
        return head, None
    return b"".join([head, *tail]), len(head)


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
    head = dump(document)
    return b"".join([head, *tail]), len(head)


def parse_response(body: bytes, header_length: int | None) -> dict[str, NDArray[Any]]:
    """The outputs of an `infer` answer by name.

    Raises:
        UpstreamFailed: it is not one.
    """
    try:
        document = _object(load_json(body[:header_length]), "The answer")
        binary = BinaryData(memoryview(body)[header_length or len(body) :])
        arrays: dict[str, NDArray[Any]] = {}
        for index, item in enumerate(_list(document.get("outputs"), "outputs")):
            where = f"outputs[{index}]"
            tensor = _object(item, where)
            datatype = str(tensor.get("datatype"))
            if datatype not in DTYPES:
                raise BadRequest(f"{where}: unknown datatype {datatype[:32]}.")
            shape, size = read_shape(tensor.get("shape"), where, MAX_ELEMENTS)
            length = _parameters(tensor, where).get("binary_data_size")
            if length is None:
                array = from_json(tensor.get("data"), datatype, shape, size, where)
            else:
                array = from_binary(binary.take(length, where), datatype, size, where)
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


# ---- text models behind infer, and the generate extension --------------------------------------


def sampling_parameters(parameters: Mapping[str, Any]) -> Sampling:
    """Sampling from a `parameters` object: names and bounds are those of OpenAI's API here.

    Raises:
        BadRequest: an unknown one, or a value out of bounds.
    """
    return validate(GenerateParameters, parameters, "parameters").sampling()


def parse_generate(body: bytes, *, chat: bool) -> tuple[GenerateRequest, str | None]:
    """`POST /v2/models/{model}/generate` and `generate_stream`: the request and its `id`.

    `text_input` is the user's message for a model with a chat template, else the prompt.

    Raises:
        BadRequest: `param` is the field at fault.
    """
    document = _object(load_json(body), "The body")
    _known(document, {"text_input", "parameters", "id"}, "")
    identity = _identity(document)
    text = document.get(TEXT_INPUT)
    if not isinstance(text, str):
        raise BadRequest("text_input must be a string.", param=TEXT_INPUT)
    sampling = sampling_parameters(_parameters(document, "parameters"))
    return text_request(text, sampling, chat=chat), identity


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


def _flag(parameters: Mapping[str, Any], name: str, where: str) -> bool:
    flag = parameters.get(name, False)
    if not isinstance(flag, bool):
        param = f"{where}.{name}"
        raise BadRequest(f"{param} must be true or false; it is {shown(flag)}.", param=param)
    return flag


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
