"""Engine embed: the vectors are the reference's, whatever the runtime and the company."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nearfield.api.events import Embedded, EmbedRequest
from nearfield.core.errors import BadRequest, DeadlineExceeded
from nearfield.core.spec import ModelSpec
from nearfield.serving.engines.embed import EmbedEngine
from nearfield.weights import resolve
from numpy.typing import NDArray
from transformers import AutoModel, AutoTokenizer

from tests.support.engines import Driver

TEXTS = (
    "hello",
    "The quick brown fox jumps over the lazy dog.",
    "Grüße aus Zürich, 東京 und München",
    "a longer sentence about nothing in particular " * 6,
    "?",
)
SOURCE = {"source": "builtin://minilm"}


def load(**spec: Any) -> tuple[EmbedEngine, Driver]:
    whole = {**SOURCE, "engine": "embed", **spec}
    weights = resolve(ModelSpec.model_validate({"model": "m", **whole}))
    engine = EmbedEngine()
    driver = Driver(engine)
    driver.load(whole, weights)
    return engine, driver


@pytest.fixture(scope="module")
def minilm() -> Iterator[Driver]:
    engine, driver = load()
    yield driver
    engine.close()


@pytest.fixture(scope="module")
def reference() -> NDArray[np.float32]:
    """As the model card has it, one text at a time. (sentence-transformers itself, which takes ten
    seconds to import, is what tests/integration compares with.)"""
    weights = resolve(ModelSpec.model_validate({"model": "m", **SOURCE, "engine": "embed"}))
    tokenizer, model = AutoTokenizer.from_pretrained(weights), AutoModel.from_pretrained(weights)
    rows = []
    with torch.inference_mode():
        for text in TEXTS:
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            rows.append(torch.nn.functional.normalize(hidden.mean(0), dim=0).numpy())
    return np.stack(rows)


def vectors_of(driver: Driver, request: EmbedRequest, name: str = "r") -> NDArray[np.float32]:
    answer = driver.run(request, name)[-1]
    assert isinstance(answer, Embedded)
    return answer.vectors


def test_the_default_runtime_equals_the_reference(
    minilm: Driver, reference: NDArray[np.float32]
) -> None:
    assert minilm.capabilities is not None
    assert minilm.capabilities.detail["runtime"] in ("openvino", "onnx")
    together = vectors_of(minilm, EmbedRequest(TEXTS))
    assert np.abs(together - reference).max() <= 1e-5
    for text, expected in zip(TEXTS, reference, strict=True):
        assert np.abs(vectors_of(minilm, EmbedRequest((text,)))[0] - expected).max() <= 1e-5


def test_torch_equals_the_reference(reference: NDArray[np.float32]) -> None:
    engine, driver = load(engine={"kind": "embed", "runtime": "torch"})
    assert np.abs(vectors_of(driver, EmbedRequest(TEXTS)) - reference).max() <= 1e-5
    engine.close()


def test_many_requests_at_once_are_answered_each_with_its_own(
    minilm: Driver, reference: NDArray[np.float32]
) -> None:
    for i in range(60):
        minilm.engine.submit(f"many-{i}", EmbedRequest((TEXTS[i % 5], TEXTS[(i + 1) % 5])))
    batched = 0
    for i in range(60):
        answer = minilm.wait(f"many-{i}")[-1]
        assert isinstance(answer, Embedded)
        expected = reference[[i % 5, (i + 1) % 5]]
        assert np.abs(answer.vectors - expected).max() <= 1e-5
        batched = max(batched, answer.timings.batch_size)
    assert 1 < batched <= 32
    stats = minilm.engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="affinity is Linux's")
def test_computing_is_not_pinned_to_a_core(minilm: Driver) -> None:
    """OpenVINO would pin the thread of every replica of a node to the same one."""
    every = os.sched_getaffinity(0)
    request = EmbedRequest(tuple("a sentence of some length " * 20 for _ in range(8)))
    threads = [thread.native_id for thread in threading.enumerate() if thread.native_id]
    answer = threading.Thread(target=minilm.run, args=(request, "long"))
    answer.start()
    seen: list[set[int]] = []
    while answer.is_alive():
        seen += map(os.sched_getaffinity, threads)
    assert len(seen) > 10
    assert all(cores == every for cores in seen)


def test_tokens_are_inputs_too(minilm: Driver, reference: NDArray[np.float32]) -> None:
    engine = minilm.engine
    assert isinstance(engine, EmbedEngine)
    ids = tuple(engine._tokenizer.encode(TEXTS[0]).ids)
    assert np.abs(vectors_of(minilm, EmbedRequest((ids,)))[0] - reference[0]).max() <= 1e-5
    error = minilm.refused(EmbedRequest(((10**9,),)))
    assert isinstance(error, BadRequest)
    assert error.param == "input[0]"


def test_dimensions_are_cut_and_normal_again(minilm: Driver) -> None:
    whole = vectors_of(minilm, EmbedRequest(("x",)))[0]
    cut = vectors_of(minilm, EmbedRequest(("x",), dimensions=10))[0]
    assert np.allclose(cut, whole[:10] / np.linalg.norm(whole[:10]), atol=1e-6)
    error = minilm.refused(EmbedRequest(("x",), dimensions=385))
    assert error.param == "dimensions"


def test_too_long_an_input_is_refused_or_cut(minilm: Driver) -> None:
    long = "word " * 600
    error = minilm.refused(EmbedRequest(("short", long)))
    assert isinstance(error, BadRequest)
    assert (error.param, error.code) == ("input[1]", "context_length_exceeded")
    engine, driver = load(engine={"kind": "embed", "truncate": True})
    assert vectors_of(driver, EmbedRequest((long,))).shape == (1, 384)
    engine.close()


def test_a_passed_deadline_is_not_computed(minilm: Driver) -> None:
    steps = minilm.engine.stats().steps
    error = minilm.refused(EmbedRequest(("x",), deadline_s=time.monotonic() - 1))
    assert isinstance(error, DeadlineExceeded)
    assert minilm.engine.stats().steps == steps


@pytest.mark.parametrize(
    ("engine", "says"),
    [
        ({"kind": "embed", "max_tokens": 5000}, "positions"),
        ({"kind": "embed", "runtime": "openvino"}, "openvino"),
    ],
)
def test_what_cannot_be_is_said(engine: dict[str, Any], says: str) -> None:
    spec = {"engine": engine} if "max_tokens" in engine else {"engine": engine, "dtype": "float16"}
    with pytest.raises(BadRequest, match=says):
        load(**spec)


def test_a_directory_that_is_no_encoder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadRequest, match=r"config\.json"):
        Driver(EmbedEngine()).load({"source": f"file://{tmp_path}", "engine": "embed"}, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(BadRequest, match="tokenizer"):
        Driver(EmbedEngine()).load({"source": f"file://{tmp_path}", "engine": "embed"}, tmp_path)
