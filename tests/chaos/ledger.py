"""The books of one experiment: what was sent, what was answered, what was executed. Pure.

    Answer      what a client got for one request, and when
    Execution   one run of a request in an engine, from the engine's own file
    account     both together: who was lost, who ran twice, who ran abroad
    Bars        what must be true; `misses` says what is not

All times are on the machine's monotonic clock, which all its processes share.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["ok", "refused", "error", "told", "cut", "lost"]
"""`ok`: complete and right. `refused`: a definite no that says when to come back, or why never.
`error`: any other failure that the client was told of. `told`: a stream that broke off with an
explicit error event. `cut`: one that ended without a word, or with what was not its own. `lost`: no
answer by the deadline."""

RACE_S = 0.1
"""From the end of a run to its answer at the gateway, on a busy machine. A replica that dies in
between has run it, and nobody can know: an inference without a key is run again."""
BOUND = "eu"
"""The tenant whose data may not leave the EU, and the jurisdiction it may not leave."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What one request got.

    Attributes:
        due_s: when it was to be sent; latency counts from here. sendings: by the client, in all.
        code: of the error. region: that answered, as the gateway says.
        retry_after_s: when it may be sent again, where that is said.
    """

    id: str
    tenant: str
    stream: bool
    due_s: float
    ended_s: float
    kind: Kind
    status: int = 0
    code: str = ""
    region: str = ""
    retry_after_s: float | None = None
    sendings: int = 1

    @property
    def took_s(self) -> float:
        return self.ended_s - self.due_s


@dataclass(frozen=True, slots=True)
class Execution:
    """One run of a request. `ended`: how, and when; None: its engine died in the middle."""

    id: str
    region: str
    begun_s: float
    ended: Literal["done", "failed", "cancelled"] | None = None
    ended_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Tally:
    """An experiment in figures.

    Attributes:
        begun: runs that engines began, in all. again: requests that were begun more than once.
        duplicated: requests that were executed to the end more than once. raced: those of them
            whose first run ended in the moment of the fault, its answer on the way.
        abroad: runs of bound requests outside of their jurisdiction.
        failover_s: the longest that anybody waited from the fault on, or from when it was sent.
        p99_before_s, p99_during_s: of the good answers.
    """

    sent: int
    kinds: Mapping[Kind, int]
    begun: int
    again: int
    duplicated: int
    raced: int
    abroad: int
    failover_s: float
    p99_before_s: float
    p99_during_s: float
    worst: tuple[str, ...] = ()

    def of(self, kind: Kind) -> int:
        return self.kinds.get(kind, 0)

    @property
    def answered(self) -> int:
        """With a definite answer, good or bad."""
        return self.sent - self.of("lost")


@dataclass(frozen=True, slots=True)
class Fault:
    """When it began, and when it was over; infinite: it was not, before the load ended."""

    began_s: float
    over_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Bars:
    """What must be true of an experiment.

    The first ones are right or wrong on any machine; the times are held only to machines that have
    nothing else to do.

    Attributes:
        errors: share of requests whose client may see one. told: streams that may break, told.
        may_refuse: tenants that may be refused while the fault lasts. says_when: with a
            Retry-After; an engine that answers 503 itself need not.
        runs_twice: replays are right although the first run may have come to its end: inferences
            without a key, whose region went silent and could not be told from a dead one.
        load_times: runs that engines may begin for each request sent.
        failover_s: see `Tally`. p99_times: p99 during the fault over p99 before; p99_s: or this.
    """

    errors: float = 0.0
    told: bool = True
    may_refuse: Collection[str] = ()
    says_when: bool = True
    runs_twice: bool = False
    load_times: float | None = None
    failover_s: float | None = 1.5
    p99_times: float | None = 2.0
    p99_s: float | None = None


def account(
    answers: Sequence[Answer],
    executions: Sequence[Execution],
    fault: Fault,
    jurisdictions: Mapping[str, str],
) -> Tally:
    """The books of these requests.

    Args:
        executions: those of other requests are left out.
        jurisdictions: of each region.
    """
    by_id = {answer.id: answer for answer in answers}
    ours = [run for run in executions if run.id in by_id]
    begun = Counter(run.id for run in ours)
    done: dict[str, list[float]] = {}
    for run in ours:
        if run.ended == "done":
            done.setdefault(run.id, []).append(run.ended_s)
    twice = [min(ends) for ends in done.values() if len(ends) > 1]
    abroad = [
        run for run in ours if by_id[run.id].tenant == BOUND and jurisdictions[run.region] != BOUND
    ]
    good = [answer for answer in answers if answer.kind == "ok"]
    before = [a.took_s for a in good if a.ended_s < fault.began_s]
    during = [a.took_s for a in good if a.ended_s >= fault.began_s and a.due_s < fault.over_s]
    return Tally(
        sent=len(answers),
        kinds=dict(Counter(answer.kind for answer in answers)),
        begun=len(ours),
        again=sum(count > 1 for count in begun.values()),
        duplicated=len(twice),
        raced=sum(abs(end_s - fault.began_s) < RACE_S for end_s in twice),
        abroad=len(abroad),
        failover_s=failover_s(answers, fault),
        p99_before_s=quantile(before, 0.99),
        p99_during_s=quantile(during, 0.99),
        worst=_worst(answers),
    )


def failover_s(answers: Iterable[Answer], fault: Fault) -> float:
    """The longest that a request which was answered waited, from the fault or from its sending on.

    A refused or failed one has its answer: it is counted as such, not here. A lost one waited until
    its client gave up.
    """
    waits = (
        answer.ended_s - max(answer.due_s, fault.began_s)
        for answer in answers
        if answer.ended_s >= fault.began_s
        and answer.due_s < fault.over_s
        and answer.kind in ("ok", "lost")
    )
    return max(waits, default=0.0)


def quantile(values: Iterable[float], q: float) -> float:
    """Nearest rank; not a number where there are no values."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    return ordered[min(len(ordered) - 1, max(0, math.ceil(q * len(ordered)) - 1))]


