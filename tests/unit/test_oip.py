"""Tensors over HTTP: every datatype both ways, and bodies that lie."""

from __future__ import annotations

import contextlib
import json
import struct
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from nearfield.api import oip
from nearfield.api.events import Inferred, Timings
from nearfield.api.json_body import load_json
from nearfield.core.errors import BadRequest
from numpy.typing import NDArray

X = oip.Declared("x", "FP32", (-1, 2))


def body(**tensor: Any) -> bytes:
    given = {"name": "x", "datatype": "FP32", "shape": [1, 2], **tensor}
    return json.dumps({"inputs": [given]}).encode()


def parse(raw: bytes, length: int | None = None, *declared: oip.Declared) -> oip.InferCall:
    return oip.parse_infer(raw, length, declared or (X,), (X,))


def arrays(datatype: str) -> st.SearchStrategy[NDArray[Any]]:
    shapes = hnp.array_shapes(min_dims=1, max_dims=3, max_side=4)
    if datatype == "BYTES":
        return hnp.arrays(np.dtype(object), shapes, elements=st.text(max_size=6).map(str.encode))
    dtype = oip.DTYPES[datatype]
    if datatype == "BF16":
        bits = hnp.arrays(np.uint16, shapes)
        widened = bits.map(lambda b: (b.astype(np.uint32) << 16).view(np.float32))
        return widened.filter(lambda a: bool(np.isfinite(a).all()))
    elements = None
    if dtype.kind == "f":
        elements = st.floats(allow_nan=False, allow_infinity=False, width=dtype.itemsize * 8)  # type: ignore[call-overload]
    return hnp.arrays(dtype, shapes, elements=elements)


@pytest.mark.parametrize("datatype", oip.DTYPES)
@pytest.mark.parametrize("binary", [True, False])
@given(data=st.data())
def test_every_datatype_goes_out_and_comes_back(
    datatype: str, binary: bool, data: st.DataObject
) -> None:
    array = data.draw(arrays(datatype))
    declared = oip.Declared("x", datatype, (-1,) * array.ndim)
    wanted = oip.InferCall(None, {}, (), binary_by_default=binary)
    answer = Inferred({"x": array}, Timings(0.0))
    raw, length = oip.render_infer(wanted, "m", "1", (declared,), answer)
    assert (length is not None) == binary
    outputs = oip.parse_response(raw, length)
    assert np.array_equal(outputs["x"], array)
    # What went out as an output comes in as an input.
    head = json.loads(raw[:length])
    document = json.dumps({"inputs": head["outputs"]}).encode()
    call = parse(document + raw[length or len(raw) :], len(document) if binary else None, declared)
    assert np.array_equal(call.inputs["x"], array)
    assert call.inputs["x"].shape == array.shape


def test_json_data_may_be_flat_or_nested() -> None:
    flat = parse(body(shape=[2, 2], data=[1, 2, 3, 4])).inputs["x"]
    nested = parse(body(shape=[2, 2], data=[[1, 2], [3, 4]])).inputs["x"]
    assert np.array_equal(flat, nested)
    assert flat.dtype == np.float32


LIES: list[tuple[dict[str, Any], str]] = [
    ({"shape": [2**32, 2**32], "data": []}, "inputs[0].shape"),
    ({"shape": [2**40, 2], "data": [1, 2]}, "inputs[0].shape"),
    ({"shape": [10**9, 2], "data": [1, 2]}, "inputs[0].shape"),
    ({"shape": [-1, 2], "data": [1, 2]}, "inputs[0].shape"),
    ({"shape": [True, 2], "data": [1, 2]}, "inputs[0].shape"),
    ({"shape": [1.0, 2], "data": [1, 2]}, "inputs[0].shape"),
    ({"shape": "1,2", "data": [1, 2]}, "inputs[0].shape"),
    ({"shape": [1] * 40, "data": [1]}, "inputs[0].shape"),
    ({"shape": [2], "data": [1, 2]}, "inputs[0].shape"),
    ({"shape": [1, 3], "data": [1, 2, 3]}, "inputs[0].shape"),
    ({"data": [1, 2, 3]}, "inputs[0].data"),
    ({"data": [[1], [2]]}, "inputs[0].data"),
    ({"data": [[1, 2], [3]]}, "inputs[0].data"),
    ({"data": [1, "2"]}, "inputs[0].data"),
    ({"data": [1, None]}, "inputs[0].data"),
    ({"data": [1, True]}, "inputs[0].data"),
    ({"data": [1, 1e300]}, "inputs[0].data"),
    ({"data": {"0": 1}}, "inputs[0].data"),
    ({}, "inputs[0].data"),
    ({"datatype": "FP64", "data": [1, 2]}, "inputs[0].datatype"),
    ({"datatype": "float", "data": [1, 2]}, "inputs[0].datatype"),
    ({"datatype": 5, "data": [1, 2]}, "inputs[0].datatype"),
    ({"name": "y", "data": [1, 2]}, "inputs[0]"),
    ({"name": 5, "data": [1, 2]}, "inputs[0].name"),
    ({"colour": "red", "data": [1, 2]}, "inputs[0].colour"),
    ({"parameters": {"binary_data_size": 8}}, "inputs[0].parameters.binary_data_size"),
    ({"parameters": {"binary_data_size": -1}}, "inputs[0].parameters.binary_data_size"),
    ({"parameters": {"binary_data_size": 1e9}}, "inputs[0].parameters.binary_data_size"),
    ({"parameters": {"binary_data_size": 8}, "data": [1, 2]}, "inputs[0]"),
    (
        {"parameters": {"shared_memory_region": "r"}, "data": [1, 2]},
        "inputs[0].parameters",
    ),
]


