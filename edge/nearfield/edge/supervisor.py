"""The process that keeps a gateway running: it holds the listening sockets, workers use them.

    SIGTERM, SIGINT   workers drain, then everything ends; twice: at once
    SIGHUP            zero-downtime restart: new workers from the files and the code as they are
                      now; once they accept, the old ones drain. If they fail, nothing changes.
    a worker dies     another takes its place

The sockets stay open throughout, so whoever connects meanwhile waits in a queue and is refused
nothing. The supervisor itself is replaced by starting another one that takes over: it gets the
sockets (`proxy.handover`), and this one drains and ends once that one's workers accept.

This process does little and imports little: no request ever passes through it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nearfield.api.signing import write_private
from nearfield.core.errors import BadRequest, Conflict, NearfieldError
from nearfield.core.settings import Settings
from nearfield.edge import channel
from nearfield.edge.proxy.handover import Inherited, Offer, address, inherit

if TYPE_CHECKING:
    from nearfield.core.federation import Listen
    from nearfield.edge.files import Files

log = logging.getLogger("nearfield.edge")

REPLACED_DRAIN_S = 600.0
"""And when it is replaced: nobody waits for it. As long as a request's default deadline."""
START_S = 30.0
"""How long workers may take to accept: a store that does not answer costs them some seconds."""
KILL_S = 5.0
"""A worker that has not ended so long after its drain is killed."""
RESPAWN_S, MAX_RESPAWN_S = 0.1, 10.0
"""Before a worker that died is replaced: doubled each time, until one has lived for ..."""
HEALTHY_S = 60.0
STATE_FILE, OFFER_FILE = "gateway.json", "handover"

_Event = Literal["begun", "restart", "stop", "taken"]
_Field = Literal["port", "grpc_port"]
_Sockets = dict[_Field, "_Bound"]


class WorkerFailed(NearfieldError):
    """A worker ended before it accepted. It has said why on standard error.

    Attributes:
        exit_code: its own.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__("The gateway could not be started: see above.", code="worker_failed")
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True)
class Options:
    """How a gateway is run.

    Attributes:
        state: its folder; None: by its name, in NEARFIELD_HOME.
        take_over: from the one that runs with this state.
    """

    state: Path | None = None
    workers: int = 1
    drain_s: float = channel.DRAIN_S
    take_over: bool = False


@dataclass(frozen=True, slots=True)
class Running:
    """What is written down about a gateway that runs.

    Attributes:
        pid: the supervisor's. grpc: host:port, None where it does not listen for it.
        generation: of its workers: one more with each restart.
        failures: restarts that failed, and trouble: why the last did.
    """

    gateway: str
    pid: int
    url: str
    grpc: str | None
    workers: tuple[int, ...]
    started_unix_s: float
    generation: int
    failures: int = 0
    trouble: str | None = None


def running(state: Path) -> Running | None:
    """The gateway that runs with this state, None if none does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            with address(state / OFFER_FILE) as name:
                probe.connect(name)
            data = json.loads((state / STATE_FILE).read_text())
        except (OSError, ValueError):
            return None
    data["workers"] = tuple(data["workers"])
    return Running(**data)


@dataclass(frozen=True, slots=True)
class _Bound:
    """Sockets that listen at one address, as the file names it."""

    host: str
    port: int
    sockets: list[socket.socket]

    def close(self) -> None:
        for each in self.sockets:
            each.close()


class _Worker:
    """A process, and the supervisor's end of its channel."""

    def __init__(self, number: int, arguments: Sequence[str]) -> None:
        self.number = number
        self.began_s = time.monotonic()
        self.leaving = False
        self.ready = asyncio.Event()
        self.gone = asyncio.Event()
        self.line, theirs = socket.socketpair()
        self.line.setblocking(False)
        with theirs:
            command = [sys.executable, "-m", "nearfield.edge.worker"]
            self.process = subprocess.Popen(
                [*command, "--channel", str(theirs.fileno()), *arguments],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a terminal's Ctrl-C is the supervisor's to handle
            )

    async def tend(self) -> int:
        """Until it has ended; returns its exit code."""
        async for said in channel.lines(self.line):
            if said == channel.READY:
                self.ready.set()
        code = await asyncio.to_thread(self.process.wait)
        self.line.close()
        self.gone.set()
        return code

    def leave(self, drain_s: float) -> None:
        self.leaving = True
        with contextlib.suppress(OSError):  # it is gone
            self.line.send(b"drain %d\n" % drain_s)

    def kill(self) -> None:
        self.leaving = True
        if self.process.poll() is None:
            self.process.kill()


