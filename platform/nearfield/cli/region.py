"""A local region: one Ray head with Serve on this machine, started, found again and ended.

    <home>/regions/local/      state.json, token (0600), locks, ray.log, logs of the last run
    /tmp/nearfield-xxxxxxxx/   Ray's session and HAProxy's sockets, whose paths must be short

The process that starts a region owns it; when the owner dies without ending it, the next start
finds the stale state and cleans up. A detached region has no owner.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from nearfield.cli import processes, ray_head, ray_nodes
from nearfield.cli.ports import Reservations
from nearfield.cli.processes import Process
from nearfield.cli.serve_api import ServeApi
from nearfield.core.errors import Conflict, NotFound, Unavailable
from nearfield.core.settings import Settings

Report = Callable[[str], None]
DEFAULT_PORT = 8000
_STATE_VERSION = 1
_RAY_START_TIMEOUT_S = 180.0
DRAIN_TIMEOUT_S = 60.0
_ALL_INTERFACES = ("0.0.0.0", "::")  # noqa: S104
_STOP_GRACE_S = 2.0


@dataclass(frozen=True, slots=True)
class RegionOptions:
    """How a region is started.

    Attributes:
        port: a wish: the next free one is taken.
        num_cpus: what models may ask for in total; absent: at least 4. Only Ray's bookkeeping.
        serve_options: top-level keys of a Serve config other than `applications`.
        environ: variables of its own, above those of this process.
        lean: Ray's dashboard has no pages, which makes it smaller.
        cluster: a cluster file of fake nodes (`ray_nodes.is_local`), which come and go as replicas
            need them.
    """

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    ingress: ray_head.Ingress = "haproxy"
    num_cpus: int | None = None
    object_store_bytes: int = 128 * 2**20
    detached: bool = False
    serve_options: dict[str, Any] = field(default_factory=dict)
    environ: Mapping[str, str] = field(default_factory=dict)
    lean: bool = False
    cluster: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class RegionState:
    """What is written down about a region, enough to use it or to end it from another process.

    Attributes:
        region_id: the value of the marker in the environment of all its processes.
        pythonpath: what Ray was started with, so that an application's own can extend it.
        serve_options: top-level keys of every Serve config put there (they cannot change).
        owner: the process that will end it, None if detached.
        environ: `RegionOptions.environ`: what it asks of callers, for instance.
        ready: Ray is up; before that, only cleaning up is possible.
    """

    region_id: str
    host: str
    port: int
    ingress: ray_head.Ingress
    ports: ray_head.HeadPorts
    runtime_dir: str
    started_unix_s: float
    pythonpath: str
    serve_options: dict[str, Any]
    owner: Process | None
    environ: Mapping[str, str] = field(default_factory=dict)
    ready: bool = False

    def to_json(self) -> dict[str, Any]:
        return {"version": _STATE_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> RegionState:
        fields = {key: value for key, value in data.items() if key != "version"}
        owner = fields.pop("owner")
        ports = ray_head.HeadPorts(**fields.pop("ports"))
        return cls(**fields, ports=ports, owner=Process(**owner) if owner else None)


@dataclass(frozen=True)
class Region:
    """A region's directory and its state.

    `reservations`: its ports, held by the process that starts it until all of them are bound.
    """

    root: Path
    state: RegionState
    reservations: Reservations = field(default_factory=Reservations, compare=False)

    @property
    def base_url(self) -> str:
        """Where models answer: `<base_url>/<route_prefix>`."""
        host = "127.0.0.1" if self.state.host in _ALL_INTERFACES else self.state.host
        return f"http://{host}:{self.state.port}"

    def url_of(self, route_prefix: str | None) -> str | None:
        """The base URL of an application, None if it has no route."""
        return None if route_prefix is None else f"{self.base_url}{route_prefix.rstrip('/')}"

    @property
    def dashboard_url(self) -> str:
        return f"http://127.0.0.1:{self.state.ports.dashboard}"

    @property
    def gcs_address(self) -> str:
        """Where Ray's head answers."""
        return f"127.0.0.1:{self.state.ports.gcs}"

    @property
    def logs_dir(self) -> Path:
        """Ray's and Serve's logs while the region runs; afterwards they are in `root/logs`."""
        return Path(self.state.runtime_dir) / "ray" / "session_latest" / "logs"

    @property
    def settings(self) -> Settings:
        """What the environment of its replicas says."""
        return Settings.from_env({**os.environ, **self.state.environ})

    @property
    def token_file(self) -> Path:
        return self.root / "token"

    @cached_property
    def api(self) -> ServeApi:
        return ServeApi(self.dashboard_url, self.base_url, self.token_file.read_text().strip())

    @contextlib.contextmanager
    def deploying(self) -> Iterator[None]:
        """Held while the desired config is read, changed and written: one writer at a time."""
        with locked(self.root / "deploy.lock", wait=True):
            yield