@pytest.mark.parametrize(("change", "param"), LIES)
def test_a_body_that_lies_is_refused_by_name(change: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as raised:
        parse(body(**change))
    assert raised.value.param == param, raised.value.message


def test_integers_stay_in_their_range() -> None:
    declared = oip.Declared("x", "UINT8", (-1,))
    good = {"datatype": "UINT8", "shape": [2]}
    assert parse(body(**good, data=[0, 255]), None, declared).inputs["x"].tolist() == [0, 255]
    for value in (256, -1, 1.5, "1", True):
        with pytest.raises(BadRequest, match="from 0 to 255"):
            parse(body(**good, data=[0, value]), None, declared)


def binary_body(raw: bytes, datatype: str, shape: list[int], size: int) -> tuple[bytes, int]:
    head = body(datatype=datatype, shape=shape, parameters={"binary_data_size": size})
    return head + raw, len(head)


@pytest.mark.parametrize(
    ("raw", "datatype", "shape", "size"),
    [
        (b"\0" * 7, "FP32", [1, 2], 7),
        (b"\0" * 9, "FP32", [1, 2], 8),
        (b"\0" * 4, "FP32", [1, 2], 8),
        (struct.pack("<I", 100) + b"abc", "BYTES", [1], 7),
        (struct.pack("<I", 2**31) + b"abc", "BYTES", [1], 7),
        (struct.pack("<I", 1) + b"abc", "BYTES", [1], 7),
        (b"ab", "BYTES", [1], 2),
        (b"", "BYTES", [5], 0),
    ],
)
def test_binary_data_that_lies_is_refused(
    raw: bytes, datatype: str, shape: list[int], size: int
) -> None:
    declared = oip.Declared("x", datatype, (-1,) * len(shape))
    whole, length = binary_body(raw, datatype, shape, size)
    with pytest.raises(BadRequest):
        parse(whole, length, declared)


@pytest.mark.parametrize("length", [0, -1, 10**9])
def test_a_header_length_that_lies_is_refused(length: int) -> None:
    with pytest.raises(BadRequest, match="inference-header-content-length"):
        parse(body(data=[1, 2]), length)


def test_inputs_must_be_there_once() -> None:
    entry = json.loads(body(data=[1, 2]))["inputs"][0]
    with pytest.raises(BadRequest, match="twice"):
        parse(json.dumps({"inputs": [entry, entry]}).encode())
    with pytest.raises(BadRequest, match="Missing inputs: x"):
        parse(b'{"inputs": []}')
    with pytest.raises(BadRequest, match="at most"):
        parse(json.dumps({"inputs": [entry] * 1000}).encode())


def test_outputs_are_checked_and_counted() -> None:
    def asked(outputs: Any) -> bytes:
        return json.dumps({**json.loads(body(data=[1, 2])), "outputs": outputs}).encode()

    assert parse(asked([{"name": "x"}])).outputs == ("x",)
    for outputs in ([{"name": "z"}], [{"name": "x"}] * 2, [{}] * 100_000, "x"):
        with pytest.raises(BadRequest):
            parse(asked(outputs))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"   ",
        b"{",
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b"[" * 5_000_000,
        b'{"a":' * 100_000,
        b'{"a": 1} x',
        b'{"a": "\xff"}',
        b"\xff\xfe{\x00}\x00",
        b"nul",
    ],
)
def test_json_that_is_not_is_refused_at_once(raw: bytes) -> None:
    started_s = time.perf_counter()
    with pytest.raises(BadRequest) as raised:
        load_json(raw)
    assert raised.value.code == "invalid_json"
    assert time.perf_counter() - started_s < 1.0


@given(st.binary(max_size=200))
def test_any_bytes_are_parsed_or_refused(raw: bytes) -> None:
    for attempt in (lambda: parse(raw), lambda: parse(raw, len(raw) // 2), lambda: load_json(raw)):
        with contextlib.suppress(BadRequest):
            attempt()


def test_generate_takes_openais_names() -> None:
    raw = json.dumps(
        {"text_input": "hi", "parameters": {"max_tokens": 5, "temperature": 0, "stop": "x"}}
    ).encode()
    chat, identity = oip.parse_generate(raw, chat=True)
    assert identity is None
    assert chat.messages == ({"role": "user", "content": "hi"},)
    assert (chat.sampling.max_tokens, chat.sampling.stop) == (5, ("x",))
    assert oip.parse_generate(raw, chat=False)[0].prompt == "hi"
    for parameters in ({"max_tokens": 0}, {"max_tokens": True}, {"heat": 1}, {"stop": [1]}):
        bad = json.dumps({"text_input": "hi", "parameters": parameters}).encode()
        with pytest.raises(BadRequest):
            oip.parse_generate(bad, chat=True)
