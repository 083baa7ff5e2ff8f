"""The Serve deployment: one replica of one model, an ASGI application in Serve's own server."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING

import ray
from nearfield.core.settings import Settings
from nearfield.core.spec import ModelSpec
from nearfield.serving.access import Access
from nearfield.serving.cluster import Cluster
from nearfield.serving.departure import LATER_S, LEAVES, STARTED, Departure, follow
from nearfield.serving.gate import Gate
from nearfield.serving.host import EngineHost
from nearfield.serving.http import Frontend
from nearfield.serving.routes import build_router
from nearfield.serving.service import Service
from nearfield.telemetry import logs
from nearfield.telemetry.requests import Recorder
from nearfield.telemetry.setup import Telemetry
from ray import serve
from starlette.routing import Router

if TYPE_CHECKING:
    from nearfield.serving.slices import Reservation

log = logging.getLogger("nearfield.replica")


@serve.deployment(name="replica")
@serve.ingress()
class Replica:
    """Loads the model in a process of its own and answers for it."""

    def __init__(self, spec: ModelSpec) -> None:
        logs.configure(model=spec.model)
        self._reserved: Reservation | None = None
        self._access = Access.from_settings(Settings.from_env(os.environ), spec.model)
        limits = spec.limits
        self._service = Service(
            spec,
            EngineHost(spec, threads=spec.threads or _assigned_cpus()),
            Gate(limits.max_running, limits.max_queued),
            Departure(limits.drain_s),
        )
        self._telemetry = Telemetry(
            model=spec.model,
            version=spec.version,
            moment=self._service.moment,
            environ=os.environ,
            instance=serve.get_replica_context().replica_id.unique_id,
        )

    async def __serve_build_asgi_app__(self) -> Router:
        """Called by Serve after the constructor; the replica is up when it returns."""
        wanted = self._service.spec.slice
        if wanted is not None:
            from nearfield.serving.slices import Reservation

            self._reserved = await asyncio.to_thread(Reservation, wanted)
        await self._service.host.start(self._reserved.slice if self._reserved else None)
        here = ray.get_runtime_context().get_node_id()
        departure = self._service.departure
        self._following = asyncio.create_task(follow(departure, here, Cluster.own().leaving))
        frontend = Frontend(
            Recorder(self._telemetry),
            timeout_s=self._service.spec.limits.timeout_s,
            ingress_returns_id=True,
            access=self._access,
            departure=departure,
        )
        return build_router(self._service, frontend, self._telemetry)

    async def check_health(self) -> None:
        """Called by Serve; what it raises makes Serve replace this replica."""
        if not self._service.host.healthy:
            raise RuntimeError("the engine stopped and could not be started again")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve where the deployment scales: what `serving.pools` reads of a replica."""
        moment, due_s = self._service.moment(), self._service.departure.due_s
        return {
            STARTED: self._service.created_s,
            LEAVES: 0.0 if due_s is None else min(due_s, LATER_S),
            "running": moment.running,
            "waiting": moment.waiting,
            "queue_age_s": moment.queue_age_s,
            **self._service.gate.totals(),
        }

    async def __del__(self) -> None:
        # Serve calls this once everything accepted has been answered.
        await self._service.host.close()
        await asyncio.to_thread(self._telemetry.close)


def _assigned_cpus() -> int:
    """The CPUs Ray reserved for this replica; a fraction of one still gets one thread."""
    assigned: dict[str, float] = ray.get_runtime_context().get_assigned_resources()  # type: ignore[no-untyped-call]
    return max(1, int(assigned.get("CPU", 1)))
