"""The protocol between a replica and what computes in it.

An engine lives in a process of its own (see `host.py`): it is built, `load`ed once, and then
given requests from one thread. It answers through `emit`, from any thread it likes, with lists
of (request id, event): one list per step however many requests shared the step. A request ends
with exactly one terminal event. That is all a replica knows about an engine.

Most custom engines are plain functions; `FunctionEngine` turns those into an engine.
"""

from __future__ import annotations

import abc
import asyncio
import inspect
import logging
import threading
import time
from collections.abc import (
    AsyncIterator,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Sequence,
)
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from nearfield.api.events import (
    Completed,
    Embedded,
    EmbedRequest,
    Event,
    Failed,
    GenerateRequest,
    Inferred,
    Request,
    Task,
    TensorRequest,
    Text,
    Timings,
)
from nearfield.core.errors import BadRequest, DeadlineExceeded, EngineFailed, NearfieldError
from nearfield.core.spec import CustomEngine, ModelSpec
from numpy.typing import NDArray

Emit = Callable[[Sequence[tuple[str, Event]]], None]
Result = TypeVar("Result")
Job = TypeVar("Job")
log = logging.getLogger("nearfield.engine")


@dataclass(frozen=True, slots=True)
class TensorMetadata:
    """A model's input or output as the Open Inference Protocol names it; -1: any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a loaded engine can do; the replica refuses the rest before the engine sees it.

    Attributes:
        tasks: which requests it takes.
        max_model_len: longest prompt plus output, tokens.
        chat: it has a chat template. tool_format: how its calls look, None if its template
            takes no tools (a key of `nearfield.api.tools.FORMATS`).
        dimensions: length of an embedding.
        inputs, outputs: of a tensor model.
        platform: for OIP metadata. detail: for people (`status`), never relied on.
    """

    tasks: frozenset[Task]
    platform: str
    max_model_len: int | None = None
    chat: bool = False
    tool_format: str | None = None
    dimensions: int | None = None
    inputs: tuple[TensorMetadata, ...] = ()
    outputs: tuple[TensorMetadata, ...] = ()
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A moment of an engine, for metrics and routing.

    kv_used, kv_total are tokens; `queue_age_s` is how long the oldest waiting request waits.
    """

    running: int = 0
    waiting: int = 0
    queue_age_s: float = 0.0
    kv_used: int = 0
    kv_total: int = 0
    steps: int = 0
    batch_size: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Slice:
    """A TPU slice that is this replica's alone (`slice` in the spec).

    Attributes:
        hosts: their addresses, this one first. chips: of each.
        placement_group: id of the one that holds all chips, a bundle for each host in this order.
            An engine starts its workers in it, with Ray.
    """

    name: str
    hosts: tuple[str, ...]
    chips: int
    placement_group: str


@dataclass(frozen=True, slots=True)
class EngineContext:
    """What an engine is given to load.

    Attributes:
        spec: the model's spec. weights: its local directory, None for engines without.
        threads: CPU threads it may use. emit: how it answers.
        slice: where the spec asks for one.
    """

    spec: ModelSpec
    weights: Path | None
    threads: int
    emit: Emit
    slice: Slice | None = None

    @property
    def options(self) -> dict[str, Any]:
        """A custom engine's `options` in the spec."""
        engine = self.spec.engine
        return engine.options if isinstance(engine, CustomEngine) else {}


class Engine(abc.ABC):
    """What a replica needs of an engine. All calls come from one thread."""

    @abc.abstractmethod
    def load(self, context: EngineContext) -> Capabilities:
        """Load the model and warm it up: when this returns, the first request is as fast as any.

        Raises:
            NearfieldError: the model cannot be served; the message says why, for the developer.
        """

    @abc.abstractmethod
    def submit(self, request_id: str, request: Request) -> None:
        """Take a request; never blocks for long. What is wrong with it comes back as `Failed`."""

    @abc.abstractmethod
    def cancel(self, request_id: str) -> None:
        """Stop working on a request, if it is still here. Nothing more is emitted for it."""

    def stats(self) -> EngineStats:
        """A cheap snapshot, from any thread."""
        return EngineStats()

    def close(self) -> None:  # noqa: B027 - nothing to let go of is the usual case
        """Let go of threads and devices."""


