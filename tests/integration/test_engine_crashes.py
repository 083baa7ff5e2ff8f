"""Engines that crash, hang and stop, in real processes: who fails, and who is answered."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest
from nearfield.api.events import Failed
from nearfield.core.errors import EngineFailed, Unavailable

from tests.support.hosting import (
    answer,
    error_of,
    program,
    running,
    spec_of,
    text_of,
    until,
)


@pytest.mark.parametrize("poison", ["exit:9", "segv", "say:streamed exit:9"])
async def test_only_the_poison_fails(poison: str) -> None:
    async with running() as host:
        others = [asyncio.create_task(answer(host, f"sleep:0.2 say:{n}")) for n in range(8)]
        await asyncio.sleep(0)
        bad = error_of(await answer(host, poison))
        assert (type(bad), bad.code) == (EngineFailed, "engine_crashed")
        assert [text_of(a) for a in await asyncio.gather(*others)] == [str(n) for n in range(8)]
        assert host.healthy
        assert text_of(await answer(host, "say:after")) == "after"


async def test_two_poisons_among_many() -> None:
    async with running() as host:
        prompts = [f"sleep:0.1 say:{n}" for n in range(6)]
        prompts[1:1] = ["sleep:0.05 exit:1"]
        prompts.append("sleep:0.02 segv")
        answers = await asyncio.gather(*(answer(host, p) for p in prompts))
        failed = [p for p, a in zip(prompts, answers, strict=True) if isinstance(a[-1], Failed)]
        assert failed == ["sleep:0.05 exit:1", "sleep:0.02 segv"]


async def test_a_streamed_answer_is_never_cut_silently() -> None:
    async with running() as host:
        with host.open(program("say:a sleep:30 say:b")) as flight:
            first = await anext(flight)
            assert text_of(first) == "a"
            assert host.pid is not None
            os.kill(host.pid, signal.SIGKILL)
            (last,) = await anext(flight)
        assert isinstance(last, Failed)
        assert last.error.code == "engine_crashed"


async def test_a_whole_answer_is_made_again_after_a_crash(tmp_path: Path) -> None:
    async with running() as host:
        task = asyncio.create_task(
            answer(host, f"say:a touch:{tmp_path / 'runs'} sleep:0.3 say:b", whole=True)
        )
        await until((tmp_path / "runs").exists)
        assert host.pid is not None
        os.kill(host.pid, signal.SIGKILL)
        assert text_of(await task) == "ab"
        assert len((tmp_path / "runs").read_text().split()) == 2


async def test_no_request_runs_more_than_twice(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    async with running() as host:
        events = await answer(host, f"touch:{runs} exit:1")
        assert error_of(events).code == "engine_crashed"
        assert len(runs.read_text().split()) == 2
        assert host.crashes == 2


async def test_arrivals_during_a_restart_wait_and_are_answered(tmp_path: Path) -> None:
    async with running() as host:
        poison = asyncio.create_task(answer(host, "exit:1"))
        await until(lambda: host.pid is None)
        late = [answer(host, f"touch:{tmp_path / str(n)} say:{n}") for n in range(20)]
        assert [text_of(a) for a in await asyncio.gather(*late)] == [str(n) for n in range(20)]
        assert error_of(await poison).code == "engine_crashed"
        # They never shared the engine with the suspect.
        assert all(len((tmp_path / str(n)).read_text().split()) == 1 for n in range(20))


async def test_a_suspect_that_left_is_not_run_again(tmp_path: Path) -> None:
    async with running() as host:
        task = asyncio.create_task(answer(host, f"touch:{tmp_path / 'runs'} sleep:30"))
        await until((tmp_path / "runs").exists)
        assert host.pid is not None
        os.kill(host.pid, signal.SIGKILL)
        await until(lambda: host.pid is None)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert text_of(await answer(host, "say:next")) == "next"
        assert len((tmp_path / "runs").read_text().split()) == 1


async def test_suspects_run_together_when_time_is_up() -> None:
    async with running(retry_alone_s=0.2) as host:
        tasks = [asyncio.create_task(answer(host, f"sleep:0.5 say:{n}")) for n in range(5)]
        await asyncio.sleep(0.1)
        assert host.pid is not None
        os.kill(host.pid, signal.SIGKILL)
        await until(lambda: host.pid is None)
        restarted_s = time.monotonic()
        assert [text_of(a) for a in await asyncio.gather(*tasks)] == [str(n) for n in range(5)]
        assert time.monotonic() - restarted_s < 5 * 0.5 + 1.5


async def test_a_stopped_process_is_replaced() -> None:
    async with running(heartbeat_timeout_s=2.5) as host:
        good = asyncio.create_task(answer(host, "sleep:0.5 say:fine"))
        bad = await answer(host, "stop")
        assert error_of(bad).code == "engine_crashed"
        assert text_of(await good) == "fine"


async def test_an_engine_that_answers_nobody_is_replaced(tmp_path: Path) -> None:
    async with running(stall_timeout_s=1.0) as host:
        first_pid = host.pid
        # A client that gives up must not hide the dead lock from the next one.
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(answer(host, "block:600"), timeout=0.5)
        assert text_of(await answer(host, "say:fine")) == "fine"
        assert host.pid != first_pid


async def test_a_patient_request_is_not_taken_for_a_hang() -> None:
    async with running(stall_timeout_s=0.3, heartbeat_timeout_s=4) as host:
        request = program("sleep:2.5 say:fine", deadline_s=time.monotonic() + 30)
        with host.open(request) as flight:
            events = [e async for some in flight for e in some]
        assert text_of(events) == "fine"
        assert host.crashes == 0


async def test_gives_up_when_it_cannot_be_loaded_again(tmp_path: Path) -> None:
    spec = spec_of(exit=5, exit_after=str(tmp_path / "loaded"))
    async with running(spec) as host:
        assert error_of(await answer(host, "exit:1")).code == "engine_down"
        assert not host.healthy
        with pytest.raises(Unavailable):
            host.open(program("say:a"))


async def test_gives_up_after_crashes_that_no_request_explains() -> None:
    async with running(max_crashes=1) as host:
        for _ in range(2):
            await until(lambda: host.pid is not None)
            crashes, pid = host.crashes, host.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            await until(lambda before=crashes: host.crashes > before)  # type: ignore[misc]
        await until(lambda: not host.healthy)
