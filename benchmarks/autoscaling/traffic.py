"""Recorded traffic as work a second: what arrives in each second of a trace.

The traces are CSV files described in the shared data's README; they are not part of the repository.
`folder` finds them inside or beside it, or where `NEARFIELD_TRACES` says.

ServeGen publishes rates and gaps by client and ten minutes: arrivals are drawn from them with a
seed. Alibaba's service is published as a rate a minute: arrivals are drawn, too. The others are
requests as they came. Where lengths differ much among requests, a trace is there twice: once every
request is one unit of work, as Ray Serve's replicas signal it, and once its tokens are, prompt and
answer, as the simulator's do.
"""

from __future__ import annotations

import csv
import gzip
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Series = NDArray[np.float64]
ROOT = Path(__file__).parents[2]
VARIABLE = "NEARFIELD_TRACES"
DAY_S = 86_400
WINDOW_S = 600
"""Of ServeGen's rates."""

SERVEGEN = {"m_large": "week1", "m_small": "week1", "deepseek_r1": "day1"}
REQUESTS = {
    "azure_code": "azure_llm_2023_code",
    "azure_conv": "azure_llm_2023_conv",
    "mooncake": "mooncake_conversation",
}
NAMES = (
    *SERVEGEN,
    *REQUESTS,
    *(f"{name}_tokens" for name in REQUESTS),
    "alibaba_genai",
)


class TracesMissing(Exception):
    """There is no shared data, or a file of it is missing."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """One trace.

    Attributes:
        work: what came in each second, in `unit`.
        drawn: whether arrivals were drawn from recorded rates; else they are the recorded ones.
        loads_s: recorded times to load a model, to be drawn as part of each boot; empty: boots
            take what the cell says.
        from_s: where in the trace it begins.
    """

    name: str
    unit: str
    work: Series
    drawn: bool
    loads_s: tuple[float, ...] = ()
    from_s: int = 0

    def part(self, from_s: int, to_s: int | None = None) -> Traffic:
        """A slice of it."""
        work = self.work[from_s:to_s]
        return Traffic(self.name, self.unit, work, self.drawn, self.loads_s, from_s)


def folder(given: Path | None = None) -> Path:
    """The shared data: what was given, else the variable's, else `shared/data` inside the
    repository or beside it.

    Raises:
        TracesMissing: it is nowhere.
    """
    if given is None and os.environ.get(VARIABLE):
        given = Path(os.environ[VARIABLE])
    for place in [given] if given else [above / "shared" / "data" for above in (ROOT, ROOT.parent)]:
        if (place / "traces").is_dir():
            return place
    raise TracesMissing(
        f"there is no traces/ in {given}"
        if given
        else f"no shared/data/traces in {ROOT.name} or beside it: give its folder with --data "
        f"or {VARIABLE}"
    )


def read(
    name: str,
    data: Path,
    *,
    seed: int = 1,
    days: float | None = None,
    drawn: Series | None = None,
) -> Traffic:
    """A trace, or its first days.

    Args:
        drawn: its work, if that is there already.

    Raises:
        TracesMissing: its file is not there.
    """
    most_s = None if days is None else int(days * DAY_S)
    if name in SERVEGEN:
        path = data / "traces" / f"servegen_{name}_clients_{SERVEGEN[name]}.csv.gz"
        work = _clients(path, seed, most_s) if drawn is None else drawn
        return Traffic(name, "requests", work, drawn=True)
    if name == "alibaba_genai":
        path = data / "traces" / "alibaba_genai_qps_1min.csv"
        loads_s = _loads(data / "coldstart" / "alibaba_genai_load_latency.csv.gz")
        work = _minutes(path, "generative_requests", seed)[:most_s]
        return Traffic(name, "requests", work, drawn=True, loads_s=loads_s)
    tokens = name.endswith("_tokens")
    path = data / "traces" / f"{REQUESTS[name.removesuffix('_tokens')]}.csv.gz"
    work = _requests(path, tokens=tokens)[:most_s]
    return Traffic(name, "tokens" if tokens else "requests", work, drawn=False)


def _rows(path: Path) -> Iterator[Mapping[str, str]]:
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
            yield from csv.DictReader(lines)
    except OSError as error:
        raise TracesMissing(f"{path} cannot be read: {error.strerror}") from None


def _clients(path: Path, seed: int, most_s: int | None) -> Series:
    """Requests in each second, every client's gaps drawn window by window."""
    rng = np.random.default_rng(seed)
    windows = [row for row in _rows(path) if float(row["rate_rps"]) > 0.0]
    length_s = WINDOW_S + max(int(float(row["window_start_s"])) for row in windows)
    length_s = min(length_s, most_s or length_s)
    found = np.zeros(length_s)
    for row in windows:
        start_s = int(float(row["window_start_s"]))
        if start_s >= length_s:
            continue
        counts = _window(rng, float(row["rate_rps"]), row["family"], float(row["p1"]))
        end_s = min(length_s, start_s + WINDOW_S)
        found[start_s:end_s] += counts[: end_s - start_s]
    return found


def _window(rng: np.random.Generator, rate: float, family: str, shape: float) -> NDArray[np.int64]:
    """Requests in each second of a window. The gaps are of the published family and shape,
    rescaled so that their mean is 1 / rate."""
    block = int(rate * WINDOW_S * 1.1) + 100
    counts = np.zeros(WINDOW_S, np.int64)
    at_s = 0.0
    while at_s < WINDOW_S:
        if family == "Gamma":
            gaps = rng.gamma(shape, 1.0 / (shape * rate), block)
        else:
            gaps = rng.weibull(shape, block) / (rate * math.gamma(1.0 + 1.0 / shape))
        times = at_s + np.cumsum(gaps)
        at_s = float(times[-1])
        inside = times[times < WINDOW_S].astype(np.int64)
        counts += np.bincount(inside, minlength=WINDOW_S)
    return counts


def _minutes(path: Path, column: str, seed: int) -> Series:
    """Requests in each second, Poisson at each minute's rate; minutes left out had none."""
    rates = {int(float(row["t_s"])) // 60: float(row[column]) for row in _rows(path)}
    first, last = min(rates), max(rates)
    per_minute = np.array([rates.get(minute, 0.0) for minute in range(first, last + 1)])
    drawn = np.random.default_rng(seed).poisson(np.repeat(per_minute, 60))
    return drawn.astype(np.float64)


def _requests(path: Path, *, tokens: bool) -> Series:
    seconds, amounts = [], []
    for row in _rows(path):
        seconds.append(int(float(row["arrival_s"])))
        amounts.append(float(row["input_tokens"]) + float(row["output_tokens"]) if tokens else 1.0)
    return np.bincount(seconds, weights=amounts).astype(np.float64)


def _loads(path: Path) -> tuple[float, ...]:
    """Seconds that loading a base model took, in the order recorded."""
    found = (float(r["latency_ms"]) / 1000.0 for r in _rows(path) if r["kind"] == "base_model")
    return tuple(found)
