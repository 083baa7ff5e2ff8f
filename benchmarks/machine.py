"""The machine, as far as a figure depends on it, and whether it is idle."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

BUSY_SHARE = 0.10
"""Above this share of all cores in use by others, a measurement is not worth making."""

PACKAGES = (
    "nearfield", "ray", "torch", "transformers", "onnxruntime", "openvino", "starlette", "uvloop",
    "httptools", "msgspec",
)  # fmt: skip


def describe() -> dict[str, Any]:
    """What the tables are headed with."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(int(_field("/proc/meminfo", "MemTotal").split()[0]) / 2**20, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "commit": _commit(),
        "load_average": list(os.getloadavg()),
        "started": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def busy_share(seconds: float) -> float:
    """Share of all cores that was in use, or stolen by the host, during `seconds` from now."""
    idle_0, all_0 = _ticks()
    time.sleep(seconds)
    idle_1, all_1 = _ticks()
    return 1 - (idle_1 - idle_0) / max(1, all_1 - all_0)


def _ticks() -> tuple[int, int]:
    ticks = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def _field(file: str, name: str) -> str:
    for line in Path(file).read_text().splitlines():
        if line.startswith(name):
            return line.partition(":")[2].strip()
    return ""


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    here = Path(__file__).parent
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True
    )
    return found.stdout.strip() or "unknown"
