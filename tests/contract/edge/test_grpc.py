"""The Open Inference Protocol over gRPC: real clients before, the region's own code behind."""

from __future__ import annotations

import asyncio
import functools
import gzip
import json
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
import tritonclient.grpc as triton
from nearfield.api import oip
from nearfield.api.error_bodies import oip_error
from nearfield.api.events import Inferred, Timings
from nearfield.core.errors import (
    BadRequest,
    Conflict,
    EngineFailed,
    Forbidden,
    NearfieldError,
    NotFound,
    RateLimited,
    Unauthenticated,
    Unavailable,
)
from nearfield.edge import oip_messages as messages
from nearfield.edge.grpc import OpenInference
from nearfield.edge.proxy.limits import Limits
from nearfield.edge.proxy.plain import OpenGate
from nearfield.edge.proxy.ports import Grant, Request

from tests.support.edge import Forwarding, Heard, Upstream, answer, forwarding
from tests.support.hosting import until
from tests.support.http2 import peer, request

pytestmark = pytest.mark.asyncio(loop_scope="module")

Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter
SERVICE = "/inference.GRPCInferenceService/"
SOON_S = 10.0
LIMITS = Limits(max_body_bytes=2_000_000, max_message_bytes=3_000_000)
RUNS = {"INT8": "int8", "INT16": "int16", "INT32": "int32", "INT64": "int64", "UINT8": "uint8"} | {
    "UINT16": "uint16", "UINT32": "uint32", "UINT64": "uint64", "FP16": "float16",
    "FP32": "float32", "FP64": "float64", "BOOL": "bool",
}  # fmt: skip


class Replica:
    """Answers as a region's replica does, with its own code: its input comes back."""

    def __init__(self) -> None:
        self.datatype = "FP32"
        self.dimensions = 1
        self.call: oip.InferCall | None = None
        self.says: bytes | None = None

    def answer(self, heard: Heard) -> bytes:
        if self.says is not None:
            return self.says
        declared = (oip.Declared("x", self.datatype, (-1,) * self.dimensions),)
        if heard.method == "GET":
            if heard.target.endswith("/ready"):
                return answer(b'{"ready": true}')
            if heard.target.startswith("/v2/models/"):
                known = oip.model_metadata("m", "1", "onnx", declared, declared)
                return answer(json.dumps(known).encode())
            if heard.target.startswith("/v2/health"):
                return answer(b'{"live": true}')
            return answer(json.dumps(oip.server_metadata("0.1")).encode())
        length = int(heard.headers["inference-header-content-length"])
        try:
            self.call = call = oip.parse_infer(heard.body, length, declared, declared)
            given = Inferred(dict(call.inputs), Timings(0.0))
            body, told = oip.render_infer(call, "m", "1", declared, given)
        except NearfieldError as error:
            return answer(json.dumps(oip_error(error)).encode(), error.status)
        assert told is not None, "all tensors are asked for as binary data"
        return answer(body, inference_header_content_length=str(told))


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def served() -> AsyncIterator[tuple[Upstream, Replica]]:
    running, replica = Upstream(), Replica()
    await running.start()
    yield running, replica
    await running.close()


@pytest_asyncio.fixture(loop_scope="module")
async def replica(served: tuple[Upstream, Replica]) -> Replica:
    upstream, replica = served
    replica.__init__()  # type: ignore[misc]

    async def handler(heard: Heard, reader: Reader, writer: Writer) -> None:
        writer.write(replica.answer(heard))

    upstream.handler = handler
    return replica


@pytest_asyncio.fixture(loop_scope="module")
async def proxy(served: tuple[Upstream, Replica], replica: Replica) -> AsyncIterator[Forwarding]:
    async with forwarding(
        [served[0].target], limits=LIMITS, calls=OpenInference(LIMITS)
    ) as running:
        yield running


async def asked(proxy: Forwarding, ask: Callable[[Any], Any]) -> Any:
    """What tritonclient gets; it blocks, so it has a thread of its own."""

    def run() -> Any:
        with triton.InferenceServerClient(f"127.0.0.1:{proxy.address[1]}") as client:
            return ask(client)

    return await asyncio.to_thread(run)


