"""An engine's timings from a real run: what its requests took, and who was there meanwhile.

The run is a CSV file with one row a request, measured at the replica:

    arrival_s, input_tokens, output_tokens, first_token_s, total_s      and, of several, replica

`first_token_s` and `total_s` count from the arrival. Two kinds of rows tell the timings apart, each
an equation in (token_s, one_s, step_s, sequence_s, request_s) of `engine.Timing`:

- after the first token, a request's answer takes an iteration for each further token: short ones
  while it decodes alone, others longer by everybody beside it; and the prompts computed meanwhile;
- a request that came when nobody was there waits for its own prompt only, and for what is around
  the engine.

How an answer's iterations are divided depends on how long they take, so both are found in turns.

They are solved for the least sum of errors, each as a share of its request's whole time, so that
a first token of milliseconds does not outweigh an answer; none of the timings is below zero. The
sum of errors and not of their squares, by weights that are found again each round (Holland and
Welsch, "Robust regression using iteratively reweighted least-squares", 1977): a run has requests
that a pause of the machine has hit. They do not say which timing is how long, but count in the
mean: that is met in the end, by one factor for decoding and one for the rest. With five unknowns
every set of those that are zero can be tried.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nearfield.simulator import scenario as s
from nearfield.simulator.traces import TraceError, number, rows

COLUMNS = ("arrival_s", "input_tokens", "output_tokens", "first_token_s", "total_s")
FEWEST = 20
"""Equations without which nothing is believed."""
LEAST_S = 1e-7
ROUNDS = 12
MOST_LONGER = 3.0
"""Times as long as explained that a request counts at most: a pause of seconds is an accident."""
SMALL = 0.01
"""A relative error that is none: its weight is bounded."""

APART = 10
"""Answers without which nothing is said about decoding alone, or in company."""
TOKEN, ONE, STEP, SEQUENCE, REQUEST = range(5)
UNKNOWN = 5
Found = tuple[float, ...]
"""(token_s, one_s, step_s, sequence_s, request_s)."""


@dataclass(frozen=True, slots=True)
class Equation:
    """A time, and what it is made of.

    Attributes:
        whole_s: of the request: what an error is measured by.
        tokens: of prompts. prompts: iterations that compute them. steps: those that decode.
        beside: seconds of the decoding by how many decoded. requests: whose way is in it.
    """

    took_s: float
    whole_s: float
    tokens: float
    prompts: float = 0.0
    steps: float = 0.0
    beside: Mapping[int, float] = field(default_factory=dict)
    requests: float = 0.0

    def factors(self, found: Found | None, *, apart: bool) -> Found:
        """Of the unknowns.

        Args:
            found: how long iterations take, as far as that is known. apart: whether one that
                decodes alone is another unknown.
        """
        parts = {n: span_s / _iteration_s(n, found) for n, span_s in self.beside.items()}
        scale = self.steps / sum(parts.values()) if parts else 0.0
        alone = scale * parts.get(1, 0.0) if apart else 0.0
        company = scale * sum(n * part for n, part in parts.items()) - alone
        rest = self.steps - alone + self.prompts
        return self.tokens, alone, rest, company, self.requests


def _iteration_s(n: int, found: Found | None) -> float:
    if found is None:
        return 1.0
    if n == 1 and found[ONE] > 0.0:
        return found[ONE]
    return max(LEAST_S, found[STEP] + n * found[SEQUENCE])


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
        alone = ""
        if engine.step_ms_alone is not None:
            alone = f", alone {engine.step_ms_alone:.4g} ms"
        return (
            f"{engine.engine}: prefill {engine.prefill_tokens_per_s:.4g} tokens/s, step "
            f"{engine.step_ms:.4g} ms + {engine.step_ms_per_sequence:.4g} ms a sequence{alone}; "
            f"around it {engine.request_ms:.4g} ms; measured, {self.requests} requests, median "
            f"error {100 * self.error:.1f} %"
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
    apart = _apart(equations)
    found = _in_the_mean(equations, _solve(equations, apart=apart), apart=apart)
    errors = sorted(abs(_explained_s(e, found, apart=apart) / e.took_s - 1.0) for e in equations)
    return Calibration(
        engine.model_copy(
            update={
                "prefill_tokens_per_s": 1.0 / max(found[TOKEN], LEAST_S),
                "step_ms": 1000 * max(found[STEP], LEAST_S),
                "step_ms_per_sequence": 1000 * found[SEQUENCE],
                "step_ms_alone": 1000 * max(found[ONE], LEAST_S) if apart else None,
                "request_ms": 1000 * found[REQUEST],
            }
        ),
        sum(len(run) for run in replicas.values()),
        errors[len(errors) // 2],
    )


def _apart(equations: Sequence[Equation]) -> bool:
    """Whether answers that decoded alone can be told from those in company."""
    alone = company = 0
    for equation in equations:
        if equation.beside:
            share = equation.beside.get(1, 0.0) / sum(equation.beside.values())
            alone += share > 0.5
            company += share < 0.5
    return min(alone, company) >= APART


def _equations(run: Sequence[Measured], engine: s.Engine) -> list[Equation]:
    found: list[Equation] = []
    by_first = sorted(run, key=lambda r: r.first_s)
    firsts = [r.first_s for r in by_first]
    prompts = [0, *itertools.accumulate(r.prompt for r in by_first)]
    beside = _Beside(run)
    comes = sorted(run, key=lambda r: r.came_s)
    busy_until_s = -math.inf
    for i, r in enumerate(comes):
        next_s = comes[i + 1].came_s if i + 1 < len(comes) else math.inf
        if r.came_s >= busy_until_s and next_s >= r.first_s:
            iterations = max(1, math.ceil(r.prompt / engine.prefill_chunk_tokens))
            waited_s = r.first_s - r.came_s
            whole_s = r.ended_s - r.came_s
            found.append(
                Equation(waited_s, whole_s, float(r.prompt), float(iterations), requests=1.0)
            )
        busy_until_s = max(busy_until_s, r.ended_s)
        took_s = r.ended_s - r.first_s
        if r.answer > 1 and took_s > 0:
            later = bisect_right(firsts, r.ended_s)
            tokens = prompts[later] - prompts[bisect_right(firsts, r.first_s)]
            spans_s = beside.spans(r.first_s, r.ended_s)
            steps = r.answer - 1.0
            found.append(Equation(took_s, took_s, float(tokens), steps=steps, beside=spans_s))
    return [equation for equation in found if equation.took_s > 0]


class _Beside:
    """How many requests decode at once, over time."""

    def __init__(self, run: Sequence[Measured]) -> None:
        changes = sorted([(r.first_s, 1) for r in run] + [(r.ended_s, -1) for r in run])
        self._at_s = [at_s for at_s, _ in changes]
        self._counts = list(itertools.accumulate(change for _, change in changes))

    def spans(self, begin_s: float, end_s: float) -> dict[int, float]:
        """Seconds between these times by how many decoded."""
        spans_s: dict[int, float] = {}
        i = bisect_right(self._at_s, begin_s)
        at_s = begin_s
        while at_s < end_s:
            until_s = min(end_s, self._at_s[i]) if i < len(self._at_s) else end_s
            count = max(1, self._counts[i - 1])
            spans_s[count] = spans_s.get(count, 0.0) + until_s - at_s
            at_s = until_s
            i += 1
        return spans_s


def _solve(equations: Sequence[Equation], *, apart: bool) -> Found:
    """Least sum of errors, each as a share of its request's whole time, nothing below zero."""
    shares = [e.took_s / e.whole_s for e in equations]
    weights = shares
    found: Found | None = None
    for _ in range(ROUNDS):
        scaled = [tuple(x / e.took_s for x in e.factors(found, apart=apart)) for e in equations]
        found = _weighted(scaled, weights)
        errors = [abs(sum(x * v for x, v in zip(row, found, strict=True)) - 1.0) for row in scaled]
        weights = [
            share / math.sqrt(max(share * error, SMALL))
            for share, error in zip(shares, errors, strict=True)
        ]
    assert found is not None
    return found


