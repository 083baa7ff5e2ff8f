"""What isolation costs, and what it is worth: products on shared, fair-queued and dedicated pools.

One model's products in one region, with the same requests at the same moments, on

    shared          one pool, first come, first served
    fair-queued     one pool, products in turn (`policy.fair`), chunk by chunk of their prompts
    dedicated       a pool for each product
    X apart         a pool for X, one for all others
    X first         a pool for X, that may use the others' as well
    limited         one pool, and a limit on some product's tokens (`policy.quota`)

each with more and more replicas, until the products that are to be protected keep what they were
promised. Pools that share nothing are simulated by themselves: what is in one changes nothing in
the other, so a few runs make up many layouts. Fleets are static, so that a cost is one number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product as combinations

from nearfield.core.errors import BadRequest
from nearfield.core.problems import did_you_mean
from nearfield.simulator.neighbours import SHARED, Case, Fare, Group

MOST_FAILED = 0.02
"""A layout that refuses or gives up more of any product is none."""
MOST_MORE = 0.6
"""Replicas more than now, as a share, up to which layouts are looked at."""
FAIR = "fair-queued"
LIMITED = "limited"
ONE_POOL = (SHARED, FAIR)
Progress = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class Row:
    """One layout of one size.

    Attributes:
        others: the protected products together; fares: each product by itself.
        kept: every promise is.
        dominated_by: a layout that costs no more and is no slower for the others, and can be had;
            None: it is on the frontier, or would be.
        ms_per_usd: on the frontier, milliseconds of the others' p99 that each further dollar an
            hour saves, from the cheaper one before it.
        needs_turns: products in turn, which this engine is not said to do: shown, never chosen.
    """

    layout: str
    groups: tuple[Group, ...]
    usd_per_hour: float
    fares: Mapping[str, Fare]
    others: Fare
    kept: bool
    dominated_by: Row | None = None
    ms_per_usd: float | None = None
    needs_turns: bool = False

    @property
    def replicas(self) -> int:
        return sum(group.replicas for group in self.groups)

    @property
    def offered(self) -> bool:
        """Whether it may be chosen: the engine does it, and it serves all products."""
        worst = max((fare.failed_share for fare in self.fares.values()), default=0.0)
        return not self.needs_turns and worst <= MOST_FAILED

    @property
    def pools(self) -> str:
        """`assistant 3 + reports 5`."""
        return " + ".join(f"{whose} {n}" for group in self.groups for whose, n in group.pools)


@dataclass(frozen=True, slots=True)
class Comparison:
    """All rows, the cheapest first.

    Attributes:
        noisy: the product the others are protected from. now: the shared pool as it is.
        goals_s: the promised p99 by product.
        requests, runs: simulated in all.
    """

    case: Case
    noisy: str
    now: Row
    rows: tuple[Row, ...]
    goals_s: Mapping[str, float]
    requests: int
    runs: int

    @property
    def frontier(self) -> list[Row]:
        return [
            row
            for row in self.rows
            if row.dominated_by is None and (row.offered or row is self.now)
        ]

    @property
    def choice(self) -> Row | None:
        """The cheapest that keeps every promise."""
        return next((row for row in self.frontier if row.kept and row.offered), None)

    @property
    def hoped_for(self) -> Row | None:
        """A cheaper one that would, with an engine that serves products in turn."""
        found = next((row for row in self.rows if row.needs_turns and row.kept), None)
        choice = self.choice
        if found is None or (choice is not None and choice.usd_per_hour <= found.usd_per_hour):
            return None
        return found


# ---- comparing -----------------------------------------------------------------------------------


def compare(
    case: Case,
    *,
    noisy: str | None = None,
    goal_s: float = 0.7,
    goals_s: Mapping[str, float] | None = None,
    now: int | None = None,
    limits: Mapping[str, int] | None = None,
    in_turn: bool = False,
    thorough: bool = False,
    progress: Progress = lambda share: None,
) -> Comparison:
    """Every layout, in every size that is of interest.

    Args:
        noisy: the product that the others are protected from; absent: the noisiest.
        goal_s: the p99 that every other product is promised. goals_s: instead of it, by product;
            the noisy one has none unless it stands here.
        now: replicas of the shared pool as it is; absent: as the scenario begins.
        limits: tokens a minute that some products may have: compared too, and never chosen where
            it refuses much.
        in_turn: the engine serves products in turn, so that this may be chosen.
        thorough: look at every size of every layout. Else the search ends one replica beyond the
            first layouts that keep the promises: what the next dollar would buy.

    Raises:
        BadRequest: it knows no such product.
    """
    noisy = noisy or case.noisiest
    limited = tuple(sorted((limits or {}).items()))
    for name in (noisy, *(goals_s or ()), *(limits or ())):
        if name not in case.products:
            near = did_you_mean(name, case.products)
            raise BadRequest(
                f"--noisy, --slo-p99-ms, --limit: {name!r} is no product of this case: "
                + (f"did you mean {near}?" if near else f"it has {', '.join(case.products)}"),
                param="noisy",
            )
    promised = {name: goal_s for name in case.products if name != noisy} | dict(goals_s or {})
    pool = case.pool
    present = now or pool.initial_replicas or pool.min_replicas or case.least(case.products)
    search = _Search(case, noisy, promised, present, limited, in_turn, thorough, progress)
    rows = list(search.rows())
    base = search.row(SHARED, (Group(case.products, ((SHARED, present),)),))
    if all(row.groups != base.groups for row in rows):
        rows.append(base)
    done = _frontier(rows, base)
    return Comparison(
        case,
        noisy,
        next(row for row in done if row.groups == base.groups),
        tuple(done),
        promised,
        case.requests,
        case.runs,
    )


class _Search:
    """The rows of one comparison."""

    def __init__(
        self,
        case: Case,
        noisy: str,
        goals_s: Mapping[str, float],
        present: int,
        limits: tuple[tuple[str, int], ...],
        in_turn: bool,
        thorough: bool,
        progress: Progress,
    ) -> None:
        self.case = case
        self.noisy = noisy
        self.others = tuple(name for name in case.products if name != noisy)
        self.goals_s = goals_s
        self.sizes = range(max(1, present - 1), math.ceil(present * (1 + MOST_MORE)) + 1)
        self._limits = limits
        self._in_turn = in_turn
        self._thorough = thorough
        self._progress = progress

    def rows(self) -> Iterator[Row]:
        names = self.case.products
        apart = [(name,) for name in names]
        kinds: list[tuple[str, Callable[[int], list[tuple[Group, ...]]]]] = [
            (SHARED, lambda n: [(Group(names, ((SHARED, n),)),)]),
            (FAIR, lambda n: [(Group(names, ((SHARED, n),), "in turn"),)]),
            ("dedicated", lambda n: self._split(apart, n)),
        ]
        if self._limits:
            limited = self._limits
            kinds.append((LIMITED, lambda n: [(Group(names, ((SHARED, n),), limits=limited),)]))
        for name in names:
            rest = tuple(other for other in names if other != name)
            if len(rest) > 1:
                kinds.append((f"{name} apart", self._apart(name, rest)))
            kinds.append((f"{name} first", self._first(name)))
        kept: set[str] = set()
        settled: set[str] = set()
        last = self.sizes[-1]
        for done, replicas in enumerate(self.sizes):
            if replicas > last:
                break
            beyond = bool(kept) and not self._thorough
            for i, (layout, options) in enumerate(kinds):
                self._progress((done + i / len(kinds)) / (last - self.sizes[0] + 1))
                if layout in settled or (beyond and layout not in (*kept, *ONE_POOL)):
                    continue
                found = [self.row(layout, groups) for groups in options(replicas)]
                found = [row for row in found if self._serves(row)]
                if not found:
                    continue
                best = min(found, key=self._worth)
                yield best
                if best.kept:
                    (kept if best.offered else settled).add(layout)
            if kept and not self._thorough:
                last = min(last, replicas if beyond else replicas + 1)
        self._progress(1.0)

    def row(self, layout: str, groups: tuple[Group, ...]) -> Row:
        fares: dict[str, Fare] = {}
        for group in groups:
            fares |= self.case.fares(group)
        fares = {name: fares[name] for name in self.case.products}
        kept = all(fares[name].p99_s <= goal for name, goal in self.goals_s.items())
        replicas = sum(group.replicas for group in groups)
        usd = replicas * self.case.pool.usd_per_hour
        others = Fare.all_of([fares[name] for name in self.others])
        needs_turns = layout == FAIR and not self._in_turn
        return Row(layout, groups, usd, fares, others, kept, needs_turns=needs_turns)

    def _serves(self, row: Row) -> bool:
        limited = dict(self._limits) if row.layout == LIMITED else {}
        return all(
            fare.failed_share <= MOST_FAILED or name in limited for name, fare in row.fares.items()
        )

    def _worth(self, row: Row) -> tuple[bool, float, float]:
        """Of one layout and size: the promises first. Where they are kept the noisy product gets
        the rest, else the others get what there is."""
        noisy_s = row.fares[self.noisy].p99_s
        if row.kept:
            return False, noisy_s, row.others.p99_s
        return True, row.others.p99_s, noisy_s

    def _split(self, parts: Sequence[tuple[str, ...]], total: int) -> list[tuple[Group, ...]]:
        """Every way to give each part a pool of its own."""
        leasts = [self.case.least(part) for part in parts]
        spare = total - sum(leasts)
        if spare < 0:
            return []
        names = [part[0] if len(part) == 1 else SHARED for part in parts]
        return [
            tuple(
                Group(part, ((name, least + more),))
                for part, name, least, more in zip(parts, names, leasts, extra, strict=True)
            )
            for extra in combinations(range(spare + 1), repeat=len(parts))
            if sum(extra) == spare
        ]

    def _apart(self, name: str, rest: tuple[str, ...]) -> Callable[[int], list[tuple[Group, ...]]]:
        return lambda total: self._split([(name,), rest], total)

    def _first(self, name: str) -> Callable[[int], list[tuple[Group, ...]]]:
        """A pool that is enough for its mean, or one replica more; it may use the others' too."""
        case = self.case
        least = case.least((name,))

        def options(total: int) -> list[tuple[Group, ...]]:
            return [
                (Group(case.products, ((name, own), (SHARED, total - own))),)
                for own in (least, least + 1)
                if total - own >= 1
            ]

        return options


def _frontier(rows: Sequence[Row], now: Row) -> list[Row]:
    """The rows by cost, each with what dominates it, or with what its last dollars have bought."""
    ordered = sorted(rows, key=lambda row: (row.usd_per_hour, row.others.p99_s, row.layout))
    done: list[Row] = []
    best: Row | None = None
    for row in ordered:
        if best is not None and row.others.p99_s >= best.others.p99_s:
            done.append(replace(row, dominated_by=best))
            continue
        if not row.offered and row.groups != now.groups:
            done.append(row)
            continue
        gained = None
        if best is not None and math.isfinite(best.others.p99_s):
            usd = row.usd_per_hour - best.usd_per_hour
            gained = 1000 * (best.others.p99_s - row.others.p99_s) / usd if usd > 0 else None
        best = replace(row, ms_per_usd=gained)
        done.append(best)
    return done
