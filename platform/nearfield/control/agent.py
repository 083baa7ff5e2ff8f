"""The region's agent: tells gateways where every replica is, within a second of a change.

    applications:
      - name: nearfield-agent
        route_prefix: /-/nearfield
        import_path: nearfield.control:app

One small replica that asks the controller at a constant pace, whatever happens. While the
controller is gone it goes on telling what it knew, and how old that is.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time

from nearfield.api.load import TARGETS_PATH, Application, Targets
from nearfield.control.targets import Controller
from ray import serve
from ray.exceptions import RayError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router

log = logging.getLogger("nearfield.agent")

PERIOD_S = 0.25
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
        self._known_s: float | None = None

    async def __serve_build_asgi_app__(self) -> Router:
        self._polling = asyncio.create_task(self._poll())
        path = TARGETS_PATH.removeprefix("/-/nearfield")
        return Router([Route(path, self.targets)], redirect_slashes=False)

    async def targets(self, request: Request) -> Response:
        if self._known_s is None:
            body = json.dumps({"error": "The controller has not answered yet."})
            return Response(body, 503, media_type="application/json")
        known = Targets(self._applications, time.monotonic() - self._known_s)
        return Response(json.dumps(known.to_json()), media_type="application/json")

    async def _poll(self) -> None:
        controller = Controller()
        while True:
            began_s = time.monotonic()
            try:
                self._applications = await asyncio.wait_for(controller.applications(), PATIENCE_S)
                self._known_s = time.monotonic()
            except (RayError, ValueError, TimeoutError) as error:
                log.warning("the controller does not answer: %s", type(error).__name__)
            await asyncio.sleep(max(0.0, PERIOD_S - (time.monotonic() - began_s)))


app = Agent.bind()  # type: ignore[attr-defined]
