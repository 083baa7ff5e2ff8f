"""The commands against a running region, and a region's whole life in a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import httpx
import pytest
from nearfield.cli import processes
from nearfield.cli import region as regions
from nearfield.cli.main import main

if TYPE_CHECKING:
    from tests.integration.conftest import TestRegion

START_TIMEOUT_S = 180.0

PLAIN_APP = """\
from ray import serve
from starlette.requests import Request


@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class Plain:
    async def __call__(self, request: Request) -> str:
        return "plain"


app = Plain.bind()
"""
PLAIN_CONFIG = """\
applications:
  - name: {name}
    route_prefix: /{name}
    import_path: plain_app:app
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A directory with a plain Serve application, the quickest thing that can be deployed."""
    (tmp_path / "plain_app.py").write_text(PLAIN_APP)
    (tmp_path / "plain.yaml").write_text(PLAIN_CONFIG.format(name="plain"))
    return tmp_path


def run(region: TestRegion, *arguments: str) -> int:
    return main([*arguments, "--dir", str(region.region.root)])


def out(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def complete(url: str, model: str) -> str:
    body = {"model": model, "prompt": "hello there"}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=30)
    answer.raise_for_status()
    text: str = answer.json()["choices"][0]["text"]
    return text


# Against the region of this test session


def test_from_new_to_gone(
    region: TestRegion,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What the help of `nearfield` tells a newcomer to do."""
    monkeypatch.chdir(tmp_path)
    assert main(["new", "cli-shout", "--engine", "custom"]) == 0
    config = Path("cli-shout/cli-shout.yaml")
    assert run(region, "serve", str(config)) == 0
    url = region.url("cli-shout")
    assert complete(url, "cli-shout") == "HELLO THERE "

    capsys.readouterr()
    assert run(region, "models", "--json") == 0
    (model,) = [m for m in out(capsys)["models"] if m["application"] == "cli-shout"]
    assert model == {
        "application": "cli-shout",
        "model": "cli-shout",
        "version": "1",
        "engine": "cli_shout:CliShout",
        "source": None,
        "endpoint": url,
        "replicas": 1,
        "replicas_wanted": 1,
        "state": "running",
        "reason": None,
        "scaled": False,
    }

    upgraded = config.read_text().replace("      limits:", '      version: "2"\n      limits:')
    config.write_text(upgraded)
    assert run(region, "serve", str(config)) == 0
    assert httpx.get(f"{url}/v2/models/cli-shout/versions/2/ready").status_code == 200

    assert run(region, "rm", "cli-shout") == 0
    capsys.readouterr()
    assert run(region, "models", "--json") == 0
    assert "cli-shout" not in [m["application"] for m in out(capsys)["models"]]
    assert run(region, "rm", "cli-shout") == 1
    assert "No such model here: cli-shout" in capsys.readouterr().err


