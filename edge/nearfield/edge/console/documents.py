"""What the page is told, as JSON: the state of the world, requests that are over, and changes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any, Literal, Protocol, Self

from nearfield.core.federation import GatewayFile, RegionFile
from nearfield.edge.console.access import Viewer
from nearfield.edge.console.traffic import Flow
from nearfield.edge.recent import Entry
from nearfield.edge.status import EndpointStatus, RegionStatus
from nearfield.policy.explain import Explanation, Line
from nearfield.policy.health import Transition

Document = dict[str, Any]


class StateSource(Protocol):
    """The world as a gateway knows it (`edge.world.World`). Asked about once a second."""

    @property
    def regions(self) -> Sequence[RegionStatus]:
        """Every region and its endpoints, as they are now."""
        ...

    @property
    def changes(self) -> Iterable[Transition]:
        """The last changes of health, in order; the same objects each time."""
        ...

    def explain(self, model: str) -> tuple[Explanation, object]:
        """How a request of an ordinary caller would be routed now, and why."""
        ...


@dataclass(frozen=True, slots=True)
class Here:
    """The gateway that the console belongs to.

    Attributes:
        region: its home; None: an edge site. latitude, longitude: None where nobody said.
        workers: processes that share its port. Each tells of its own requests.
    """

    name: str
    region: str | None
    jurisdiction: str
    version: str
    city: str | None = None
    latitude: float | None = None
    longitude: float | None = None
    workers: int = 1

    @classmethod
    def of(
        cls, file: GatewayFile, regions: Iterable[RegionFile], version: str, workers: int = 1
    ) -> Self:
        """From its file and those of its regions."""
        home = None if file.home is None else file.home.region
        found = next((each for each in regions if each.region == home), None)
        place = file.location or (None if found is None else found.location)
        return cls(
            file.gateway,
            home,
            file.jurisdiction or ("" if found is None else found.jurisdiction),
            version,
            file.city or (None if found is None else found.city),
            None if place is None else place.latitude,
            None if place is None else place.longitude,
            workers,
        )


@dataclass(frozen=True, slots=True)
class Change:
    """Something became different.

    Attributes:
        number: grows with each. at_s: Unix time.
        subject: a region, an endpoint, or a replica of one.
        open: it is about a region as a whole, which everybody may know.
    """

    number: int
    at_s: float
    kind: Literal["health", "scaling"]
    subject: str
    before: str
    after: str
    reason: str
    open: bool

    def to_json(self) -> Document:
        shown = asdict(self)
        del shown["open"]
        return shown


# ---- the world ----------------------------------------------------------------------------------


def state(
    here: Here, source: StateSource, regions: Sequence[RegionStatus], flow: Flow, viewer: Viewer
) -> Document:
    """Everything that is polled or pushed once a second."""
    endpoints = [
        (region, endpoint)
        for region in regions
        for endpoint in region.endpoints
        if _visible(endpoint, viewer)
    ]
    lines = _lines(source, {endpoint.model for _, endpoint in endpoints})
    return {
        "at_s": time.time(),
        "gateway": asdict(here),
        "viewer": {"tenant": viewer.tenant},
        "traffic": {
            "seconds": flow.seconds,
            "rps": flow.rps,
            "failed_rps": flow.failed_rps,
            "first_byte_p50_s": flow.first_byte_p50_s,
            "first_byte_p99_s": flow.first_byte_p99_s,
            "in_flight": _private(viewer, sum(region.in_flight for region in regions)),
        },
        "regions": [_region(region, flow, viewer) for region in regions],
        "endpoints": [
            _endpoint(region, endpoint, lines.get(endpoint.name), flow, viewer)
            for region, endpoint in endpoints
        ],
    }


def _private(viewer: Viewer, value: Any) -> Any:
    """How full things are: None for whoever sees one tenant only."""
    return value if viewer.everything else None


def _visible(endpoint: EndpointStatus, viewer: Viewer) -> bool:
    if viewer.everything or endpoint.products is None:
        return True
    return not viewer.products.isdisjoint(endpoint.products)


def _lines(source: StateSource, models: Iterable[str]) -> dict[str, Line]:
    """Each endpoint's part in the decision that would be made for its model now."""
    return {line.endpoint: line for model in models for line in source.explain(model)[0].lines}