def start(root: Path, options: RegionOptions, report: Report) -> Region:
    """Start a region in `root` and return once Ray is up; Serve starts with the first deploy.

    Raises:
        Conflict: a region runs there already.
        Unavailable: Ray did not start; the message says what it said.
    """
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(root / "start.lock", wait=False):
        _make_room(root, report)
        reservations = Reservations()
        port = reservations.next_free(options.port, options.host)
        if port != options.port:
            report(f"port {options.port} is taken, using {port}")
        runtime_dir = Path(tempfile.mkdtemp(prefix="nearfield-", dir=_short_tmp()))
        owner = None if options.detached else processes.identify(os.getpid())
        state = RegionState(
            region_id=secrets.token_hex(8),
            host=options.host,
            port=port,
            ingress=options.ingress,
            ports=ray_head.HeadPorts.choose(reservations),
            runtime_dir=str(runtime_dir),
            started_unix_s=time.time(),
            pythonpath=os.environ.get("PYTHONPATH", ""),
            serve_options=_serve_options(options, port),
            owner=owner,
            environ=dict(options.environ),
        )
        region = Region(root, state, reservations)
        _write_private(region.token_file, secrets.token_hex(32))
        # Written before anything runs, so that not even a kill -9 during the start leaves orphans.
        _write_state(region)
        try:
            _start_ray(region, options)
        except BaseException:
            end(region, drain_timeout_s=0)
            raise
        region = replace(region, state=replace(state, ready=True))
        _write_state(region)
        return region


def find(root: Path) -> Region:
    """The region that runs in `root`.

    Raises:
        NotFound: none does.
    """
    region = read(root)
    if region is None or not region.state.ready or not processes.of_region(region.state.region_id):
        raise NotFound(f"No region runs here. {_instead(root)}", code="region_not_running")
    return region


def _instead(root: Path) -> str:
    """What to do where no region runs."""
    others = sorted(path.parent.name for path in root.parent.glob("*/state.json"))
    if not others or root.name in others:
        return "Start one with: nearfield up"
    return f"Others do, name one: --region {' or '.join(others)}"


def end(region: Region, *, drain_timeout_s: float = DRAIN_TIMEOUT_S) -> int:
    """End all of a region's processes, keep its logs, forget it. Returns how many it ended.

    Args:
        drain_timeout_s: how long replicas may finish what they accepted; 0: not at all.

    Raises:
        TimeoutError: some would not end; the state is kept for the next try.
    """
    if drain_timeout_s > 0:
        drain(region, drain_timeout_s)
    grace_s = _STOP_GRACE_S if drain_timeout_s > 0 else 0.0
    return end_drained(region, grace_s=grace_s)


def drain(region: Region, timeout_s: float) -> None:
    """End its Serve: replicas finish what they have accepted, if they can in this time."""
    if region.state.ready:
        region.api.shut_down(timeout_s=timeout_s)


def end_drained(region: Region, *, grace_s: float = _STOP_GRACE_S) -> int:
    """The rest of `end`.

    Raises:
        TimeoutError: as `end` does.
    """
    count = processes.end_region(region.state.region_id, grace_s=grace_s)
    runtime_dir = Path(region.state.runtime_dir)
    logs = region.root / "logs"
    for session_logs in runtime_dir.glob("ray/session_2*/logs"):
        shutil.rmtree(logs, ignore_errors=True)
        shutil.move(session_logs, logs)
    shutil.rmtree(runtime_dir, ignore_errors=True)
    _state_file(region.root).unlink(missing_ok=True)
    region.token_file.unlink(missing_ok=True)
    region.reservations.close()
    return count


