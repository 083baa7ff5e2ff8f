"""What a replica may rely on, whatever the engine. Every engine passes the same suite.

An engine of your own: add it to `ENGINES` and run `make test-fast`.
"""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nearfield.api.events import (
    EmbedRequest,
    Event,
    Failed,
    GenerateRequest,
    Request,
    Sampling,
    TensorRequest,
    Text,
)
from nearfield.core.errors import BadRequest, DeadlineExceeded
from nearfield.core.spec import ModelSpec
from nearfield.serving.engines.base import Engine, FunctionEngine
from nearfield.serving.engines.table import ENGINES as KINDS
from nearfield.serving.engines.table import create_engine
from nearfield.weights import resolve

from tests.support.engines import Driver
from tests.support.tensors import write_doubling_model
from tests.support.tiny_lms import make_lm
from tests.support.upstream import running_upstream


@dataclass
class Subject:
    """An engine under test.

    `good(i)`: requests that are answered; `bad`: one of the right task that must be refused;
    `endless`: one that would run for long, to be cancelled, if the engine has any.
    """

    driver: Driver
    good: Callable[[int], Request]
    bad: Request | None
    wrong_task: Request
    endless: Request | None = None

    @property
    def engine(self) -> Engine:
        return self.driver.engine


LONG = Sampling(max_tokens=450, ignore_eos=True)


def _load(spec: dict[str, Any], weights: Path | None = None) -> Driver:
    model = ModelSpec.model_validate({"model": "m", **spec})
    driver = Driver(create_engine(model))
    driver.load(spec, weights if weights is not None else resolve(model))
    return driver


def _generate(tmp: Path, stack: ExitStack) -> Subject:
    make_lm(tmp)
    return Subject(
        _load({"engine": "generate", "source": f"file://{tmp}"}),
        lambda i: GenerateRequest(prompt=f"{i}", sampling=Sampling(max_tokens=3 + i % 5)),
        GenerateRequest(prompt="a" * 600),
        EmbedRequest(("x",)),
        GenerateRequest(prompt="x", sampling=LONG),
    )


def _vllm(tmp: Path, stack: ExitStack) -> Subject:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: it needs a GPU (pip install 'nearfield[vllm]')")
    make_lm(tmp)
    driver = _load({"engine": "vllm", "source": f"file://{tmp}"})
    return Subject(
        driver,
        lambda i: GenerateRequest(prompt=f"{i}", sampling=Sampling(max_tokens=3 + i % 5)),
        GenerateRequest(prompt="a" * 600),
        EmbedRequest(("x",)),
        GenerateRequest(prompt="x", sampling=LONG),
    )


def _embed(tmp: Path, stack: ExitStack) -> Subject:
    return Subject(
        _load({"engine": "embed", "source": "builtin://minilm"}),
        lambda i: EmbedRequest(("word " * (1 + i % 7), f"{i}")),
        EmbedRequest(("word " * 600,)),
        GenerateRequest(prompt="x"),
    )


def _tensor(tmp: Path, stack: ExitStack) -> Subject:
    write_doubling_model(tmp)
    engine = {"kind": "tensor", "max_batch": 8}
    return Subject(
        _load({"engine": engine, "source": f"file://{tmp}"}),
        lambda i: TensorRequest({"x": np.full((1 + i % 3, 2), i, np.float32)}),
        TensorRequest({"x": np.zeros((1, 3), np.float32)}),
        EmbedRequest(("x",)),
    )


def _remote(tmp: Path, stack: ExitStack) -> Subject:
    _, url = stack.enter_context(running_upstream())
    return Subject(
        _load({"engine": {"kind": "remote", "url": f"{url}/v1"}}),
        lambda i: GenerateRequest(prompt=f"word {i}"),
        GenerateRequest(prompt="fail 400"),
        EmbedRequest(("x",)),
        GenerateRequest(prompt="slow"),
    )


def _remote_tensors(tmp: Path, stack: ExitStack) -> Subject:
    _, url = stack.enter_context(running_upstream())
    engine = {"kind": "remote", "url": url, "protocol": "oip", "task": "tensor"}
    return Subject(
        _load({"engine": {**engine, "upstream_model": "tensors"}}),
        lambda i: TensorRequest({"x": np.full((1 + i % 3, 2), i, np.float32)}),
        TensorRequest({"x": np.full((1, 2), np.nan, np.float32)}),
        EmbedRequest(("x",)),
    )


class Words(FunctionEngine):
    """A custom engine: says the prompt's words; refuses "bad"; "on and on" never ends."""

    def generate(self, request: GenerateRequest) -> Iterator[str]:
        prompt = request.prompt or ""
        if prompt == "bad":
            raise BadRequest("bad is bad", param="prompt")
        while prompt == "on and on":
            yield "on "
            time.sleep(0.001)
        yield from prompt.split()


def _custom(tmp: Path, stack: ExitStack) -> Subject:
    driver = Driver(Words())
    driver.load({"engine": "tests.contract.test_engines:Words"}, None)
    return Subject(
        driver,
        lambda i: GenerateRequest(prompt=f"word {i}"),
        GenerateRequest(prompt="bad"),
        EmbedRequest(("x",)),
        GenerateRequest(prompt="on and on"),
    )


