"""The Open Inference Protocol over gRPC: `inference.GRPCInferenceService`, all six calls.

    ServerLive       GET /v2/health/live        ServerMetadata   GET /v2
    ServerReady      GET /v2/health/ready       ModelMetadata    GET /v2/models/{model}
    ModelReady       GET /v2/models/{model}/ready
    ModelInfer       POST /v2/models/{model}/infer, tensors as binary data

Each call is put as the request of the same protocol over HTTP, and goes the way of every request:
pages, Gate, Router, Retries, Recorder. Metadata are its headers, `grpc-timeout` is its deadline, a
cancelled call is a client that has left. gRPC itself is a frame of five bytes and two trailers on
the HTTP/2 that is spoken here anyway (docs/adr/0011).

Limits: a request's message is as large as a body over HTTP may be (`Limits.max_body_bytes`), as it
comes and as it is decompressed; an answer as large as `Limits.max_message_bytes`. Compressed
requests (gzip, deflate) are read; answers are not compressed.
"""

from __future__ import annotations

import base64
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

import msgspec
from google.protobuf.message import DecodeError
from nearfield.core.errors import (
    BadRequest,
    DeadlineExceeded,
    NearfieldError,
    PayloadTooLarge,
    UpstreamFailed,
)
from nearfield.edge import oip_messages as messages
from nearfield.edge.oip_transcode import check_size, from_http, to_http
from nearfield.edge.proxy import head
from nearfield.edge.proxy.limits import Limits
from nearfield.edge.proxy.ports import Fields, Reply, Request

SERVICE: Final = b"/inference.GRPCInferenceService/"
CONTENT_TYPE: Final = b"application/grpc"
PREFIX_BYTES: Final = 5
"""Before a message: whether it is compressed, and its length."""
MAX_SMALL_BYTES: Final = 4096
"""Of a message that holds a name and a version."""
RETRY_INFO: Final = "type.googleapis.com/google.rpc.RetryInfo"
HEADER_LENGTH: Final = b"inference-header-content-length"
TIMEOUT: Final = b"x-request-timeout-ms"

OK, CANCELLED, UNKNOWN, INVALID_ARGUMENT, DEADLINE_EXCEEDED, NOT_FOUND = 0, 1, 2, 3, 4, 5
PERMISSION_DENIED, RESOURCE_EXHAUSTED, ABORTED, UNIMPLEMENTED, INTERNAL = 7, 8, 10, 12, 13
UNAVAILABLE, UNAUTHENTICATED = 14, 16

CODES: Final = {
    401: UNAUTHENTICATED,
    403: PERMISSION_DENIED,
    404: NOT_FOUND,
    408: DEADLINE_EXCEEDED,
    409: ABORTED,
    413: RESOURCE_EXHAUSTED,
    429: RESOURCE_EXHAUSTED,
    431: RESOURCE_EXHAUSTED,
    499: CANCELLED,
    500: INTERNAL,
    501: UNIMPLEMENTED,
    502: UNAVAILABLE,
    503: UNAVAILABLE,
    504: DEADLINE_EXCEEDED,
}
"""What a status means as a gRPC code. Other 4xx: INVALID_ARGUMENT; what is left: UNKNOWN."""

_TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])")
_UNIT_MS = {b"H": 3.6e6, b"M": 6e4, b"S": 1e3, b"m": 1.0, b"u": 1e-3, b"n": 1e-6}
_ENCODINGS = {b"gzip": 16 + zlib.MAX_WBITS, b"deflate": zlib.MAX_WBITS}
_MOST_WAIT_S = (2**31 - 1) // 1000
"""As milliseconds it must fit 32 bits."""
_ACCEPTED = (b"grpc-accept-encoding", b"identity,gzip,deflate")
_PROTOBUF = (CONTENT_TYPE, b"application/grpc+proto")
_PRINTABLE = " !\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~"


class Unimplemented(BadRequest):
    status = 501
    default_code = "unimplemented"


# ---- the calls, as HTTP ------------------------------------------------------------------------


class _Error(msgspec.Struct):
    error: str


class _Tensor(msgspec.Struct):
    name: str
    datatype: str
    shape: list[int]


class _Server(msgspec.Struct):
    name: str
    version: str
    extensions: list[str] = []


class _Model(msgspec.Struct):
    name: str
    versions: list[str] = []
    platform: str = ""
    inputs: list[_Tensor] = []
    outputs: list[_Tensor] = []


@dataclass(frozen=True, slots=True)
class Method:
    """One call of the service.

    Attributes:
        asks: its message. path: what that asks for over HTTP, `{model}` where the model stands.
        answer: the message that an answer is; from its status, fields and body.
        may_say_no: 503 is an answer, not an error.
    """

    asks: Any
    path: str
    answer: Callable[[int, Mapping[bytes, bytes], bytes], Any]
    may_say_no: bool = False

    @property
    def infers(self) -> bool:
        return self.asks is messages.ModelInferRequest