class Supervisor:
    """Runs one gateway in the foreground."""

    def __init__(self, path: Path, options: Options, on_ready: Callable[[Running], None]) -> None:
        """
        Args:
            path: the gateway's file.
            on_ready: told once, when clients are accepted.
        """
        self._path = path.absolute()
        self._options = options
        self._on_ready = on_ready
        self._events: asyncio.Queue[_Event] = asyncio.Queue()
        self._listen: Listen
        self._sockets: _Sockets = {}
        self._workers: list[_Worker] = []
        self._everybody: set[_Worker] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._codes: dict[_Worker, int] = {}
        self._respawn_s = RESPAWN_S
        self._state = Path()
        self._offer: Offer | None = None
        self._told: Running | None = None
        self._restarting = self._again = False

    async def run(self) -> int:
        """Until it is stopped or replaced; returns the exit code.

        Raises:
            BadRequest: a file cannot be used, or an address cannot be listened on.
            Conflict: such a gateway runs already.
            WorkerFailed: a worker does not start.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._events.put_nowait, "stop")
        loop.add_signal_handler(signal.SIGHUP, self._hang_up, _has_terminal())
        beginning = self._spawn_task(self._begin())
        beginning.add_done_callback(lambda _: self._events.put_nowait("begun"))
        drain_s = self._options.drain_s
        try:
            while True:
                event = await self._events.get()
                if event == "begun":
                    beginning.result()
                elif event == "restart":
                    if beginning.done():
                        self._restart_soon()
                elif event == "taken":
                    drain_s = REPLACED_DRAIN_S
                    log.info("another process has taken over: draining")
                    break
                else:
                    break
            beginning.cancel()
            await self._end(drain_s)
        except BaseException:
            await self._end(0.0)
            raise
        finally:
            for task in self._tasks:
                task.cancel()
            self._forget()
        return 0

    # ---- beginning --------------------------------------------------------------------------

    async def _begin(self) -> None:
        # Python takes longest: let it start while the files are read.
        early = [self._spawn(number) for number in range(self._options.workers)]
        read = await asyncio.to_thread(_read, self._path)
        self._listen = read.gateway.listen
        name = read.gateway.gateway
        self._state = self._options.state or _default_state(name)
        _make_state(self._state)
        taken = await asyncio.to_thread(self._take)
        self._sockets = self._bind([] if taken is None else taken.sockets)
        await self._settle(early)
        self._workers = early
        if taken is not None:
            taken.ready()
        self._offer = self._offered()
        self._told = self._describe(name)
        self._note()
        self._on_ready(self._told)

    def _take(self) -> Inherited | None:
        """The sockets of the gateway that runs here, if there is one and it may be replaced."""
        known = running(self._state)
        if known is not None and not self._options.take_over:
            raise Conflict(
                f"The gateway {known.gateway} runs already, at {known.url} (process {known.pid}). "
                "Restart it with: nearfield gateway FILE --restart, or replace its process with: "
                "nearfield gateway FILE --take-over",
                code="gateway_running",
            )
        return None if known is None else inherit(self._state / OFFER_FILE)

    def _spawn(self, number: int) -> _Worker:
        arguments = ["--workers", str(self._options.workers)]
        if self._options.state is not None:
            arguments += ["--state", str(self._options.state.absolute())]
        worker = _Worker(number, [*arguments, str(self._path)])
        self._everybody.add(worker)
        self._spawn_task(self._tend(worker))
        return worker

    async def _settle(self, workers: Sequence[_Worker]) -> None:
        """Give workers their sockets, and wait until they accept.

        Raises:
            WorkerFailed: one does not.
        """
        for worker in workers:
            channel.send_sockets(worker.line, self._sockets_of(worker))
        for worker in workers:
            ready, gone = (asyncio.create_task(e.wait()) for e in (worker.ready, worker.gone))
            await asyncio.wait((ready, gone), timeout=START_S, return_when="FIRST_COMPLETED")
            ready.cancel()
            gone.cancel()
            if not worker.ready.is_set():
                raise WorkerFailed(self._codes.get(worker, 1) or 1)

    # ---- workers come and go ----------------------------------------------------------------

    async def _tend(self, worker: _Worker) -> None:
        code = self._codes[worker] = await worker.tend()
        self._everybody.discard(worker)
        if worker not in self._workers or worker.leaving:
            return
        if time.monotonic() - worker.began_s > HEALTHY_S:
            self._respawn_s = RESPAWN_S
        log.error("worker %d ended with code %d: another one starts", worker.process.pid, code)
        await asyncio.sleep(self._respawn_s)
        self._respawn_s = min(2 * self._respawn_s, MAX_RESPAWN_S)
        if worker not in self._workers:
            return  # a restart has replaced it
        another = self._spawn(worker.number)
        self._workers[self._workers.index(worker)] = another
        with contextlib.suppress(OSError):  # it died at once: then this is done again
            channel.send_sockets(another.line, self._sockets_of(another))
        self._note()

    def _hang_up(self, had_terminal: bool) -> None:
        """A restart is asked for; or the terminal is gone, which asks for the end."""
        self._events.put_nowait("stop" if had_terminal and not _has_terminal() else "restart")

    def _restart_soon(self) -> None:
        if self._restarting:
            self._again = True
            return
        self._restarting = True
        self._spawn_task(self._restart())

    async def _restart(self) -> None:
        assert self._told is not None
        began_s = time.monotonic()
        listen, sockets = self._listen, self._sockets
        fresh: list[_Worker] = []
        try:
            read = await asyncio.to_thread(_read, self._path)
            if read.gateway.gateway != self._told.gateway:
                raise BadRequest("gateway: its name cannot change while it runs", param="gateway")
            self._listen = read.gateway.listen
            self._sockets = self._bind([])
            fresh = [self._spawn(number) for number in range(self._options.workers)]
            await self._settle(fresh)
        except (NearfieldError, OSError) as error:
            for worker in fresh:
                worker.kill()
            _close(self._sockets, but=sockets)
            self._listen, self._sockets = listen, sockets
            trouble = error.message if isinstance(error, NearfieldError) else str(error)
            log.error("not restarted, everything stays as it was: %s", trouble)
            self._note(failures=self._told.failures + 1, trouble=trouble)
        else:
            replaced, self._workers = self._workers, fresh
            for worker in replaced:
                worker.leave(REPLACED_DRAIN_S)
            _close(sockets, but=self._sockets)
            if sockets != self._sockets:
                self._replace_offer()
            self._note(generation=self._told.generation + 1, trouble=None)
            log.info("restarted in %.2f s", time.monotonic() - began_s)
        finally:
            self._restarting = False
            if self._again:
                self._again = False
                self._restart_soon()

    async def _end(self, drain_s: float) -> None:
        """Everybody goes. Another order to stop: at once."""
        for worker in self._everybody:
            if drain_s and worker.ready.is_set():
                worker.leave(drain_s)
            else:
                worker.kill()
        gone = asyncio.gather(*(worker.gone.wait() for worker in self._everybody))
        order = asyncio.create_task(self._order_to_stop())
        await asyncio.wait((gone, order), timeout=drain_s + KILL_S, return_when="FIRST_COMPLETED")
        order.cancel()
        for worker in self._everybody:
            worker.kill()
        await gone

    async def _order_to_stop(self) -> None:
        while await self._events.get() != "stop":
            pass

    # ---- sockets ----------------------------------------------------------------------------

    def _bind(self, taken: Sequence[socket.socket]) -> _Sockets:
        """Sockets for every address of the file: those that listen there already, or new ones.

        Args:
            taken: from another process; those that are not wanted any more are closed.

        Raises:
            BadRequest: an address cannot be had.
        """
        listen, left = self._listen, list(taken)
        wanted: dict[_Field, int | None] = {"port": listen.port, "grpc_port": listen.grpc_port}
        found: _Sockets = {}
        for field, port in wanted.items():
            if port is None:
                continue
            known = self._sockets.get(field)
            if known is not None and (known.host, known.port) == (listen.host, port):
                found[field] = known
                continue
            there = _at(left, listen.host, port)
            found[field] = _Bound(
                listen.host, port, there or self._new_sockets(field, listen.host, port)
            )
            left = [each for each in left if each not in there]
        for each in left:
            each.close()
        return found

    def _new_sockets(self, field: _Field, host: str, port: int) -> list[socket.socket]:
        # Imported late: with it comes the forwarding path, which is of no use here before.
        from nearfield.edge.proxy.listener import bind

        count = self._options.workers
        try:
            first = bind(host, port)  # alone: what another program shares is taken
            if count == 1:
                return [first]
            port = first.getsockname()[1]
            first.close()
            return [bind(host, port, shared=True) for _ in range(count)]
        except OSError as error:
            raise BadRequest(
                f"{self._path.name}: listen.{field} is {port}, and {host}:{port} cannot be "
                f"listened on: {error.strerror or error}. Choose another, or stop what listens "
                "there.",
                param=f"listen.{field}",
            ) from None

    def _sockets_of(self, worker: _Worker) -> list[socket.socket]:
        """Each socket has a worker, and each worker a socket at each address."""
        count, number = self._options.workers, worker.number
        return [
            each
            for bound in self._sockets.values()
            for each in bound.sockets[number::count] or [bound.sockets[number % len(bound.sockets)]]
        ]

    def _offered(self) -> Offer:
        """
        Raises:
            BadRequest: the state's folder does not take a socket.
        """
        every = [each for bound in self._sockets.values() for each in bound.sockets]
        try:
            return Offer(self._state / OFFER_FILE, every, lambda: self._events.put_nowait("taken"))
        except OSError as error:
            raise BadRequest(
                f"The folder {self._state} cannot hold a socket ({error}): give one with a "
                "shorter name, with --state",
                param="state",
            ) from None

    def _replace_offer(self) -> None:
        former, self._offer = self._offer, self._offered()
        if former is not None:
            former.close()

    # ---- what is written down ---------------------------------------------------------------

    def _describe(self, name: str) -> Running:
        bound = self._sockets.get("grpc_port")
        scheme = "http" if self._listen.tls is None else "https"
        return Running(
            gateway=name,
            pid=os.getpid(),
            url=f"{scheme}://{_authority(self._sockets['port'])}",
            grpc=None if bound is None else _authority(bound),
            workers=self._pids(),
            started_unix_s=time.time(),
            generation=1,
        )

    def _pids(self) -> tuple[int, ...]:
        return tuple(worker.process.pid for worker in self._workers)

    def _note(self, **changes: Any) -> None:
        """Write down what is so now."""
        assert self._told is not None
        now = self._describe(self._told.gateway)
        names = ("started_unix_s", "generation", "failures", "trouble")
        kept = {name: getattr(self._told, name) for name in names}
        self._told = replace(now, **{**kept, **changes})
        try:
            write_private(self._state / STATE_FILE, json.dumps(asdict(self._told)).encode())
        except OSError as error:
            log.warning("the gateway's state could not be written: %s", error)

    def _forget(self) -> None:
        if self._offer is not None:
            self._offer.close()
        for bound in self._sockets.values():
            bound.close()
        path = self._state / STATE_FILE
        with contextlib.suppress(OSError, ValueError, KeyError):
            if json.loads(path.read_text())["pid"] == os.getpid():
                path.unlink()

    def _spawn_task(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _read(path: Path) -> Files:
    # Checking files takes pydantic, and longer to import than all else here: beside the workers.
    from nearfield.edge import files

    return files.read(path)


def _default_state(gateway: str) -> Path:
    from nearfield.edge import files

    return files.default_state(Settings.from_env(os.environ), gateway)


def _at(sockets: Sequence[socket.socket], host: str, port: int) -> list[socket.socket]:
    """Those that listen at this address."""
    if port == 0:
        return []
    try:
        wanted = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][:2]
    except OSError:
        return []
    return [each for each in sockets if each.getsockname()[:2] == wanted]


def _close(sockets: _Sockets, *, but: _Sockets) -> None:
    kept = list(but.values())
    for bound in sockets.values():
        if not any(bound is each for each in kept):
            bound.close()


def _authority(bound: _Bound) -> str:
    """Where they are reached from this machine."""
    host, port = bound.sockets[0].getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _make_state(path: Path) -> None:
    """
    Raises:
        BadRequest: it cannot be made.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise BadRequest(f"The folder {path} cannot be made: {error.strerror}") from None


def _has_terminal() -> bool:
    """Whether standard input is a terminal that is still there."""
    try:
        return os.isatty(0)
    except OSError:
        return False
