"""The parts of a local region that need no Ray: processes, ports, state, config changes, words."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from nearfield.cli import deploy, ports, probe, processes, ray_head, snippets
from nearfield.cli import models as listing
from nearfield.cli import region as regions
from nearfield.cli.applications import applications, serve_options
from nearfield.cli.config_files import ConfigFile
from nearfield.cli.region import Region, RegionState
from nearfield.cli.serve_api import ServeApi
from nearfield.core.errors import BadRequest, Conflict, NotFound, Unavailable
from nearfield.core.spec import ModelSpec
from nearfield.core.yaml_document import parse


def state(**changes: Any) -> RegionState:
    given = RegionState(
        region_id="0123456789abcdef",
        host="127.0.0.1",
        port=8000,
        ingress="haproxy",
        ports=ray_head.HeadPorts(*range(20_000, 20_000 + len(ray_head.HeadPorts.__slots__))),
        runtime_dir="/nowhere",
        started_unix_s=0.0,
        pythonpath="/base",
        serve_options={"proxy_location": "HeadOnly"},
        owner=None,
        ready=True,
    )
    return replace(given, **changes)


# Processes


Spawn = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Start a process marked as a region's; it says "ready" and then does as told."""
    started: list[subprocess.Popen[bytes]] = []

    def start(region_id: str, code: str = "signal.pause()") -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-c", f"import os, signal\nprint('ready', flush=True)\n{code}"],
            env={**os.environ, processes.MARKER: region_id},
            stdout=subprocess.PIPE,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_only_the_regions_own_processes_are_ended(spawn: Spawn) -> None:
    mine, other = spawn("aaaa"), spawn("aaaabbbb")
    assert [process.pid for process in processes.of_region("aaaa")] == [mine.pid]
    assert processes.end_region("aaaa", grace_s=5.0) == 1
    assert mine.wait(timeout=5) == -signal.SIGTERM
    assert other.poll() is None