async def call(
    proxy: Forwarding, method: str, message: Any = b"", answer: Any = None, **options: Any
) -> Any:
    """What a plain gRPC client gets."""

    def run() -> Any:
        with grpc.insecure_channel(f"127.0.0.1:{proxy.address[1]}") as channel:
            raw = message if isinstance(message, bytes) else message.SerializeToString()
            decode = None if answer is None else answer.FromString
            options.setdefault("timeout", SOON_S)
            return channel.unary_unary(SERVICE + method, None, decode)(raw, **options)

    return await asyncio.to_thread(run)


def tensor(array: np.ndarray[Any, Any], datatype: str) -> triton.InferInput:
    given = triton.InferInput("x", list(array.shape), datatype)
    given.set_data_from_numpy(array)
    return given


async def refused(proxy: Forwarding, method: str, message: Any = b"", **options: Any) -> Any:
    with pytest.raises(grpc.RpcError) as raised:
        await call(proxy, method, message, **options)
    return raised.value


# ---- the six calls ------------------------------------------------------------------------------


async def test_health_and_metadata(proxy: Forwarding) -> None:
    assert await asked(proxy, lambda client: client.is_server_live())
    assert await asked(proxy, lambda client: client.is_server_ready())
    assert await asked(proxy, lambda client: client.is_model_ready("m", "1"))
    assert proxy.outcome.request.path == b"/v2/models/m/versions/1/ready"
    server = await asked(proxy, lambda client: client.get_server_metadata())
    assert (server.name, server.version) == ("nearfield", "0.1")
    assert "binary_tensor_data" in server.extensions
    model = await asked(proxy, lambda client: client.get_model_metadata("m"))
    assert (model.name, model.platform, list(model.versions)) == ("m", "onnx", ["1"])
    assert (model.inputs[0].datatype, list(model.inputs[0].shape)) == ("FP32", [-1])


async def test_what_is_not_ready_says_so(proxy: Forwarding, replica: Replica) -> None:
    replica.says = answer(b'{"ready": false}', 503)
    assert not await asked(proxy, lambda client: client.is_server_live())
    assert not await asked(proxy, lambda client: client.is_server_ready())
    assert not await asked(proxy, lambda client: client.is_model_ready("m"))
    error = await refused(proxy, "ServerMetadata")
    assert error.code() == grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("datatype", RUNS)
async def test_every_datatype_goes_and_comes_back(
    proxy: Forwarding, replica: Replica, datatype: str
) -> None:
    replica.datatype, replica.dimensions = datatype, 2
    array = np.array([[0, 1, 2], [3, 4, 5]]).astype(RUNS[datatype])
    found = await asked(proxy, lambda client: client.infer("m", [tensor(array, datatype)]))
    assert np.array_equal(found.as_numpy("x"), array)
    assert found.as_numpy("x").dtype == array.dtype
    request = proxy.outcome.request
    assert (request.model, request.method, request.dialect) == ("m", b"POST", "oip")
    assert request.target == request.path == b"/v2/models/m/infer"


async def test_bf16(proxy: Forwarding, replica: Replica) -> None:
    replica.datatype = "BF16"
    message = messages.ModelInferRequest(model_name="m", raw_input_contents=[b"\x80\x3f\x00\x40"])
    message.inputs.add(name="x", datatype="BF16", shape=[2])
    found = await call(proxy, "ModelInfer", message, messages.ModelInferResponse)
    assert list(found.raw_output_contents) == [b"\x80\x3f\x00\x40"]
    assert replica.call is not None
    assert replica.call.inputs["x"].tolist() == [1.0, 2.0]


async def test_bytes(proxy: Forwarding, replica: Replica) -> None:
    replica.datatype = "BYTES"
    array = np.array([b"", b"\xff\x00", "größer".encode()], dtype=object)
    found = await asked(proxy, lambda client: client.infer("m", [tensor(array, "BYTES")]))
    assert found.as_numpy("x").tolist() == array.tolist()


TYPED: dict[str, tuple[str, list[Any]]] = {
    "BOOL": ("bool_contents", [True, False, True]),
    "INT8": ("int_contents", [-128, 0, 127]),
    "INT16": ("int_contents", [-32768, 0, 32767]),
    "INT32": ("int_contents", [-(2**31), 0, 2**31 - 1]),
    "INT64": ("int64_contents", [-(2**63), 0, 2**63 - 1]),
    "UINT8": ("uint_contents", [0, 1, 255]),
    "UINT16": ("uint_contents", [0, 1, 65535]),
    "UINT32": ("uint_contents", [0, 1, 2**32 - 1]),
    "UINT64": ("uint64_contents", [0, 1, 2**64 - 1]),
    "FP32": ("fp32_contents", [0.5, -1.25, 3.0]),
    "FP64": ("fp64_contents", [0.1, -1e300, 3.0]),
    "BYTES": ("bytes_contents", [b"", b"\xff", b"abc"]),
}


