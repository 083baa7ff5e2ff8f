"""Who sends what when: streams of requests from generators and from recorded traces.

A stream is asked for one span of time after another. `take` gives each request of the span, `tick`
only how many there are, and some of them for an example: what the fluid mode needs.

A rate that changes is run on its own clock: gaps are drawn with a mean of one request, and time
passes on that clock as fast as the rate says. So the gaps keep their shape whatever the rate does.
"""

from __future__ import annotations

import itertools
import math
import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from nearfield.simulator import scenario as s
from nearfield.simulator.traces import (
    PERIOD_S,
    Client,
    Steps,
    TraceError,
    clients,
    mixed_table,
    number,
    rate_steps,
    recorded,
    rows,
)

Lengths = tuple[int, int]
"""Tokens of a prompt and of its answer."""
Arrival = tuple[float, int, int]
"""When, and both."""
Draw = Callable[[random.Random], float]

MINUTE_S = 60.0
DAY_S = 86_400.0
Z95 = 1.6448536
"""The normal distribution's 95 % quantile."""
FEW = 32.0
"""Requests in a tick below which each is drawn by itself."""
COPY_S = 1.0
"""Copies of a recorded request come within so long after it."""
MEAN_OF = 2048
"""Draws that the mean of a distribution is taken from."""


class Tick:
    """A span of a stream, for the fluid mode.

    Attributes:
        count: requests. lengths: of some of them. prompt, answer: mean tokens of all.
    """

    __slots__ = ("answer", "count", "lengths", "prompt")

    def __init__(self, count: int, lengths: list[Lengths], prompt: float, answer: float) -> None:
        self.count = count
        self.lengths = lengths
        self.prompt = prompt
        self.answer = answer


class Stream(Protocol):
    """Requests of one class of callers from one place."""

    cv2: float
    """Squared coefficient of variation of the gaps, about."""

    def take(self, until_s: float) -> list[Arrival]:
        """All requests from where the last call ended."""

    def tick(self, until_s: float, most: int) -> Tick:
        """How many there are, with the lengths of at most so many."""


def draws(drawn: s.Drawn, folder: Path) -> Draw:
    """A function that draws from the distribution."""
    if isinstance(drawn, s.Fixed):
        value = drawn.value
        return lambda rng: value
    if isinstance(drawn, s.Exponential):
        rate = 1.0 / drawn.mean
        return lambda rng: rng.expovariate(rate)
    if isinstance(drawn, s.Recorded):
        values = recorded(drawn, folder)
        count = len(values)
        return lambda rng: values[int(rng.random() * count)]
    mu = math.log(drawn.p50)
    sigma = math.log(drawn.p95 / drawn.p50) / Z95
    most = math.inf if drawn.most is None else drawn.most
    return lognormal(mu, sigma, most)


def lognormal(mu: float, sigma: float, most: float) -> Draw:
    """`rng.lognormvariate`, cut: the same draws by the same method (Kinderman and Monahan, 1977)
    in half the time, as two of them make a request."""
    exp, log = math.exp, math.log
    magic = 4 * math.exp(-0.5) / math.sqrt(2.0)

    def draw(rng: random.Random) -> float:
        uniform = rng.random
        while True:
            u1 = uniform()
            u2 = 1.0 - uniform()
            z = magic * (u1 - 0.5) / u2
            if z * z / 4.0 <= -log(u2):
                drawn = exp(mu + z * sigma)
                return drawn if drawn < most else most

    return draw