def test_orphans_and_the_deaf_are_ended_too(spawn: Spawn) -> None:
    parent = spawn(
        "cccc",
        # The child leaves the group, outlives its parent and ignores SIGTERM.
        "if os.fork() == 0:\n"
        "    os.setsid(); signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    print('child', flush=True); signal.pause()",
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"child\n"
    parent.wait(timeout=5)
    assert len(processes.of_region("cccc")) == 1
    assert processes.end_region("cccc", grace_s=0.2) == 1
    assert processes.of_region("cccc") == []


def test_a_pid_alone_does_not_identify(spawn: Spawn) -> None:
    process = spawn("dddd")
    identity = processes.identify(process.pid)
    assert identity is not None
    assert processes.identify(process.pid) == identity
    process.kill()
    process.wait()
    assert processes.identify(process.pid) is None


def test_memory_is_counted(spawn: Spawn) -> None:
    spawn("eeee")
    memory = processes.memory_bytes(processes.of_region("eeee"))
    assert memory is None or 2**20 < memory < 2**28


# Ports


def test_a_taken_port_is_passed_over() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        taken = held.getsockname()[1]
        assert not ports.is_free(taken, "127.0.0.1")
        reservations = ports.Reservations()
        assert reservations.next_free(taken, "127.0.0.1") > taken
        with pytest.raises(OSError, match="no free port"):
            reservations.next_free(taken, "127.0.0.1", tries=1)
        reservations.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reservations are Linux's abstract sockets")
def test_two_regions_that_start_at_once_choose_different_ports() -> None:
    first, second = ports.Reservations(), ports.Reservations()
    port = first.next_free(28_000, "127.0.0.1")
    other = second.next_free(28_000, "127.0.0.1")
    assert other > port
    assert first.block(410) != second.block(410)
    first.close()
    assert second.next_free(port, "127.0.0.1") == port
    second.close()


def test_regions_share_no_port() -> None:
    reservations = ports.Reservations()
    chosen = ray_head.HeadPorts.choose(reservations)
    reservations.close()
    numbers = list(chosen.to_json().values())
    assert len(set(numbers)) == len(numbers)
    assert all(ports.is_free(number) for number in numbers)
    assert chosen.replica_http_last - chosen.replica_http_first >= 100
    assert max(numbers) < 32_768, "below the ephemeral range"


# How Ray is started


def environment(base: dict[str, str]) -> dict[str, str]:
    return ray_head.environment(
        base,
        region_id="ffff",
        token_file=Path("/home/u/token"),
        runtime_dir=Path("/tmp/nearfield-12345678"),
        ports=state().ports,
        ingress="haproxy",
    )


def test_ray_is_started_apart_from_any_other() -> None:
    env = environment({"RAY_ADDRESS": "other:6379", "RAY_AUTH_TOKEN": "theirs", "HOME": "/home/u"})
    assert env["HOME"] == "/home/u"
    assert "RAY_ADDRESS" not in env
    assert "RAY_AUTH_TOKEN" not in env
    assert env["RAY_AUTH_MODE"] == "token"
    assert env["RAY_AUTH_TOKEN_PATH"] == "/home/u/token"
    assert env[processes.MARKER] == "ffff"
    assert env["RAY_USAGE_STATS_ENABLED"] == "0"


def test_tunables_can_be_set_from_outside_and_isolation_cannot() -> None:
    env = environment({"RAY_SERVE_HAPROXY_NBTHREAD": "8", "RAY_SERVE_HAPROXY_METRICS_PORT": "9101"})
    assert env["RAY_SERVE_HAPROXY_NBTHREAD"] == "8"
    assert env["RAY_SERVE_HAPROXY_METRICS_PORT"] != "9101"


def test_haproxys_socket_paths_fit() -> None:
    """HAProxy takes 97 characters; Serve puts a node id of 56 between directory and file."""
    env = environment({})
    for name in ("SOCKET_PATH", "METRICS_SOCKET_PATH"):
        path = Path(env[f"RAY_SERVE_HAPROXY_{name}"])
        assert len(str(path.parent / ("0" * 56) / path.name)) <= 97


def test_every_port_serve_listens_on_is_ours() -> None:
    """A port variable that a new Ray adds must not go unnoticed: its default is one per host."""
    import ray

    source = (Path(ray.__file__).parent / "serve/_private/constants.py").read_text()
    known = set(re.findall(r'"(RAY_SERVE_\w*_PORT)"', source))
    not_listened_on = {"RAY_SERVE_WORKER_PROXY_HTTP_PORT", "RAY_SERVE_WORKER_PROXY_GRPC_PORT"}
    assert known - not_listened_on <= environment({}).keys()


# State


def test_state_survives_the_disk() -> None:
    for owner in (None, processes.Process(1, "2")):
        given = state(owner=owner)
        assert RegionState.from_json(json.loads(json.dumps(given.to_json()))) == given


def test_a_region_that_was_killed_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps(state(region_id="no such").to_json()))
    assert regions.read(tmp_path) is not None
    with pytest.raises(NotFound, match="nearfield up"):
        regions.find(tmp_path)


def test_another_versions_state_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps({**state().to_json(), "version": 99}))
    with pytest.raises(Conflict, match="another version"):
        regions.read(tmp_path)


def test_a_running_region_is_not_started_twice(tmp_path: Path, spawn: Spawn) -> None:
    owner = spawn("0000")
    running = state(region_id="0000", owner=processes.identify(owner.pid))
    (tmp_path / "state.json").write_text(json.dumps(running.to_json()))
    with pytest.raises(Conflict, match="already runs at"):
        regions.start(tmp_path, regions.RegionOptions(), print)
    assert owner.poll() is None


# Changing what is served