def typed(datatype: str, field: str, values: list[Any], size: int | None = None) -> Any:
    message = messages.ModelInferRequest(model_name="m")
    given = message.inputs.add(
        name="x", datatype=datatype, shape=[len(values) if size is None else size]
    )
    getattr(given.contents, field).extend(values)
    return message


@pytest.mark.parametrize("datatype", TYPED)
async def test_typed_contents(proxy: Forwarding, replica: Replica, datatype: str) -> None:
    replica.datatype = datatype
    field, values = TYPED[datatype]
    await call(proxy, "ModelInfer", typed(datatype, field, values))
    assert replica.call is not None
    assert replica.call.inputs["x"].tolist() == values


async def test_no_elements_at_all(proxy: Forwarding, replica: Replica) -> None:
    found = await call(
        proxy, "ModelInfer", typed("FP32", "fp32_contents", []), messages.ModelInferResponse
    )
    assert (list(found.outputs[0].shape), found.raw_output_contents[0]) == ([0], b"")


async def test_ids_parameters_and_wanted_outputs(proxy: Forwarding, replica: Replica) -> None:
    array = np.array([1.0], dtype=np.float32)

    def ask(client: triton.InferenceServerClient) -> Any:
        return client.infer(
            "m",
            [tensor(array, "FP32")],
            model_version="1",
            outputs=[triton.InferRequestedOutput("x")],
            request_id="mine",
            parameters={"flag": True, "steps": 4, "name": "ä"},
            headers={"x-request-id": "req-7", "traceparent": f"00-{'a' * 32}-{'b' * 16}-01"},
        )

    found = await asked(proxy, ask)
    assert found.get_response().id == "mine"
    assert found.get_response().model_version == "1"
    assert replica.call is not None
    assert replica.call.outputs == ("x",)
    wanted = {"flag": True, "steps": 4, "name": "ä", "binary_data_output": True}
    assert replica.call.parameters == wanted
    request = proxy.outcome.request
    assert (request.request_id, request.trace.trace_id) == (b"req-7", b"a" * 32)
    assert request.path == b"/v2/models/m/versions/1/infer"


@pytest.mark.parametrize("compression", ["gzip", "deflate"])
async def test_compressed_requests(proxy: Forwarding, replica: Replica, compression: str) -> None:
    array = np.zeros(10_000, dtype=np.float32)
    found = await asked(
        proxy,
        lambda client: client.infer(
            "m", [tensor(array, "FP32")], compression_algorithm=compression
        ),
    )
    assert np.array_equal(found.as_numpy("x"), array)


async def test_a_large_tensor(proxy: Forwarding) -> None:
    array = np.arange(400_000, dtype=np.float32)
    found = await asked(proxy, lambda client: client.infer("m", [tensor(array, "FP32")]))
    assert np.array_equal(found.as_numpy("x"), array)
    assert proxy.proxy.held_bytes == 0


async def test_one_connection_many_calls(proxy: Forwarding) -> None:
    def ask(client: triton.InferenceServerClient) -> list[float]:
        found: dict[int, float] = {}
        complete = threading.Event()

        def done(n: int, result: Any, error: Any) -> None:
            found[n] = float("nan") if error else float(result.as_numpy("x")[0])
            if len(found) == 30:
                complete.set()

        for n in range(30):
            given = tensor(np.array([n], dtype=np.float32), "FP32")
            client.async_infer("m", [given], functools.partial(done, n))
        assert complete.wait(SOON_S)
        return [found[n] for n in range(30)]

    assert await asked(proxy, ask) == [float(n) for n in range(30)]


# ---- errors, deadlines, cancelling --------------------------------------------------------------


class Doors(OpenGate):
    """Refuses with what it is told to."""

    def __init__(self) -> None:
        self.error: NearfieldError | None = None
        self.at_the_head = False

    def enter(self, request: Request) -> NearfieldError | None:
        return self.error if self.at_the_head else None

    def admit(self, request: Request) -> Grant | NearfieldError:  # type: ignore[override]
        return self.error or super().admit(request)


