"""The process an engine lives in: `python -m nearfield.serving.worker FD PARENT_PID`.

`host.py` starts it with one end of a socketpair. The main thread loads the engine and then hands
it requests; the engine answers from any thread. The process must never outlive its replica: the
kernel kills it when the replica dies (Linux), and end-of-file on the socket ends it everywhere.
"""

from __future__ import annotations

import faulthandler
import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence

from nearfield.api.events import Event, Failed, Request
from nearfield.core.errors import EngineFailed, NearfieldError
from nearfield.serving.engines.base import Engine, EngineContext, EngineStats
from nearfield.serving.engines.table import create_engine
from nearfield.serving.framing import Channel, Kind, Start, pack_events
from nearfield.telemetry import logs

log = logging.getLogger("nearfield.worker")

STATS_PERIOD_S = 0.25
HEARTBEAT_PERIOD_S = 1.0
"""Statistics go out this often even when nothing changed, to show that the process lives."""

PR_SET_PDEATHSIG = 1


class Worker:
    """One engine and the channel to its replica."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def run(self) -> int:
        """Serve until told to close; the process's exit status."""
        first = self._channel.receive()
        if first is None:
            return 1
        start: Start = first[1]
        logs.configure(model=start.spec.model)
        try:
            engine = self._load(start)
        except NearfieldError as error:
            self._channel.send(Kind.REFUSED, error)
            return 1
        except Exception as error:
            # Whatever a model's code raises ends here: the developer reads it in the log and,
            # shortened, in the deployment's status.
            log.exception("the engine could not be loaded")
            reason = f"The engine could not be loaded: {type(error).__name__}: {error}"
            self._channel.send(Kind.REFUSED, EngineFailed(reason, code="load_failed"))
            return 1
        threading.Thread(target=self._report, args=(engine,), name="stats", daemon=True).start()
        while (message := self._channel.receive()) is not None:
            kind, payload = message
            if kind == Kind.SUBMIT:
                self._submit(engine, *payload)
            elif kind == Kind.CANCEL:
                engine.cancel(payload)
            elif kind == Kind.CLOSE:
                engine.close()
                return 0
        return 1

    def _load(self, start: Start) -> Engine:
        weights = None
        if start.spec.source is not None:
            # Here and not above: a source that needs no download needs none of its imports.
            from nearfield.weights import resolve

            weights = resolve(start.spec)
        engine = create_engine(start.spec)
        context = EngineContext(start.spec, weights, start.threads, self._emit, start.slice)
        capabilities = engine.load(context)
        # What is loaded stays: the collector need not walk over it while requests run.
        gc.collect()
        gc.freeze()
        self._channel.send(Kind.LOADED, capabilities)
        return engine

    def _submit(self, engine: Engine, request_id: str, request: Request) -> None:
        try:
            engine.submit(request_id, request)
        except NearfieldError as error:
            self._emit([(request_id, Failed(error))])
        except Exception:
            # One request must not take the process, and with it everyone else's, down.
            log.exception("the engine did not take a request")
            self._emit([(request_id, Failed(EngineFailed("The model failed on this request.")))])

    def _emit(self, events: Sequence[tuple[str, Event]]) -> None:
        try:
            self._channel.send(Kind.EVENTS, pack_events(events))
        except OSError:
            os._exit(1)  # the replica is gone: nobody is left to answer

    def _report(self, engine: Engine) -> None:
        tick = threading.Event()
        sent: EngineStats | None = None
        quiet_s = 0.0
        while True:
            try:
                stats = engine.stats()
            except Exception:
                # A custom engine's mistake in its figures must not look like a dead process.
                log.exception("the engine's statistics could not be read")
                stats = EngineStats()
            quiet_s += STATS_PERIOD_S
            if stats != sent or quiet_s >= HEARTBEAT_PERIOD_S:
                sent, quiet_s = stats, 0.0
                try:
                    self._channel.send(Kind.STATS, stats)
                except OSError:
                    os._exit(1)
            tick.wait(STATS_PERIOD_S)


def _die_with_parent(parent_pid: int) -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)  # it died before the line above


def main() -> None:
    """Entry point; never returns."""
    descriptor, parent_pid = int(sys.argv[1]), int(sys.argv[2])
    _die_with_parent(parent_pid)
    faulthandler.enable()  # a segmentation fault leaves its stack in the log
    os.set_inheritable(descriptor, False)  # else a child of the engine would keep the socket open
    status = Worker(Channel(socket.socket(fileno=descriptor))).run()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: threads of native libraries may crash or hang the interpreter's own ending.
    os._exit(status)


if __name__ == "__main__":
    main()
