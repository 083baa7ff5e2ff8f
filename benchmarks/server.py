"""A side, running: started, waited for, and ended with everything it has started."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.environments import HERE, python
from benchmarks.load import Job
from benchmarks.sides import COMMON, Side

MARKER = "NEARFIELD_BENCH_SIDE"
READY_S = 180.0
STOP_S = 45.0


class SideFailed(Exception):
    """It did not start, or died; the message ends with its last words."""


@dataclass(frozen=True, slots=True)
class Running:
    """A side that can be asked. `started_s`: from the command to being ready."""

    port: int
    started_s: float
    mark: str

    def processes(self) -> list[int]:
        """All of its processes, wherever they have gone."""
        return _marked(self.mark)


@contextmanager
def running(
    side: Side, data: Path, weights: Path, more: Mapping[str, str] | None = None
) -> Iterator[Running]:
    """The side in its own session, with a scratch directory that is gone afterwards.

    Args:
        more: further values for its command and environment.

    Raises:
        SideFailed: it is not ready within `READY_S`.
    """
    # Short: Ray and HAProxy put sockets into it, whose paths may have about 100 characters.
    scratch = Path(tempfile.mkdtemp(prefix="nb-"))
    mark = uuid.uuid4().hex
    port, port_2 = _free_ports(2)
    values = {
        "python": str(python(side.venv)),
        "here": str(HERE),
        "repo": str(HERE.parent),
        "data": str(data),
        "weights": str(weights),
        "scratch": str(scratch),
        "port": str(port),
        "port_2": str(port_2),
        **(more or {}),
    }
    own = {name: value.format(**values) for name, value in side.environment.items()}
    environment = _environment() | COMMON | own | {MARKER: mark}
    log = scratch / "log"
    try:
        if side.prepare:
            _run([part.format(**values) for part in side.prepare], environment, READY_S)
        began_s = time.monotonic()
        with log.open("wb") as out:
            process = subprocess.Popen(
                [part.format(**values) for part in side.command],
                env=environment,
                cwd=scratch,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            _wait_ready(side, process, port, log)
            yield Running(port, time.monotonic() - began_s, mark)
        finally:
            _end(process, mark)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _environment() -> dict[str, str]:
    """Ours, without what would make a side another one."""
    foreign = ("RAY_", "BENCH_", "NEARFIELD_", "OTEL_", "PYTHONPATH", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign)}


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _wait_ready(side: Side, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    until_s = time.monotonic() + READY_S
    while time.monotonic() < until_s:
        if side.ready.startswith("/"):
            if _answers(f"http://127.0.0.1:{port}{side.ready}"):
                return
        elif side.ready in log.read_text(errors="replace"):
            return
        if process.poll() is not None:
            break
        time.sleep(0.1)
    words = log.read_text(errors="replace")[-1500:]
    raise SideFailed(f"{side.name} is not ready (exit {process.poll()}):\n{words}")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _end(process: subprocess.Popen[bytes], mark: str) -> None:
    """Ask the first process to stop, as its user would; then kill what is left of it."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    until_s = time.monotonic() + 10
    while (left := _marked(mark)) and time.monotonic() < until_s:
        for pid in left:
            _kill(pid)
        time.sleep(0.1)


def _marked(mark: str) -> list[int]:
    """Processes of a side, wherever they have gone: they inherit the marker."""
    needle = f"{MARKER}={mark}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            alive = (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
            if alive and needle in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def load(job: Job, *, cpus: str | None = None) -> dict[str, float]:
    """Send the load, from a process of its own; its figures.

    Args:
        cpus: that it is confined to.

    Raises:
        SideFailed: a request failed, or there is no end.
    """
    command = [sys.executable, "-m", "benchmarks.load"]
    if cpus is not None:
        command = ["taskset", "-c", cpus, *command]
    return figures_of(command, json.dumps(dataclasses.asdict(job)), job.longest_s + 30)


def figures_of(command: list[str], stdin: str | None, limit_s: float) -> dict[str, float]:
    """What one of our own helpers finds out: load or limits.

    Raises:
        SideFailed: it found nothing.
    """
    found: dict[str, float] = json.loads(_run(command, helper_environment(), limit_s, stdin))
    return found


def helper_environment() -> dict[str, str]:
    """For processes of our own beside the sides."""
    return _environment() | COMMON


def _run(
    command: list[str], environment: Mapping[str, str], limit_s: float, stdin: str | None = None
) -> str:
    """Run something to its end; what it prints.

    Raises:
        SideFailed: it fails, or takes too long.
    """
    try:
        done = subprocess.run(
            command,
            cwd=HERE.parent,
            env=environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=limit_s,
        )
    except subprocess.TimeoutExpired as error:
        raise SideFailed(f"no result within {limit_s:.0f} s") from error
    if done.returncode != 0:
        raise SideFailed(done.stderr.strip()[-600:])
    return done.stdout
