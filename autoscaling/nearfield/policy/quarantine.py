"""The query of death: find the request that kills replicas, and refuse it before it has them all.

When a replica dies, every request inside it is a suspect. An innocent one is absolved by being
answered; the culprit never is. So suspects are *tried*: no replica runs two at a time, and no body
runs twice at a time (`may_try`), whether it comes again as a replay or as a new request. If the
replica of a trial dies, that one did it. Two kills, and the body is refused for a while.

A trial takes as long as it took requests to kill so far: mostly they do so while their prompt is
read. Whoever had outlived that when its replica died is run again beside others, and tried alone
only if another dies with it inside (`suspicion`): twenty that wait for each other would all be
late, and mostly none of them did it.

Replicas that die together have one cause, and it need not be a request: a node was lost, or a
region. Then only bodies that were in more than one of them are suspects, and none is convicted
before its trial: a prompt that everybody sends is in every replica whatever kills them.

An engine that dies alone inside a replica that lives (`engine_crashed`) names its culprit itself:
that is a death with one body inside.

A suspect is tried in its own region, lest it take others' replicas too. It leaves (`departure`)
where that region is lost altogether, for no request does that; and, once in its life, if it is only
slightly suspected and its region has nobody left to run it. Where it comes to it is a suspect as
well (`accused`), so that the next death there convicts it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from nearfield.core.errors import Unprocessable

KILLS = 2
"""Deaths that convict a body, the last of them in its trial or with nothing else inside."""
TOGETHER_S = 1.0
"""Deaths within so long of each other are one event."""
QUICK_S = 0.1
"""What kills a replica mostly does so while its prompt is read: within so long, or as long as its
first byte was expected to take. See `suspicion`."""
SUSPECT_S = 300.0
"""How long a suspect is remembered that does not come again."""
QUARANTINE_S = 600.0
MOST_RECORDS = 1024
"""Bodies remembered. Beyond them the oldest suspects are forgotten, then the oldest convicts."""

Fate = Literal["lost", "alive", "unheard"]
"""Of a region whose replica died: nothing in it answers any more; something that was asked since
has; neither is known yet, and will be within `health.Rules.fails` quick questions."""
Standing = Literal["clear", "suspect", "quarantined"]
Suspicion = Literal["slight", "fresh", "grave"]
"""`slight`: it had outlived the time in which requests kill, and runs beside others. `fresh`: it is
tried, and once it has outlived that time the next one is. `grave`: it was inside twice, or
alone, and is tried to its end."""


def fingerprint(model: str, body: bytes) -> bytes:
    """Names a body without keeping any of it."""
    return hashlib.blake2b(body, digest_size=16, key=model.encode()[:64]).digest()


@dataclass(frozen=True, slots=True)
class Record:
    """deaths: replicas that died with it inside. until_s: when it is forgotten or let in again."""

    deaths: int
    until_s: float
    convicted: bool = False


@dataclass(frozen=True, slots=True)
class Quarantine:
    """What is held against whom.

    Attributes:
        records: by fingerprint, the oldest first. Where it is empty no body need be looked at.
        recent: when replicas died lately, and what was inside.
    """

    records: Mapping[bytes, Record] = field(default_factory=dict)
    recent: tuple[tuple[float, frozenset[bytes]], ...] = ()

    def standing(self, body: bytes, now_s: float) -> Standing:
        """Of the body with this fingerprint."""
        record = self.records.get(body)
        if record is None or now_s >= record.until_s:
            return "clear"
        return "quarantined" if record.convicted else "suspect"

    def convicted(self, body: bytes, now_s: float) -> Quarantine:
        """Another gateway has found one with this fingerprint guilty."""
        records = {k: r for k, r in self.records.items() if k != body}
        records[body] = Record(KILLS, now_s + QUARANTINE_S, convicted=True)
        return Quarantine(_bounded(records), self.recent)

    def accused(self, body: bytes, now_s: float) -> Quarantine:
        """Another gateway suspects one with this fingerprint: a replica died with it inside."""
        if self.standing(body, now_s) != "clear":
            return self
        records = {k: r for k, r in self.records.items() if k != body}
        records[body] = Record(1, now_s + SUSPECT_S)
        return Quarantine(_bounded(records), self.recent)

    def absolved(self, body: bytes) -> Quarantine:
        """One with this fingerprint was answered to the end: it does not kill."""
        record = self.records.get(body)
        if record is None or record.convicted:
            return self
        return Quarantine({k: r for k, r in self.records.items() if k != body}, self.recent)

    def blamed(
        self, inside: Sequence[tuple[bytes, bool]], now_s: float
    ) -> tuple[Quarantine, frozenset[bytes]]:
        """A replica, or the engine in it, has died.

        Args:
            inside: of each request it had, the fingerprint and whether it was on trial.

        Returns:
            The quarantine afterwards, and the fingerprints it died of beyond doubt: those requests
            are not sent again.
        """
        lately = tuple(death for death in self.recent if now_s - death[0] < TOGETHER_S)
        accused, certain = _accused(inside, [bodies for _, bodies in lately])
        records = {
            body: record
            for body, record in self.records.items()
            if now_s < record.until_s and body not in accused
        }
        for body in accused:
            known = self.standing(body, now_s) != "clear"
            before = self.records[body] if known else Record(0, 0.0)
            # Of deaths that come together only the first counts: they are one event.
            deaths = before.deaths + 1 if certain or not lately else max(1, before.deaths)
            convicted = before.convicted or (certain and deaths >= KILLS)
            until_s = now_s + (QUARANTINE_S if convicted else SUSPECT_S)
            records[body] = Record(deaths, until_s, convicted)
        recent = (*lately, (now_s, frozenset(body for body, _ in inside)))
        guilty = frozenset(accused) if certain else frozenset()
        return Quarantine(_bounded(records), recent), guilty


def _accused(
    inside: Sequence[tuple[bytes, bool]], others: Collection[frozenset[bytes]]
) -> tuple[list[bytes], bool]:
    """Who is to blame for a death, and whether that is beyond doubt.

    others: what was inside the replicas that died just before.
    """
    tried = list(dict.fromkeys(body for body, on_trial in inside if on_trial))
    if tried:
        unrelated = any(tried[0] not in bodies for bodies in others)
        return tried, len(tried) == 1 and not unrelated
    bodies = list(dict.fromkeys(body for body, _ in inside))
    if others:
        return [body for body in bodies if any(body in other for other in others)], False
    # Many requests with one body prove nothing: that may be what everybody sends.
    return bodies, len(inside) == 1


def _bounded(records: dict[bytes, Record]) -> dict[bytes, Record]:
    excess = len(records) - MOST_RECORDS
    if excess <= 0:
        return records
    # Sorting is stable, so each kind stays in order of age.
    forgotten = set(sorted(records, key=lambda body: records[body].convicted)[:excess])
    return {body: record for body, record in records.items() if body not in forgotten}


def suspicion(record: Record, *, alone: bool, inside_s: float, first_byte_s: float) -> Suspicion:
    """How a request is run again that was inside a replica when that died.

    Args:
        alone: nothing else was there. inside_s: for how long it had been there.
        first_byte_s: how long its first byte was expected to take.
    """
    if alone or record.deaths > 1:
        return "grave"
    return "fresh" if inside_s < trial_s(first_byte_s) else "slight"


def trial_s(first_byte_s: float) -> float:
    """How long it takes to see that a request does not kill as most do that do."""
    return max(QUICK_S, first_byte_s)


def may_try(body: bytes, *, trying: Collection[bytes], suspects_there: int) -> bool:
    """Whether a suspect may run now.

    Args:
        trying: bodies on trial in this region. suspects_there: those on the replica it would go to.
    """
    return body not in trying and suspects_there == 0


def departure(fate: Fate, *, slight: bool) -> Literal["go", "wait", "stay"]:
    """Whether a suspect may leave its region, where nobody is left that could run it now.

    Args:
        fate: of that region. slight: it is not tried (`suspicion`): it had outlived the time in
            which requests kill, so that it hardly did it.
    """
    if fate == "unheard":
        return "wait"
    return "go" if fate == "lost" or slight else "stay"


def refusal(record: Record, now_s: float) -> Unprocessable:
    """What the sender of a quarantined body is told."""
    return Unprocessable(
        f"Replicas died of this request {record.deaths} times, so it is not run again for now. "
        "Change it, or report it.",
        code="request_quarantined",
        retry_after_s=max(1.0, record.until_s - now_s),
    )
