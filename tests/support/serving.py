"""A replica without Ray: the same routes over a real engine process, in a real web server."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn
from nearfield.core.spec import CustomEngine, Limits, ModelSpec
from nearfield.serving.access import Access
from nearfield.serving.departure import Departure
from nearfield.serving.gate import Gate
from nearfield.serving.host import EngineHost
from nearfield.serving.http import Frontend
from nearfield.serving.routes import build_router
from nearfield.serving.service import Service
from nearfield.telemetry.requests import Recorder
from nearfield.telemetry.setup import Telemetry
from starlette.routing import Router


@dataclass
class Served:
    """A running replica. `client` talks to it, `address` is (host, port)."""

    service: Service
    router: Router
    telemetry: Telemetry
    client: httpx.AsyncClient
    address: tuple[str, int]

    async def raw(self, request: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection with `request` sent on it."""
        reader, writer = await asyncio.open_connection(*self.address)
        writer.write(request)
        await writer.drain()
        return reader, writer


def spec_of(import_path: str, *, limits: dict[str, Any] | None = None, **options: Any) -> ModelSpec:
    engine = CustomEngine(import_path=import_path, options=options)
    return ModelSpec(model="test", engine=engine, limits=Limits(**(limits or {})))


@asynccontextmanager
async def served(spec: ModelSpec, *, access: Access | None = None) -> AsyncIterator[Served]:
    """Serve `spec` on a free port of this host."""
    host = EngineHost(spec)
    gate = Gate(spec.limits.max_running, spec.limits.max_queued)
    service = Service(spec, host, gate, Departure(spec.limits.drain_s))
    telemetry = Telemetry(model=spec.model, version=spec.version, moment=service.moment, environ={})
    await host.start()
    frontend = Frontend(
        Recorder(telemetry),
        timeout_s=spec.limits.timeout_s,
        access=access,
        departure=service.departure,
    )
    router = build_router(service, frontend, telemetry)
    # Named TCP: asyncio sets TCP_NODELAY only then, and an answer takes 40 ms without it.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    address = listener.getsockname()[:2]
    server = uvicorn.Server(
        uvicorn.Config(router, log_config=None, access_log=False, lifespan="off")
    )
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    url = f"http://{address[0]}:{address[1]}"
    try:
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            yield Served(service, router, telemetry, client, address)
    finally:
        server.should_exit = True
        await serving
        with contextlib.suppress(OSError):
            listener.close()
        await host.close()
        telemetry.close()
