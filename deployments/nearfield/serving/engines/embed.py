"""Sentence embeddings with adaptive batching.

Inputs are tokenised as they arrive; one thread takes batches by `policy.batching` and computes
them. An input is the unit: the inputs of one request may go in different batches, and its answer
leaves when the last of them is computed.

Runtimes: BERT encoders run on OpenVINO or ONNX Runtime over a graph we build, whose batches are
packed without padding (`bert_onnx`, docs/adr/0006); everything else, and every GPU, on torch, in
batches of like length.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
from nearfield.api.events import Embedded, EmbedRequest, Event, Failed, Request, Timings
from nearfield.core.errors import BadRequest, DeadlineExceeded, EngineFailed, NearfieldError
from nearfield.core.spec import EmbedEngine as EmbedSpec
from nearfield.policy.batching import BatchCost, next_batch
from nearfield.serving.engines.base import (
    Capabilities,
    EngineContext,
    EngineStats,
    ThreadEngine,
)
from nearfield.serving.engines.embed_runtimes import EmbedModel, Runtime, open_runtime
from nearfield.serving.engines.text import load_tokenizer
from numpy.typing import NDArray

log = logging.getLogger("nearfield.engine")


@dataclass(slots=True)
class Job:
    """A request: its inputs' tokens and the vectors computed so far. Times are monotonic."""

    request_id: str
    request: EmbedRequest
    tokens: list[list[int]]
    vectors: list[NDArray[np.float32] | None]
    arrived_s: float
    started_s: float | None = None
    batch_size: int = 1
    batches: int = 0
    cancelled: bool = False


@dataclass(slots=True)
class Item:
    """One input of a job, waiting."""

    job: Job
    index: int
    length: int = field(init=False)

    def __post_init__(self) -> None:
        self.length = len(self.job.tokens[self.index])


