"""The region's agent: tells gateways where every replica is, within a second of a change, and how
the models were scaled, and why.

    applications:
      - name: nearfield-agent
        route_prefix: /-/nearfield
        import_path: nearfield.control:app

One small replica that asks the controller at a constant pace, whatever happens. While the
controller is gone it goes on telling what it knew, and how old that is. In a region that asks for
passports or keys it tells only gateways and platform administrators.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

import ray
from nearfield.api.error_bodies import openai_error
from nearfield.api.load import AGENT_PREFIX, TARGETS_PATH, Application, Targets
from nearfield.api.scaling import SCALING_PATH, ModelScaling
from nearfield.control.entry import Entry
from nearfield.control.scaling import Decisions
from nearfield.control.targets import Controller
from nearfield.core.errors import NearfieldError, Unavailable
from nearfield.core.settings import Settings
from ray import serve
from ray.exceptions import RayError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router

log = logging.getLogger("nearfield.agent")

PERIOD_S = 0.25
LEARN_S = 1.0
"""Between looks at what scaling has decided, which it does once a second."""
PATIENCE_S = 5.0


@serve.deployment(
    name="agent",
    num_replicas=1,
    max_ongoing_requests=1000,
    ray_actor_options={"num_cpus": 0},
)
@serve.ingress()
class Agent:
    """Polls the controller and answers from memory."""

    def __init__(self) -> None:
        self._applications: tuple[Application, ...] = ()
        self._reasons: dict[str, str] = {}  # why each has its replicas, where nearfield scales it
        self._known_s: float | None = None
        self._entry = Entry(Settings.from_env(os.environ))
        self._decisions = Decisions(ray.get_runtime_context().gcs_address)

    async def __serve_build_asgi_app__(self) -> Router:
        self._polling = asyncio.create_task(self._poll())
        self._learning = asyncio.create_task(self._learn())
        routes = {TARGETS_PATH: self.targets, SCALING_PATH: self.scaling}
        return Router(
            [
                Route(path.removeprefix(AGENT_PREFIX), _answering(self._entry, page))
                for path, page in routes.items()
            ],
            redirect_slashes=False,
        )

    async def targets(self) -> object:
        """A `Targets`."""
        if self._known_s is None:
            raise Unavailable("The controller has not answered yet.", retry_after_s=1.0)
        applications = tuple(
            replace(app, scaling=self._reasons.get(app.name, "")) for app in self._applications
        )
        return Targets(applications, time.monotonic() - self._known_s).to_json()

    async def scaling(self) -> object:
        """The last decision for each model that scales: `ModelScaling`s."""
        try:
            found = await self._decided()
        except RuntimeError as error:
            raise Unavailable(f"The head does not answer: {error}", retry_after_s=1.0) from None
        return [model.shown() for model in found]

    async def _decided(self) -> tuple[ModelScaling, ...]:
        names = {app.name for app in self._applications}
        return await asyncio.to_thread(self._decisions.read, names)

    async def _learn(self) -> None:
        while True:
            try:
                models = await self._decided()
                self._reasons = {pool.application: pool.reason for m in models for pool in m.pools}
            except (RuntimeError, ValueError) as error:
                log.warning("the last decisions of scaling are not known: %s", error)
            await asyncio.sleep(LEARN_S)

    async def _poll(self) -> None:
        controller = Controller()
        while True:
            began_s = time.monotonic()
            self._entry.refresh()
            try:
                self._applications = await asyncio.wait_for(controller.applications(), PATIENCE_S)
                self._known_s = time.monotonic()
            except (RayError, ValueError, TimeoutError) as error:
                log.warning("the controller does not answer: %s", type(error).__name__)
            await asyncio.sleep(max(0.0, PERIOD_S - (time.monotonic() - began_s)))


Page = Callable[[], Awaitable[object]]


def _answering(entry: Entry, page: Page) -> Callable[[Request], Awaitable[Response]]:
    """The page as JSON, for those who may ask."""

    async def answer(request: Request) -> Response:
        try:
            entry.admit(
                request.headers.get("x-nearfield-passport"), request.headers.get("authorization")
            )
            found, status = await page(), 200
        except NearfieldError as error:
            found, status = openai_error(error), error.status
        return Response(json.dumps(found), status, media_type="application/json")

    return answer


app = Agent.bind()  # type: ignore[attr-defined]
