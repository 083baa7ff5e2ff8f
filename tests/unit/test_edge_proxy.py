"""Parts of the forwarding path that need no socket: timers, paths, rewriting, what is imported."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest
from nearfield.core.errors import RateLimited
from nearfield.edge.proxy import head, identity
from nearfield.edge.proxy.answers import refusal
from nearfield.edge.proxy.ports import Grant, Leg, Request, Target, Trace
from nearfield.edge.proxy.rewrite import upstream_head
from nearfield.edge.proxy.timers import Timers


class Entry:
    """Something that is due, and moves itself on as often as it is told to."""

    def __init__(self, due_s: float, again_s: float = 0.0) -> None:
        self.due_s = due_s
        self.timer: asyncio.TimerHandle | None = None
        self.again_s = again_s
        self.calls: list[float] = []

    def on_due(self, now_s: float) -> None:
        self.calls.append(now_s)
        if self.again_s:
            self.due_s = now_s + self.again_s


class TestTimers:
    async def test_in_time_and_once(self) -> None:
        loop = asyncio.get_running_loop()
        timers = Timers(loop)
        begin_s = loop.time()
        soon, later = Entry(begin_s + 0.05), Entry(begin_s + 1.2)
        timers.watch(soon)
        timers.watch(later)
        await asyncio.sleep(1.35)
        assert len(soon.calls) >= 1
        assert 0.045 < soon.calls[0] - begin_s < 0.15
        assert 1.195 < later.calls[0] - begin_s < 1.3
        timers.unwatch(soon)
        timers.unwatch(later)
        assert len(timers) == 0

    async def test_moved_later_and_sooner(self) -> None:
        loop = asyncio.get_running_loop()
        timers = Timers(loop)
        begin_s = loop.time()
        later, sooner = Entry(begin_s + 0.03), Entry(begin_s + 100)
        for each in (later, sooner):
            timers.watch(each)
        later.due_s = begin_s + 0.1
        sooner.due_s = begin_s + 0.03
        timers.sooner(sooner)
        await asyncio.sleep(0.06)
        assert (len(later.calls), len(sooner.calls)) == (0, 1)
        await asyncio.sleep(0.08)
        assert len(later.calls) == 1

    async def test_forgotten(self) -> None:
        timers = Timers(asyncio.get_running_loop())
        entry = Entry(asyncio.get_running_loop().time() + 0.02)
        timers.watch(entry)
        timers.unwatch(entry)
        timers.unwatch(entry)
        await asyncio.sleep(0.04)
        assert entry.calls == []

    async def test_one_that_moves_itself_on(self) -> None:
        timers = Timers(asyncio.get_running_loop())
        entry = Entry(asyncio.get_running_loop().time() + 0.02, again_s=0.02)
        timers.watch(entry)
        await asyncio.sleep(0.11)
        assert 3 <= len(entry.calls) <= 5
        timers.unwatch(entry)

    async def test_one_that_stays_due_does_not_keep_the_loop_busy(self) -> None:
        timers = Timers(asyncio.get_running_loop())
        entry = Entry(0.0)
        timers.watch(entry)
        await asyncio.sleep(0.1)
        assert len(entry.calls) == 1
        timers.unwatch(entry)


@pytest.mark.parametrize(
    "data",
    [
        b"G", b"GET", b"GET /v1", b"GET /v1 ", b"GET /v1 HTTP/1.", b"GET /v1 HTTP/1.1\r",
        b"GET /v1 HTTP/1.1\r\n", b"GET /v1 HTTP/1.1\r\nHost: a\r", b"OPTIONS /x HTTP/1.1\r\nA",
    ],
)  # fmt: skip
def test_what_may_become_a_head(data: bytes) -> None:
    head.check_incomplete(data)


@pytest.mark.parametrize(
    "data",
    [b"\x16\x03", b"get /", b"GET\t", b"GET /a\n", b"GET /v1 HTTP/1.1\r\nA: b\n", b"\r\r", b"{}",
     b"GET /v1 HTTP/1.1\r\nA: b\rc", b"GET /v1 HTTP/1.1\r\nA: \0", b"SSH-2.0-x\r\n"],
)  # fmt: skip
def test_what_can_no_longer_become_a_head(data: bytes) -> None:
    with pytest.raises(head.Bad):
        head.check_incomplete(data)


@pytest.mark.parametrize(
    "host", [b"a", b"a.b-c_d:80", b"[::1]", b"[fe80::1]:8080", b"127.0.0.1:1", b"xn--bcher-kva.de"]
)
def test_hosts(host: bytes) -> None:
    head.check_host(host, b"1")


@pytest.mark.parametrize(
    "host", [b"", b"a b", b"a/b", b"a@b", b"a,b", b"[::1", b"::1", b"a:b", b"a:999999", b"a\xff"]
)
def test_no_hosts(host: bytes) -> None:
    with pytest.raises(head.Bad):
        head.check_host(host, b"1")


def test_retry_after_is_rounded_up() -> None:
    answer = refusal(RateLimited("no", retry_after_s=0.2), "openai")
    assert (b"retry-after", b"1") in list(answer.headers)


def test_sampling() -> None:
    assert identity.trace({}, 1.0).sampled
    assert not identity.trace({}, 0.0).sampled
    given = {b"traceparent": b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-03"}
    assert identity.trace(given, 0.0).sampled


def test_a_request_of_an_upstream_on_ipv6() -> None:
    request = Request(
        b"GET", b"/v1", b"/v1", "openai", {b"host": b"x"}, b"id", Trace(b"t", b"s", b"", False),
        1.0, 3.0,
    )  # fmt: skip
    written = upstream_head(request, Leg(Target("::1", 80)), Grant(), b"", 1.5)
    assert written == (
        b"GET /v1 HTTP/1.1\r\nhost: [::1]:80\r\nx-request-id: id\r\n"
        b"traceparent: 00-t-s-00\r\nx-request-timeout-ms: 1500\r\n\r\n"
    )


def test_a_gateway_needs_no_numpy_and_no_web_framework() -> None:
    """It starts in a moment, also where only `nearfield[edge]` is installed."""
    code = (
        "import sys, nearfield.edge.proxy.__main__\n"
        "heavy = ['numpy', 'starlette', 'httpx', 'pydantic', 'opentelemetry', 'grpc']\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
