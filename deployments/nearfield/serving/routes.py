"""All routes of a replica as one ASGI application."""

from __future__ import annotations

import json
from typing import Any

from nearfield.api import openapi
from nearfield.api.load import LOAD_PATH
from nearfield.core.errors import NotFound
from nearfield.serving import routes_oip, routes_openai
from nearfield.serving.access import Door
from nearfield.serving.http import ANY, Endpoint, Exchange, Frontend, Handler
from nearfield.serving.service import Service
from nearfield.telemetry.setup import Telemetry
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send


def build_router(service: Service, frontend: Frontend, telemetry: Telemetry) -> Router:
    """The application: OpenAI under /v1, the Open Inference Protocol under /v2, health, metrics.

    A bare router: Starlette's application would add two wrappers around every request to do
    what `Endpoint` does already.
    """
    plain = PlainRoutes(service, telemetry)
    return Router(
        [
            *routes_openai.OpenAIRoutes(service).routes(frontend),
            *routes_oip.OIPRoutes(service).routes(frontend),
            *plain.routes(frontend),
        ],
        redirect_slashes=False,
        default=_Unknown(frontend),
    )


class PlainRoutes:
    """What belongs to neither API: health, metrics, the OpenAPI document."""

    def __init__(self, service: Service, telemetry: Telemetry) -> None:
        self._service = service
        self._telemetry = telemetry
        self._document: bytes | None = None

    def routes(self, frontend: Frontend) -> list[Route]:
        table: list[tuple[str, Handler, Door | None]] = [
            ("/healthz", self.live, None),
            ("/livez", self.live, None),
            ("/readyz", self.ready, None),
            ("/metrics", self.metrics, "operation"),
            (LOAD_PATH, self.load, "operation"),
            ("/openapi.json", self.openapi, "inference"),
        ]
        render = routes_openai.render_error
        return [
            Route(path, Endpoint(path, {"GET": handler}, render, frontend, door=door))
            for path, handler, door in table
        ]

    async def live(self, exchange: Exchange) -> None:
        await _state(exchange, good=self._service.host.healthy)

    async def ready(self, exchange: Exchange) -> None:
        await _state(exchange, good=self._service.ready)

    async def metrics(self, exchange: Exchange) -> None:
        page = self._telemetry.prometheus_page()
        await exchange.answer(page, content_type=CONTENT_TYPE_LATEST.encode())

    async def load(self, exchange: Exchange) -> None:
        await exchange.answer(json.dumps(self._service.load().to_json()).encode())

    async def openapi(self, exchange: Exchange) -> None:
        if self._document is None:
            self._document = json.dumps(self._describe()).encode()
        await exchange.answer(self._document)

    def _describe(self) -> dict[str, Any]:
        return openapi.document(self._service.spec, self._service.capabilities)


async def _state(exchange: Exchange, *, good: bool) -> None:
    body = {"status": "ok" if good else "unavailable"}
    await exchange.answer(json.dumps(body).encode(), status=200 if good else 503)


class _Unknown:
    """Any other path: a 404 in the dialect it would have been answered in."""

    def __init__(self, frontend: Frontend) -> None:
        self._openai = Endpoint(
            "/{path}", {ANY: _no_such_path}, routes_openai.render_error, frontend
        )
        self._oip = Endpoint("/{path}", {ANY: _no_such_path}, routes_oip.render_error, frontend)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"][len(scope.get("root_path", "")) :]
        endpoint = self._oip if path == "/v2" or path.startswith("/v2/") else self._openai
        await endpoint(scope, receive, send)


async def _no_such_path(exchange: Exchange) -> None:
    raise NotFound(
        "There is no such path. GET /openapi.json lists those there are.", code="path_not_found"
    )