def stream(
    traffic: s.Traffic, folder: Path, rng: random.Random, *, start_s: float, utc_offset_h: float
) -> Stream:
    """The stream of one class of callers from one place.

    Args:
        rng: its own: what others draw changes nothing here.
        start_s: seconds after UTC midnight at time 0.
        utc_offset_h: of the place.

    Raises:
        TraceError: a recorded file cannot be used.
    """
    arrivals = traffic.arrivals
    given = [
        None if drawn is None else draws(drawn, folder)
        for drawn in (traffic.input_tokens, traffic.output_tokens)
    ]
    if isinstance(arrivals, s.Requests):
        return RequestTrace(arrivals, folder, rng, given[0], given[1])
    if isinstance(arrivals, s.Clients):
        return ClientMix(arrivals, folder, rng, given[0], given[1])
    prompt, answer = given
    assert prompt is not None
    assert answer is not None
    if isinstance(arrivals, s.Poisson):
        segment, cv = _constant(arrivals.rate_rps), 1.0
    elif isinstance(arrivals, s.Gamma):
        segment, cv = _constant(arrivals.rate_rps), arrivals.cv
    elif isinstance(arrivals, s.Diurnal):
        segment, cv = _diurnal(arrivals, start_s + 3600 * utc_offset_h), arrivals.cv
    elif isinstance(arrivals, s.Burst):
        segment, cv = _bursts(arrivals, random.Random(rng.random())), arrivals.cv
    else:
        steps, span_s = rate_steps(folder / arrivals.file, arrivals.time, arrivals.rate)
        segment, cv = _replayed(steps, span_s, arrivals), arrivals.cv
    return Renewal(segment, cv, prompt, answer, rng)


# ---- rates ---------------------------------------------------------------------------------------

Segment = Callable[[float], tuple[float, float]]
"""The rate at a time, and when it is another."""


def _constant(rate_rps: float) -> Segment:
    return lambda now_s: (rate_rps, math.inf)


def _diurnal(arrivals: s.Diurnal, clock_s: float) -> Segment:
    mean, swing = arrivals.mean_rps, arrivals.peak_to_mean - 1.0
    peak_s = 3600 * arrivals.peak_hour

    def segment(now_s: float) -> tuple[float, float]:
        minute = math.floor(now_s / MINUTE_S)
        middle_s = (minute + 0.5) * MINUTE_S + clock_s
        wave = math.cos(2 * math.pi * (middle_s - peak_s) / DAY_S)
        return mean * (1.0 + swing * wave), (minute + 1) * MINUTE_S

    return segment


def _bursts(arrivals: s.Burst, rng: random.Random) -> Segment:
    """Made as they are asked for, in order of time."""
    ends = [rng.expovariate(1 / arrivals.every_s)]

    def segment(now_s: float) -> tuple[float, float]:
        while ends[-1] <= now_s:  # an even number of ends: quiet comes next
            mean_s = arrivals.every_s if len(ends) % 2 == 0 else arrivals.lasts_s
            ends.append(ends[-1] + rng.expovariate(1 / mean_s))
        i = bisect_right(ends, now_s)
        return (arrivals.burst_rps if i % 2 else arrivals.base_rps), ends[i]

    return segment


def _replayed(steps: Steps, span_s: float, arrivals: s.Rates) -> Segment:
    times, offset_s, repeat = arrivals.times, arrivals.offset_s, arrivals.repeat

    def segment(now_s: float) -> tuple[float, float]:
        at_s = now_s + offset_s
        round_s = math.floor(at_s / span_s) * span_s if repeat else 0.0
        if at_s - round_s >= span_s:
            return 0.0, math.inf
        rate, until_s = steps.segment(at_s - round_s)
        return times * rate, min(until_s, span_s) + round_s - offset_s

    return segment


# ---- streams -------------------------------------------------------------------------------------


def gaps(family: str, shape: float) -> tuple[Draw, float]:
    """Draws of a mean of 1, and their squared coefficient of variation."""
    if family == "Gamma":
        scale = 1.0 / shape
        if shape == 1.0:
            return (lambda rng: rng.expovariate(1.0)), 1.0
        return (lambda rng: rng.gammavariate(shape, scale)), scale
    shape = max(shape, 0.1)  # below, one gap in a million holds them all
    first = math.gamma(1 + 1 / shape)
    scale, power = 1.0 / first, 1.0 / shape

    def weibull(rng: random.Random) -> float:
        return float(scale * (-math.log(1.0 - rng.random())) ** power)

    return weibull, math.gamma(1 + 2 / shape) / first**2 - 1.0


