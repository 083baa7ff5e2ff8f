"""News for those who look: one clock for all of them, whose work does not grow with the traffic's.

    every 0.1 s   requests that are over are counted, for each class of viewers
    every 0.5 s   the few of them that tell most are sent
    every second  rates, the state of the world, what has changed; may each viewer still look?

Only changes are watched while nobody looks: whoever comes after an incident wants to see it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, Self

import msgspec
from nearfield.core.errors import Unavailable
from nearfield.edge.console.access import Access, Viewer, still
from nearfield.edge.console.documents import Change, Here, StateSource, row, state, telling
from nearfield.edge.console.traffic import Traffic
from nearfield.edge.proxy.ports import Line, Request
from nearfield.edge.recent import Entry, Recent, Subscription
from nearfield.edge.status import EndpointStatus, RegionStatus
from nearfield.policy.health import Transition

log = logging.getLogger("nearfield.edge.console")

TICK_S: Final = 0.1
"""At 10,000 requests a second a thousand are counted at once: well below a millisecond."""
NEWS_TICKS: Final = 5
SECOND_TICKS: Final = 10
MOST_BEHIND: Final = 16_384
"""Requests between two ticks: more than a process can answer in a second."""
MOST_ROWS: Final = 3
"""Requests told at once: six a second is as much as anybody reads."""
PAST_ROWS: Final = 60
PAST_NOTABLE: Final = 20
MOST_CHANGES: Final = 200
MOST_FEEDS: Final = 32
"""Open feeds. Each costs what it is sent, some KiB a second; operators are few."""
FEED_S: Final = 3600.0
"""A feed ends after so long, and is asked for again: no connection is forgotten for days."""
LINGER_S: Final = 10.0
"""How long traffic is still counted for whoever polls instead of listening."""

_encode = msgspec.json.Encoder().encode


def _event(name: str, document: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode("ascii"), _encode(document))


@dataclass(slots=True, eq=False)
class _Scope:
    """One class of viewers, and what is counted and made for all of them together."""

    viewer: Viewer
    traffic: Traffic
    used_s: float
    news: Subscription | None = None
    fresh: list[Entry] = field(default_factory=list)
    feeds: set[Watching] = field(default_factory=set)


class Watching:
    """One viewer's open feed: a `Feed`."""

    def __init__(self, broadcast: Broadcast, request: Request, viewer: Viewer) -> None:
        self.request = request
        self.viewer = viewer
        self.line: Line | None = None
        self._broadcast = broadcast

    def open(self, line: Line) -> None:
        self.line = line
        self._broadcast._joined(self)

    def closed(self) -> None:
        self._broadcast._left(self)
        self.line = None

    def send(self, data: bytes) -> None:
        """One who does not keep up misses it; there is more to come."""
        if self.line is not None:
            self.line.send(data)

    def end(self, code: str) -> None:
        """Say why, and end."""
        if self.line is not None:
            self.line.send(_event("end", {"code": code}))
            self.line.end()