def _live(status: int, fields: Mapping[bytes, bytes], body: bytes) -> Any:
    return messages.ServerLiveResponse(live=status == 200)


def _ready(status: int, fields: Mapping[bytes, bytes], body: bytes) -> Any:
    return messages.ServerReadyResponse(ready=status == 200)


def _model_ready(status: int, fields: Mapping[bytes, bytes], body: bytes) -> Any:
    return messages.ModelReadyResponse(ready=status == 200)


def _server(status: int, fields: Mapping[bytes, bytes], body: bytes) -> Any:
    told = msgspec.json.decode(body, type=_Server)
    return messages.ServerMetadataResponse(
        name=told.name, version=told.version, extensions=told.extensions
    )


def _model(status: int, fields: Mapping[bytes, bytes], body: bytes) -> Any:
    told = msgspec.json.decode(body, type=_Model)
    answer = messages.ModelMetadataResponse(
        name=told.name, versions=told.versions, platform=told.platform
    )
    for into, tensors in ((answer.inputs, told.inputs), (answer.outputs, told.outputs)):
        for tensor in tensors:
            into.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
    return answer


def _inferred(status: int, fields: Mapping[bytes, bytes], body: bytes) -> Any:
    length = fields.get(HEADER_LENGTH)
    return from_http(body, None if length is None else int(length))


METHODS: Final = {
    SERVICE + b"ServerLive": Method(messages.ServerLiveRequest, "/v2/health/live", _live, True),
    SERVICE + b"ServerReady": Method(messages.ServerReadyRequest, "/v2/health/ready", _ready, True),
    SERVICE + b"ServerMetadata": Method(messages.ServerMetadataRequest, "/v2", _server),
    SERVICE + b"ModelReady": Method(
        messages.ModelReadyRequest, "/v2/models/{model}/ready", _model_ready, True
    ),
    SERVICE + b"ModelMetadata": Method(messages.ModelMetadataRequest, "/v2/models/{model}", _model),
    SERVICE + b"ModelInfer": Method(
        messages.ModelInferRequest, "/v2/models/{model}/infer", _inferred
    ),
}


class OpenInference:
    """Knows the calls of the service. See `ports.Calls`."""

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()

    def find(self, target: bytes, headers: dict[bytes, bytes]) -> InferenceCall | None:
        kind = headers.get(b"content-type", b"")
        if kind != CONTENT_TYPE and not kind.startswith(
            (b"application/grpc+", b"application/grpc;")
        ):
            return None
        return InferenceCall(target, headers, self._limits)


class InferenceCall:
    """One call. See `ports.Call`."""

    def __init__(self, target: bytes, headers: dict[bytes, bytes], limits: Limits) -> None:
        self._method = METHODS.get(target)
        self._max_bytes = limits.max_body_bytes
        self._encoding = headers.get(b"grpc-encoding", b"identity")
        self.refused: NearfieldError | None = None
        if self._method is None:
            self.refused = Unimplemented(
                "There is no such call here: inference.GRPCInferenceService has ServerLive, "
                "ServerReady, ServerMetadata, ModelReady, ModelMetadata and ModelInfer."
            )
        elif headers[b"content-type"].partition(b";")[0] not in _PROTOBUF:
            self.refused = Unimplemented("Messages are taken as protobuf only.")
        self.at_once = self._method is not None and self._method.infers
        self.max_bytes = PREFIX_BYTES + (self._max_bytes if self.at_once else MAX_SMALL_BYTES)
        timeout = headers.get(b"grpc-timeout")
        for name in [name for name in headers if name.startswith(b"grpc-")]:
            del headers[name]
        if timeout is not None:
            try:
                headers[TIMEOUT] = b"%d" % timeout_ms(timeout, limits.max_timeout_s)
            except NearfieldError as error:
                self.refused = self.refused or error

    # ---- the request ------------------------------------------------------------------------

    def read(self, request: Request) -> NearfieldError | None:
        method = self._method
        assert method is not None, "refused at its head"
        try:
            message = self._unframe(request.body)
            if method.infers:
                check_size(message)
            try:
                asked = method.asks.FromString(message)
            except DecodeError:
                raise BadRequest("The message is not the one that this call takes.") from None
            self._put(request, method, asked)
        except NearfieldError as error:
            return error
        return None

    def _put(self, request: Request, method: Method, asked: Any) -> None:
        path = method.path
        model = None
        if "{model}" in path:
            model = asked.model_name if method.infers else asked.name
            version = asked.model_version if method.infers else asked.version
            path = _of_model(path, model, version)
        headers = request.headers
        for name in (b"content-type", b"content-length", b"te", HEADER_LENGTH):
            headers.pop(name, None)
        if method.infers:
            request.body, length = to_http(asked, self._max_bytes)
            headers[b"content-type"] = b"application/octet-stream"
            headers[HEADER_LENGTH] = b"%d" % length
        else:
            request.method = b"GET"
            request.body = b""
        request.target = request.path = path.encode("ascii")
        request.model = model

    def _unframe(self, body: bytes) -> bytes:
        """The one message of a unary call.

        Raises:
            NearfieldError: it is not one, or cannot be decompressed.
        """
        length = int.from_bytes(body[1:PREFIX_BYTES], "big")
        if len(body) < PREFIX_BYTES or length != len(body) - PREFIX_BYTES or body[0] > 1:
            raise BadRequest("The call must bring exactly one message.")
        message = body[PREFIX_BYTES:]
        return message if body[0] == 0 else self._decompress(message)

    def _decompress(self, message: bytes) -> bytes:
        bits = _ENCODINGS.get(self._encoding)
        if bits is None:
            raise Unimplemented("Messages may be compressed with gzip or deflate.")
        stream = zlib.decompressobj(bits)
        most = self.max_bytes - PREFIX_BYTES
        try:
            plain = stream.decompress(message, most + 1)
        except zlib.error:
            raise BadRequest("The message cannot be decompressed.") from None
        if len(plain) > most:
            raise PayloadTooLarge(f"The message is larger than {most} bytes, decompressed.")
        if not stream.eof or stream.unused_data:
            raise BadRequest("The message cannot be decompressed.")
        return plain

    # ---- the answer -------------------------------------------------------------------------

    def reply(self, status: int, fields: Fields, body: bytes) -> Reply:
        method = self._method
        if method is None or not (status == 200 or (status == 503 and method.may_say_no)):
            return _refusal(status, fields, body)
        try:
            message = method.answer(status, dict(fields), body).SerializeToString()
        except (UpstreamFailed, msgspec.MsgspecError, ValueError, TypeError):
            return _refusal(500, fields, b'{"error": "The replica\'s answer cannot be read."}')
        framed = b"\0" + len(message).to_bytes(PREFIX_BYTES - 1, "big") + message
        return Reply(_head(fields), framed, ((b"grpc-status", b"%d" % OK),))


