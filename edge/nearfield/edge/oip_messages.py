"""The messages of the Open Inference Protocol's gRPC service, as protobuf classes.

Field names and numbers are those of its specification (kserve/open-inference-protocol). The
descriptors are built here, in a pool of their own: a process may hold another copy of the same
messages, from a client library, without either getting in the other's way. `RpcStatus` and what
goes with it are google.rpc.Status and RetryInfo, in which gRPC tells more of an error.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, message_factory
from google.protobuf.descriptor_pool import DescriptorPool

PACKAGE = "inference"

_SCALARS = {
    name: getattr(descriptor_pb2.FieldDescriptorProto, f"TYPE_{name.upper()}")
    for name in ("bool", "bytes", "double", "float", "int32", "int64", "string", "uint32", "uint64")
}
_Fields = dict[str, tuple[int, str]]

_TENSOR: _Fields = {
    "name": (1, "string"),
    "datatype": (2, "string"),
    "shape": (3, "repeated int64"),
    "parameters": (4, "map InferParameter"),
    "contents": (5, "InferTensorContents"),
}
_NAMED: _Fields = {"name": (1, "string"), "version": (2, "string")}

MESSAGES: dict[str, _Fields] = {
    "ServerLiveRequest": {},
    "ServerLiveResponse": {"live": (1, "bool")},
    "ServerReadyRequest": {},
    "ServerReadyResponse": {"ready": (1, "bool")},
    "ModelReadyRequest": _NAMED,
    "ModelReadyResponse": {"ready": (1, "bool")},
    "ServerMetadataRequest": {},
    "ServerMetadataResponse": {**_NAMED, "extensions": (3, "repeated string")},
    "ModelMetadataRequest": _NAMED,
    "ModelMetadataResponse": {
        "name": (1, "string"),
        "versions": (2, "repeated string"),
        "platform": (3, "string"),
        "inputs": (4, "repeated ModelMetadataResponse.TensorMetadata"),
        "outputs": (5, "repeated ModelMetadataResponse.TensorMetadata"),
    },
    "ModelMetadataResponse.TensorMetadata": {
        "name": (1, "string"),
        "datatype": (2, "string"),
        "shape": (3, "repeated int64"),
    },
    "InferParameter": {
        "bool_param": (1, "choice bool"),
        "int64_param": (2, "choice int64"),
        "string_param": (3, "choice string"),
        "double_param": (4, "choice double"),
        "uint64_param": (5, "choice uint64"),
    },
    "InferTensorContents": {
        "bool_contents": (1, "repeated bool"),
        "int_contents": (2, "repeated int32"),
        "int64_contents": (3, "repeated int64"),
        "uint_contents": (4, "repeated uint32"),
        "uint64_contents": (5, "repeated uint64"),
        "fp32_contents": (6, "repeated float"),
        "fp64_contents": (7, "repeated double"),
        "bytes_contents": (8, "repeated bytes"),
    },
    "ModelInferRequest": {
        "model_name": (1, "string"),
        "model_version": (2, "string"),
        "id": (3, "string"),
        "parameters": (4, "map InferParameter"),
        "inputs": (5, "repeated ModelInferRequest.InferInputTensor"),
        "outputs": (6, "repeated ModelInferRequest.InferRequestedOutputTensor"),
        "raw_input_contents": (7, "repeated bytes"),
    },
    "ModelInferRequest.InferInputTensor": _TENSOR,
    "ModelInferRequest.InferRequestedOutputTensor": {
        "name": (1, "string"),
        "parameters": (2, "map InferParameter"),
    },
    "ModelInferResponse": {
        "model_name": (1, "string"),
        "model_version": (2, "string"),
        "id": (3, "string"),
        "parameters": (4, "map InferParameter"),
        "outputs": (5, "repeated ModelInferResponse.InferOutputTensor"),
        "raw_output_contents": (6, "repeated bytes"),
    },
    "ModelInferResponse.InferOutputTensor": _TENSOR,
    "RpcStatus": {
        "code": (1, "int32"),
        "message": (2, "string"),
        "details": (3, "repeated RpcStatus.Detail"),
    },
    "RpcStatus.Detail": {"type_url": (1, "string"), "value": (2, "bytes")},
    "RetryInfo": {"retry_delay": (1, "RetryInfo.Delay")},
    "RetryInfo.Delay": {"seconds": (1, "int64"), "nanos": (2, "int32")},
}
"""A message's fields: number, and type. `choice`: at most one of these is there."""


def _describe(name: str, fields: _Fields) -> descriptor_pb2.DescriptorProto:
    message = descriptor_pb2.DescriptorProto(name=name.rpartition(".")[2])
    for field_name, (number, kind) in fields.items():
        how, _, of = kind.rpartition(" ")
        field = message.field.add(name=field_name, number=number)
        if how == "map":
            entry = "".join(part.capitalize() for part in field_name.split("_")) + "Entry"
            nested = _describe(entry, {"key": (1, "string"), "value": (2, of)})
            nested.options.map_entry = True
            message.nested_type.append(nested)
            of = f"{name}.{entry}"
        repeated = how in ("repeated", "map")
        field.label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
        if how == "choice":
            if not message.oneof_decl:
                message.oneof_decl.add(name="parameter_choice")
            field.oneof_index = 0
        if of in _SCALARS:
            field.type = _SCALARS[of]
        else:
            field.type = field.TYPE_MESSAGE
            field.type_name = f".{PACKAGE}.{of}"
    return message


def _build() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(
        name="nearfield/open_inference.proto", package=PACKAGE, syntax="proto3"
    )
    described = {name: _describe(name, fields) for name, fields in MESSAGES.items()}
    for name, message in described.items():
        outer = name.rpartition(".")[0]
        if outer:
            described[outer].nested_type.append(message)
    file.message_type.extend(message for name, message in described.items() if "." not in name)
    pool = DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))
        for name in MESSAGES
        if "." not in name
    }


_CLASSES = _build()

ServerLiveRequest = _CLASSES["ServerLiveRequest"]
ServerLiveResponse = _CLASSES["ServerLiveResponse"]
ServerReadyRequest = _CLASSES["ServerReadyRequest"]
ServerReadyResponse = _CLASSES["ServerReadyResponse"]
ModelReadyRequest = _CLASSES["ModelReadyRequest"]
ModelReadyResponse = _CLASSES["ModelReadyResponse"]
ServerMetadataRequest = _CLASSES["ServerMetadataRequest"]
ServerMetadataResponse = _CLASSES["ServerMetadataResponse"]
ModelMetadataRequest = _CLASSES["ModelMetadataRequest"]
ModelMetadataResponse = _CLASSES["ModelMetadataResponse"]
ModelInferRequest = _CLASSES["ModelInferRequest"]
ModelInferResponse = _CLASSES["ModelInferResponse"]
RpcStatus = _CLASSES["RpcStatus"]
RetryInfo = _CLASSES["RetryInfo"]
