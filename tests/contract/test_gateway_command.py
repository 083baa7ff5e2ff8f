"""`nearfield gateway`: run, restarted, replaced and stopped from a terminal."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from nearfield.edge.supervisor import Running, running

from tests.support.processes import until, write_files
from tests.support.terminal import Terminal, run, run_json

pytestmark = pytest.mark.timeout(90)


class Shell:
    """Gateways of one home; none is left behind."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.file = write_files(folder)
        self.state = self.home / "gateways" / "eu-west"
        self.opened: list[Terminal] = []

    def start(self, *arguments: str) -> tuple[Terminal, Running]:
        terminal = Terminal(self.home, "gateway", str(self.file), *arguments)
        self.opened.append(terminal)
        pid = terminal.process.pid
        told = until(lambda: (told := running(self.state)) and told.pid == pid and told)
        assert isinstance(told, Running)
        return terminal, told

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return run(self.home, "gateway", str(self.file), *arguments)

    def run_json(self, *arguments: str, code: int = 0) -> Any:
        return run_json(self.home, "gateway", str(self.file), *arguments, code=code)


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    opened = Shell(tmp_path)
    yield opened
    for each in opened.opened:
        each.kill()


def test_from_start_to_stop(shell: Shell) -> None:
    terminal, told = shell.start("--workers", "2")
    terminal.wait_for(f"gateway eu-west ready: {told.url} (console: {told.url}/console)")
    assert len(told.workers) == 2
    assert httpx.get(f"{told.url}/healthz").status_code == 200

    again = shell.run_json("--restart")
    assert again["generation"] == 2
    assert set(again["workers"]).isdisjoint(told.workers)
    assert (again["endpoint"], again["pid"]) == (told.url, told.pid)

    stopped = shell.run("--stop")
    assert (stopped.returncode, stopped.stdout) == (0, "The gateway eu-west has stopped.\n")
    assert terminal.wait() == 0
    for option in ("--restart", "--stop"):
        refused = shell.run(option)
        assert refused.returncode == 1
        assert "Start it with: nearfield gateway FILE" in refused.stderr


def test_json_is_told_once_clients_are_accepted(shell: Shell) -> None:
    terminal, told = shell.start("--json", "--drain-s", "1")
    terminal.wait_for("}\n")
    assert terminal.end(signal.SIGINT) == 0
    logged = '{"ts"'  # on standard error
    document = json.loads("".join(each for each in terminal.lines if not each.startswith(logged)))
    assert document["endpoint"] == told.url
    assert document["console"] == f"{told.url}/console"


def test_a_restart_that_fails_says_why(shell: Shell) -> None:
    _, told = shell.start()
    good = shell.file.read_text()
    shell.file.write_text(good.replace('"regions"', '"passport_keys": "nowhere.json", "regions"'))
    refused = shell.run("--restart")
    assert refused.returncode == 1
    assert "Not restarted, everything stays as it was" in refused.stderr
    shell.file.write_text(good.replace('"port"', '"prt"'))
    refused = shell.run("--restart")
    assert refused.returncode == 2
    assert "listen.prt unknown key" in refused.stderr
    now = running(shell.state)
    assert now is not None
    assert (now.workers, now.generation) == (told.workers, 1)


def test_one_takes_over_from_another(shell: Shell) -> None:
    first, told = shell.start()
    refused = shell.run()
    assert refused.returncode == 1
    assert "nearfield gateway FILE --restart" in refused.stderr
    fixed = json.loads(shell.file.read_text())
    shell.file.write_text(json.dumps({**fixed, "listen": {"port": int(told.url.split(":")[-1])}}))
    _, after = shell.start("--take-over")
    assert after.url == told.url
    assert first.wait() == 0


def test_what_does_not_go_together(shell: Shell) -> None:
    refused = shell.run("--restart", "--stop")
    assert refused.returncode == 2
    assert "one of them at a time" in refused.stderr


def test_it_loads_neither_ray_nor_torch(shell: Shell) -> None:
    """Not even late: what the processes of a running gateway have mapped, not what they import."""
    _, told = shell.start()
    assert httpx.get(f"{told.url}/v1/models").status_code == 200
    for pid in (told.pid, *told.workers):
        maps = Path(f"/proc/{pid}/maps")
        if not maps.exists():
            pytest.skip("no /proc here")
        mapped = {line.rpartition("/")[2] for line in maps.read_text().splitlines()}
        assert [name for name in mapped if name.startswith(("_raylet", "libtorch", "libray"))] == []
    code = (
        "import sys, nearfield.cli.main, nearfield.cli.commands.gateway, nearfield.edge.worker\n"
        "print([name for name in ('ray', 'torch', 'numpy', 'transformers') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
