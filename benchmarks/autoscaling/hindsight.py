"""What one does who knows the trace: the oracle, and baselines with their numbers set for it.

Each is a schedule of replicas, one number each `DECIDE_S`. None reacts to the queue, so that all of
a trace is computed at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from nearfield.simulator.parts import Step

from benchmarks.autoscaling.traffic import Series
from benchmarks.autoscaling.waiting import (
    DECIDE_S,
    Boots,
    Counts,
    Outcome,
    Replay,
    largest,
    late_share,
    running,
)

ALLOWED = 0.01
"""Share of the work that may be late, for everybody."""
ORACLE_WINDOWS_S = (5, 15, 30, 60, 120, 300, 600)
WINDOWS_S = (15, 30, 60, 120, 300)
HOLDS_S = (60, 300, 600, 1200)
UTILISATIONS = tuple(round(0.05 * i, 2) for i in range(4, 23))
"""0.2 to 1.1: of the settings that are tried."""
FINER = 5
"""Halvings between two of them."""
FITTED, GUESS = 6, 0.15
"""Runs to fit a policy with one number; by how much it is lowered for each logarithm too late."""


class Setting(NamedTuple):
    """Of the reactive policy: `benchmarks.autoscaling.baselines.Reactive`."""

    utilisation: float
    window_s: int
    hold_s: int


@dataclass(frozen=True, slots=True)
class Case:
    """One cell: a trace's work, the size of a replica, boots, and what runs at first."""

    work: Series
    speed: float
    boots: Boots
    first: int

    def follow(self, targets: Counts) -> Outcome:
        """What comes of this schedule, if what it says is asked for when it says so. All boots take
        the mean time here: where they differ, a schedule is better off than a policy."""
        serving = running(targets, self.first, round(self.boots.mean_s), len(self.work))
        late = late_share(self.work, np.multiply(serving, self.speed))
        ups = np.maximum(0, np.diff(targets, prepend=self.first))
        cost = float(np.repeat(targets, DECIDE_S)[: len(self.work)].mean())
        return Outcome(late, cost, int(ups.sum()), int(targets.max()))

    @property
    def bins(self) -> Series:
        """Work in each DECIDE_S."""
        starts = np.arange(0, len(self.work), DECIDE_S)
        return np.add.reduceat(self.work, starts)


def always(case: Case, count: int) -> Outcome:
    """What comes of so many replicas from beginning to end."""
    capacity = np.full(len(case.work), count * case.speed)
    return Outcome(late_share(case.work, capacity), float(count), 0, count)


def static(case: Case) -> Outcome:
    """The fewest replicas with which, always there, no more is late than allowed."""
    most = 1
    while always(case, most).late > ALLOWED:
        most *= 2
    least = most // 2
    while most - least > 1:
        middle = (least + most) // 2
        late = always(case, middle).late > ALLOWED
        least, most = (middle, most) if late else (least, middle)
    return always(case, most)


def peak(case: Case) -> Outcome:
    """Always replicas for the busiest minute."""
    window = min(60, len(case.work))
    total = np.concatenate([[0.0], np.cumsum(case.work)])
    busiest = float((total[window:] - total[:-window]).max()) / window
    return always(case, max(1, math.ceil(busiest / case.speed - 1e-9)))


