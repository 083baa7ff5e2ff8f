"""`nearfield` commands in processes of their own, as people run them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.processes import Command, until

START_S = 240.0
MODULE = ("-m", "nearfield.cli.main")


class Terminal(Command):
    """A `nearfield` command that goes on."""

    def __init__(self, home: Path, *arguments: str) -> None:
        super().__init__(home, *MODULE, *arguments)

    def wait_for(self, text: str, within_s: float = START_S) -> None:
        until(lambda: text in self.text or self.process.poll() is not None, within_s)
        assert text in self.text, self.text

    def end(self, number: signal.Signals = signal.SIGINT) -> int:
        self.process.send_signal(number)
        return self.wait()

    def wait(self, within_s: float = 90.0) -> int:
        return super().wait(within_s)

    def kill(self) -> None:
        self.process.kill()
        self.wait()


def run(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command, until it has ended."""
    return subprocess.run(
        [sys.executable, *MODULE, *arguments],
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