def timeout_ms(value: bytes, max_s: float) -> int:
    """`grpc-timeout`, rounded up. Longer than may be: as long as may be.

    Raises:
        BadRequest: it is none.
        DeadlineExceeded: there is no time at all.
    """
    found = _TIMEOUT.fullmatch(value)
    if found is None:
        raise BadRequest("grpc-timeout must be at most eight digits and a unit.")
    number, unit = int(found[1]), _UNIT_MS[found[2]]
    if number == 0:
        raise DeadlineExceeded("The call's deadline has passed: it is not run.")
    return int(min(max(1.0, number * unit), max_s * 1000))


def _of_model(path: str, model: str, version: str) -> str:
    """
    Raises:
        BadRequest: the model's name, or its version, is none.
    """
    for name, field in ((model, "model_name"), (version or "1", "model_version")):
        if head.MODEL.fullmatch(name.encode()) is None or name in (".", ".."):
            raise BadRequest(
                f"{field} must be of letters, digits, '.', '_' and '-', 128 at most.", param=field
            )
    of_version = f"{model}/versions/{version}" if version else model
    return path.format(model=of_version)


def _head(fields: Fields) -> list[tuple[bytes, bytes]]:
    shown = [field for field in fields if field[0].startswith(b"x-")]
    return [(b":status", b"200"), (b"content-type", CONTENT_TYPE), _ACCEPTED, *shown]


def _refusal(status: int, fields: Fields, body: bytes) -> Reply:
    """An error: a head alone, which ends the call."""
    code = CODES.get(status) or (INVALID_ARGUMENT if 400 <= status < 500 else UNKNOWN)
    try:
        text = msgspec.json.decode(body, type=_Error).error
    except msgspec.MsgspecError:
        text = f"The request was answered with status {status}."
    told = [
        *_head(fields),
        (b"grpc-status", b"%d" % code),
        (b"grpc-message", quote(text, safe=_PRINTABLE).encode("ascii")),
    ]
    retry_after = dict(fields).get(b"retry-after", b"")
    if retry_after.isdigit():
        told += _retry_info(code, text, retry_after)
    return Reply(told, b"", ())


def _retry_info(code: int, text: str, retry_after: bytes) -> list[tuple[bytes, bytes]]:
    """When to come back: as gRPC's own retries, as google.rpc's error model, and as HTTP say it."""
    wait_s = min(int(retry_after), _MOST_WAIT_S)
    info = messages.RetryInfo()
    info.retry_delay.seconds = wait_s
    status = messages.RpcStatus(code=code, message=text)
    status.details.add(type_url=RETRY_INFO, value=info.SerializeToString())
    details = base64.b64encode(status.SerializeToString()).rstrip(b"=")
    return [
        (b"retry-after", retry_after),
        (b"grpc-retry-pushback-ms", b"%d" % (wait_s * 1000)),
        (b"grpc-status-details-bin", details),
    ]