def _make_room(root: Path, report: Report) -> None:
    region = read(root)
    if region is None:
        return
    owner = region.state.owner
    running = processes.of_region(region.state.region_id)
    owned = owner is not None and processes.identify(owner.pid) == owner
    if owned or (owner is None and running):
        raise Conflict(
            f"A region already runs at {region.base_url}. Add models to it with: nearfield serve "
            "FILE, stop it with: nearfield down, or start another one with --dir",
            code="region_running",
        )
    if running:
        report(f"cleaning up {len(running)} processes of a region that was killed")
    end(region, drain_timeout_s=0)


def _start_ray(region: Region, options: RegionOptions) -> None:
    state = region.state
    runtime_dir = Path(state.runtime_dir)
    environ = {**os.environ, **state.environ}
    autoscaling_config, num_cpus = None, options.num_cpus
    if options.cluster is not None:
        num_cpus = num_cpus or ray_nodes.head_cpus(options.cluster)
        autoscaling_config = runtime_dir / "cluster.yaml"
        ray_nodes.write_autoscaling_config(
            autoscaling_config,
            options.cluster,
            gcs_port=state.ports.gcs,
            unavailable_file=region.root / ray_nodes.UNAVAILABLE,
        )
        environ |= ray_nodes.environment()
    arguments = ray_head.command(
        state.ports,
        runtime_dir,
        # Two models with one CPU each should fit everywhere; CPUs here are only Ray's bookkeeping.
        num_cpus=num_cpus or max(4, os.cpu_count() or 1),
        object_store_bytes=options.object_store_bytes,
        autoscaling_config=autoscaling_config,
    )
    (runtime_dir / "tmp").mkdir()
    if state.ingress == "haproxy":
        ray_head.write_haproxy_launcher(runtime_dir)
    environment = ray_head.environment(
        environ,
        region_id=state.region_id,
        token_file=region.token_file,
        runtime_dir=runtime_dir,
        ports=state.ports,
        ingress=state.ingress,
        lean=options.lean,
    )
    log_file = region.root / "ray.log"
    with log_file.open("wb") as log:
        # A session of its own: Ctrl-C in our terminal must reach us, not Ray.
        started = subprocess.Popen(
            arguments,
            env=environment,
            cwd=region.root,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = started.wait(timeout=_RAY_START_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if started.poll() is None:
                started.kill()
                started.wait()
    if code != 0:
        ended = "did not finish" if code is None else f"ended with code {code}"
        last = "\n".join(log_file.read_text(errors="replace").strip().splitlines()[-8:])
        raise Unavailable(f"Ray did not start: `ray start` {ended}. Its last words:\n{last}")


def _serve_options(options: RegionOptions, port: int) -> dict[str, Any]:
    given = options.serve_options
    return {
        "logging_config": {"enable_access_log": False},  # replicas log requests themselves
        **given,
        "proxy_location": "HeadOnly",
        "http_options": {
            "request_timeout_s": ray_head.REQUEST_TIMEOUT_S,
            **given.get("http_options", {}),
            "host": options.host,
            "port": port,
        },
    }


def read(root: Path) -> Region | None:
    """The region `root` tells of, running or not; None if there is none."""
    try:
        data = json.loads(_state_file(root).read_text())
    except FileNotFoundError:
        return None
    if data.get("version") != _STATE_VERSION:
        raise Conflict(
            f"{_state_file(root)} was written by another version of nearfield; stop that region "
            "with the version that started it, or use another --dir"
        )
    return Region(root, RegionState.from_json(data))


def _state_file(root: Path) -> Path:
    return root / "state.json"


def _write_state(region: Region) -> None:
    _write_private(
        _state_file(region.root), json.dumps(region.state.to_json(), indent=2, sort_keys=True)
    )


def _write_private(path: Path, text: str) -> None:
    """Write a file only its owner can read, all of it or nothing."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)  # 0600
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    Path(name).replace(path)


def _short_tmp() -> str:
    # A user's own TMPDIR is often too long for a Unix socket's path; mkdtemp makes this safe.
    return "/tmp" if os.access("/tmp", os.W_OK) else tempfile.gettempdir()  # noqa: S108


@contextlib.contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[None]:
    """One process at a time.

    Raises:
        Conflict: another one is there, and waiting was not wanted.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise Conflict("Another `nearfield up` is starting a region here right now.") from None
        yield