class _Renewals:
    """A renewal process on the clock of a changing rate; its gaps may change as well."""

    def __init__(self, rng: random.Random, left: float) -> None:
        """
        Args:
            left: of the first gap.
        """
        self.rng = rng
        self._at_s, self._left = 0.0, left

    def lengths(self, now_s: float) -> Lengths:
        """Of one more request."""
        raise NotImplementedError

    def _segment(self, now_s: float) -> tuple[float, float, Draw, float]:
        """Rate, until when, gaps and their cv²."""
        raise NotImplementedError

    def take(self, until_s: float) -> list[Arrival]:
        rng, lengths = self.rng, self.lengths
        found: list[Arrival] = []
        now_s, left = self._at_s, self._left
        while now_s < until_s:
            rate, end_s, gap, _ = self._segment(now_s)
            stop_s = min(end_s, until_s)
            if rate > 0.0:
                next_s = now_s + left / rate
                while next_s < stop_s:
                    found.append((next_s, *lengths(next_s)))
                    now_s = next_s
                    left = gap(rng)
                    next_s = now_s + left / rate
                left -= (stop_s - now_s) * rate
            now_s = stop_s
        self._at_s, self._left = now_s, left
        return found

    def _expected(self, until_s: float) -> tuple[float, float]:
        """Requests until then: their mean, and their variance in the end."""
        expected = variance = 0.0
        now_s = self._at_s
        while now_s < until_s:
            rate, end_s, _, cv2 = self._segment(now_s)
            stop_s = min(end_s, until_s)
            expected += rate * (stop_s - now_s)
            variance += rate * (stop_s - now_s) * cv2
            now_s = stop_s
        return expected, variance


class Renewal(_Renewals):
    """Those of a generator: gaps of one shape, lengths of one distribution."""

    def __init__(
        self, rate: Segment, cv: float, prompt: Draw, answer: Draw, rng: random.Random
    ) -> None:
        self._rate = rate
        self._gap, self.cv2 = gaps("Gamma", 1.0 / cv**2)
        self._prompt, self._answer = prompt, answer
        super().__init__(rng, self._gap(rng))
        # From an rng of its own: how the mean is found must not change what is drawn.
        sample = random.Random(0)
        pairs = [(prompt(sample), answer(sample)) for _ in range(MEAN_OF)]
        self._means = (sum(p for p, _ in pairs) / MEAN_OF, sum(a for _, a in pairs) / MEAN_OF)

    def lengths(self, now_s: float) -> Lengths:
        return int(self._prompt(self.rng)), int(self._answer(self.rng))

    def _segment(self, now_s: float) -> tuple[float, float, Draw, float]:
        return *self._rate(now_s), self._gap, self.cv2

    def tick(self, until_s: float, most: int) -> Tick:
        expected, _ = self._expected(until_s)
        if expected < FEW:
            return _each(self.take(until_s), most)
        self._at_s = until_s
        count = clumped(self.rng, expected, self.cv2)
        some = [self.lengths(until_s) for _ in range(min(count, most))]
        return Tick(count, some, *self._means)


def clumped(rng: random.Random, expected: float, cv2: float) -> int:
    """A count with this mean, and as much variance as renewals with such gaps have in the end."""
    return int(rng.gammavariate(expected / cv2, cv2) + rng.random()) if expected > 0 else 0


