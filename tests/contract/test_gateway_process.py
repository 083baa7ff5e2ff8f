"""A gateway as a process: started, restarted, replaced, killed, stopped. Nobody is refused."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from nearfield.edge.supervisor import running

from tests.support.processes import GatewayProcess, until, write_files

pytestmark = pytest.mark.timeout(90)


class Starter:
    """Starts gateways of one home, and leaves none behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.started: list[GatewayProcess] = []

    def __call__(self, file: Path, *arguments: str) -> GatewayProcess:
        self.started.append(GatewayProcess(file, self.home, *arguments))
        return self.started[-1]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Starter]:
    starter = Starter(tmp_path)
    yield starter
    for each in starter.started:
        each.kill()


class Load:
    """Clients that ask without pause, each on a new connection every time, until the end."""

    def __init__(self, url: str, clients: int = 2) -> None:
        self._at = urlsplit(url)
        self._stop = threading.Event()
        self.answered = 0
        self.failed: list[str] = []
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(clients)]

    def __enter__(self) -> Load:
        for each in self._threads:
            each.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for each in self._threads:
            each.join(30)

    def _ask(self) -> None:
        while not self._stop.is_set():
            connection = http.client.HTTPConnection(
                self._at.hostname or "", self._at.port, timeout=30
            )
            try:
                connection.request("GET", "/healthz")
                status = connection.getresponse().status
                if status != 200:
                    self.failed.append(str(status))
                self.answered += 1
            except (OSError, http.client.HTTPException) as error:
                self.failed.append(repr(error))
            finally:
                connection.close()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] not in "ZX"


def test_start_restart_crash_and_stop(start: Starter) -> None:
    gateway = start(write_files(start.folder))
    first = gateway.wait_ready()
    assert first.url in gateway.text
    assert httpx.get(f"{first.url}/healthz").status_code == 200
    assert httpx.get(f"{first.url}/readyz").status_code == 503, "it has no replica to send to"
    with Load(first.url) as load:
        gateway.signal(signal.SIGHUP)
        second = until(lambda: (told := gateway.told).generation == 2 and told)
        assert (second.url, second.pid) == (first.url, first.pid)
        assert set(second.workers).isdisjoint(first.workers)
        until(lambda: not alive(first.workers[0]))
        before = load.answered
        until(lambda: load.answered > before + 20)
    assert load.failed == []

    os.kill(second.workers[0], signal.SIGKILL)
    third = until(lambda: (told := gateway.told).workers != second.workers and told)
    assert httpx.get(f"{third.url}/healthz", timeout=30).status_code == 200, "it waited in a queue"

    gateway.signal(signal.SIGTERM)
    assert gateway.wait() == 0
    assert not any(alive(pid) for pid in third.workers)
    assert running(gateway.state) is None
    assert not (gateway.state / "gateway.json").exists()
    assert (gateway.state.stat().st_mode & 0o777) == 0o700


def test_a_restart_with_a_broken_file_changes_nothing(start: Starter) -> None:
    file = write_files(start.folder)
    gateway = start(file)
    before = gateway.wait_ready()
    good = file.read_text()
    file.write_text(good.replace('"port"', '"prt"'))
    gateway.signal(signal.SIGHUP)
    told = until(lambda: (told := gateway.told).failures == 1 and told)
    assert "listen.prt unknown key" in (told.trouble or "")
    assert (told.workers, told.generation) == (before.workers, 1)
    assert httpx.get(f"{told.url}/healthz").status_code == 200

    file.write_text(good.replace('{"port": 0}', json.dumps({"port": 0, "grpc_port": 0})))
    gateway.signal(signal.SIGHUP)
    told = until(lambda: (told := gateway.told).generation == 2 and told)
    assert (told.url, told.trouble) == (before.url, None)
    assert told.grpc is not None, "and another port beside the first"


def test_another_process_takes_over(start: Starter) -> None:
    file = write_files(start.folder)
    old = start(file)
    before = old.wait_ready()
    with Load(before.url) as load:
        refused = start(file)
        assert refused.wait() == 1
        assert "runs already" in refused.text
        assert "--take-over" in refused.text

        fixed = json.loads(file.read_text())
        fixed["listen"] = {"port": urlsplit(before.url).port}
        file.write_text(json.dumps(fixed))
        new = start(file, "--take-over")
        after = new.wait_ready()
        assert after.url == before.url
        assert after.pid == new.process.pid
        assert old.wait() == 0
        assert not any(alive(pid) for pid in before.workers)
        answered = load.answered
        until(lambda: load.answered > answered + 20)
    assert load.failed == []
    assert new.told == after, "the old one took nothing of the new one's with it"


def test_several_workers_share_a_port(start: Starter) -> None:
    gateway = start(write_files(start.folder), "--workers", "2")
    told = gateway.wait_ready()
    assert len(set(told.workers)) == 2
    with Load(told.url, clients=4) as load:
        until(lambda: load.answered > 50)
        os.kill(told.workers[0], signal.SIGKILL)
        until(lambda: told.workers[0] not in gateway.told.workers)
        until(lambda: load.answered > 100)
    # Lost is what the killed one had in hand, not what waited at its socket or came later.
    assert len(load.failed) <= 4
    assert not any("refused" in each.lower() for each in load.failed)


def test_workers_do_not_outlive_their_supervisor(start: Starter) -> None:
    gateway = start(write_files(start.folder))
    told = gateway.wait_ready()
    gateway.signal(signal.SIGKILL)
    until(lambda: not any(alive(pid) for pid in told.workers))
    again = start(write_files(start.folder))
    assert again.wait_ready().pid == again.process.pid, "what the killed one left is no hindrance"


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({"listen": {"port": "8080"}}, 2, "listen.port must be a whole number"),
        ({"passport_keys": "nowhere.json"}, 2, "passport keys cannot be read"),
        ({"listen": {"port": 0, "tls": {"certificate": "a", "key": "b"}}}, 2, "listen.tls"),
        ({"listen": {"host": "192.0.2.1", "port": 0}}, 2, "listen.port is 0, and 192.0.2.1:0"),
    ],
)
def test_what_cannot_start_says_why(
    start: Starter, changes: dict[str, Any], code: int, said: str
) -> None:
    gateway = start(write_files(start.folder, **changes))
    assert gateway.wait() == code
    assert said in gateway.text
    assert "Traceback" not in gateway.text


def test_neither_ray_nor_torch_is_loaded() -> None:
    code = (
        "import sys, nearfield.edge.worker, nearfield.edge.accounts, nearfield.edge.grpc\n"
        "print([name for name in ('ray', 'torch', 'numpy', 'transformers') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_without_a_store_no_sql_is_loaded() -> None:
    code = "import sys, nearfield.edge.worker; print('sqlalchemy' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"
