"""One run of an engine's process, seen from the replica: start, messages, log, end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from nearfield.core.errors import EngineFailed
from nearfield.core.spec import ModelSpec
from nearfield.serving.engines.base import Capabilities, EngineStats, Slice
from nearfield.serving.framing import FrameReader, Kind, Start, encode

log = logging.getLogger("nearfield.host")

LOG_TAIL_LINES = 20
STDERR = 2
"""Not `sys.stderr`, which Serve replaces by a buffer."""

OnEvents = Callable[[Sequence[tuple[str, Any]]], None]


class EngineProcess(asyncio.Protocol):
    """A running engine process: its socket, its log, its end.

    Attributes:
        ended: done once the process has closed its socket, which it does by dying.
        heard_s: when it last sent anything, on `time.monotonic()`.
        unanswered_s: time with requests inside since anything came of any of them; whoever
            watches the process adds to it.
        stats: its last word about itself.
        killed_because: why `kill` was called, if it was.
    """

    def __init__(
        self, on_events: OnEvents, popen: subprocess.Popen[bytes], printed: LogPipe
    ) -> None:
        loop = asyncio.get_running_loop()
        self.popen = popen
        self.printed = printed
        self.loaded: asyncio.Future[Capabilities] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()
        self.heard_s = time.monotonic()
        self.unanswered_s = 0.0
        self.stats = EngineStats()
        self.killed_because: str | None = None
        self._on_events = on_events
        self._reader = FrameReader()
        self._transport: asyncio.Transport | None = None

    # ---- asyncio.Protocol -------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance

    def data_received(self, data: bytes) -> None:
        self.heard_s = time.monotonic()
        for kind, payload in self._reader.feed(data):
            if kind == Kind.EVENTS:
                self.unanswered_s = 0.0
                self._on_events(payload)
            elif kind == Kind.STATS:
                before, self.stats = self.stats, payload
                if (before.steps, before.tokens) != (payload.steps, payload.tokens):
                    self.unanswered_s = 0.0
            elif kind == Kind.LOADED:
                self.loaded.set_result(payload)
            elif kind == Kind.REFUSED:
                self.loaded.set_exception(payload)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    # ---- for the host -----------------------------------------------------------------------

    def send(self, kind: Kind, payload: Any = None) -> None:
        """Send a message; dropped if the process is gone."""
        if self._transport is not None and not self._transport.is_closing():
            for part in encode(kind, payload):
                self._transport.write(part)

    def kill(self, because: str) -> None:
        """End the process and its children now."""
        if self.killed_because is None:
            self.killed_because = because
            self._signal_all(signal.SIGKILL)

    def _signal_all(self, number: signal.Signals) -> None:
        # Its own session: children of the engine go with it.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.popen.pid, number)

    async def reap(self, patience_s: float = 0.0) -> int:
        """Wait for the process to go, insisting after `patience_s`; its exit status."""
        if patience_s:
            await asyncio.wait({self.ended}, timeout=patience_s)
        # Before its status is collected: until then nobody else can have its number.
        self._signal_all(signal.SIGKILL)
        while self.popen.poll() is None:  # noqa: ASYNC110 (no portable event for it)
            await asyncio.sleep(0.005)
        if self._transport is not None:
            self._transport.close()
        await self.printed.drain()
        return self.popen.returncode


class LogPipe(asyncio.Protocol):
    """What the engine's process prints: passed on to our own, the last lines kept."""

    def __init__(self) -> None:
        self.tail: deque[str] = deque(maxlen=LOG_TAIL_LINES)
        self._ended = asyncio.Event()
        self._partial = b""
        self._transport: asyncio.BaseTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # a log that cannot be written must not hurt the engine
            os.write(STDERR, data)
        *lines, self._partial = (self._partial + data).split(b"\n")
        self._partial = self._partial[-4096:]
        self.tail += [line.decode(errors="replace")[:500] for line in lines]

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended.set()

    async def drain(self) -> None:
        """Read what a process that has ended still had to say."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), timeout=1.0)
        if self._transport is not None:
            self._transport.close()


async def start_process(
    spec: ModelSpec, threads: int, on_events: OnEvents, slice_: Slice | None = None
) -> EngineProcess:
    """Start a process and wait until its model is loaded.

    Raises:
        NearfieldError: it could not be loaded; the message says why.
    """
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    try:
        popen = _popen(theirs.fileno(), threads)
    except OSError:
        ours.close()
        raise
    finally:
        theirs.close()
    process: EngineProcess | None = None
    try:
        assert popen.stdout is not None
        _, printed = await loop.connect_read_pipe(LogPipe, popen.stdout)
        _, process = await loop.create_unix_connection(
            lambda: EngineProcess(on_events, popen, printed), sock=ours
        )
        process.send(Kind.START, Start(spec, threads, slice_))
        either: set[asyncio.Future[Any]] = {process.loaded, process.ended}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not process.loaded.done():
            status = await process.reap(patience_s=1.0)
            log.error("the engine's last words:\n%s", "\n".join(printed.tail))
            raise EngineFailed(
                f"The engine's process {exit_in_words(status)} while loading. "
                "The replica's log has its last words.",
                code="load_failed",
            )
        process.loaded.result()  # raises what the process refused with
    except BaseException:
        if process is None:
            ours.close()
            popen.kill()
            popen.wait()
        else:
            await process.reap(patience_s=1.0 if process.loaded.done() else 0.0)
        raise
    return process


def _popen(descriptor: int, threads: int) -> subprocess.Popen[bytes]:
    # On the loop's own thread on purpose: the kernel's parent-death signal follows the thread
    # that starts a process, and this one lives as long as the replica.
    count = str(threads)
    return subprocess.Popen(
        [sys.executable, "-m", "nearfield.serving.worker", str(descriptor), str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
        pass_fds=[descriptor],
        start_new_session=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": count,
            "MKL_NUM_THREADS": count,
            "OPENBLAS_NUM_THREADS": count,
            "RAYON_NUM_THREADS": count,
            "PYTHONUNBUFFERED": "1",
            # Where this process found its modules, a custom engine's among them, whichever way
            # they were put there (a working_dir, an editable install, `serve run` in a project).
            "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
        },
    )


def exit_in_words(status: int) -> str:
    """A process's exit status as the end of a sentence."""
    if status >= 0:
        return f"exited with code {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