def _each(found: Sequence[Arrival], most: int) -> Tick:
    count = len(found)
    if not count:
        return Tick(0, [], 0.0, 0.0)
    shown = (
        found if count <= most else [found[(2 * i + 1) * count // (2 * most)] for i in range(most)]
    )
    return Tick(
        count,
        [(prompt, answer) for _, prompt, answer in shown],
        sum(arrival[1] for arrival in found) / count,
        sum(arrival[2] for arrival in found) / count,
    )


class RequestTrace:
    """A recorded trace, request by request."""

    def __init__(
        self,
        arrivals: s.Requests,
        folder: Path,
        rng: random.Random,
        prompt: Draw | None,
        answer: Draw | None,
    ) -> None:
        path = folder / arrivals.file
        columns = [arrivals.time]
        columns += [c for c in (arrivals.input_tokens, arrivals.output_tokens) if c is not None]
        of_prompt = arrivals.input_tokens if prompt is None else None
        of_answer = arrivals.output_tokens if answer is None else None
        self._records = [
            (
                number(path, row, arrivals.time),
                None if of_prompt is None else int(number(path, row, of_prompt)),
                None if of_answer is None else int(number(path, row, of_answer)),
            )
            for row in rows(path, columns)
        ]
        if not self._records:
            raise TraceError(f"{path.name} has no rows", "name a trace with some")
        times_s = [record[0] for record in self._records]
        if times_s != sorted(times_s):
            raise TraceError(f"{path.name} is not in order of {arrivals.time}", "sort its rows")
        count = len(times_s)
        self._span_s = max(1e-6, times_s[-1] - min(0.0, times_s[0])) * (count + 1) / count
        self._shift_s = -arrivals.offset_s
        self._next = 0
        while self._next < count and times_s[self._next] + self._shift_s < 0:
            self._next += 1
        self._repeat, self._times = arrivals.repeat, arrivals.times
        self._prompt, self._answer, self._rng = prompt, answer, rng
        self._later: list[Arrival] = []
        self.cv2 = _cv2(times_s)

    def take(self, until_s: float) -> list[Arrival]:
        rng, records = self._rng, self._records
        found = self._later
        while True:
            if self._next == len(records):
                if not self._repeat:
                    break
                self._next, self._shift_s = 0, self._shift_s + self._span_s
            at_s, prompt, answer = records[self._next]
            at_s += self._shift_s
            if at_s >= until_s:
                break
            self._next += 1
            copies = int(self._times + rng.random()) if self._times != 1.0 else 1
            for i in range(copies):
                found.append(
                    (
                        at_s + (COPY_S * rng.random() if i else 0.0),
                        int(self._prompt(rng)) if prompt is None and self._prompt else prompt or 0,
                        int(self._answer(rng)) if answer is None and self._answer else answer or 0,
                    )
                )
        found.sort()
        cut = bisect_right(found, (until_s, 0, 0))
        self._later = found[cut:]
        return found[:cut]

    def tick(self, until_s: float, most: int) -> Tick:
        return _each(self.take(until_s), most)


def _cv2(times_s: Sequence[float]) -> float:
    between = [b - a for a, b in itertools.pairwise(times_s)]
    if not between or not sum(between):
        return 1.0
    mean = sum(between) / len(between)
    return sum((gap - mean) ** 2 for gap in between) / len(between) / mean**2


class ClientMix:
    """Clients of a ServeGen file, each with its own rate, gaps and lengths."""

    def __init__(
        self,
        arrivals: s.Clients,
        folder: Path,
        rng: random.Random,
        prompt: Draw | None,
        answer: Draw | None,
    ) -> None:
        tokens = None if arrivals.tokens is None else folder / arrivals.tokens
        found = clients(folder / arrivals.file, tokens)
        if not found:
            raise TraceError(f"{arrivals.file} has no rows", "name a file with clients")
        covered = [c for c in found if c.input_tables and c.output_tables]
        if tokens is not None and not covered and (prompt is None or answer is None):
            raise TraceError(f"{tokens.name} covers none of the clients", "name their own file")
        mixes = (
            _mix([(c.requests, c.input_tables) for c in covered]),
            _mix([(c.requests, c.output_tables) for c in covered]),
        )
        self._clients = [
            _ClientStream(client, arrivals, prompt, answer, mixes, random.Random(rng.random()))
            for client in found
        ]
        total = sum(client.requests for client in found)
        self.cv2 = sum(c.cv2 * c.requests for c in self._clients) / total if total else 1.0

    def take(self, until_s: float) -> list[Arrival]:
        found: list[Arrival] = []
        for client in self._clients:
            found += client.take(until_s)
        found.sort()
        return found

    def tick(self, until_s: float, most: int) -> Tick:
        ticks = [client.tick(until_s, 1) for client in self._clients]
        count = sum(tick.count for tick in ticks)
        if not count:
            return Tick(0, [], 0.0, 0.0)
        rng = self._clients[0].rng
        ends, seen = [], 0
        for tick in ticks:
            seen += tick.count
            ends.append(seen)
        lengths = []
        for i in range(min(count, most)):  # each stands for as many, whoever sent them
            which = bisect_right(ends, int((i + rng.random()) * count / min(count, most)))
            lengths.append(self._clients[which].lengths(until_s))
        return Tick(
            count,
            lengths,
            sum(t.count * t.prompt for t in ticks) / count,
            sum(t.count * t.answer for t in ticks) / count,
        )


def _mix(parts: Sequence[tuple[float, dict[int, list[int]]]]) -> dict[int, list[int]]:
    periods = sorted({period for _, tables in parts for period in tables})
    return {
        period: mixed_table([(w, tables[period]) for w, tables in parts if period in tables])
        for period in periods
    }


class _ClientStream(_Renewals):
    """One client: windows with a rate and a family each; outside them it is silent."""

    def __init__(
        self,
        client: Client,
        arrivals: s.Clients,
        prompt: Draw | None,
        answer: Draw | None,
        mixes: tuple[dict[int, list[int]], dict[int, list[int]]],
        rng: random.Random,
    ) -> None:
        super().__init__(rng, rng.expovariate(1.0))
        self.requests = client.requests
        self._windows = [
            (start_s - arrivals.offset_s, arrivals.times * rate, *gaps(family, shape))
            for start_s, rate, family, shape in client.windows
        ]
        self._starts = [window[0] for window in self._windows]
        self._window_s, self._offset_s = arrivals.window_s, arrivals.offset_s
        self._given = (prompt, answer)
        covered = bool(client.input_tables and client.output_tables)
        self._tables = (client.input_tables, client.output_tables) if covered else mixes
        self._means: dict[int, tuple[float, float]] = {}
        total = sum(window[1] for window in self._windows)
        self.cv2 = sum(w[1] * w[3] for w in self._windows) / total if total else 1.0

    def _segment(self, now_s: float) -> tuple[float, float, Draw, float]:
        i = bisect_right(self._starts, now_s) - 1
        if i >= 0:
            start_s, rate, gap, cv2 = self._windows[i]
            if now_s < start_s + self._window_s:
                return rate, start_s + self._window_s, gap, cv2
        next_s = self._starts[i + 1] if i + 1 < len(self._starts) else math.inf
        return 0.0, next_s, _never, 1.0

    def lengths(self, now_s: float) -> Lengths:
        prompt, answer = (
            given(self.rng) if given is not None else _at(tables, self._period(now_s), self.rng)
            for given, tables in zip(self._given, self._tables, strict=True)
        )
        return int(prompt), int(answer)

    def _period(self, now_s: float) -> int:
        return int((now_s + self._offset_s) // PERIOD_S)

    def tick(self, until_s: float, most: int) -> Tick:
        expected, variance = self._expected(until_s)
        if expected < FEW:
            return _each(self.take(until_s), most)
        self._at_s = until_s
        count = clumped(self.rng, expected, variance / expected)
        return Tick(count, [], *self._mean(until_s))

    def _mean(self, now_s: float) -> tuple[float, float]:
        period = self._period(now_s)
        means = self._means.get(period)
        if means is None:
            pairs = [self.lengths(now_s) for _ in range(MEAN_OF)]
            means = sum(p for p, _ in pairs) / MEAN_OF, sum(a for _, a in pairs) / MEAN_OF
            self._means[period] = means
        return means


def _never(rng: random.Random) -> float:
    return math.inf


def _at(tables: dict[int, list[int]], period: int, rng: random.Random) -> int:
    table = tables.get(period)
    if table is None:  # of the nearest period that was published
        table = tables[min(tables, key=lambda p: abs(p - period))]
    return table[int(rng.random() * len(table))]
