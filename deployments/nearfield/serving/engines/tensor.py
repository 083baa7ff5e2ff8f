"""Any tensors-to-tensors model in ONNX, on ONNX Runtime.

With `max_batch` above 1, requests whose tensors differ only in their first dimension are joined
along it, waiting at most `max_wait_ms` for company.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import onnxruntime
from nearfield.api.events import Event, Failed, Inferred, Request, TensorRequest, Timings
from nearfield.api.oip import DTYPES
from nearfield.core.errors import (
    BadRequest,
    DeadlineExceeded,
    EngineFailed,
)
from nearfield.core.spec import TensorEngine as TensorSpec
from nearfield.serving.engines.base import (
    Capabilities,
    EngineContext,
    EngineStats,
    TensorMetadata,
    ThreadEngine,
)
from numpy.typing import NDArray

log = logging.getLogger("nearfield.engine")

DATATYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}
"""ONNX Runtime's element types as the Open Inference Protocol names them."""


@dataclass(slots=True)
class Job:
    """A request, waiting. `rows` is its first dimension, 1 where requests are not joined."""

    request_id: str
    request: TensorRequest
    rows: int
    arrived_s: float

    def joins(self, other: Job) -> bool:
        """Whether both can go in one batch."""
        if self.request.outputs != other.request.outputs:
            return False
        ours, theirs = self.request.inputs, other.request.inputs
        return all(ours[name].shape[1:] == theirs[name].shape[1:] for name in ours)


class TensorEngine(ThreadEngine[Job]):
    """One ONNX Runtime session and the thread that runs it."""

    def load(self, context: EngineContext) -> Capabilities:
        spec = self._spec = cast(TensorSpec, context.spec.engine)
        self.prepare_thread(context.emit)
        if context.weights is None:
            raise BadRequest("engine tensor needs a source")
        file = context.weights / spec.file
        if not file.is_file():
            raise BadRequest(
                f"engine.file is {spec.file}; the source holds no such file. It holds: "
                f"{', '.join(sorted(p.name for p in context.weights.glob('*.onnx')))}."
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = context.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(
                str(file), options, providers=_providers(context.spec.device)
            )
        except _ORT_ERRORS as error:
            raise BadRequest(f"source: {spec.file} cannot be loaded: {_reason(error)}") from error
        self._inputs = _metadata(self._session.get_inputs())
        self._outputs = _metadata(self._session.get_outputs())
        self._batches = spec.max_batch > 1
        if self._batches:
            self._require_free_rows()
        self._waiting: deque[Job] = deque()
        self.start_thread()
        return Capabilities(
            tasks=frozenset({"tensor"}),
            platform="onnxruntime_onnx",
            inputs=self._inputs,
            outputs=self._outputs,
            detail={"providers": self._session.get_providers(), "batches": self._batches},
        )

    def _require_free_rows(self) -> None:
        for tensor in (*self._inputs, *self._outputs):
            if not tensor.shape or tensor.shape[0] != -1:
                raise BadRequest(
                    f"engine.max_batch is {self._spec.max_batch}, but {tensor.name} has shape "
                    f"{list(tensor.shape)}: requests can only be joined along a first dimension of "
                    "any size. Set max_batch: 1."
                )

    # ---- any thread -------------------------------------------------------------------------

    def cancel(self, request_id: str) -> None:
        with self._wake:
            if job := self._jobs.pop(request_id, None):
                self._waiting = deque(other for other in self._waiting if other is not job)

    def stats(self) -> EngineStats:
        with self._wake:
            waiting = len(self._waiting)
            oldest_s = self._waiting[0].arrived_s if self._waiting else None
        return EngineStats(
            running=self._running,
            waiting=waiting,
            queue_age_s=0.0 if oldest_s is None else time.monotonic() - oldest_s,
            steps=self._steps,
            batch_size=self._running,
        )

    def enqueue(self, job: Job) -> None:
        self._waiting.append(job)

    def job(self, request_id: str, request: Request) -> Job:
        """Check a request against the model's metadata.

        Raises:
            BadRequest: an input is missing, unknown, or of another type or shape.
        """
        if not isinstance(request, TensorRequest):
            raise BadRequest("This model takes tensors; it takes no other requests.")
        declared = {tensor.name: tensor for tensor in self._inputs}
        if unknown := sorted(request.inputs.keys() - declared.keys()):
            raise BadRequest(
                f"The model has no input {unknown[0]}; it has {', '.join(declared)}.",
                param="inputs",
            )
        for name, tensor in declared.items():
            if name not in request.inputs:
                raise BadRequest(f"Missing input {name}.", param="inputs")
            _require(tensor, request.inputs[name])
        outputs = {tensor.name for tensor in self._outputs}
        if missing := [name for name in request.outputs if name not in outputs]:
            raise BadRequest(
                f"The model has no output {missing[0]}; it has {', '.join(sorted(outputs))}.",
                param="outputs",
            )
        rows = 1
        if self._batches:
            sizes = {name: array.shape[0] for name, array in request.inputs.items()}
            rows = next(iter(sizes.values()))
            if len(set(sizes.values())) > 1:
                raise BadRequest(
                    f"All inputs need the same first dimension; they have {sizes}.", param="inputs"
                )
        return Job(request_id, replace(request, inputs=_native(request)), rows, time.monotonic())

    # ---- the model's thread -----------------------------------------------------------------

    def run(self) -> None:
        while True:
            with self._wake:
                while not (self._closed or self._waiting):
                    self._wake.wait()
                if self._closed:
                    return
                self._await_company()
                events, batch = self._take()
            if batch:
                events += self._answer(batch)
            if events:
                self._emit(events)

    def _await_company(self) -> None:
        if not self._batches or not self._waiting:
            return
        until_s = self._waiting[0].arrived_s + self._spec.max_wait_ms / 1000
        while sum(job.rows for job in self._waiting) < self._spec.max_batch:
            left_s = until_s - time.monotonic()
            if left_s <= 0 or self._closed or not self._waiting:
                return
            self._wake.wait(left_s)

    def _take(self) -> tuple[list[tuple[str, Event]], list[Job]]:
        now_s = time.monotonic()
        events: list[tuple[str, Event]] = []
        batch: list[Job] = []
        rows = 0
        kept: deque[Job] = deque()
        for job in self._waiting:
            deadline_s = job.request.deadline_s
            if deadline_s is not None and deadline_s <= now_s:
                if self._jobs.pop(job.request_id, None):
                    message = "The request's deadline passed before it was computed."
                    events.append((job.request_id, Failed(DeadlineExceeded(message))))
            elif not batch or (
                self._batches and rows + job.rows <= self._spec.max_batch and job.joins(batch[0])
            ):
                batch.append(job)
                rows += job.rows
            else:
                kept.append(job)
        self._waiting = kept
        self._running = len(batch)
        return events, batch

    def _answer(self, batch: list[Job]) -> list[tuple[str, Event]]:
        started_s = time.monotonic()
        try:
            answers = self._compute(batch)
        except _ORT_ERRORS as error:
            if len(batch) > 1:
                # One of them may have brought the others down: each for itself.
                return [event for job in batch for event in self._answer([job])]
            log.exception("a request failed: %s", _reason(error))
            answers = [Failed(EngineFailed("The model failed on this request."))]
        self._steps += 1
        ended_s = time.monotonic()
        events: list[tuple[str, Event]] = []
        with self._wake:
            self._running = 0
            for job, answer in zip(batch, answers, strict=True):
                if self._jobs.pop(job.request_id, None) is None:
                    continue
                if isinstance(answer, Failed):
                    events.append((job.request_id, answer))
                    continue
                timings = Timings(
                    started_s=job.arrived_s,
                    queue_s=started_s - job.arrived_s,
                    prefill_s=ended_s - started_s,
                    batch_size=len(batch),
                    steps=1,
                )
                events.append((job.request_id, Inferred(answer, timings)))
        return events

    def _compute(self, batch: list[Job]) -> list[dict[str, NDArray[Any]] | Failed]:
        first = batch[0].request
        names = list(first.outputs or [tensor.name for tensor in self._outputs])
        feed = {
            name: np.concatenate([job.request.inputs[name] for job in batch])
            if len(batch) > 1
            else first.inputs[name]
            for name in first.inputs
        }
        results = self._session.run(names, feed)
        if len(batch) == 1:
            return [dict(zip(names, results, strict=True))]
        answers: list[dict[str, NDArray[Any]] | Failed] = []
        at = 0
        for job in batch:
            part = slice(at, at + job.rows)
            answers.append(
                {name: result[part] for name, result in zip(names, results, strict=True)}
            )
            at += job.rows
        return answers


_ORT_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    *(
        error
        for error in vars(onnxruntime.capi.onnxruntime_pybind11_state).values()
        if isinstance(error, type) and issubclass(error, Exception)
    ),
)
"""ONNX Runtime's exceptions have no common base class."""