class Broadcast:
    """See the module. One event loop's property."""

    def __init__(self, here: Here, source: StateSource, recent: Recent, access: Access) -> None:
        self._here = here
        self._source = source
        self._recent = recent
        self._access = access
        self._scopes: dict[Viewer, _Scope] = {}
        self._changes: deque[Change] = deque(maxlen=MOST_CHANGES)
        self._numbered = 0
        self._regions: Sequence[RegionStatus] = ()
        self._scale: dict[str, EndpointStatus] = {}  # endpoints, as of a second ago
        self._last: Transition | None = None  # of the source's changes, the last one seen
        self._told = 0  # changes that viewers have been sent, by number
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        self._look()
        self._told = self._numbered
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        for scope in tuple(self._scopes.values()):
            self._drop(scope)

    def close(self) -> None:
        """End all feeds and open no more: the gateway is about to stop, and must not wait for
        them."""
        self._closed = True
        for scope in tuple(self._scopes.values()):
            for watching in tuple(scope.feeds):
                watching.end("stopping")

    # ---- for the pages ----------------------------------------------------------------------

    def state(self, viewer: Viewer) -> bytes:
        """The world as this viewer sees it, as JSON."""
        scope = self._scope(viewer)
        regions = self._source.regions
        return _encode(state(self._here, self._source, regions, scope.traffic.flow(), viewer))

    def watch(self, request: Request, viewer: Viewer) -> Watching:
        """A feed of everything new.

        Raises:
            Unavailable: there are too many.
        """
        feeds = sum(len(scope.feeds) for scope in self._scopes.values())
        if feeds >= MOST_FEEDS or self._closed:
            raise Unavailable(
                "Too many consoles are open on this gateway: this one asks now and then instead.",
                code="too_many_feeds",
                retry_after_s=30.0,
            )
        request.deadline_s = time.monotonic() + FEED_S
        return Watching(self, request, viewer)

    def _joined(self, watching: Watching) -> None:
        scope = self._scope(watching.viewer)
        scope.feeds.add(watching)
        watching.send(_event("past", self._past(watching.viewer)))
        watching.send(b"event: state\ndata: %b\n\n" % self.state(watching.viewer))

    def _left(self, watching: Watching) -> None:
        scope = self._scopes.get(watching.viewer)
        if scope is not None:
            scope.feeds.discard(watching)
            scope.used_s = time.monotonic()

    def _past(self, viewer: Viewer) -> dict[str, Any]:
        """What happened before somebody came, oldest first."""
        tenant = viewer.tenant
        rows = {id(each): each for each in self._recent.latest(PAST_ROWS, tenant=tenant)}
        notable = self._recent.latest(PAST_NOTABLE, tenant=tenant, notable=True)
        rows.update((id(each), each) for each in notable)
        ordered = sorted(rows.values(), key=lambda entry: entry.ended_s)
        return {
            "requests": [row(entry) for entry in ordered],
            "changes": [c.to_json() for c in self._changes if c.open or viewer.everything],
        }

    # ---- the clock --------------------------------------------------------------------------

    async def _run(self) -> None:
        ticks = 0
        while True:
            await asyncio.sleep(TICK_S)
            ticks += 1
            try:
                self._tick(ticks)
            except Exception:
                log.exception("the console's news could not be made")

    def _tick(self, ticks: int) -> None:
        scopes = tuple(self._scopes.values())
        for scope in scopes:
            self._gather(scope)
        second = ticks % SECOND_TICKS == 0
        if second:
            self._look()
        if second or ticks % NEWS_TICKS == 0:
            for scope in scopes:
                self._tell(scope)
            self._told = self._numbered
        if second:
            for scope in scopes:
                self._second(scope)

    def _second(self, scope: _Scope) -> None:
        now_s = time.monotonic()
        scope.traffic.turn(now_s)
        for watching in tuple(scope.feeds):
            ended = still(self._access, watching.request, watching.viewer)
            if ended is not None:
                watching.end(ended.code or ended.type)
        if scope.feeds:
            scope.used_s = now_s
            data = b"event: state\ndata: %b\n\n" % self._state_of(scope)
            for watching in tuple(scope.feeds):
                watching.send(data)
        elif now_s - scope.used_s > LINGER_S:
            self._drop(scope)

    def _state_of(self, scope: _Scope) -> bytes:
        flow = scope.traffic.flow()
        return _encode(state(self._here, self._source, self._regions, flow, scope.viewer))

    # ---- requests ---------------------------------------------------------------------------

    def _scope(self, viewer: Viewer) -> _Scope:
        now_s = time.monotonic()
        scope = self._scopes.get(viewer)
        if scope is None:
            scope = self._scopes[viewer] = _Scope(viewer, Traffic(now_s), now_s)
            self._follow(scope)
        scope.used_s = now_s
        return scope

    def _follow(self, scope: _Scope) -> None:
        scope.news = self._recent.subscribe(
            _no_wake, tenant=scope.viewer.tenant, most_behind=MOST_BEHIND
        )

    def _drop(self, scope: _Scope) -> None:
        self._scopes.pop(scope.viewer, None)
        if scope.news is not None:
            scope.news.close()

    def _gather(self, scope: _Scope) -> None:
        assert scope.news is not None
        if scope.news.dropped:  # this process stood still; what it missed is in no rate
            self._follow(scope)
            return
        taken = scope.news.take()
        scope.traffic.add(taken)
        scope.fresh += taken

    def _tell(self, scope: _Scope) -> None:
        fresh, scope.fresh = scope.fresh, []
        if not scope.feeds:
            return
        changes = [
            change.to_json()
            for change in self._changes
            if change.number > self._told and (change.open or scope.viewer.everything)
        ]
        if not fresh and not changes:
            return
        rows = telling(fresh, MOST_ROWS)
        told = {
            "requests": [row(entry) for entry in rows],
            "untold": len(fresh) - len(rows),
            "changes": changes,
        }
        data = _event("news", told)
        for watching in tuple(scope.feeds):
            watching.send(data)

    # ---- changes ----------------------------------------------------------------------------

    def _look(self) -> None:
        """See what is different from a second ago."""
        self._regions = self._source.regions
        self._look_at_health()
        self._look_at_scale()

    def _look_at_health(self) -> None:
        regions = {region.name for region in self._regions}
        monotonic_to_unix_s = time.time() - time.monotonic()
        fresh: list[Transition] = []
        for transition in reversed(tuple(self._source.changes)):
            if transition is self._last:
                break
            fresh.append(transition)
        if fresh:
            self._last = fresh[0]
        for one in reversed(fresh):
            if one.before == "unknown" and one.after == "up":
                continue  # it is known now: that is no change of it
            self._note(
                Change(
                    self._numbered + 1,
                    one.at_s + monotonic_to_unix_s,
                    "health",
                    one.name,
                    one.before,
                    one.after,
                    one.reason,
                    open=one.name in regions,
                )
            )

    def _look_at_scale(self) -> None:
        """The number of replicas, and why: what scaling says, else what was true before."""
        before, now = self._scale, {}
        for endpoint in (each for region in self._regions for each in region.endpoints):
            now[endpoint.name] = endpoint
            was = before.get(endpoint.name)
            if was is None or was.replicas == endpoint.replicas:
                continue
            turn = _counted(was.replicas), _counted(endpoint.replicas)
            reason = endpoint.scaling or was.scaling or _fullness(was)
            number = self._numbered + 1
            self._note(
                Change(number, time.time(), "scaling", endpoint.name, *turn, reason, open=False)
            )
        self._scale = now

    def _note(self, change: Change) -> None:
        self._numbered = change.number
        self._changes.append(change)


def _fullness(endpoint: EndpointStatus) -> str:
    if endpoint.replicas == 0:
        return "it was at zero"
    words = f"{endpoint.load} of {endpoint.slots} slots were taken"
    if endpoint.queue_age_s > 0:
        words += f", the oldest request had waited {endpoint.queue_age_s:.1f} s"
    return words


def _counted(replicas: int) -> str:
    return "1 replica" if replicas == 1 else f"{replicas} replicas"


def _no_wake() -> None:
    """The clock comes round soon enough."""