ERRORS: list[tuple[NearfieldError, grpc.StatusCode]] = [
    (BadRequest("wrong"), grpc.StatusCode.INVALID_ARGUMENT),
    (Unauthenticated("who"), grpc.StatusCode.UNAUTHENTICATED),
    (Forbidden("no"), grpc.StatusCode.PERMISSION_DENIED),
    (NotFound("where"), grpc.StatusCode.NOT_FOUND),
    (Conflict("again"), grpc.StatusCode.ABORTED),
    (RateLimited("100 % full", retry_after_s=2.5), grpc.StatusCode.RESOURCE_EXHAUSTED),
    (EngineFailed("broken"), grpc.StatusCode.INTERNAL),
    (Unavailable("später"), grpc.StatusCode.UNAVAILABLE),
]


@pytest.mark.parametrize("at_the_head", [True, False])
async def test_errors_have_their_codes(
    served: tuple[Upstream, Replica], replica: Replica, at_the_head: bool
) -> None:
    doors = Doors()
    doors.at_the_head = at_the_head
    async with forwarding([served[0].target], gate=doors, calls=OpenInference()) as proxy:
        for doors.error, code in ERRORS:
            error = await refused(proxy, "ModelInfer", typed("FP32", "fp32_contents", [1.0]))
            assert (error.code(), error.details()) == (code, doors.error.message)
            trailing = dict(error.trailing_metadata()) | dict(error.initial_metadata() or ())
            assert trailing["x-request-id"]
            if doors.error.retry_after_s:
                assert trailing["retry-after"] == "3"
                assert trailing["grpc-retry-pushback-ms"] == "3000"
                told = messages.RpcStatus.FromString(trailing["grpc-status-details-bin"])
                assert (told.code, told.message) == (code.value[0], "100 % full")
                info = messages.RetryInfo.FromString(told.details[0].value)
                assert info.retry_delay.seconds == 3


async def test_what_the_replica_refuses(proxy: Forwarding, replica: Replica) -> None:
    replica.datatype = "FP64"
    error = await refused(proxy, "ModelInfer", typed("FP32", "fp32_contents", [1.0]))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "must be FP64" in error.details()


async def test_a_deadline(served: tuple[Upstream, Replica], proxy: Forwarding) -> None:
    async def never(heard: Heard, reader: Reader, writer: Writer) -> None:
        assert int(heard.headers["x-request-timeout-ms"]) <= 200
        await served[0].gone(reader)

    served[0].handler = never
    error = await refused(proxy, "ModelInfer", typed("FP32", "fp32_contents", [1.0]), timeout=0.2)
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: not proxy.proxy.live)
    assert proxy.outcome.error in ("deadline_exceeded", "cancelled")


async def test_a_call_that_is_cancelled_stops_the_upstream(
    served: tuple[Upstream, Replica], proxy: Forwarding
) -> None:
    upstream = served[0]

    async def never(heard: Heard, reader: Reader, writer: Writer) -> None:
        await upstream.gone(reader)

    upstream.handler = never
    upstream.left.clear()
    raw = typed("FP32", "fp32_contents", [1.0]).SerializeToString()
    with grpc.insecure_channel(f"127.0.0.1:{proxy.address[1]}") as channel:
        running = channel.unary_unary(SERVICE + "ModelInfer").future(raw, timeout=SOON_S)
        await until(lambda: len(proxy.proxy.live) == 1)
        running.cancel()
        async with asyncio.timeout(SOON_S):
            await upstream.left.wait()
    assert proxy.outcome.error == "cancelled"


@pytest.mark.parametrize(
    "says",
    [
        answer(b"{}"),
        answer(b"[]"),
        answer(b"\xff"),
        answer(b'{"outputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}]}'),
        answer(b'{"outputs": []}abcd', inference_header_content_length="15"),
        answer(
            b'{"outputs": [{"name": "x", "datatype": "FP32", "shape": [9], "parameters": '
            b'{"binary_data_size": 4}}]}abcd',
            inference_header_content_length="101",
        ),
    ],
)
async def test_an_answer_that_cannot_be_read(
    proxy: Forwarding, replica: Replica, says: bytes
) -> None:
    replica.says = says
    error = await refused(proxy, "ModelInfer", typed("FP32", "fp32_contents", [1.0]))
    assert error.code() == grpc.StatusCode.INTERNAL


async def test_an_answer_that_is_too_large(proxy: Forwarding, replica: Replica) -> None:
    replica.says = answer(b" " * 3_000_001)
    error = await refused(proxy, "ModelInfer", typed("FP32", "fp32_contents", [1.0]))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    await until(lambda: not proxy.proxy.held_bytes)