class ThreadEngine(Engine, Generic[Job]):
    """An engine that computes in one thread, on whatever waits when it is free.

    Call `prepare_thread` first in `load` and `start_thread` last. `_jobs` holds every request that
    has no answer yet; whoever takes one out of it is the one to answer. `_wake` guards it, and
    what `enqueue` fills.
    """

    def prepare_thread(self, emit: Emit) -> None:
        self._emit = emit
        self._jobs: dict[str, Job] = {}
        self._wake = threading.Condition()
        self._closed = False
        self._running = self._steps = self._tokens = 0

    def start_thread(self) -> None:
        self._thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self._thread.start()

    @abc.abstractmethod
    def job(self, request_id: str, request: Request) -> Job:
        """Check and prepare a request, in any thread.

        Raises:
            BadRequest: what is wrong with it.
        """

    @abc.abstractmethod
    def enqueue(self, job: Job) -> None:
        """Let it wait for the thread. `_wake` is held."""

    @abc.abstractmethod
    def run(self) -> None:
        """What the thread does, until `_closed`."""

    def submit(self, request_id: str, request: Request) -> None:
        try:
            job = self.job(request_id, request)
        except NearfieldError as error:
            self._emit([(request_id, Failed(error))])
            return
        with self._wake:
            self._jobs[request_id] = job
            self.enqueue(job)
            self._wake.notify()

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join(timeout=10)


class LoopEngine(Engine):
    """An engine whose requests are coroutines in an event loop of its own.

    Call `start_loop` in `load`, and answer one request at a time in `answer`: emit what comes
    on the way, return what ends it, raise what goes wrong.
    """

    def start_loop(
        self, emit: Emit, tasks: Iterable[Task], executor: Executor | None = None
    ) -> None:
        """Start the loop. `tasks`: what `answer` is given; the rest is refused before it."""
        self._emit = emit
        self._abilities = frozenset(tasks)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._executor = executor
        self._loop = asyncio.new_event_loop()
        if isinstance(executor, ThreadPoolExecutor):
            self._loop.set_default_executor(executor)
        threading.Thread(target=self._loop.run_forever, name="engine", daemon=True).start()

    @abc.abstractmethod
    async def answer(self, request_id: str, request: Request, started_s: float) -> Event:
        """Answer a request: the event that ends it. Cancelled when nobody waits any more.

        Raises:
            NearfieldError: what the caller is told.
        """

    def failure(self, error: Exception) -> NearfieldError:
        """What the caller is told of any other exception; the log has the traceback."""
        log.error("%s failed on a request", type(self).__name__, exc_info=error)
        return EngineFailed("The model failed on this request.")

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Run something in the loop and wait for it (in `load` and `close`)."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def submit(self, request_id: str, request: Request) -> None:
        def start() -> None:
            task = self._loop.create_task(self._answer(request_id, request))
            self._tasks[request_id] = task
            task.add_done_callback(lambda _: self._tasks.pop(request_id, None))

        self._loop.call_soon_threadsafe(start)

    def cancel(self, request_id: str) -> None:
        def stop() -> None:
            if task := self._tasks.get(request_id):
                task.cancel()

        self._loop.call_soon_threadsafe(stop)

    def stats(self) -> EngineStats:
        return EngineStats(running=len(self._tasks))

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)

    async def _answer(self, request_id: str, request: Request) -> None:
        started_s = time.monotonic()
        deadline_s = request.deadline_s
        left_s = None if deadline_s is None else max(0.0, deadline_s - started_s)
        try:
            if request.task not in self._abilities:
                does = ", ".join(sorted(self._abilities))
                raise BadRequest(f"This model does {does}; it does not {request.task}.")
            if left_s == 0:
                raise TimeoutError
            async with asyncio.timeout(left_s):
                event = await self.answer(request_id, request, started_s)
        except TimeoutError:
            event = Failed(DeadlineExceeded("The request's deadline passed before its answer."))
        except NearfieldError as error:
            event = Failed(error)
        except Exception as error:  # noqa: BLE001 - whatever it was, the caller must be told
            event = Failed(self.failure(error))
        self._emit([(request_id, event)])


