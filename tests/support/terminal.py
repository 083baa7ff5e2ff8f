"""`nearfield` commands in processes of their own, as people run them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from tests.support.processes import until

START_S = 240.0
COMMAND = [sys.executable, "-m", "nearfield.cli.main"]


class Terminal:
    """A command that goes on, in a session of its own. Its output is read as it comes."""

    def __init__(self, home: Path, *arguments: str) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
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
        for line in self.process.stdout:
            self.lines.append(line)

    @property
    def text(self) -> str:
        return "".join(self.lines)

    def wait_for(self, text: str, within_s: float = START_S) -> None:
        until(lambda: text in self.text or self.process.poll() is not None, within_s)
        assert text in self.text, self.text

    def end(self, number: signal.Signals = signal.SIGINT) -> int:
        self.process.send_signal(number)
        return self.wait()

    def wait(self, within_s: float = 90.0) -> int:
        code = self.process.wait(within_s)
        self._reader.join(within_s)
        return code

    def kill(self) -> None:
        self.process.kill()
        self.wait()


def run(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command, until it has ended."""
    return subprocess.run(
        [*COMMAND, *arguments],
        env={**os.environ, "NEARFIELD_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def run_json(home: Path, *arguments: str, code: int = 0) -> Any:
    """What a command prints with `--json`, when it ends with this code."""
    done = run(home, *arguments, "--json")
    assert done.returncode == code, done.stdout + done.stderr
    return json.loads(done.stdout)