class FakeServe:
    """Serve's REST interface, as far as a deploy needs it."""

    def __init__(self, **running: dict[str, Any]) -> None:
        self.applications = {name: self._details(app) for name, app in running.items()}
        self.put: dict[str, Any] | None = None
        self.status = 200

    @staticmethod
    def _details(app: dict[str, Any]) -> dict[str, Any]:
        return {
            "name": app["name"],
            "status": "RUNNING",
            "message": "",
            "route_prefix": app.get("route_prefix"),
            "deployed_app_config": app,
            "deployments": {},
        }

    def handle(self, request: httpx.Request) -> httpx.Response:
        if request.url.host == "ingress":
            assert "authorization" not in request.headers, "the token is for the dashboard only"
            assert request.url.path == "/-/routes"
            return httpx.Response(200, json={f"/{name}": name for name in self.applications})
        assert request.headers["authorization"] == "Bearer secret"
        if request.method == "PUT":
            self.put = json.loads(request.content)
        return httpx.Response(self.status, json={"applications": self.applications})


def region_of(fake: FakeServe, root: Path) -> Region:
    region = Region(root, state())
    api = ServeApi("http://dashboard", "http://ingress", "secret", httpx.MockTransport(fake.handle))
    object.__setattr__(region, "api", api)
    return region


def app(name: str, route: str | None = None) -> dict[str, Any]:
    return {"name": name, "route_prefix": route or f"/{name}", "import_path": "x:y"}


def test_a_deploy_leaves_the_others_alone(tmp_path: Path) -> None:
    fake = FakeServe(chat=app("chat"), embed=app("embed"))
    region = region_of(fake, tmp_path)
    deploy.apply(region, [app("mine"), {**app("embed"), "args": {"version": "2"}}])
    assert fake.put == {
        "proxy_location": "HeadOnly",
        "applications": [
            app("chat"),
            {**app("embed"), "args": {"version": "2"}},
            app("mine"),
        ],
    }


def test_a_removal_leaves_the_others_alone(tmp_path: Path) -> None:
    fake = FakeServe(chat=app("chat"), embed=app("embed"))
    deploy.apply(region_of(fake, tmp_path), [], remove=["chat"])
    assert fake.put is not None
    assert fake.put["applications"] == [app("embed")]


def test_what_is_not_there_cannot_be_removed(tmp_path: Path) -> None:
    fake = FakeServe(chat=app("chat"))
    with pytest.raises(NotFound, match=r"No such model here: caht\. Running: chat"):
        deploy.apply(region_of(fake, tmp_path), [], remove=["caht"])
    assert fake.put is None


def test_a_taken_route_is_refused(tmp_path: Path) -> None:
    fake = FakeServe(chat=app("chat"))
    with pytest.raises(Conflict, match="route_prefix /chat of mine is taken by chat"):
        deploy.apply(region_of(fake, tmp_path), [app("mine", "/chat")])
    assert fake.put is None


def test_an_application_on_its_way_out_is_not_brought_back(tmp_path: Path) -> None:
    fake = FakeServe(chat=app("chat"), old=app("old"))
    fake.applications["old"]["status"] = "DELETING"
    deploy.apply(region_of(fake, tmp_path), [app("mine")])
    assert fake.put is not None
    assert [a["name"] for a in fake.put["applications"]] == ["chat", "mine"]


@pytest.mark.parametrize(("status", "kind"), [(400, BadRequest), (503, Unavailable)])
def test_serves_own_refusals_are_told(tmp_path: Path, status: int, kind: type[Exception]) -> None:
    fake = FakeServe()
    fake.status = status
    with pytest.raises(kind):
        deploy.apply(region_of(fake, tmp_path), [app("mine")])


def test_a_dead_dashboard_is_told() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    with pytest.raises(Unavailable, match="nearfield status"):
        ServeApi(
            "http://dashboard", "http://ingress", "secret", httpx.MockTransport(refuse)
        ).details()


REPLICA_TRACE = """The deployment failed to start 3 times in a row. Error:
ray::ServeReplica:chat:replica.initialize() (pid=1, ip=192.0.2.1)
  File "replica.py", line 1867, in initialize
    await self._user_callable_wrapper.initialize_callable()
RuntimeError: Traceback (most recent call last):
  File "engine.py", line 7, in load
    raise BadRequest("no weights")
{error}"""