def misses(tally: Tally, answers: Sequence[Answer], bars: Bars, *, timed: bool) -> list[str]:
    """Which bars are missed, in words.

    Args:
        timed: hold it to the times as well.
    """
    found = []
    if tally.of("lost"):
        found.append(f"{tally.of('lost')} lost")
    if tally.of("cut"):
        found.append(f"{tally.of('cut')} cut without a word")
    if tally.of("told") and not bars.told:
        found.append(f"{tally.of('told')} streams broken")
    if tally.duplicated > tally.raced and not bars.runs_twice:
        found.append(f"{tally.duplicated - tally.raced} executed twice")
    if tally.abroad:
        found.append(f"{tally.abroad} runs outside of their jurisdiction")
    if tally.of("error") > bars.errors * tally.sent:
        found.append(f"{tally.of('error')} errors")
    refused = [a for a in answers if a.kind == "refused" and a.tenant not in bars.may_refuse]
    if len(refused) > bars.errors * tally.sent:
        found.append(f"{len(refused)} refused that could have been served")
    nowhere = [a for a in answers if a.kind == "refused" and a.tenant in bars.may_refuse]
    if bars.says_when and any(a.status == 503 and a.retry_after_s is None for a in nowhere):
        found.append("503 without Retry-After")
    if bars.load_times is not None and tally.begun > bars.load_times * tally.sent:
        found.append(f"{tally.begun} runs for {tally.sent} requests")
    return found + (_late(tally, bars) if timed else [])


def _late(tally: Tally, bars: Bars) -> list[str]:
    found = []
    if bars.failover_s is not None and tally.failover_s >= bars.failover_s:
        found.append(f"failover {tally.failover_s:.2f} s")
    before_s, during_s = tally.p99_before_s, tally.p99_during_s
    if bars.p99_s is not None:
        if during_s >= bars.p99_s:
            found.append(f"p99 {during_s:.2f} s")
    elif bars.p99_times is not None and during_s >= bars.p99_times * before_s:
        found.append(f"p99 {during_s / before_s:.1f} times that before")
    return found


def _worst(answers: Sequence[Answer]) -> tuple[str, ...]:
    """The commonest ways in which requests failed, for the report."""
    failed = Counter(
        f"{a.kind} {a.status or ''} {a.code} ({a.tenant}{', stream' if a.stream else ''})"
        for a in answers
        if a.kind != "ok"
    )
    return tuple(f"{count} × {' '.join(what.split())}" for what, count in failed.most_common(5))