def _explained_s(equation: Equation, found: Found, *, apart: bool) -> float:
    factors = equation.factors(found, apart=apart)
    return math.fsum(x * v for x, v in zip(factors, found, strict=True))


def _in_the_mean(equations: Sequence[Equation], found: Found, *, apart: bool) -> Found:
    """Longer by what pauses cost: most requests had none, but who is to come will."""
    longer = []
    for decoding in (False, True):
        ratios = [
            min(MOST_LONGER, e.took_s / max(LEAST_S, _explained_s(e, found, apart=apart)))
            for e in equations
            if bool(e.beside) == decoding
        ]
        longer.append(math.fsum(ratios) / len(ratios) if ratios else 1.0)
    around, steps = longer
    token_s, one_s, step_s, sequence_s, request_s = found
    return token_s * around, one_s * steps, step_s * steps, sequence_s * steps, request_s * around


def _weighted(rows_: Sequence[Found], weights: Sequence[float]) -> Found:
    """Least squares of weighted errors of rows x = 1, nothing below zero."""
    best: tuple[float, Found] | None = None
    for used in itertools.chain.from_iterable(
        itertools.combinations(range(UNKNOWN), count) for count in range(UNKNOWN, 0, -1)
    ):
        found = _normal([[row[i] for i in used] for row in rows_], weights)
        if found is None or min(found) < 0:
            continue
        full = [0.0] * UNKNOWN
        for i, value in zip(used, found, strict=True):
            full[i] = value
        error = sum(
            (weight * (sum(x * v for x, v in zip(row, full, strict=True)) - 1.0)) ** 2
            for row, weight in zip(rows_, weights, strict=True)
        )
        if best is None or error < best[0]:
            best = error, tuple(full)
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
