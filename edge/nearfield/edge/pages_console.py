"""The console: a page for operators, and its data.

    GET /console, /console/{file}             anybody: the page, without any data
    GET /console/data/state                   the world now, and how much goes where
    GET /console/data/feed                    that each second; requests and changes as they come
    GET /console/data/requests/{request}      one request: its tries, their times, the decision

Who may see the data, and whose, is `console.access`'s to say. What is shown of the fleet comes from
a `StateSource` (the World), what is shown of requests from `Recent`.
"""

from __future__ import annotations

from typing import Final, Self

import msgspec
from nearfield.core.errors import NearfieldError, NotFound
from nearfield.edge.console import assets
from nearfield.edge.console.access import Access, KeyAccess, LocalAccess, Viewer
from nearfield.edge.console.broadcast import Broadcast
from nearfield.edge.console.documents import Here, StateSource
from nearfield.edge.proxy.answers import refusal
from nearfield.edge.proxy.ports import Answer, Feed, Page, Request
from nearfield.edge.recent import Recent

__all__ = ["Access", "Console", "Here", "KeyAccess", "LocalAccess", "StateSource", "Viewer"]

ROOT: Final = "/console"
DATA: Final = f"{ROOT}/data"
_DATA_FIELDS: Final = ((b"cache-control", b"no-store"), (b"x-content-type-options", b"nosniff"))
_encode = msgspec.json.Encoder().encode


class Console:
    """The pages of one gateway process: use it as a context, and `close` it before a drain."""

    def __init__(self, here: Here, source: StateSource, recent: Recent, access: Access) -> None:
        self._recent = recent
        self._access = access
        self._broadcast = Broadcast(here, source, recent, access)
        self._assets = assets.load()

    async def __aenter__(self) -> Self:
        await self._broadcast.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._broadcast.__aexit__()

    def close(self) -> None:
        """End all feeds, and open no more: a drain must not wait for those who only look."""
        self._broadcast.close()

    def routes(self) -> dict[tuple[str, str], Page]:
        """By method and pattern of the path."""
        return {
            **assets.pages(self._assets, ROOT),
            ("GET", f"{DATA}/state"): self._state,
            ("GET", f"{DATA}/feed"): self._feed,
            ("GET", f"{DATA}/requests/{{request}}"): self._request,
        }

    def _state(self, request: Request) -> Answer:
        try:
            return _json(self._broadcast.state(self._access.viewer(request)))
        except NearfieldError as error:
            return refusal(error, "openai")

    def _feed(self, request: Request) -> Answer | Feed:
        try:
            return self._broadcast.watch(request, self._access.viewer(request))
        except NearfieldError as error:
            return refusal(error, "openai")

    def _request(self, request: Request) -> Answer:
        try:
            viewer = self._access.viewer(request)
            path = request.target.decode("ascii").partition("?")[0]
            found = self._recent.find(path.rpartition("/")[2], tenant=viewer.tenant)
            if found is None:
                raise NotFound(
                    "There is no such request here: this process remembers only the last ones "
                    "that it answered itself.",
                    code="request_not_found",
                )
        except NearfieldError as error:
            return refusal(error, "openai")
        # The decision tells of every region's queues: that is the platform's business.
        return _json(_encode(found.to_json(explained=viewer.everything)))


def _json(body: bytes) -> Answer:
    return Answer(200, body, headers=_DATA_FIELDS)