class FunctionEngine(LoopEngine):
    """An engine made of one plain method: write the one your model needs.

        class Shout(FunctionEngine):
            def generate(self, request):          # yield text
                yield request.prompt.upper()

        class Norms(FunctionEngine):
            inputs = (TensorMetadata("x", "FP32", (-1, 3)),)
            outputs = (TensorMetadata("norm", "FP32", (-1,)),)
            def infer(self, inputs):              # {name: array} -> {name: array}
                return {"norm": np.linalg.norm(inputs["x"], axis=-1)}

        class Hashes(FunctionEngine):
            dimensions = 8
            def embed(self, texts):               # list[str] -> float32 [n, dimensions]
                ...

    Override `setup(context)` to load weights. Methods may be `async`; plain ones run in a thread
    each, at most `spec.limits.max_running` at a time (the replica sees to that).
    """

    inputs: ClassVar[tuple[TensorMetadata, ...]] = ()
    outputs: ClassVar[tuple[TensorMetadata, ...]] = ()
    dimensions: ClassVar[int | None] = None

    generate: Callable[[GenerateRequest], Iterable[str] | AsyncIterator[str]]
    embed: Callable[[list[str]], NDArray[np.float32]]
    infer: Callable[[dict[str, NDArray[Any]]], dict[str, NDArray[Any]]]

    def setup(self, context: EngineContext) -> None:
        """Load what the model needs. `context.options` holds the spec's options."""

    def load(self, context: EngineContext) -> Capabilities:
        methods: dict[Task, str] = {"generate": "generate", "embed": "embed", "tensor": "infer"}
        tasks = frozenset(t for t, m in methods.items() if callable(getattr(self, m, None)))
        if not tasks:
            raise BadRequest(f"{type(self).__name__} defines none of generate, embed and infer")
        if "embed" in tasks and self.dimensions is None:
            raise BadRequest(f"{type(self).__name__} defines embed but not dimensions")
        if "tensor" in tasks and not (self.inputs and self.outputs):
            raise BadRequest(f"{type(self).__name__} defines infer but not inputs and outputs")
        # The loop's own default has room for only a few more threads than there are CPUs.
        threads = ThreadPoolExecutor(context.spec.limits.max_running, thread_name_prefix="engine")
        self.start_loop(context.emit, tasks, threads)
        self.setup(context)
        return Capabilities(
            tasks=tasks,
            platform=f"nearfield_{type(self).__name__.lower()}",
            chat="generate" in tasks,
            dimensions=self.dimensions,
            inputs=self.inputs,
            outputs=self.outputs,
        )

    async def answer(self, request_id: str, request: Request, started_s: float) -> Event:
        def timings() -> Timings:
            return Timings(started_s, prefill_s=time.monotonic() - started_s)

        if isinstance(request, TensorRequest):
            outputs = await _run(self.infer, request.inputs)
            wanted = request.outputs or tuple(outputs)
            return Inferred({name: outputs[name] for name in wanted}, timings())
        if isinstance(request, EmbedRequest):
            texts = [item for item in request.inputs if isinstance(item, str)]
            if len(texts) != len(request.inputs):
                raise BadRequest("input must be text: this model takes no tokens", param="input")
            vectors = np.asarray(await _run(self.embed, texts), dtype=np.float32)
            return Embedded(vectors, sum(len(t.split()) for t in texts), timings())
        tokens, first_s = 0, None
        async for text in _texts(self.generate, request):
            tokens += 1
            first_s = first_s or time.monotonic()
            self._emit([(request_id, Text(text))])
        self._emit([(request_id, Text("", tokens=0, finish_reason="stop"))])
        words = len(str(request.prompt or request.messages).split())
        ended_s = time.monotonic()
        first_s = first_s or ended_s
        prefill_s, decode_s = first_s - started_s, ended_s - first_s
        return Completed(words, tokens, Timings(started_s, 0.0, prefill_s, decode_s))


async def _run(function: Callable[..., Any], *args: Any) -> Any:
    if inspect.iscoroutinefunction(function):
        return await function(*args)
    return await asyncio.to_thread(function, *args)


_END = object()


async def _texts(
    function: Callable[[GenerateRequest], Any], request: GenerateRequest
) -> AsyncIterator[str]:
    produced = function(request)
    if inspect.isasyncgen(produced):
        async for text in produced:
            yield str(text)
        return
    iterator: Iterator[str] = iter(produced)
    while (text := await asyncio.to_thread(next, iterator, _END)) is not _END:
        yield str(text)
