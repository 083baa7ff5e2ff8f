"""Open Inference bodies as tritonclient writes and reads them, and answers that go wrong."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from nearfield.api import oip
from nearfield.api.error_bodies import code_header
from nearfield.api.events import EmbedRequest, GenerateRequest, Inferred, Timings
from nearfield.core.errors import BadRequest, EngineFailed, NearfieldError
from numpy.typing import NDArray
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import np_to_triton_dtype

ARRAYS: dict[str, NDArray[Any]] = {
    "BOOL": np.array([[True, False]]),
    "UINT8": np.array([[0, 255]], np.uint8),
    "UINT16": np.array([[0, 65535]], np.uint16),
    "UINT32": np.array([[0, 2**32 - 1]], np.uint32),
    "UINT64": np.array([[0, 2**64 - 1]], np.uint64),
    "INT8": np.array([[-128, 127]], np.int8),
    "INT16": np.array([[-(2**15), 2**15 - 1]], np.int16),
    "INT32": np.array([[-(2**31), 2**31 - 1]], np.int32),
    "INT64": np.array([[-(2**63), 2**63 - 1]], np.int64),
    "FP16": np.array([[0.5, -65504]], np.float16),
    "FP32": np.array([[1 / 3, 3.4e38]], np.float32),
    "FP64": np.array([[1 / 3, 1e300]], np.float64),
    "BYTES": np.array([["hé", ""]], np.object_),
}


def refused(call: Any, *args: Any, **kwargs: Any) -> BadRequest:
    with pytest.raises(BadRequest) as raised:
        call(*args, **kwargs)
    return raised.value


def infer(
    data: Any, datatype: str, shape: list[int], declared: tuple[int, ...] = (-1,), **more: Any
) -> oip.InferCall:
    tensor = oip.Declared("x", datatype, declared)
    given = {"name": "x", "datatype": datatype, "shape": shape, "data": data}
    body = json.dumps({"inputs": [given], **more}).encode()
    return oip.parse_infer(body, None, [tensor], [tensor])


@pytest.mark.parametrize(
    ("datatype", "binary"),
    # tritonclient sends FP16 as binary data only
    [(d, binary) for d in ARRAYS for binary in (True, False) if binary or d != "FP16"],
)
def test_tritonclient_sends_and_reads_every_datatype(datatype: str, binary: bool) -> None:
    array = ARRAYS[datatype]
    assert np_to_triton_dtype(array.dtype) == datatype
    declared = oip.Declared("x", datatype, (-1, 2))
    given = InferInput("x", list(array.shape), datatype)
    given.set_data_from_numpy(array, binary_data=binary)
    wanted = InferRequestedOutput("x", binary_data=binary)
    body, length = InferenceServerClient.generate_request_body(
        [given], outputs=[wanted], request_id="7"
    )
    call = oip.parse_infer(body, length, [declared], [declared])
    assert call.id == "7"
    if datatype == "BYTES":
        assert call.inputs["x"].tolist() == [["hé".encode(), b""]]
    else:
        assert np.array_equal(call.inputs["x"], array)
        assert call.inputs["x"].dtype == array.dtype

    answer = Inferred(call.inputs, Timings(0.0))
    raw, head = oip.render_infer(call, "m", "3", [declared], answer)
    result = InferenceServerClient.parse_response_body(raw, header_length=head)
    assert result.get_response()["model_version"] == "3"
    read = result.as_numpy("x")
    if datatype == "BYTES" and not binary:
        read = np.vectorize(str.encode, otypes=[object])(read)
    assert np.array_equal(read, call.inputs["x"])


def test_bf16_is_rounded_to_nearest_even() -> None:
    declared = oip.Declared("x", "BF16", (-1,))
    values = [1.0, 1.00390625, 1.01171875, float("inf"), float("-inf"), 3.4e38]
    answer = Inferred({"x": np.array(values, np.float32)}, Timings(0.0))
    call = oip.InferCall(None, {}, (), binary_by_default=True)
    raw, head = oip.render_infer(call, "m", "1", [declared], answer)
    read = oip.parse_response(raw, head)["x"]
    assert read.tolist()[:3] == [1.0, 1.0, 1.015625]
    assert read.tolist()[3:] == [float("inf"), float("-inf"), float("inf")]
    nan = Inferred({"x": np.array([np.nan], np.float32)}, Timings(0.0))
    raw, head = oip.render_infer(call, "m", "1", [declared], nan)
    assert np.isnan(oip.parse_response(raw, head)["x"]).all()


@pytest.mark.parametrize(
    ("data", "shape", "declared"),
    [([], [0], (-1,)), ([], [0, 2], (-1, 2)), ([[], []], [2, 0], (2, -1)), ([5], [], ())],
)
def test_empty_tensors_and_scalars(data: Any, shape: list[int], declared: tuple[int, ...]) -> None:
    array = infer(data, "FP32", shape, declared).inputs["x"]
    assert array.shape == tuple(shape)
    named = oip.Declared("x", "FP32", declared)
    for binary in (True, False):
        call = oip.InferCall(None, {}, (), binary_by_default=binary)
        raw, head = oip.render_infer(call, "m", "1", [named], Inferred({"x": array}, Timings(0.0)))
        assert oip.parse_response(raw, head)["x"].shape == tuple(shape)


def test_a_trailing_nul_belongs_to_the_bytes() -> None:
    array = infer(["a\0", "b"], "BYTES", [2]).inputs["x"]
    assert array.tolist() == [b"a\0", b"b"]


@pytest.mark.parametrize(
    ("datatype", "value", "message"),
    [
        ("UINT8", 300, "inputs[0].data[1] is 300: UINT8 takes whole numbers from 0 to 255."),
        ("INT64", 2**63, "inputs[0].data[1] is 9223372036854775808: INT64 takes whole numbers "
         "from -9223372036854775808 to 9223372036854775807."),
        ("INT64", 10**400, "inputs[0].data[1] is a larger number: INT64 takes whole numbers "
         "from -9223372036854775808 to 9223372036854775807."),
        ("INT8", 1.0, "inputs[0].data[1] is 1.0: INT8 takes whole numbers from -128 to 127."),
        ("BOOL", 1, "inputs[0].data[1] is 1: BOOL takes true or false."),
        ("BYTES", 1, "inputs[0].data[1] is 1: BYTES takes strings."),
        ("FP32", "secret", "inputs[0].data[1] is a string: FP32 takes numbers."),
        ("FP32", None, "inputs[0].data[1] is null: FP32 takes numbers."),
        ("FP16", 70000, "inputs[0].data holds a number too large for FP16."),
        ("FP32", 1e39, "inputs[0].data holds a number too large for FP32."),
        ("FP64", 10**400, "inputs[0].data holds a number too large for FP64."),
    ],
)  # fmt: skip
def test_an_element_of_another_kind_is_named(datatype: str, value: Any, message: str) -> None:
    first = {"BOOL": True, "BYTES": "a"}.get(datatype, 0)
    assert refused(infer, [first, value], datatype, [2]).message == message


def test_infinity_by_another_name_is_refused() -> None:
    body = b'{"inputs": [{"name": "x", "datatype": "FP64", "shape": [1], "data": [1e999]}]}'
    x = oip.Declared("x", "FP64", (-1,))
    assert "too large" in refused(oip.parse_infer, body, None, [x], [x]).message


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"parameters": []}, "parameters"),
        ({"parameters": {"binary_data_output": 1}}, "parameters.binary_data_output"),
        ({"outputs": [{"name": "x", "parameters": {"binary_data": "yes"}}]},
         "outputs[0].parameters.binary_data"),
        ({"outputs": [{"name": "x", "parameters": {"classification": 3}}]},
         "outputs[0].parameters.classification"),
        ({"outputs": [{"name": "x", "parameters": {"shared_memory_region": "r"}}]},
         "outputs[0].parameters"),
        ({"outputs": [{"name": "y"}]}, "outputs[0]"),
        ({"outputs": ["x"]}, "outputs[0]"),
        ({"outputs": {"x": 1}}, "outputs"),
        ({"id": 5}, "id"),
        ({"input": []}, "input"),
    ],
)  # fmt: skip
def test_what_is_asked_for_is_checked(more: dict[str, Any], param: str) -> None:
    error = refused(infer, [1], "FP32", [1], **more)
    assert (error.status, error.param) == (400, param)


def test_a_million_rows_of_one_are_read() -> None:
    rows: Any = [[1.0]] * 200_000
    assert infer(rows, "FP32", [200_000, 1], (-1, 1)).inputs["x"].shape == (200_000, 1)
    assert refused(infer, rows, "FP32", [200_000], (-1,)).param == "inputs[0].data"
    assert refused(infer, [*rows, 1.0], "FP32", [200_001, 1], (-1, 1)).param == "inputs[0].data"


def test_elements_of_all_inputs_count_together() -> None:
    tensors = [oip.Declared(name, "FP32", (-1,)) for name in "ab"]
    given = [{"name": n, "datatype": "FP32", "shape": [6], "data": [0] * 6} for n in "ab"]
    body = json.dumps({"inputs": given}).encode()
    assert oip.parse_infer(body, None, tensors, tensors, max_elements=12)
    error = refused(oip.parse_infer, body, None, tensors, tensors, max_elements=11)
    assert error.param == "inputs[1].shape"


@pytest.mark.parametrize(
    ("datatype", "answered"),
    [
        ("FP32", {"y": np.zeros(1, np.float32)}),
        ("INT32", {"x": np.zeros(1, np.float32)}),
        ("FP32", {"x": np.array(["a"])}),
        ("FP32", {"x": np.array([b"a"], object)}),
        ("BYTES", {"x": np.zeros(1, np.float32)}),
    ],
)
def test_an_answer_that_was_not_declared_fails(datatype: str, answered: dict[str, Any]) -> None:
    declared = oip.Declared("x", datatype, (-1,))
    answer = Inferred(answered, Timings(0.0))
    with pytest.raises(EngineFailed):
        oip.render_infer(oip.InferCall(None, {}, ()), "m", "1", [declared], answer)


def test_an_answer_is_given_in_the_declared_type() -> None:
    declared = oip.Declared("x", "FP32", (-1,))
    answer = Inferred({"x": np.array([1 / 3], np.float64)}, Timings(0.0))
    for binary in (True, False):
        call = oip.InferCall(None, {}, (), binary_by_default=binary)
        raw, head = oip.render_infer(call, "m", "1", [declared], answer)
        assert oip.parse_response(raw, head)["x"].tolist() == [float(np.float32(1 / 3))]


def test_numbers_that_json_has_not_are_null() -> None:
    declared = oip.Declared("x", "FP32", (-1,))
    answer = Inferred({"x": np.array([1, np.nan, np.inf], np.float32)}, Timings(0.0))
    raw, _ = oip.render_infer(oip.InferCall(None, {}, ()), "m", "1", [declared], answer)
    assert json.loads(raw)["outputs"][0]["data"] == [1.0, None, None]


def test_bytes_that_are_no_text_go_as_binary_data_only() -> None:
    declared = oip.Declared("x", "BYTES", (-1,))
    answer = Inferred({"x": np.array([b"\xff\x00"], object)}, Timings(0.0))
    error = refused(oip.render_infer, oip.InferCall(None, {}, ()), "m", "1", [declared], answer)
    assert "binary_data: true" in error.message
    call = oip.InferCall(None, {}, ("x",), binary=frozenset({"x"}))
    raw, head = oip.render_infer(call, "m", "1", [declared], answer)
    assert oip.parse_response(raw, head)["x"].tolist() == [b"\xff\x00"]


# ---- text models ------------------------------------------------------------------------------


def texts(*values: bytes, **parameters: Any) -> oip.InferCall:
    return oip.InferCall(None, {"text_input": np.array(values, object)}, (), parameters)


def test_infer_on_text_models() -> None:
    chat, plain = (
        oip.to_text_requests(texts(b"a", b"b", max_tokens=3), "generate", chat=chat)
        for chat in (True, False)
    )
    assert all(isinstance(request, GenerateRequest) for request in (*chat, *plain))
    assert [r.prompt for r in plain if isinstance(r, GenerateRequest)] == ["a", "b"]
    call = texts("é".encode(), binary_data_output=True)
    (embed,) = oip.to_text_requests(call, "embed", chat=False)
    assert embed == EmbedRequest(("é",))


@pytest.mark.parametrize(
    ("call", "task", "param"),
    [
        (texts(b"\xff"), "embed", "text_input"),
        (texts(), "embed", "text_input"),
        (texts(*[b"a"] * 129), "generate", "text_input"),
        (texts(b"a", max_tokens=1), "embed", "parameters"),
        (texts(b"a", max_tokens=0), "generate", "parameters.max_tokens"),
        (texts(b"a", priority=1), "generate", "parameters.priority"),
    ],
)
def test_infer_on_text_models_is_checked(call: oip.InferCall, task: str, param: str) -> None:
    assert refused(oip.to_text_requests, call, task, chat=False).param == param


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "text_input"),
        ({"text_input": 5}, "text_input"),
        ({"text_input": "a", "temperature": 1}, "temperature"),
        ({"text_input": "a", "parameters": 5}, "parameters"),
        ({"text_input": "a", "parameters": {"temperature": 3}}, "parameters.temperature"),
        ({"text_input": "a", "parameters": {"stop": ["a", 1]}}, "parameters.stop[1]"),
        ({"text_input": "a", "parameters": {"n": 2}}, "parameters.n"),
        ({"text_input": "a", "id": 5}, "id"),
        ([], None),
    ],
)
def test_generate_is_checked(body: Any, param: str | None) -> None:
    error = refused(oip.parse_generate, json.dumps(body).encode(), chat=True)
    assert error.param == param, error.message


def test_generate_takes_what_tritons_clients_send() -> None:
    parameters = {"stream": True, "temperature": 0, "top_k": -1}
    body = {"id": "7", "text_input": "a", "parameters": parameters}
    request, identity = oip.parse_generate(json.dumps(body).encode(), chat=False)
    assert identity == "7"
    assert (request.sampling.temperature, request.sampling.top_k) == (0, 0)


def test_errors_are_one_string() -> None:
    assert oip.error_body(NearfieldError("no")) == {"error": "no"}


def test_an_errors_code_has_a_header_and_in_a_stream_a_field() -> None:
    crashed = NearfieldError("It died.", code="engine_crashed")
    assert code_header(crashed) == [(b"x-nearfield-error-code", b"engine_crashed")]
    assert oip.error_event(crashed) == {"error": "It died.", "code": "engine_crashed"}
    assert oip.error_event(NearfieldError("no")) == {"error": "no"}
    for code in (None, "", "a b", "a\r\nset-cookie: x", "é", "x" * 65):  # a remote model's
        assert code_header(NearfieldError("no", code=code)) == []