def oracle(case: Case) -> tuple[Outcome, str]:
    """The cheapest schedule found with all of the future known, and how it was found.

    Wanted in each bin are `factor x mean work over a window around it`; for each window the least
    factor with which no more is late than allowed. Replicas are ready the moment they are wanted,
    having been asked for a boot before, and paid from then. A dip that is shorter than a boot is
    filled: to stop and start again costs as much. For what is wanted, that is the least cost: every
    level is a schedule of its own, and each of its gaps costs its length or a boot. As many as the
    smallest static pool, always, is one more schedule.
    """
    bins, boot_s = case.bins, case.boots.mean_s
    total = np.concatenate([[0.0], np.cumsum(bins)])
    each = np.arange(len(bins))
    best = static(case), "static"
    for window_s in ORACLE_WINDOWS_S:
        width = min(len(bins), window_s // DECIDE_S)
        first = np.clip(each - width // 2, 0, len(bins) - width)
        mean = (total[first + width] - total[first]) / (width * DECIDE_S)

        def at(factor: float, mean: Series = mean) -> Outcome:
            wanted = np.maximum(1, np.ceil(mean * factor / case.speed - 1e-9)).astype(np.int64)
            kept = _filled(wanted, max(1, int(boot_s // DECIDE_S)))
            serving = np.repeat(kept, DECIDE_S)[: len(case.work)]
            ups = int(np.maximum(0, np.diff(kept)).sum())
            cost = float(serving.mean()) + ups * boot_s / len(case.work)
            return Outcome(
                late_share(case.work, np.multiply(serving, case.speed)),
                cost,
                ups,
                int(serving.max()),
            )

        low, high = 0.5, 2.0
        while at(high).late > ALLOWED and high < 64.0:
            low, high = high, 2.0 * high
        for _ in range(12):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if at(middle).late > ALLOWED else (low, middle)
        found = at(high)
        if found.late <= ALLOWED and found.cost < best[0].cost:
            best = found, f"{window_s} s, x {high:.3f}"
    return best


def _filled(wanted: Counts, gap: int) -> Counts:
    """With every dip of up to `gap` filled to what is on both sides of it: a closing."""
    padded = np.concatenate([np.zeros(gap, np.int64), wanted, np.zeros(gap, np.int64)])
    widened = largest(padded, gap + 1)
    return -largest(-widened[::-1], gap + 1)[::-1][gap:-gap]


def reactive(case: Case, setting: Setting) -> Counts:
    """What `baselines.Reactive` decides on this trace: it looks at arrivals only."""
    return _held(_rates(case, setting.window_s), case, setting)


def _rates(case: Case, window_s: int) -> Series:
    """Work a second over the window before each bin, or over what there is of it."""
    width = window_s // DECIDE_S
    total = np.concatenate([[0.0], np.cumsum(case.bins)])[:-1]
    each = np.arange(len(total))
    first = np.maximum(0, each - width)
    rates: Series = (total - total[first]) / (np.maximum(1, each - first) * DECIDE_S)
    return rates


def _held(rates: Series, case: Case, setting: Setting) -> Counts:
    wanted = np.ceil(rates / (case.speed * setting.utilisation) - 1e-9).astype(np.int64)
    wanted[0] = case.first  # nothing is known yet
    held: Counts = np.maximum(1, largest(wanted, max(1, setting.hold_s // DECIDE_S)))
    return held


def settings() -> Iterator[Setting]:
    for window_s in WINDOWS_S:
        for hold_s in HOLDS_S:
            for utilisation in reversed(UTILISATIONS):
                yield Setting(utilisation, window_s, hold_s)


def tried(case: Case) -> dict[Setting, Outcome]:
    """What comes of every setting, from the highest utilisation down until hardly any is late."""
    found: dict[Setting, Outcome] = {}
    done: set[tuple[float, float]] = set()
    rates = {window_s: _rates(case, window_s) for window_s in WINDOWS_S}
    for setting in settings():
        if setting[1:] not in done:
            found[setting] = case.follow(_held(rates[setting.window_s], case, setting))
            if found[setting].late < 0.4 * ALLOWED:
                done.add(setting[1:])
    return found


def tuned(case: Case, outcomes: Mapping[Setting, Outcome]) -> tuple[Outcome, Setting] | None:
    """The cheapest setting that passes; between those tried, the utilisation is refined. None: no
    setting passes."""
    best: tuple[Outcome, Setting] | None = None
    for window_s in WINDOWS_S:
        for hold_s in HOLDS_S:
            own = {s.utilisation: o for s, o in outcomes.items() if s[1:] == (window_s, hold_s)}
            passing = [u for u, o in own.items() if o.late <= ALLOWED]
            if not passing:
                continue
            low = max(passing)
            high = min((u for u in own if u > low), default=low)
            setting = Setting(low, window_s, hold_s)
            candidates = [(own[low], setting)]
            for _ in range(FINER):
                middle = setting._replace(utilisation=0.5 * (low + high))
                outcome = case.follow(reactive(case, middle))
                if outcome.late <= ALLOWED:
                    low = middle.utilisation
                    candidates.append((outcome, middle))
                else:
                    high = middle.utilisation
            for candidate in candidates:
                if best is None or candidate[0].cost < best[0].cost:
                    best = candidate
    return best


def fitted(
    policy: Callable[[float], Step], replay: Replay, default: Outcome, *, least: float, most: float
) -> tuple[Outcome, float] | None:
    """A policy with one number, set as high as passes; None: none that was tried does.

    The logarithm of the late share is taken to be linear in it, to begin with by a guess and then
    between what was found (regula falsi), so that the number is found in few runs.

    Args:
        default: what comes of it at 1.
        least, most: between which it is searched.
    """
    runs = {1.0: default}
    share = 1.0
    for _ in range(FITTED):
        passing = max((s for s, o in runs.items() if o.late <= ALLOWED), default=None)
        failing = min((s for s, o in runs.items() if o.late > ALLOWED), default=None)
        if passing is None:
            share = max(least, share - max(0.1, min(0.45, GUESS * _over(runs[share]))))
        elif failing is None or failing <= passing:
            share = min(most, passing + 0.25)
        elif runs[passing].late > 0.9 * ALLOWED or failing - passing < 0.02:
            break
        else:
            below, above = -_over(runs[passing]), _over(runs[failing])
            part = min(0.8, max(0.2, below / (below + above)))
            share = passing + part * (failing - passing)
        if share in runs:
            break
        runs[share] = replay.run(policy(share))
    passed = [(outcome, share) for share, outcome in runs.items() if outcome.late <= ALLOWED]
    return min(passed, key=lambda found: found[0].cost, default=None)


def _over(outcome: Outcome) -> float:
    """How far more is late than allowed: the logarithm of the ratio."""
    return math.log(max(1e-5, outcome.late) / ALLOWED)