async def test_an_answer_that_breaks_off(
    served: tuple[Upstream, Replica], proxy: Forwarding
) -> None:
    async def half(heard: Heard, reader: Reader, writer: Writer) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{")
        await writer.drain()
        writer.transport.abort()

    served[0].handler = half
    error = await refused(proxy, "ModelInfer", typed("FP32", "fp32_contents", [1.0]))
    assert error.code() == grpc.StatusCode.UNAVAILABLE


# ---- what is refused ----------------------------------------------------------------------------


def lie(**changes: Any) -> Any:
    message = messages.ModelInferRequest(model_name="m", raw_input_contents=[b"\0" * 8])
    message.inputs.add(name="x", datatype="FP32", shape=[2])
    for name, value in changes.items():
        if name == "shape":
            message.inputs[0].shape[:] = value
        elif name in ("datatype", "name"):
            setattr(message.inputs[0], name, value)
        elif name == "raw":
            message.raw_input_contents[:] = value
        else:
            setattr(message, name, value)
    return message


def with_parameter(name: str) -> Any:
    message = lie()
    message.inputs[0].parameters[name].int64_param = 8
    return message


def many_outputs() -> Any:
    message = lie()
    for _ in range(100_000):
        message.outputs.add(name="x")
    return message


LIES: dict[str, Callable[[], Any]] = {
    "a huge shape": lambda: lie(shape=[2**32, 2**32]),
    "a shape of 1e9s": lambda: lie(shape=[10**9, 10**9, 10**9]),
    "a negative dimension": lambda: lie(shape=[-1]),
    "two negative dimensions": lambda: lie(shape=[-1, -2]),
    "40 dimensions": lambda: lie(shape=[1] * 40),
    "data that is longer": lambda: lie(raw=[b"\0" * 9]),
    "data that is shorter": lambda: lie(raw=[b"\0" * 4]),
    "two data for one input": lambda: lie(raw=[b"\0" * 8] * 2),
    "no data": lambda: lie(raw=[]),
    "an unknown datatype": lambda: lie(datatype="FP33"),
    "no datatype": lambda: lie(datatype=""),
    "no name": lambda: lie(name=""),
    "a long name": lambda: lie(name="x" * 257),
    "BYTES that lie": lambda: lie(datatype="BYTES", shape=[3]),
    "shared memory": lambda: with_parameter("shared_memory_region"),
    "a length of its own": lambda: with_parameter("binary_data_size"),
    "no model": lambda: lie(model_name=""),
    "a model of dots": lambda: lie(model_name=".."),
    "a model with a slash": lambda: lie(model_name="a/b"),
    "a model with a query": lambda: lie(model_name="a?b"),
    "a model with an escape": lambda: lie(model_name="%2e%2e"),
    "a model with a line end": lambda: lie(model_name="a\r\nb"),
    "a long model": lambda: lie(model_name="a" * 129),
    "a version with a slash": lambda: lie(model_version="1/infer"),
    "a version of dots": lambda: lie(model_version=".."),
    "100,000 outputs": many_outputs,
    "a million empty tensors": lambda: b"\x2a\x00" * 900_000,
    "a million raw contents": lambda: b"\x3a\x00" * 900_000,
    "a group": lambda: b"\x0b\x0c",
    "no protobuf": lambda: b"\xff\xff\xff",
    "a length beyond the end": lambda: b"\x2a\x7f",
    "a varint without end": lambda: b"\x80" * 20,
    "a name that is no UTF-8": lambda: b"\x0a\x01\xff",
    "FP32 in the wrong field": lambda: typed("FP32", "fp64_contents", [1.0]),
    "FP16 in typed contents": lambda: typed("FP16", "fp32_contents", [1.0]),
    "more than an INT8 holds": lambda: typed("INT8", "int_contents", [128]),
    "less than a UINT8 holds": lambda: typed("UINT8", "uint_contents", [256]),
    "too few elements": lambda: typed("FP32", "fp32_contents", [1.0], 2),
    "too many typed whole numbers": lambda: typed("INT8", "int_contents", [0] * (2**18 + 1)),
    "contents and raw contents": lambda: _both(),
}


def _both() -> Any:
    message = lie()
    message.inputs[0].contents.fp32_contents.extend([1.0, 2.0])
    return message


@pytest.mark.parametrize("name", LIES)
async def test_a_message_that_lies(
    served: tuple[Upstream, Replica], proxy: Forwarding, name: str
) -> None:
    before = len(served[0].heard)
    error = await refused(proxy, "ModelInfer", LIES[name]())
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error.details()
    assert len(served[0].heard) == before
    assert proxy.proxy.held_bytes == 0


async def test_a_message_that_is_too_large(proxy: Forwarding) -> None:
    error = await refused(proxy, "ModelInfer", b"\0" * 2_000_100)
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    error = await refused(proxy, "ModelReady", b"\0" * 5000)
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_bomb(proxy: Forwarding) -> None:
    bomb = gzip.compress(b"\0" * 50_000_000)
    client = await peer(proxy)
    found = await client.ask(
        head("ModelInfer", (b"grpc-encoding", b"gzip")), framed(bomb, compressed=True)
    )
    assert found.headers["grpc-status"] == "8"


@pytest.mark.parametrize("method", ["ModelStreamInfer", "RepositoryIndex", "Nothing", ""])
async def test_calls_that_are_not_there(proxy: Forwarding, method: str) -> None:
    error = await refused(proxy, method)
    assert error.code() == grpc.StatusCode.UNIMPLEMENTED


def head(method: str, *more: tuple[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    return request(
        b"POST",
        (SERVICE + method).encode(),
        (b"content-type", b"application/grpc"),
        (b"te", b"trailers"),
        *more,
    )


def framed(message: bytes, *, compressed: bool = False) -> bytes:
    return bytes([compressed]) + len(message).to_bytes(4, "big") + message


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", "3"),
        (b"\0\0\0", "3"),
        (b"\0\0\0\0\5abc", "3"),
        (framed(b"") + framed(b""), "3"),
        (b"\2\0\0\0\0", "3"),
        (framed(b"abc", compressed=True), "12"),
    ],
)
async def test_frames_that_are_none(proxy: Forwarding, body: bytes, status: str) -> None:
    found = await (await peer(proxy)).ask(head("ServerLive"), body)
    assert (found.status, found.headers["grpc-status"], found.body) == (200, status, b"")


@pytest.mark.parametrize(
    ("timeout", "status"),
    [(b"1", "3"), (b"S1", "3"), (b"123456789S", "3"), (b"-1S", "3"), (b"0S", "4"), (b"1n", None),
     (b"99999999H", None)],
)  # fmt: skip
async def test_timeouts(proxy: Forwarding, timeout: bytes, status: str | None) -> None:
    found = await (await peer(proxy)).ask(
        head("ServerLive", (b"grpc-timeout", timeout)), framed(b"")
    )
    if timeout == b"1n":
        assert (found.headers | found.trailers)["grpc-status"] in ("0", "4")
    elif status is None:
        assert found.trailers["grpc-status"] == "0"
    else:
        assert found.headers["grpc-status"] == status


async def test_a_stranger_is_refused_before_the_message(served: tuple[Upstream, Replica]) -> None:
    doors = Doors()
    doors.error, doors.at_the_head = Unauthenticated("who"), True
    async with forwarding([served[0].target], gate=doors, calls=OpenInference()) as proxy:
        client = await peer(proxy)
        found = await client.reply(client.open(head("ModelInfer")))
        assert found.headers["grpc-status"] == "16"
        assert proxy.proxy.held_bytes == 0


async def test_plain_http2_beside_it(proxy: Forwarding) -> None:
    client = await peer(proxy)
    assert (await client.ask(request(b"GET", b"/v2"))).json()["name"] == "nearfield"


# ---- the messages -------------------------------------------------------------------------------


async def test_the_messages_are_those_of_others() -> None:
    """Every field that tritonclient has in the messages of this protocol, with number and type."""
    theirs = triton.service_pb2.DESCRIPTOR.message_types_by_name
    for name in messages.MESSAGES:
        ours = getattr(messages, name, None)
        if "." in name or name not in theirs or ours is None:
            continue
        _same(ours.DESCRIPTOR, theirs[name])


def _same(ours: Any, theirs: Any) -> None:
    for field in ours.fields:
        other = theirs.fields_by_name[field.name]
        assert (field.number, field.type) == (other.number, other.type)
        assert field.is_repeated == other.is_repeated
        if field.message_type is not None and not field.message_type.GetOptions().map_entry:
            _same(field.message_type, other.message_type)