class EmbedEngine(ThreadEngine[Job]):
    """Adaptive batching over a `Runtime`."""

    def load(self, context: EngineContext) -> Capabilities:
        spec = self._spec = cast(EmbedSpec, context.spec.engine)
        self.prepare_thread(context.emit)
        if context.weights is None:
            raise BadRequest("engine embed needs a source")
        model = self._model = EmbedModel.read(context.weights, spec)
        self._tokenizer = load_tokenizer(context.weights)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._runtime: Runtime = open_runtime(model, context.spec, context.threads)
        self._cost = BatchCost()
        self._waiting: deque[Item] = deque()
        self._warm_up()
        self.start_thread()
        return Capabilities(
            tasks=frozenset({"embed"}),
            platform=f"nearfield_embed_{self._runtime.name}",
            max_model_len=model.max_tokens,
            dimensions=self._runtime.dimensions,
            detail={
                "architecture": model.architecture,
                "runtime": self._runtime.name,
                "pooling": model.pooling,
                "normalize": model.normalize,
                "dtype": self._runtime.dtype,
            },
        )

    # ---- any thread -------------------------------------------------------------------------

    def cancel(self, request_id: str) -> None:
        with self._wake:
            if job := self._jobs.pop(request_id, None):
                job.cancelled = True
                self._waiting = deque(item for item in self._waiting if item.job is not job)

    def stats(self) -> EngineStats:
        with self._wake:
            started = sum(job.started_s is not None for job in self._jobs.values())
            waiting = len(self._jobs) - started
            oldest_s = self._waiting[0].job.arrived_s if self._waiting else None
        return EngineStats(
            running=started,
            waiting=waiting,
            queue_age_s=0.0 if oldest_s is None else time.monotonic() - oldest_s,
            steps=self._steps,
            batch_size=self._running,
            tokens=self._tokens,
        )

    def enqueue(self, job: Job) -> None:
        self._waiting.extend(Item(job, index) for index in range(len(job.tokens)))

    def job(self, request_id: str, request: Request) -> Job:
        """Check and tokenise a request.

        Raises:
            BadRequest: too long an input, tokens outside the vocabulary, too many dimensions.
        """
        if not isinstance(request, EmbedRequest):
            raise BadRequest("This model computes embeddings; it takes no other requests.")
        dimensions = request.dimensions
        if dimensions is not None and dimensions > self._runtime.dimensions:
            raise BadRequest(
                f"dimensions is {dimensions}; this model's vectors have "
                f"{self._runtime.dimensions}.",
                param="dimensions",
            )
        tokens = self._tokenize(request.inputs)
        limit = self._model.max_tokens
        for index, ids in enumerate(tokens):
            if len(ids) <= limit:
                continue
            if not self._spec.truncate:
                raise BadRequest(
                    f"input[{index}] is {len(ids)} tokens long; this model takes {limit}. Split "
                    "it, or set engine.truncate in the model's spec.",
                    param=f"input[{index}]" if len(tokens) > 1 else "input",
                    code="context_length_exceeded",
                )
            tokens[index] = [*ids[: limit - 1], ids[-1]]  # the closing special token stays
        return Job(request_id, request, tokens, [None] * len(tokens), time.monotonic())

    def _tokenize(self, inputs: Sequence[str | tuple[int, ...]]) -> list[list[int]]:
        if isinstance(inputs[0], str):
            texts = [str(text) for text in inputs]
            if len(texts) == 1:
                return [self._tokenizer.encode(texts[0]).ids]
            return [encoding.ids for encoding in self._tokenizer.encode_batch(texts)]
        vocabulary = self._model.vocab_size
        rows = [[int(token) for token in row] for row in inputs]
        for index, row in enumerate(rows):
            if any(not 0 <= token < vocabulary for token in row):
                raise BadRequest(
                    f"input[{index}] holds a token outside of 0..{vocabulary - 1}.",
                    param=f"input[{index}]",
                )
        return rows

    # ---- the model's thread -----------------------------------------------------------------

    def _warm_up(self) -> None:
        """Run several shapes: kernels plan on the first call, and the cost is learned."""
        widths = [min(width, self._model.max_tokens) for width in (8, 16, 32, 64)]
        for _ in range(2):
            for rows in (1, min(4, self._spec.max_batch)):
                for width in widths:
                    self._compute([[0] * width] * rows)

    def _compute(self, batch: list[list[int]]) -> NDArray[np.float32]:
        began_s = time.perf_counter()
        vectors = self._runtime.embed(batch)
        took_s = time.perf_counter() - began_s
        lengths = [len(tokens) for tokens in batch]
        tokens = sum(lengths) if self._runtime.packs else len(lengths) * max(lengths)
        self._cost = self._cost.learn(tokens, took_s)
        return vectors

    def run(self) -> None:
        while True:
            with self._wake:
                while not (self._closed or self._waiting):
                    self._wake.wait()
                if self._closed:
                    return
                events, batch = self._take()
            if batch:
                events += self._answer(batch)
            if events:
                self._emit(events)

    def _take(self) -> tuple[list[tuple[str, Event]], list[Item]]:
        """Take the next batch out of the waiting; drop what is past its deadline."""
        now_s = time.monotonic()
        events: list[tuple[str, Event]] = []
        for job in {id(item.job): item.job for item in self._waiting}.values():
            if job.request.deadline_s is not None and job.request.deadline_s <= now_s:
                job.cancelled = True
                if self._jobs.pop(job.request_id, None):
                    message = "The request's deadline passed before it was computed."
                    events.append((job.request_id, Failed(DeadlineExceeded(message))))
        if events:
            self._waiting = deque(item for item in self._waiting if not item.job.cancelled)
        if not self._waiting:
            return events, []
        waited_s = now_s - self._waiting[0].job.arrived_s
        chosen = next_batch(
            [item.length for item in self._waiting],
            self._cost,
            max_batch=self._spec.max_batch,
            left_s=self._spec.slo_ms / 1000 - waited_s,
            packed=self._runtime.packs,
        )
        batch = [self._waiting[index] for index in chosen]
        taken = set(chosen)
        self._waiting = deque(
            item for index, item in enumerate(self._waiting) if index not in taken
        )
        for item in batch:
            item.job.started_s = item.job.started_s or now_s
        self._running = len(batch)
        return events, batch

    def _answer(self, batch: list[Item]) -> list[tuple[str, Event]]:
        try:
            vectors = self._compute([item.job.tokens[item.index] for item in batch])
        except Exception:
            log.exception("a batch failed")
            error = EngineFailed("The model failed on this request.")
            return self._fail({item.job.request_id for item in batch}, error)
        self._steps += 1
        self._tokens += sum(item.length for item in batch)
        complete: list[Job] = []
        for row, item in enumerate(batch):
            job = item.job
            job.vectors[item.index] = vectors[row]
            job.batches += 1
            job.batch_size = max(job.batch_size, len(batch))
            if job.batches == len(job.tokens):
                complete.append(job)
        events: list[tuple[str, Event]] = []
        with self._wake:
            self._running = 0
            for job in complete:
                if self._jobs.pop(job.request_id, None):
                    events.append((job.request_id, _embedded(job)))
        return events

    def _fail(self, requests: set[str], error: NearfieldError) -> list[tuple[str, Event]]:
        with self._wake:
            self._running = 0
            known = [request for request in requests if self._jobs.pop(request, None)]
            self._waiting = deque(
                item for item in self._waiting if item.job.request_id not in requests
            )
        return [(request, Failed(error)) for request in known]


def _embedded(job: Job) -> Embedded:
    vectors = np.stack([vector for vector in job.vectors if vector is not None])
    dimensions = job.request.dimensions
    if dimensions is not None and dimensions < vectors.shape[1]:
        vectors = vectors[:, :dimensions]
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors = vectors / np.maximum(lengths, 1e-12)
    started_s = job.started_s or job.arrived_s
    timings = Timings(
        started_s=job.arrived_s,
        queue_s=started_s - job.arrived_s,
        prefill_s=time.monotonic() - started_s,
        batch_size=job.batch_size,
        steps=job.batches,
    )
    return Embedded(vectors.astype(np.float32, copy=False), sum(map(len, job.tokens)), timings)