def test_a_model_that_cannot_start_is_explained_and_disturbs_nobody(
    region: TestRegion, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(region, "serve", str(project / "plain.yaml")) == 0
    (project / "broken.py").write_text(
        "from nearfield.core.errors import BadRequest\n"
        "from nearfield.serving.engines.base import FunctionEngine\n"
        "class Broken(FunctionEngine):\n"
        "    def setup(self, context):\n"
        "        raise BadRequest('options.size: must be even, and is 3')\n"
        "    def generate(self, request): yield ''\n"
    )
    broken = project / "broken.yaml"
    broken.write_text(
        "applications:\n  - name: cli-broken\n    route_prefix: /cli-broken\n"
        "    import_path: nearfield.serving:app\n"
        "    args: {model: cli-broken, engine: 'broken:Broken'}\n"
        "    deployments:\n      - name: replica\n        ray_actor_options: {num_cpus: 0.1}\n"
    )
    with requests_to(f"{region.base_url}/plain") as statuses:
        started_s = time.monotonic()
        assert run(region, "serve", str(broken)) == 1
        assert time.monotonic() - started_s < 60
    shown = capsys.readouterr()
    assert "error: cli-broken: options.size: must be even, and is 3" in shown.err
    assert "Traceback" not in shown.err + shown.out
    assert len(statuses) > 20
    assert set(statuses) == {200}

    assert run(region, "status") == 1
    assert "options.size: must be even" in capsys.readouterr().err
    assert run(region, "rm", "cli-broken", "plain") == 0


@contextlib.contextmanager
def requests_to(url: str) -> Iterator[list[int]]:
    """Requests one after another in the background; their statuses."""
    statuses: list[int] = []
    stop = threading.Event()

    def ask() -> None:
        with httpx.Client(timeout=30) as client:
            while not stop.is_set():
                statuses.append(client.get(url).status_code)
                stop.wait(0.02)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield statuses
    finally:
        stop.set()
        thread.join()


def test_two_who_deploy_at_once_both_get_theirs(region: TestRegion, project: Path) -> None:
    """Serve's config is one whole: without a lock, one of them would delete the other's."""
    names = ["cli-one", "cli-two"]
    for name in names:
        (project / f"{name}.yaml").write_text(PLAIN_CONFIG.format(name=name))
    command = [sys.executable, "-m", "nearfield.cli.main", "serve"]
    where = ["--dir", str(region.region.root)]
    started = [
        subprocess.Popen([*command, str(project / f"{name}.yaml"), *where]) for name in names
    ]
    assert [process.wait(timeout=90) for process in started] == [0, 0]
    for name in names:
        assert httpx.get(f"{region.base_url}/{name}").text == "plain"
    region.remove(*names)


def test_status_tells_what_the_region_costs(
    region: TestRegion, capsys: pytest.CaptureFixture[str]
) -> None:
    run(region, "status", "--json")
    about = out(capsys)["region"]
    assert about["endpoint"] == region.base_url
    assert about["processes"] > 5
    assert about["memory_bytes"] is None or about["memory_bytes"] > 2**28
    assert Path(about["token_file"]).stat().st_mode & 0o777 == 0o600
    assert run(region, "status") in (0, 1)
    text = capsys.readouterr().out
    assert f"Region at {region.base_url}" in text
    hint = re.search(r"Serve's own view: (.*) serve (status .*)", text)
    assert hint is not None
    serve = Path(sysconfig.get_path("scripts")) / "serve"
    done = subprocess.run(
        ["bash", "-c", f"{hint[1]} {serve} {hint[2]}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "applications:" in done.stdout


def test_the_dashboard_wants_the_token(region: TestRegion) -> None:
    url = f"{region.region.dashboard_url}/api/serve/applications/"
    assert httpx.get(url).status_code in (401, 403)
    assert httpx.put(url, json={"applications": []}).status_code in (401, 403)


# A region's whole life


class Terminal:
    """A `nearfield` process in a session of its own, its output read as it comes."""

    def __init__(self, *arguments: str, home: Path) -> None:
        self.root = home / "regions" / "local"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nearfield.cli.main", *arguments],
            env={**os.environ, "NEARFIELD_HOME": str(home)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, args=[self.process.stdout])
        self._reader.start()

    def _read(self, stream: IO[str]) -> None:
        self.lines.extend(stream)

    @property
    def text(self) -> str:
        return "".join(self.lines)

    def wait_for(self, text: str) -> None:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while text not in self.text:
            assert self.process.poll() is None, self.text
            assert time.monotonic() < deadline_s, self.text
            time.sleep(0.05)

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        code = self.process.wait(timeout=90)
        self._reader.join(timeout=30)
        return code


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Any]:
    """Starts `nearfield ...` in its own home; whatever happens, nothing of it is left behind."""
    opened: list[Terminal] = []

    def start(*arguments: str) -> Terminal:
        opened.append(Terminal(*arguments, home=tmp_path / "home"))
        return opened[-1]

    yield start
    for each in opened:
        each.process.kill()
        each.wait()
        if (left := regions.read(each.root)) is not None:
            regions.end(left, drain_timeout_s=0)


def assert_nothing_left(region: regions.Region) -> None:
    assert processes.of_region(region.state.region_id) == []
    assert not Path(region.state.runtime_dir).exists()
    assert not region.token_file.exists()
    assert regions.read(region.root) is None
    with socket.socket() as probe:
        assert probe.connect_ex((region.state.host, region.state.port)) != 0


def test_the_quickstart(terminal: Any, tmp_path: Path) -> None:
    """What `make run` does: two real models, true answers, examples that run as they stand."""
    up = terminal("up")
    up.wait_for("Ctrl-C ends the region")
    assert "chat: What is 47 + 85? → 132" in up.text
    assert "embed: " in up.text
    assert "→ 384 numbers: [" in up.text
    region = regions.find(up.root)

    examples = re.findall(r"^# (.*)\n((?:(?!^# |\nCtrl-C).*\n)+)", up.text, re.MULTILINE)
    assert len(examples) == 5, up.text
    for title, code in examples:
        shell = ["bash", "-c", code] if "curl" in title else [sys.executable, "-c", code]
        done = subprocess.run(shell, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{title}: {done.stderr}"
        if title.startswith("chat "):
            assert "132" in done.stdout

    assert up.end(signal.SIGINT) == 0
    assert "nothing is left running" in up.text
    assert_nothing_left(region)
    assert (up.root / "logs" / "serve").is_dir(), "the last run's logs are kept"


def test_a_killed_region_is_cleaned_up_by_the_next(terminal: Any, project: Path) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        taken = str(held.getsockname()[1])
        up = terminal("up", str(project / "plain.yaml"), "--port", taken)
        up.wait_for("Ctrl-C ends the region")
    assert f"port {taken} is taken, using" in up.text
    killed = regions.find(up.root)
    assert httpx.get(f"{killed.base_url}/plain").text == "plain"

    up.end(signal.SIGKILL)
    assert processes.of_region(killed.state.region_id)
    again = terminal("up", str(project / "plain.yaml"), "--detach", "--json", "--ingress", "python")
    assert again.wait() == 0, again.text
    assert "processes of a region that was killed" in again.text
    assert processes.of_region(killed.state.region_id) == []
    assert not Path(killed.state.runtime_dir).exists()

    detached = regions.find(again.root)
    assert httpx.get(f"{detached.base_url}/plain").text == "plain"
    second = terminal("up")
    assert second.wait() == 1
    assert "A region already runs at" in second.text
    down = terminal("down")
    assert down.wait() == 0, down.text
    assert_nothing_left(detached)


def test_a_region_without_a_working_model_does_not_stay(terminal: Any, project: Path) -> None:
    (project / "plain_app.py").write_text("raise ValueError('not today')\n")
    up = terminal("up", str(project / "plain.yaml"))
    assert up.wait() == 1
    assert "error: plain: ValueError: not today" in up.text
    assert "nothing is left running" in up.text


def test_an_interrupted_start_leaves_nothing(terminal: Any, project: Path) -> None:
    up = terminal("up", str(project / "plain.yaml"))
    up.wait_for("starting Ray")
    deadline_s = time.monotonic() + 30
    while (region := regions.read(up.root)) is None or not processes.of_region(
        region.state.region_id
    ):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    assert up.end(signal.SIGTERM) == 130
    assert "error: interrupted" in up.text
    assert_nothing_left(region)
