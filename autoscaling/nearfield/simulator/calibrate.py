"""An engine's timings from a real run: what its requests took, and who was there meanwhile.

The run is a CSV file with one row a request, measured at the replica:

    arrival_s, input_tokens, output_tokens, first_token_s, total_s      and, of several, replica

`first_token_s` and `total_s` count from the arrival. Two kinds of rows tell the timings apart, each
an equation in (token_s, step_s, sequence_s) of `engine.Timing`:

- after the first token, a request's answer takes an iteration for each further token, each longer
  by everybody that decodes beside it, and the prompts that are computed meanwhile;
- a request that came when nobody was there waits for its own prompt only.

They are solved for the least sum of relative errors, none of the timings below zero. The sum of
errors and not of their squares, by weights that are found again each round (Holland and Welsch,
"Robust regression using iteratively reweighted least-squares", 1977): a run has requests that a
pause of the machine has hit. With three unknowns every set of those that are zero can be tried.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nearfield.simulator import scenario as s
from nearfield.simulator.traces import TraceError, number, rows

COLUMNS = ("arrival_s", "input_tokens", "output_tokens", "first_token_s", "total_s")
FEWEST = 20
"""Equations without which nothing is believed."""
LEAST_S = 1e-7
ROUNDS = 12
SMALL = 0.01
"""A relative error that is none: its weight is bounded."""

Equation = tuple[tuple[float, float, float], float]
"""Factors of (token_s, step_s, sequence_s), and the seconds they add up to."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One request of the run; times from its beginning, seconds."""

    came_s: float
    first_s: float
    ended_s: float
    prompt: int
    answer: int


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was found.

    Attributes:
        requests: in the run. error: median relative error of what it explains.
    """

    engine: s.Engine
    requests: int
    error: float

    def __str__(self) -> str:
        engine = self.engine
        return (
            f"{engine.engine}: prefill {engine.prefill_tokens_per_s:.4g} tokens/s, step "
            f"{engine.step_ms:.4g} ms + {engine.step_ms_per_sequence:.4g} ms a sequence; measured, "
            f"{self.requests} requests, median error {100 * self.error:.1f} %"
        )


def calibrate(
    scenario: s.Scenario, engine: str | None, path: Path
) -> tuple[s.Scenario, Calibration]:
    """The scenario with an engine's timings from a run.

    Args:
        engine: which; None: there is one.

    Raises:
        TraceError: the file cannot be used, or the scenario has no such engine.
    """
    names = [each.engine for each in scenario.engines]
    if engine is None and len(names) > 1:
        raise TraceError(
            "The scenario has several engines", f"name one: --calibrate {names[0]}={path}"
        )
    engine = names[0] if engine is None else engine
    if engine not in names:
        raise TraceError(f"The scenario has no engine {engine!r}", f"it has {', '.join(names)}")
    index = names.index(engine)
    found = fit(scenario.engines[index], path)
    engines = [*scenario.engines]
    engines[index] = found.engine
    return scenario.model_copy(update={"engines": engines}), found


def fit(engine: s.Engine, path: Path) -> Calibration:
    """The engine as a run has shown it; its chunk, places and bounds stay as they are."""
    replicas: dict[str, list[Measured]] = {}
    for row in rows(path, COLUMNS):
        came_s, prompt, answer, first_s, total_s = (number(path, row, c) for c in COLUMNS)
        if not 0 < first_s <= total_s:
            raise TraceError(
                f"{path.name} has a request whose first token came after {first_s} of {total_s} s",
                "both count from the arrival",
            )
        replicas.setdefault(row.get("replica") or "", []).append(
            Measured(came_s, came_s + first_s, came_s + total_s, int(prompt), int(answer))
        )
    equations = [equation for run in replicas.values() for equation in _equations(run, engine)]
    if len(equations) < FEWEST:
        raise TraceError(
            f"{path.name} tells too little: {len(equations)} usable requests, {FEWEST} are needed",
            "record more, some of them alone",
        )
    token_s, step_s, sequence_s = _solve(equations)
    errors = sorted(
        abs(a * token_s + b * step_s + c * sequence_s - took_s) / took_s
        for (a, b, c), took_s in equations
    )
    return Calibration(
        engine.model_copy(
            update={
                "prefill_tokens_per_s": 1.0 / max(token_s, LEAST_S),
                "step_ms": 1000 * max(step_s, LEAST_S),
                "step_ms_per_sequence": 1000 * sequence_s,
            }
        ),
        sum(len(run) for run in replicas.values()),
        errors[len(errors) // 2],
    )


def _equations(run: Sequence[Measured], engine: s.Engine) -> list[Equation]:
    found: list[Equation] = []
    by_first = sorted(run, key=lambda r: r.first_s)
    firsts = [r.first_s for r in by_first]
    prompts = [0, *itertools.accumulate(r.prompt for r in by_first)]
    ends = sorted(r.ended_s for r in run)
    beside = _Beside(firsts, ends)
    comes = sorted(run, key=lambda r: r.came_s)
    busy_until_s = -math.inf
    for i, r in enumerate(comes):
        next_s = comes[i + 1].came_s if i + 1 < len(comes) else math.inf
        if r.came_s >= busy_until_s and next_s >= r.first_s:
            iterations = max(1, math.ceil(r.prompt / engine.prefill_chunk_tokens))
            factors = float(r.prompt), float(iterations), 0.0
            found.append((factors, r.first_s - r.came_s))
        busy_until_s = max(busy_until_s, r.ended_s)
        took_s = r.ended_s - r.first_s
        if r.answer > 1 and took_s > 0:
            decoding = beside.mean(r.first_s, r.ended_s)
            later = bisect_right(firsts, r.ended_s)
            tokens = prompts[later] - prompts[bisect_right(firsts, r.first_s)]
            steps = r.answer - 1.0
            found.append(((float(tokens), steps, steps * decoding), took_s))
    return [pair for pair in found if pair[1] > 0]


class _Beside:
    """How many requests decode at once, in the mean over a span."""

    def __init__(self, firsts_s: Sequence[float], ends_s: Sequence[float]) -> None:
        self._firsts = firsts_s
        self._ends = ends_s
        self._first_sums = [0.0, *itertools.accumulate(firsts_s)]
        self._end_sums = [0.0, *itertools.accumulate(ends_s)]

    def mean(self, begin_s: float, end_s: float) -> float:
        return (self._integral(end_s) - self._integral(begin_s)) / (end_s - begin_s)

    def _integral(self, until_s: float) -> float:
        """Of the count, up to a time: each adds what has passed since it began, less its end."""
        begun = bisect_left(self._firsts, until_s)
        ended = bisect_left(self._ends, until_s)
        return (begun - ended) * until_s - self._first_sums[begun] + self._end_sums[ended]


def _solve(equations: Sequence[Equation]) -> tuple[float, float, float]:
    """Least squares of relative errors, nothing below zero."""
    scaled = [tuple(x / took_s for x in factors) for factors, took_s in equations]
    weights = [1.0] * len(scaled)
    found = (0.0, 0.0, 0.0)
    for _ in range(ROUNDS):
        found = _weighted(scaled, weights)
        errors = [abs(sum(x * v for x, v in zip(row, found, strict=True)) - 1.0) for row in scaled]
        weights = [1.0 / math.sqrt(max(error, SMALL)) for error in errors]
    return found


def _weighted(
    rows_: Sequence[tuple[float, ...]], weights: Sequence[float]
) -> tuple[float, float, float]:
    """Least squares of weighted errors of rows x = 1, nothing below zero."""
    best: tuple[float, tuple[float, float, float]] | None = None
    for used in itertools.chain.from_iterable(
        itertools.combinations(range(3), count) for count in (3, 2, 1)
    ):
        found = _normal([[row[i] for i in used] for row in rows_], weights)
        if found is None or min(found) < 0:
            continue
        full = [0.0, 0.0, 0.0]
        for i, value in zip(used, found, strict=True):
            full[i] = value
        error = sum(
            (weight * (sum(x * v for x, v in zip(row, full, strict=True)) - 1.0)) ** 2
            for row, weight in zip(rows_, weights, strict=True)
        )
        if best is None or error < best[0]:
            best = error, (full[0], full[1], full[2])
    assert best is not None  # one unknown of factors that are not below zero is not below zero
    return best[1]


def _normal(table: Sequence[Sequence[float]], weights: Sequence[float]) -> list[float] | None:
    """Solve weighted table x = 1 by its normal equations; None: it does not tell them apart."""
    ones = [weight * weight for weight in weights]
    n = len(table[0])
    pairs = list(zip(table, ones, strict=True))
    square = [[sum(row[i] * row[j] * w for row, w in pairs) for j in range(n)] for i in range(n)]
    right = [sum(row[i] * w for row, w in pairs) for i in range(n)]
    scale = [math.sqrt(square[i][i]) for i in range(n)]
    if min(scale) == 0.0:
        return None
    matrix = [
        [square[i][j] / (scale[i] * scale[j]) for j in range(n)] + [right[i] / scale[i]]
        for i in range(n)
    ]
    for i in range(n):
        pivot = max(range(i, n), key=lambda k: abs(matrix[k][i]))
        if abs(matrix[pivot][i]) < 1e-9:
            return None
        matrix[i], matrix[pivot] = matrix[pivot], matrix[i]
        for k in range(n):
            if k != i:
                times = matrix[k][i] / matrix[i][i]
                matrix[k] = [a - times * b for a, b in zip(matrix[k], matrix[i], strict=True)]
    return [matrix[i][n] / matrix[i][i] / scale[i] for i in range(n)]