@pytest.mark.parametrize(
    ("status", "message", "deployment", "reason"),
    [
        ("RUNNING", "", "", None),
        ("DEPLOYING", "", "A replica failed to start. Retrying.", None),
        (
            "DEPLOY_FAILED",
            "Failed to update the deployments ['replica'].",
            REPLICA_TRACE.format(error="nearfield.core.errors.BadRequest: no weights at hf://a/b"),
            "no weights at hf://a/b",
        ),
        (
            "DEPLOY_FAILED",
            "Failed to update the deployments ['replica'].",
            REPLICA_TRACE.format(error="builtins.KeyError: 'x'"),
            "KeyError: 'x'",
        ),
        (
            "DEPLOY_FAILED",
            "Deploying app 'a' failed with exception:\nTraceback (most recent call last):\n"
            "  File \"x.py\", line 1\nModuleNotFoundError: No module named 'nope'\n",
            None,
            "ModuleNotFoundError: No module named 'nope'",
        ),
        ("UNHEALTHY", "something else", "", "something else"),
    ],
)
def test_the_reason_is_the_exception_not_its_traceback(
    status: str, message: str, deployment: str | None, reason: str | None
) -> None:
    deployments = {} if deployment is None else {"replica": {"message": deployment}}
    details = {"status": status, "message": message, "deployments": deployments}
    assert deploy.failure(details) == reason


def test_no_room_is_a_failure_at_once() -> None:
    waiting = (
        "Deployment 'replica' in application 'big' has 1 replicas that have taken more than 30s "
        "to be scheduled. This may be due to waiting for the cluster to auto-scale or for a "
        'runtime environment to be installed. Resources required for each replica: {"CPU": 9.0}, '
        'total resources available: {"CPU": 3.9}. Use `ray status` for more details.'
    )
    details = {
        "status": "DEPLOYING",
        "message": "",
        "deployments": {"replica": {"message": waiting}},
    }
    reason = deploy.failure(details)
    assert reason is not None
    assert 'needs {"CPU": 9.0} and {"CPU": 3.9} is free' in reason
    assert "nearfield up --cpus" in reason


def test_waiting_ends_with_one_outcome_each(tmp_path: Path) -> None:
    fake = FakeServe(chat=app("chat"), bad=app("bad"))
    fake.applications["bad"] |= {"status": "DEPLOY_FAILED", "message": "ValueError: no"}
    lines: list[str] = []
    outcomes = deploy.wait_until_running(
        region_of(fake, tmp_path), ["chat", "bad"], timeout_s=5.0, report=lines.append
    )
    assert outcomes == [
        deploy.Outcome("chat", True),
        deploy.Outcome("bad", False, "ValueError: no"),
    ]
    assert lines == ["chat: running", "bad: failed"]


def test_waiting_has_an_end(tmp_path: Path) -> None:
    fake = FakeServe(slow=app("slow"))
    fake.applications["slow"]["status"] = "DEPLOYING"
    (outcome,) = deploy.wait_until_running(
        region_of(fake, tmp_path), ["slow"], timeout_s=0.0, report=print
    )
    assert not outcome.ready
    assert "it goes on trying" in (outcome.reason or "")


def test_models_are_listed(tmp_path: Path) -> None:
    spec = {"model": "chat", "engine": {"kind": "generate"}, "source": "builtin://abacus"}
    config = {**app("chat"), "import_path": "nearfield.serving:app", "args": spec}
    fake = FakeServe(chat=config)
    replicas = [{"state": "RUNNING"}, {"state": "STARTING"}]
    fake.applications["chat"]["deployments"] = {
        "replica": {"message": "", "target_num_replicas": 2, "replicas": replicas}
    }
    assert [model.to_json() for model in listing.listed(region_of(fake, tmp_path))] == [
        {
            "application": "chat",
            "model": "chat",
            "version": "1",
            "engine": "generate",
            "source": "builtin://abacus",
            "endpoint": "http://127.0.0.1:8000/chat",
            "replicas": 1,
            "replicas_wanted": 2,
            "state": "running",
            "reason": None,
            "scaled": False,
        }
    ]


