"""Gateways in processes of their own, as people start them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nearfield.edge.supervisor import Running, running

READY_S = 30.0


def until(
    condition: Callable[[], Any],
    within_s: float = READY_S,
    why: Callable[[], object] = str,
    *,
    every_s: float = 0.01,
) -> Any:
    """What the condition gives, once that is true. `why`: what to say if it never is."""
    deadline_s = time.monotonic() + within_s
    while not (found := condition()):
        assert time.monotonic() < deadline_s, f"it did not happen in {within_s:.0f} s: {why()}"
        time.sleep(every_s)
    return found


def write_files(folder: Path, serve_port: int = 1, **gateway: Any) -> Path:
    """A gateway's file and its region's. YAML is a superset of JSON."""
    region = {
        "region": "eu-west",
        "jurisdiction": "eu",
        "city": "Dublin",
        "location": {"latitude": 53.33, "longitude": -6.25},
    }
    (folder / "eu-west.region.yaml").write_text(json.dumps(region))
    file = {
        "gateway": "eu-west",
        "home": {"region": "eu-west", "serve": f"http://127.0.0.1:{serve_port}"},
        "regions": ["eu-west.region.yaml"],
        "listen": {"port": 0},
        **gateway,
    }
    path = folder / "gateway.yaml"
    path.write_text(json.dumps(file))
    return path


class Command:
    """A Python program in a session of its own. Its output is read as it comes."""

    def __init__(self, home: Path, *arguments: str) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, "NEARFIELD_HOME": str(home)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(self.process.stdout)

    @property
    def text(self) -> str:
        return "".join(self.lines)

    def wait(self, within_s: float = READY_S) -> int:
        code = self.process.wait(within_s)
        self._reader.join(within_s)
        return code


class GatewayProcess(Command):
    """`python -m nearfield.edge FILE`."""

    def __init__(self, file: Path, home: Path, *arguments: str) -> None:
        super().__init__(home, "-m", "nearfield.edge", str(file), *arguments)
        self.state = home / "gateways" / "eu-west"

    def wait_ready(self) -> Running:
        """What it has written down, once it accepts clients."""
        until(lambda: " ready: " in self.text or self.process.poll() is not None)
        assert self.process.poll() is None, self.text
        return self.told

    @property
    def told(self) -> Running:
        found = running(self.state)
        assert found is not None, self.text
        return found

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """Whatever it does: its workers notice, and go."""
        self.process.kill()
        self.process.wait()