def _reason(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]


def _providers(device: str) -> list[str]:
    available = onnxruntime.get_available_providers()
    if device == "cuda" and "CUDAExecutionProvider" not in available:
        raise BadRequest(
            "device is cuda, but this ONNX Runtime has no CUDA: pip install onnxruntime-gpu."
        )
    use_gpu = device != "cpu" and "CUDAExecutionProvider" in available
    return [*(["CUDAExecutionProvider"] if use_gpu else []), "CPUExecutionProvider"]


def _metadata(tensors: Sequence[Any]) -> tuple[TensorMetadata, ...]:
    described: list[TensorMetadata] = []
    for tensor in tensors:
        if tensor.type not in DATATYPES:
            raise BadRequest(f"source: {tensor.name} is a {tensor.type}, which is not served.")
        shape = tuple(size if isinstance(size, int) else -1 for size in tensor.shape)
        described.append(TensorMetadata(tensor.name, DATATYPES[tensor.type], shape))
    return tuple(described)


def _require(tensor: TensorMetadata, array: NDArray[Any]) -> None:
    if array.dtype != DTYPES[tensor.datatype]:
        raise BadRequest(
            f"Input {tensor.name} is {tensor.datatype}, not {array.dtype}.", param="inputs"
        )
    same = array.ndim == len(tensor.shape)
    fits = same and all(
        wanted in (-1, size) for size, wanted in zip(array.shape, tensor.shape, strict=True)
    )
    if not fits:
        raise BadRequest(
            f"Input {tensor.name} has shape {list(array.shape)}; the model takes "
            f"{list(tensor.shape)} (-1: any size).",
            param="inputs",
        )


def _native(request: TensorRequest) -> dict[str, NDArray[Any]]:
    """The inputs as ONNX Runtime takes them: its strings are text.

    Raises:
        BadRequest: an element is not UTF-8.
    """
    native = dict(request.inputs)
    for name, array in request.inputs.items():
        if array.dtype == object:
            try:
                texts = [e.decode() if isinstance(e, bytes) else str(e) for e in array.ravel()]
            except UnicodeDecodeError:
                raise BadRequest(
                    f"Input {name} holds bytes that are not UTF-8.", param="inputs"
                ) from None
            native[name] = np.array(texts, dtype=object).reshape(array.shape)
    return native
