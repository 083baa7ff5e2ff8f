"""The engine's process and its host, with real processes that crash, hang and leak."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nearfield.api.events import (
    Completed,
    Embedded,
    EmbedRequest,
    Sampling,
    Text,
    Timings,
)
from nearfield.core.errors import BadRequest, EngineFailed, NearfieldError
from nearfield.serving.framing import (
    Channel,
    FrameReader,
    Kind,
    encode,
    pack_events,
    unpack_event,
)
from nearfield.serving.host import EngineHost

from tests.support.hosting import (
    TICKER,
    alive,
    answer,
    error_of,
    program,
    running,
    spec_of,
    text_of,
    until,
)

# ---- framing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_bytes", [1, 3, 7, 1000, 10**9])
def test_frames_survive_any_cut(chunk_bytes: int) -> None:
    messages = [(Kind.EVENTS, [("1", "x" * n)]) for n in (0, 1, 70_000)] + [(Kind.CLOSE, None)]
    stream = b"".join(part for kind, payload in messages for part in encode(kind, payload))
    reader = FrameReader()
    read: list[tuple[int, Any]] = []
    for start in range(0, len(stream), chunk_bytes):
        read += reader.feed(stream[start : start + chunk_bytes])
    assert read == [(int(kind), payload) for kind, payload in messages]


def test_channel_end_of_stream_is_none_even_inside_a_frame() -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(theirs)
    ours.sendall(encode(Kind.SUBMIT, ("1", "request"))[0])
    ours.sendall(encode(Kind.CANCEL, "1")[0][:-1])
    ours.close()
    assert channel.receive() == (Kind.SUBMIT, ("1", "request"))
    assert channel.receive() is None
    channel.close()


def test_a_token_crosses_as_a_tuple() -> None:
    done = Text("a", finish_reason="stop")
    assert pack_events([("1", done)]) == [("1", ("a", 0, 1, "stop", None, None))]


def test_vectors_cross_as_their_bytes_whatever_their_layout() -> None:
    columns = np.arange(6, dtype=np.float64).reshape(3, 2).T  # a custom engine's own idea of them
    embedded = Embedded(columns, 5, Timings(1.0, queue_s=0.5, batch_size=2))
    [(name, packed)] = pack_events([("1", embedded)])
    assert name == "1"
    assert type(packed) is list
    again = unpack_event(packed)
    assert isinstance(again, Embedded)
    assert again.vectors.dtype == np.float32
    assert np.array_equal(again.vectors, columns)
    assert (again.prompt_tokens, again.timings) == (5, embedded.timings)


# ---- answers ----------------------------------------------------------------------------------


async def test_streams_and_completes() -> None:
    async with running() as host:
        assert host.capabilities.tasks == {"generate", "embed", "tensor"}
        events = await answer(host, "say:a say:b say:c")
        assert text_of(events) == "abc"
        assert isinstance(events[-1], Completed)
        assert events[-1].completion_tokens == 3


async def test_whole_answers_come_in_one_piece() -> None:
    async with running() as host:
        with host.open(program("say:a sleep:0.05 say:b"), whole=True) as flight:
            pieces = [events async for events in flight]
        assert len(pieces) == 1
        assert text_of(pieces[0]) == "ab"


def test_on_uvloop_in_a_thread() -> None:
    """As in a Serve replica."""

    async def main() -> str:
        async with running() as host:
            crashed, answered = await asyncio.gather(
                answer(host, "exit:1"), answer(host, "sleep:0.1 say:a say:b")
            )
            assert error_of(crashed).code == "engine_crashed"
            return text_of(answered)

    uvloop = pytest.importorskip("uvloop")
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(uvloop.run, main()).result(30) == "ab"


async def test_embeds() -> None:
    async with running() as host:
        with host.open(EmbedRequest(("four", "sixsix"))) as flight:
            ((event,),) = [events async for events in flight]
        assert isinstance(event, Embedded)
        assert event.vectors[:, 0].tolist() == [4, 6]


async def test_two_hundred_at_once() -> None:
    async with running() as host:
        answers = await asyncio.gather(
            *(answer(host, f"say:{n} sleep:0.01 say:!") for n in range(200))
        )
        assert [text_of(a) for a in answers] == [f"{n}!" for n in range(200)]


async def test_an_exception_fails_its_request_alone() -> None:
    async with running() as host:
        good, bad = await asyncio.gather(
            answer(host, "sleep:0.05 say:fine"), answer(host, "say:a raise")
        )
        assert text_of(good) == "fine"
        assert error_of(bad).code == "engine_failed"
        assert "secret" not in error_of(bad).message
        assert host.crashes == 0


async def test_leaving_cancels_in_the_engine() -> None:
    async with running(spec_of(TICKER)) as host:
        request = program("x", sampling=Sampling(max_tokens=100_000))
        with host.open(request) as flight:
            await anext(flight)
            await until(lambda: host.stats.running == 1)
        await until(lambda: host.stats.running == 0)
        assert host.healthy


async def test_a_cancelled_consumer_cancels_in_the_engine() -> None:
    async with running(spec_of(TICKER, tokens=100_000)) as host:
        task = asyncio.create_task(answer(host, "x"))
        await until(lambda: host.stats.running == 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: host.stats.running == 0)


# ---- loading ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"refuse": "no such thing"}, BadRequest, "no such thing"),
        ({"raise": "boom"}, EngineFailed, "RuntimeError: boom"),
        ({"exit": 3}, EngineFailed, "exited with code 3 while loading"),
    ],
)
async def test_load_failures_say_why(
    options: dict[str, Any], kind: type[NearfieldError], message: str
) -> None:
    host = EngineHost(spec_of(**options))
    with pytest.raises(kind, match=message):
        await host.start()
    assert host.pid is None
    await host.close()


async def test_last_words_go_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(EngineFailed):
        await EngineHost(spec_of(exit=3)).start()
    assert "these are the last words" in caplog.text


@pytest.mark.parametrize(
    ("import_path", "message"),
    [
        ("no_such_module_anywhere:Engine", "there is no module"),
        ("tests.support.programs:Nothing", "has no Nothing"),
        ("tests.support.programs:Path", "is not an engine"),
    ],
)
async def test_a_custom_engine_that_cannot_be_used(import_path: str, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        await EngineHost(spec_of(import_path)).start()


# ---- nothing is left behind -------------------------------------------------------------------


def descriptors() -> int:
    gc.collect()
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def test_closing_leaves_no_process_and_no_descriptor() -> None:
    async def once() -> int:
        async with running() as host:
            assert host.pid is not None
            await answer(host, "say:a")
            await answer(host, "exit:1")
            await answer(host, "say:b")
            return host.pid

    await once()
    before = descriptors()
    pid = await once()
    assert not alive(pid)
    assert descriptors() == before


async def test_closing_ends_what_is_inside() -> None:
    async with running() as host:
        task = asyncio.create_task(answer(host, "sleep:60"))
        await asyncio.sleep(0.05)
        await host.close()
        assert error_of(await task).code == "engine_down"


async def test_the_process_dies_with_its_replica(tmp_path: Path) -> None:
    """Even when the replica is killed with no chance to clean up."""
    script = (
        "import asyncio, sys\n"
        "from nearfield.serving.host import EngineHost\n"
        "from tests.support.hosting import spec_of\n"
        "async def main():\n"
        "    host = EngineHost(spec_of()); await host.start()\n"
        "    print(host.pid, flush=True); await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    import sys

    replica = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p or "." for p in sys.path)},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    assert replica.stdout is not None
    pid = int(await replica.stdout.readline())
    assert alive(pid)
    replica.kill()
    await replica.wait()
    await until(lambda: not alive(pid))
