"""Which bodies may have killed a replica: `policy.quarantine`, fed by what this process sees.

Each gateway process knows what it saw itself. Nothing is hashed while nothing has died.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable

from nearfield.core.errors import Unprocessable
from nearfield.edge.decisions import Admission, Routed
from nearfield.edge.proxy.ports import Attempt, Request
from nearfield.policy.quarantine import (
    Quarantine,
    fingerprint,
    refusal,
    suspicion,
    trial_s,
)


class Suspects:
    """One event loop's property.

    Attributes:
        any: a body is suspected or quarantined. While it is False nothing need be asked.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.any = False
        self._clock = clock
        self._book = Quarantine()
        self._until_s = -math.inf  # when the last record is forgotten

    def look_at(self, request: Request, admission: Admission) -> Unprocessable | None:
        """A request comes in: refuse it, or put it on trial, if its body is known for it."""
        if not request.body:
            return None
        now_s = self._clock()
        if now_s >= self._until_s:
            self._keep(Quarantine())
            return None
        named = _name(request)
        standing = self._book.standing(named, now_s)
        if standing == "quarantined":
            return refusal(self._book.records[named], now_s)
        if standing == "suspect":
            admission.trial = named
        return None

    def convicted(self, request: Request) -> Unprocessable | None:
        """The refusal of a request that was let in, and whose body is quarantined by now."""
        if not self.any:
            return None
        named, now_s = _name(request), self._clock()
        if self._book.standing(named, now_s) != "quarantined":
            return None
        return refusal(self._book.records[named], now_s)

    def answered(self, request: Request) -> None:
        """Answered to the end: that body does not kill."""
        if request.body:
            self._keep(self._book.absolved(_name(request)))

    def crashed(self, request: Request) -> None:
        """The engine died, and its replica found that it died of this body."""
        if request.body:
            book, _ = self._book.blamed([(_name(request), True)], self._clock())
            self._keep(book)

    def convicted_elsewhere(self, request: Request) -> None:
        """The gateway that had it refused it as one that kills: so do we, lest others be tried."""
        if request.body:
            self._keep(self._book.convicted(_name(request), self._clock()))

    def accused_elsewhere(self, request: Request) -> None:
        """A replica of another gateway died with it inside."""
        if request.body:
            self._keep(self._book.accused(_name(request), self._clock()))

    def died(self, inside: Iterable[Attempt]) -> None:
        """A replica is gone that had these tries. Some are on trial from now on: see `suspicion`.

        Whether it was their doing is not known: most replicas are killed by something else. So
        even one that was alone in there gets its trial, where the policy would not send it again.
        """
        now_s = self._clock()
        named: list[tuple[bytes, bool]] = []
        of: list[tuple[bytes, Attempt, Admission]] = []
        for attempt in inside:
            request, grant = attempt.request, attempt.grant
            if request is None or grant is None or not request.body:
                continue
            name = _name(request)
            leg = attempt.leg
            named.append((name, isinstance(leg, Routed) and leg.trial))
            of.append((name, attempt, grant.about))
        if not named:
            return
        book, _ = self._book.blamed(named, now_s)
        self._keep(book)
        for name, attempt, admission in of:
            leg = attempt.leg
            if book.standing(name, now_s) != "clear":
                how = suspicion(
                    book.records[name],
                    alone=len(named) == 1,
                    inside_s=now_s - attempt.started_s,
                    first_byte_s=leg.predicted_s if isinstance(leg, Routed) else 0.0,
                )
                admission.accused = True
                admission.trial = None if how == "slight" else name
                # Where it is tried nobody is before it: twenty would wait twenty queues long.
                runs_s = leg.first_byte_s if isinstance(leg, Routed) else 0.0
                admission.trial_s = trial_s(runs_s) if how == "fresh" else None

    def _keep(self, book: Quarantine) -> None:
        if book is self._book:
            return
        self._book = book
        self.any = bool(book.records)
        self._until_s = max((r.until_s for r in book.records.values()), default=-math.inf)


def _name(request: Request) -> bytes:
    return fingerprint(request.model or "", request.body)
