"""Finding and ending the processes of one region, and of no other.

Every process of a region inherits one environment variable with the region's random id: Ray's
own processes, Serve's proxies, HAProxy, and whatever an engine starts. That holds for orphans
too, unlike process trees and groups, and cannot hit a neighbour's Ray, unlike `ray stop`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

MARKER = "NEARFIELD_REGION_ID"
_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Process:
    """A running process. `started`: tells it from a later one with the same pid."""

    pid: int
    started: str


def identify(pid: int) -> Process | None:
    """The process with this pid if it runs; None if not, or if it is a zombie."""
    if _PROC.exists():
        try:
            stat = (_PROC / str(pid) / "stat").read_text()
        except OSError:
            return None
        # The command's name may hold spaces and parentheses: fields are counted behind it.
        fields = stat.rpartition(")")[2].split()
        return None if fields[0] in "ZX" else Process(pid, fields[19])
    shown = subprocess.run(
        ["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
    ).stdout.split(maxsplit=1)
    return None if len(shown) != 2 or shown[0].startswith("Z") else Process(pid, shown[1].strip())


def of_region(region_id: str) -> list[Process]:
    """All processes of the region, oldest pid first."""
    mark = f"{MARKER}={region_id}"
    pids = _pids_by_proc(mark.encode()) if _PROC.exists() else _pids_by_ps(mark)
    found = (identify(pid) for pid in sorted(pids) if pid != os.getpid())
    return [process for process in found if process is not None]


def _pids_by_proc(mark: bytes) -> Iterable[int]:
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    yield int(entry.name)


def _pids_by_ps(mark: str) -> Iterable[int]:
    listing = subprocess.run(
        ["ps", "axEww", "-o", "pid=,command="], capture_output=True, text=True, check=False
    ).stdout
    for line in listing.splitlines():
        pid, _, rest = line.strip().partition(" ")
        if mark in rest.split():
            yield int(pid)


def memory_bytes(members: Iterable[Process]) -> int | None:
    """Memory of these processes, shared pages counted once; None where it cannot be told."""
    total = 0
    for process in members:
        try:
            rollup = (_PROC / str(process.pid) / "smaps_rollup").read_text()
        except ProcessLookupError:
            continue
        except OSError:
            return None
        shares = (line for line in rollup.splitlines() if line.startswith("Pss:"))
        total += sum(int(line.split()[1]) * 1024 for line in shares)
    return total


def end_region(region_id: str, *, grace_s: float) -> int:
    """End every process of the region: ask first, insist after `grace_s`. Returns how many.

    Raises:
        TimeoutError: some would not go (a process in uninterruptible sleep, or another user's).
    """
    asked = of_region(region_id)
    # The raylet ends its workers in an orderly way, but only as long as the rest of Ray is there.
    raylets = [process for process in asked if _program(process) == "raylet"]
    _signal_all(raylets, signal.SIGTERM)
    _wait_until(lambda: not any(identify(p.pid) == p for p in raylets), grace_s)
    _signal_all(of_region(region_id), signal.SIGTERM)
    _wait_until(lambda: not of_region(region_id), grace_s)
    # A process that was being forked while we looked shows up only now: look until none is left.
    deadline_s = time.monotonic() + 10.0
    while left := of_region(region_id):
        if time.monotonic() > deadline_s:
            pids = ", ".join(str(process.pid) for process in left)
            raise TimeoutError(f"processes {pids} did not end; end them by hand (kill -9)")
        _signal_all(left, signal.SIGKILL)
        _wait_until(lambda: not of_region(region_id), 0.5)
    return len(asked)


def _signal_all(processes: Iterable[Process], number: signal.Signals) -> None:
    for process in processes:
        if identify(process.pid) == process:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process.pid, number)


def _wait_until(reached: Callable[[], bool], timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not reached() and time.monotonic() < deadline_s:
        time.sleep(0.05)


def _program(process: Process) -> str:
    """The name of a process's program, "" if it is gone."""
    if _PROC.exists():
        try:
            arguments = (_PROC / str(process.pid) / "cmdline").read_bytes()
        except OSError:
            return ""
        return Path(arguments.split(b"\0")[0].decode(errors="replace")).name
    shown = subprocess.run(
        ["ps", "-o", "comm=", "-p", str(process.pid)], capture_output=True, text=True, check=False
    )
    return Path(shown.stdout.strip()).name