ENGINES: dict[str, Callable[[Path, ExitStack], Subject]] = {
    "generate": _generate,
    "embed": _embed,
    "tensor": _tensor,
    "remote": _remote,
    "remote tensors": _remote_tensors,
    "custom": _custom,
    "vllm": _vllm,
}


@pytest.fixture(scope="module", params=ENGINES, ids=lambda name: name.replace(" ", "-"))
def subject(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Subject]:
    with ExitStack() as stack:
        made = ENGINES[request.param](tmp_path_factory.mktemp("engine"), stack)
        yield made
        made.engine.close()


def ended(events: list[Event]) -> bool:
    return [event.terminal for event in events] == [False] * (len(events) - 1) + [True]


def test_every_engine_is_under_contract() -> None:
    assert {name.split()[0] for name in ENGINES} == {*KINDS, "custom"}


def test_loading_says_what_it_can_and_emits_nothing(subject: Subject) -> None:
    capabilities = subject.driver.capabilities
    assert capabilities is not None
    assert subject.good(0).task in capabilities.tasks
    assert subject.wrong_task.task not in capabilities.tasks
    assert capabilities.platform
    if "tensor" in capabilities.tasks:
        assert capabilities.inputs
        assert capabilities.outputs


def test_a_request_ends_with_exactly_one_terminal_event(subject: Subject) -> None:
    events = subject.driver.run(subject.good(1))
    assert ended(events)
    if subject.good(1).task == "generate":
        reasons = [e.finish_reason for e in events if isinstance(e, Text) and e.finish_reason]
        assert len(reasons) == 1


def test_fifty_at_once_are_all_answered_and_nothing_is_left(subject: Subject) -> None:
    for i in range(50):
        subject.engine.submit(f"many-{i}", subject.good(i))
    for i in range(50):
        events = subject.driver.wait(f"many-{i}")
        assert ended(events)
        assert not isinstance(events[-1], Failed), events[-1]
    _settles(subject)


def test_the_wrong_task_is_refused(subject: Subject) -> None:
    assert isinstance(subject.driver.refused(subject.wrong_task), BadRequest)


def test_a_bad_request_does_not_disturb_its_neighbours(subject: Subject) -> None:
    if subject.bad is None:
        pytest.skip("no request of the right task is wrong for this engine")
    for i in range(6):
        subject.engine.submit(f"neighbour-{i}", subject.good(i))
        subject.engine.submit(f"bad-{i}", subject.bad)
    for i in range(6):
        bad = subject.driver.wait(f"bad-{i}")
        assert len(bad) == 1
        assert isinstance(bad[0], Failed)
        assert isinstance(bad[0].error, BadRequest)
        assert not isinstance(subject.driver.wait(f"neighbour-{i}")[-1], Failed)


def test_a_deadline_in_the_past_is_not_executed(subject: Subject) -> None:
    from dataclasses import replace

    late = replace(subject.good(2), deadline_s=time.monotonic() - 1)
    assert isinstance(subject.driver.refused(late), DeadlineExceeded)


def test_a_cancelled_request_says_nothing_more(subject: Subject) -> None:
    request = subject.endless or subject.good(3)
    for i in range(8):
        subject.engine.submit(f"gone-{i}", request)
        subject.engine.cancel(f"gone-{i}")
    if subject.endless is not None:
        subject.engine.submit("going", subject.endless)
        subject.driver.wait("going", count=1)
        subject.engine.cancel("going")
    _settles(subject)
    seen = {name: len(events) for name, events in subject.driver.events.items()}
    subject.driver.run(subject.good(4), "after")
    for i in range(8):
        assert len(subject.driver.events.get(f"gone-{i}", [])) == seen.get(f"gone-{i}", 0)
    if subject.endless is not None:
        assert not subject.driver.events["going"][-1].terminal


def test_cancelling_what_is_not_there_is_nothing(subject: Subject) -> None:
    subject.engine.cancel("never submitted")
    subject.driver.run(subject.good(5), "done")
    subject.engine.cancel("done")
    assert ended(subject.driver.run(subject.good(5), "still works"))


@pytest.mark.parametrize("name", ["generate", "embed", "tensor", "custom"])
def test_closing_ends_its_threads(name: str, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with ExitStack() as stack:
        subject = ENGINES[name](tmp_path, stack)
        subject.driver.run(subject.good(1))
        subject.engine.close()
    # The libraries' own threads (progress bars, pools that load weights) may stay: ours have names.
    ours = {
        t
        for t in set(threading.enumerate()) - before
        if "tqdm" not in type(t).__module__ and not t.name.startswith("ThreadPoolExecutor-")
    }
    for thread in ours:
        thread.join(timeout=10)
    assert not [thread.name for thread in ours if thread.is_alive()]


def _settles(subject: Subject) -> None:
    """The engine comes to rest: nothing runs, nothing waits."""
    deadline_s = time.monotonic() + 20
    while time.monotonic() < deadline_s:
        stats = subject.engine.stats()
        if stats.running == stats.waiting == 0:
            return
        threading.Event().wait(0.01)
    raise AssertionError(subject.engine.stats())
