"""The last requests, where they went, and why: for drill-down by id and for the console's feed.

There is a ring for all requests, and one for those that failed or needed more than one try: a busy
second must not wash away what somebody will ask about. Both are bounded, and hold nothing that a
caller wrote: no body, no header, no path.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from nearfield.edge.decisions import Tokens
from nearfield.edge.proxy.ports import FailureKind
from nearfield.policy.endpoints import CRITICALITIES
from nearfield.policy.explain import Explanation

MOST = 4096
"""Requests kept; about 1 KiB each."""
MOST_NOTABLE = 1024
MOST_BEHIND = 2048
"""Entries that a subscriber may leave untaken before it is dropped."""


@dataclass(slots=True, eq=False)
class Tried:
    """One try at one endpoint. Times are on `time.monotonic()`; see `ports.Attempt` and
    `decisions.Routed`."""

    endpoint: str
    region: str
    replica: str | None
    why: str
    reason: str
    predicted_s: float
    started_s: float
    first_byte_s: float | None
    ended_s: float
    status: int
    failure: FailureKind | None
    explain: Callable[[], Explanation] | None

    def to_json(self, since_s: float) -> dict[str, Any]:
        """For people and programs; times in seconds since the request's arrival."""
        first_s = self.first_byte_s
        return {
            "endpoint": self.endpoint,
            "region": self.region,
            "replica": self.replica,
            "why": self.why,
            "reason": self.reason,
            "predicted_s": round(self.predicted_s, 6),
            "started_after_s": round(self.started_s - since_s, 6),
            "first_byte_after_s": None if first_s is None else round(first_s - since_s, 6),
            "ended_after_s": round(self.ended_s - since_s, 6),
            "status": self.status or None,
            "failure": self.failure,
        }


@dataclass(slots=True, eq=False)
class Entry:
    """One request that is over.

    Attributes:
        at_s: when it arrived, Unix time. started_s, first_byte_s, ended_s: on `time.monotonic()`.
        operation: as telemetry has it (`chat`). model: as served; what was asked for where it was
            never routed, empty where that is no model's name.
        region, endpoint, version: where its answer came from; empty where it was never routed.
        used: tokens, if its answer said so.
        sampled: its trace is.
    """

    request_id: str
    trace_id: str
    span_id: str
    parent_id: str
    sampled: bool
    at_s: float
    started_s: float
    first_byte_s: float | None
    ended_s: float
    method: str
    operation: str
    stream: bool
    tenant: str
    product: str | None
    key_id: str
    from_gateway: bool
    criticality: int
    model: str
    version: str
    region: str
    endpoint: str
    status: int
    error: str | None
    body_bytes: int
    answer_bytes: int
    used: Tokens | None
    tries: tuple[Tried, ...]

    @property
    def failed(self) -> bool:
        """Whether its caller got anything but what it asked for."""
        return self.error is not None or self.status >= 400

    def to_json(self, *, explained: bool = False) -> dict[str, Any]:
        """For people and programs.

        Args:
            explained: with every endpoint's part in the last decision. That takes a while, and
                tells of the whole fleet.
        """
        first_s = self.first_byte_s
        shown: dict[str, Any] = {
            "request_id": self.request_id,
            "trace_id": self.trace_id,
            "at_s": round(self.at_s, 6),
            "duration_s": round(self.ended_s - self.started_s, 6),
            "first_byte_s": None if first_s is None else round(first_s - self.started_s, 6),
            "tenant": self.tenant,
            "product": self.product,
            "key_id": self.key_id,
            "from_gateway": self.from_gateway,
            "criticality": CRITICALITIES[self.criticality],
            "operation": self.operation,
            "stream": self.stream,
            "model": self.model,
            "version": self.version,
            "region": self.region,
            "endpoint": self.endpoint,
            "status": self.status,
            "error": self.error,
            "body_bytes": self.body_bytes,
            "answer_bytes": self.answer_bytes,
            "tokens": None if self.used is None else asdict(self.used),
            "attempts": [tried.to_json(self.started_s) for tried in self.tries],
        }
        if explained:
            explain = self.tries[-1].explain if self.tries else None
            shown["decision"] = None if explain is None else asdict(explain())
        return shown


class Subscription:
    """Entries as they come, from now on. Take them; whoever falls behind is dropped.

    Attributes:
        dropped: it fell behind: nothing more will come.
    """

    def __init__(
        self, recent: Recent, wake: Callable[[], None], tenant: str | None, most: int
    ) -> None:
        self.dropped = False
        self._recent = recent
        self._wake = wake
        self._tenant = tenant
        self._most = most
        self._waiting: list[Entry] = []

    def take(self) -> list[Entry]:
        """What has come since the last time, in order. `wake` is called for the next one."""
        taken, self._waiting = self._waiting, []
        return taken

    def close(self) -> None:
        """Want no more. May be called again."""
        self._recent._unsubscribe(self)
        self._waiting = []

    def _put(self, entry: Entry) -> None:
        if self._tenant is not None and entry.tenant != self._tenant:
            return
        waiting = self._waiting
        if len(waiting) >= self._most:
            self.dropped = True
            self.close()
            self._wake()
            return
        waiting.append(entry)
        if len(waiting) == 1:
            self._wake()


class Recent:
    """The rings, and who follows them. One event loop's property."""

    def __init__(self, most: int = MOST, most_notable: int = MOST_NOTABLE) -> None:
        self._all: deque[Entry] = deque(maxlen=most)
        self._notable: deque[Entry] = deque(maxlen=most_notable)
        self._subscriptions: tuple[Subscription, ...] = ()

    def add(self, entry: Entry) -> None:
        """A request is over."""
        self._all.append(entry)
        if len(entry.tries) > 1 or entry.failed:
            self._notable.append(entry)
        for subscription in self._subscriptions:
            subscription._put(entry)

    def find(self, request_id: str, *, tenant: str | None = None) -> Entry | None:
        """The newest request of that id, if it is still known.

        Args:
            tenant: whose it must be; None: anybody's. Callers may choose ids, so two may be alike.
        """
        for entry in chain(reversed(self._all), reversed(self._notable)):
            if entry.request_id == request_id and tenant in (None, entry.tenant):
                return entry
        return None

    def latest(self, most: int, *, tenant: str | None = None, notable: bool = False) -> list[Entry]:
        """The newest first.

        Args:
            tenant: whose; None: everybody's.
            notable: only those that failed or needed more than one try.
        """
        found: list[Entry] = []
        for entry in self._newest(notable):
            if len(found) == most:
                break
            if tenant is None or entry.tenant == tenant:
                found.append(entry)
        return found

    def _newest(self, notable: bool) -> Iterator[Entry]:
        return reversed(self._notable if notable else self._all)

    def subscribe(
        self,
        wake: Callable[[], None],
        *,
        tenant: str | None = None,
        most_behind: int = MOST_BEHIND,
    ) -> Subscription:
        """Follow what is added from now on.

        Args:
            wake: called once something is there to be taken, or the subscription was dropped. It
                runs in every request's way: note it, and come back later.
            tenant: whose requests; None: everybody's.
        """
        made = Subscription(self, wake, tenant, most_behind)
        self._subscriptions = (*self._subscriptions, made)
        return made

    def _unsubscribe(self, subscription: Subscription) -> None:
        self._subscriptions = tuple(s for s in self._subscriptions if s is not subscription)