# From files to applications


def config_file(directory: Path, text: str, name: str = "model.yaml") -> ConfigFile:
    return ConfigFile(name, directory / name, parse(text))


CUSTOM = """\
applications:
  - name: shout
    route_prefix: /shout
    import_path: nearfield.serving:app
    args: {model: shout, engine: "shout:Shout"}
"""


def test_what_lies_beside_a_file_can_be_imported(tmp_path: Path) -> None:
    file = config_file(tmp_path, CUSTOM)
    assert "runtime_env" not in applications([file], "/base")[0]
    (tmp_path / "shout.py").write_text("")
    (deployed,) = applications([file], "/base")
    assert deployed["runtime_env"]["env_vars"]["PYTHONPATH"] == f"{tmp_path}:/base"
    assert "runtime_env" not in file.document.value["applications"][0]


def test_a_runtime_env_of_ones_own_is_kept(tmp_path: Path) -> None:
    (tmp_path / "shout.py").write_text("")
    file = config_file(tmp_path, CUSTOM + "    runtime_env: {env_vars: {A: b}}\n")
    assert applications([file], "")[0]["runtime_env"] == {"env_vars": {"A": "b"}}


def test_files_for_one_region_agree_on_its_options(tmp_path: Path) -> None:
    first = config_file(tmp_path, "http_options: {port: 1}\n" + CUSTOM, "a.yaml")
    same = config_file(tmp_path, "http_options: {port: 1}\n" + CUSTOM, "b.yaml")
    other = config_file(tmp_path, "http_options: {port: 2}\n" + CUSTOM, "c.yaml")
    assert serve_options([first, same]) == {"http_options": {"port": 1}}
    with pytest.raises(BadRequest, match=r"http_options differs between a.yaml and c.yaml"):
        serve_options([first, other])


# Asking and telling


def spec(engine: Any, **more: Any) -> ModelSpec:
    source = {} if "remote" in str(engine) else {"source": "builtin://abacus"}
    return ModelSpec.model_validate({"model": "m", "engine": engine, **source, **more})


@pytest.mark.parametrize(
    ("engine", "kind"),
    [
        ("generate", "chat"),
        ("vllm", "chat"),
        ("embed", "embeddings"),
        ("tensor", "ready"),
        ("my_module:Engine", "ready"),
        ({"kind": "remote", "url": "http://h/v1"}, "chat"),
        ({"kind": "remote", "url": "http://h/v1", "task": "embed"}, "embeddings"),
        ({"kind": "remote", "url": "http://h", "task": "tensor", "protocol": "oip"}, "ready"),
    ],
)
def test_each_engine_is_asked_what_it_can_answer(engine: Any, kind: probe.Kind) -> None:
    assert probe.kind_of(spec(engine)) == kind


def test_examples_name_the_endpoint_and_compile() -> None:
    shown = snippets.examples(
        [
            ("http://127.0.0.1:8000/chat", spec("generate")),
            ("http://127.0.0.1:8000/embed", spec("embed")),
        ]
    )
    assert len(shown) == 5
    for title, code in shown:
        assert "127.0.0.1:8000/" in code
        assert "{" not in title
        if "curl" not in title:
            compile(code, title, "exec")


def test_the_environment_for_people_is_the_one_we_use() -> None:
    """cluster_configs/local/serve.env, for a Ray started by hand."""
    file = Path(__file__).parents[2] / "cluster_configs" / "local" / "serve.env"
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    shown = dict(line.split("=") for line in lines)
    ours = environment({})
    assert shown == {key: ours[key] for key in shown}