def _region(region: RegionStatus, flow: Flow, viewer: Viewer) -> Document:
    names = (endpoint.name for endpoint in region.endpoints)
    return {
        "name": region.name,
        "jurisdiction": region.jurisdiction,
        "city": region.city,
        "latitude": region.latitude,
        "longitude": region.longitude,
        "home": region.home,
        "health": region.health,
        "reason": region.reason,
        "for_s": region.for_s,
        "weight": region.weight,
        "rtt_s": region.rtt_s,
        "age_s": region.age_s,
        "draining": region.draining,
        "in_flight": _private(viewer, region.in_flight),
        "rps": sum(flow.at_rps.get(name, 0.0) for name in names),
    }


def _endpoint(
    region: RegionStatus, endpoint: EndpointStatus, line: Line | None, flow: Flow, viewer: Viewer
) -> Document:
    shown: Document = {
        "name": endpoint.name,
        "region": region.name,
        "model": endpoint.model,
        "version": endpoint.version,
        "pool": endpoint.pool,
        "kind": endpoint.kind,
        "current": endpoint.current,
        "health": endpoint.health,
        "weight": endpoint.weight,
        "draining": endpoint.draining,
        "unit_usd": endpoint.unit_usd,
        "verdict": None if line is None else line.verdict,
        "rtt_s": region.rtt_s if line is None else line.rtt_s,
        "rps": flow.at_rps.get(endpoint.name, 0.0),
    }
    full: Document = {
        "products": endpoint.products,
        "replicas": endpoint.replicas,
        "scaling": endpoint.scaling or None,
        "slots": endpoint.slots,
        "max_queued": endpoint.max_queued,
        "load": endpoint.load,
        "in_flight": endpoint.in_flight,
        "queue_age_s": endpoint.queue_age_s,
        "cold_start_s": endpoint.cold_start_s if endpoint.replicas == 0 else None,
        "reason": None if line is None else line.reason,
        "wait_s": None if line is None else line.wait_s,
        "first_byte_s": endpoint.first_byte_s if line is None else line.first_byte_s,
        "predicted_s": None if line is None else line.predicted_s,
    }
    return shown | (full if viewer.everything else dict.fromkeys(full))


# ---- requests -----------------------------------------------------------------------------------


def row(entry: Entry) -> Document:
    """One request in one line of the feed."""
    last = entry.tries[-1] if entry.tries else None
    first_s = entry.first_byte_s
    return {
        "id": entry.request_id,
        "at_s": entry.at_s,
        "tenant": entry.tenant,
        "operation": entry.operation,
        "stream": entry.stream,
        "model": entry.model,
        "region": entry.region,
        "endpoint": entry.endpoint,
        "why": None if last is None else last.why,
        "reason": None if last is None else last.reason,
        "tries": len(entry.tries),
        "from_gateway": entry.from_gateway,
        "status": entry.status,
        "error": entry.error,
        "failed": entry.failed,
        "first_byte_s": None if first_s is None else first_s - entry.started_s,
        "duration_s": entry.ended_s - entry.started_s,
    }


def telling(entries: Sequence[Entry], most: int) -> list[Entry]:
    """Of many requests the few that tell most, in their order: by turns one that failed or was
    tried again, and one of each kind of decision, the newest first; then whatever is newest."""
    chosen: dict[int, Entry] = {}
    for found in _by_interest(entries):
        if len(chosen) == most:
            break
        chosen.setdefault(id(found), found)
    return [entry for entry in entries if id(entry) in chosen]


def _by_interest(entries: Sequence[Entry]) -> Iterator[Entry]:
    newest = entries[::-1]
    trouble = [entry for entry in newest if entry.failed or len(entry.tries) > 1]
    kinds: dict[tuple[str, str], Entry] = {}
    for entry in newest:
        kinds.setdefault((entry.endpoint, entry.tries[-1].why if entry.tries else ""), entry)
    for pair in zip_longest(trouble, kinds.values()):
        yield from (entry for entry in pair if entry is not None)
    yield from newest
