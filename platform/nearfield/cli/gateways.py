"""A gateway as a process of this machine: started in the background, found, restarted, ended.

A gateway's supervisor writes down what runs, in its state's folder; whoever started it is of no
importance. What is started here also carries a marker in its environment (as all processes of a
region do), so that it can be ended even if its supervisor was killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nearfield.cli import processes
from nearfield.cli.processes import Process
from nearfield.core.errors import Conflict, NotFound, Unavailable
from nearfield.edge.supervisor import KILL_S, START_S, STATE_FILE, Running, running

_POLL_S = 0.05
_WORDS = 8
"""Last lines of its log that are told when it does not start."""


@dataclass(frozen=True, slots=True)
class GatewayProcess:
    """A gateway that runs, ran or is to run in the background.

    Attributes:
        file: its gateway file. state: its folder. log: what it prints.
        marker: tells its processes from all others.
    """

    name: str
    file: Path
    state: Path
    log: Path
    marker: str

    @property
    def told(self) -> Running | None:
        """What it has written down; None if it does not run."""
        return running(self.state)

    @property
    def died(self) -> bool:
        """Whether it ended without being asked to."""
        return (self.state / STATE_FILE).exists() and self.told is None

    def processes(self) -> list[Process]:
        """Those that were started here; see `processes.memory_bytes`."""
        return processes.of_region(self.marker)

    def start(self, environ: Mapping[str, str], *, workers: int = 1) -> subprocess.Popen[bytes]:
        """Start its supervisor, which outlives this process. See `wait_ready`."""
        self.log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        command = [sys.executable, "-m", "nearfield.edge", str(self.file)]
        with self.log.open("wb") as log:
            return subprocess.Popen(
                [*command, "--state", str(self.state), "--workers", str(workers)],
                env={**environ, processes.MARKER: self.marker},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C is not for it
            )

    def wait_ready(self, started: subprocess.Popen[bytes]) -> Running:
        """
        Raises:
            Unavailable: it does not start; the message has its last words.
        """
        deadline_s = time.monotonic() + START_S + KILL_S
        while time.monotonic() < deadline_s:
            ended = started.poll() is not None
            told = self.told
            if told is not None and told.pid == started.pid:
                return told
            if ended:
                break
            time.sleep(_POLL_S)
        said = self.log.read_text(errors="replace").strip().splitlines()[-_WORDS:]
        raise Unavailable(f"The gateway {self.name} did not start. It said:\n" + "\n".join(said))

    def leave(self) -> None:
        """Ask it to go: it drains first. Asked twice, at once."""
        told = self.told
        if told is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(told.pid, signal.SIGTERM)

    def end(self, *, drain_timeout_s: float) -> int:
        """End all of its processes, and say how many there were.

        Args:
            drain_timeout_s: how long it may finish what it accepted; 0: not at all.

        Raises:
            TimeoutError: some would not end.
        """
        told, marked = self.told, self.processes()
        if told is not None and drain_timeout_s > 0:
            self.leave()
            _wait_gone(told.pid, drain_timeout_s)
            told = self.told
        # One that was replaced by hand does not carry the marker.
        others = {told.pid, *told.workers} if told is not None else set[int]()
        for pid in others - {process.pid for process in marked}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        processes.end_region(self.marker, grace_s=KILL_S if drain_timeout_s > 0 else 0.0)
        (self.state / STATE_FILE).unlink(missing_ok=True)
        return len(others | {process.pid for process in marked})


def found(state: Path) -> Running:
    """The gateway that runs with this state.

    Raises:
        NotFound: none does.
    """
    told = running(state)
    if told is None:
        raise NotFound(
            f"No gateway runs with the state in {state}. Start it with: nearfield gateway FILE",
            code="gateway_not_running",
        )
    return told


def restart(state: Path, *, timeout_s: float = START_S + KILL_S) -> Running:
    """New workers for the gateway that runs with this state; returns once they accept.

    Raises:
        NotFound: none runs.
        Conflict: it goes on as it was; the message says why.
        Unavailable: it has ended, or takes too long.
    """
    before = found(state)
    os.kill(before.pid, signal.SIGHUP)
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        now = running(state)
        if now is not None and now.generation > before.generation:
            return now
        if now is not None and now.failures > before.failures:
            raise Conflict(
                f"Not restarted, everything stays as it was: {now.trouble}", code="not_restarted"
            )
        if now is None and processes.identify(before.pid) is None:
            raise Unavailable(f"The gateway {before.gateway} has ended. See what it printed.")
        time.sleep(_POLL_S)
    raise Unavailable(
        f"The gateway {before.gateway} has not restarted after {timeout_s:.0f} s. See what it "
        "printed."
    )


def stop(state: Path, *, timeout_s: float) -> Running:
    """Stop the gateway that runs with this state; returns what ran once it has drained.

    Raises:
        NotFound: none runs. Unavailable: it drains for longer than this.
    """
    told = found(state)
    os.kill(told.pid, signal.SIGTERM)
    if not _wait_gone(told.pid, timeout_s):
        raise Unavailable(
            f"The gateway {told.gateway} still drains after {timeout_s:.0f} s. Cut its requests "
            "off by stopping it again."
        )
    return told


def _wait_gone(pid: int, timeout_s: float) -> bool:
    deadline_s = time.monotonic() + timeout_s
    began = processes.identify(pid)
    while began is not None and processes.identify(pid) == began:
        if time.monotonic() > deadline_s:
            return False
        time.sleep(_POLL_S)
    return True
