"""Recorded traffic, round trips and spot capacity, read from CSV files (`.gz` as well)."""

from __future__ import annotations

import csv
import gzip
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING

from nearfield.core.errors import BadRequest

if TYPE_CHECKING:
    from nearfield.simulator.scenario import Prices, Recorded, Scenario, Spot

QUANTILES = (0.01, 0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99)
QUANTILE_COLUMNS = ("p1", "p5", "p10", "p25", "p50", "p75", "p90", "p95", "p99")
TABLE = 512
"""Entries of a table of equally likely lengths."""
MOST_TAIL = 10.0
"""Longest length believed in, in p99: beyond it only the published mean tells anything."""


class TraceError(BadRequest):
    """A recorded file cannot be used."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(f"{message}: {remedy}.")
        self.remedy = remedy


def rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """The rows of a file that has these columns.

    Raises:
        TraceError: it cannot be read, or lacks one.
    """
    try:
        with _open(path) as lines:
            reader = csv.DictReader(lines)
            found = reader.fieldnames or ()
            missing = [column for column in columns if column not in found]
            if missing:
                raise TraceError(
                    f"{path.name} has no column {missing[0]!r}",
                    f"its columns are {', '.join(found) or 'none'}",
                )
            yield from reader
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TraceError(f"{path.name} cannot be read ({error})", "name a CSV file") from None


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


def number(path: Path, row: dict[str, str], column: str) -> float:
    """A cell. Raises: TraceError, where it is no number."""
    try:
        return float(row[column])
    except (TypeError, ValueError):
        raise TraceError(
            f"{path.name} has {row[column]!r} in the column {column!r}", "give it a number"
        ) from None


def recorded(drawn: Recorded, folder: Path) -> list[float]:
    """The values of a column."""
    path = folder / drawn.file
    values = [
        number(path, row, drawn.column) * drawn.times + drawn.plus
        for row in rows(path, (drawn.column, *drawn.where))
        if all(row[column] == wanted for column, wanted in drawn.where.items())
    ]
    if not values:
        raise TraceError(f"{path.name} has no row with {drawn.where}", "change `where`")
    return values


def distances(scenario: Scenario, folder: Path) -> dict[tuple[str, str], float]:
    """Round trips in seconds, by (place, region). What is said one way holds both ways."""
    table: dict[tuple[str, str], float] = {}
    if scenario.rtts is not None:
        rtts = scenario.rtts
        path = folder / rtts.file
        for row in rows(path, (rtts.source, rtts.target, rtts.column)):
            if row[rtts.column]:
                pair = (row[rtts.source], row[rtts.target])
                table[pair] = number(path, row, rtts.column) / 1000
    for place, rtt_ms in [(r.region, r.rtt_ms) for r in scenario.regions] + [
        (s.site, s.rtt_ms) for s in scenario.sites
    ]:
        for other, ms in rtt_ms.items():
            table[place, other] = ms / 1000
    for (source, target), rtt_s in list(table.items()):
        table.setdefault((target, source), rtt_s)
    for region in scenario.regions:
        table[region.region, region.region] = scenario.local_rtt_ms / 1000
    return table


def spot_changes(spot: Spot, folder: Path) -> list[tuple[float, int]]:
    """(when, replicas that can be had from then on), from the simulation's start."""
    assert spot.file is not None
    path = folder / spot.file
    columns = ("trace_id", "t_s", "available_instances")
    found: dict[str, list[tuple[float, int]]] = {}
    for row in rows(path, columns):
        if spot.trace is None or row["trace_id"] == spot.trace:
            replicas = int(number(path, row, "available_instances") * spot.times)
            changes = found.setdefault(row["trace_id"], [])
            changes.append((number(path, row, "t_s") - spot.offset_s, replicas))
    if not found:
        raise TraceError(f"{path.name} has no trace {spot.trace!r}", "name another trace")
    if len(found) > 1:
        raise TraceError(
            f"{path.name} has {len(found)} traces", f"name one, as trace: {min(found)}"
        )
    changes = sorted(next(iter(found.values())))
    started = [replicas for at_s, replicas in changes if at_s <= 0]
    return [(0.0, started[-1] if started else 0), *(c for c in changes if c[0] > 0)]


def price_changes(prices: Prices, folder: Path) -> list[tuple[float, float]]:
    """(when, price of a replica from then on), from the simulation's start."""
    path = folder / prices.file
    changes = sorted(
        (number(path, row, prices.time) - prices.offset_s, number(path, row, prices.price))
        for row in rows(path, (prices.time, prices.price, *prices.where))
        if all(row[column] == wanted for column, wanted in prices.where.items())
    )
    if not changes:
        raise TraceError(f"{path.name} has no row with {prices.where}", "change `where`")
    before = [(0.0, usd) for at_s, usd in changes if at_s <= 0]
    return before[-1:] + [change for change in changes if change[0] > 0]


# ---- traffic -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Steps:
    """A rate that changes in steps: from `at_s[i]` on it is `rate_rps[i]`; nothing before."""

    at_s: Sequence[float]
    rate_rps: Sequence[float]

    def segment(self, now_s: float) -> tuple[float, float]:
        """The rate at a time, and until when."""
        i = bisect_right(self.at_s, now_s)
        until_s = self.at_s[i] if i < len(self.at_s) else float("inf")
        return (self.rate_rps[i - 1] if i else 0.0), until_s


def rate_steps(path: Path, time: str, rate: str) -> tuple[Steps, float]:
    """A file of rates, and its span: the last window is as long as the one before it."""
    at_s: list[float] = []
    rate_rps: list[float] = []
    for row in rows(path, (time, rate)):
        at_s.append(number(path, row, time))
        rate_rps.append(max(0.0, number(path, row, rate)))
    if not at_s or at_s != sorted(at_s):
        raise TraceError(f"{path.name} is empty or not in order of {time}", "sort its rows")
    last_s = at_s[-1] - at_s[-2] if len(at_s) > 1 else 60.0
    return Steps(at_s, rate_rps), at_s[-1] + last_s


@dataclass(slots=True)
class Client:
    """One client of a ServeGen file: its windows in order of time.

    `windows`: (start, rate_rps, family, shape). Lengths: one table for each period of `period_s`.
    """

    name: str
    windows: list[tuple[float, float, str, float]] = field(default_factory=list)
    input_tables: dict[int, list[int]] = field(default_factory=dict)
    output_tables: dict[int, list[int]] = field(default_factory=dict)

    @property
    def requests(self) -> float:
        """About how many, in windows' worth of rate."""
        return sum(window[1] for window in self.windows)


PERIOD_S = 21_600.0
"""ServeGen publishes lengths by client and 6 hours."""


@cache
def clients(path: Path, tokens: Path | None) -> list[Client]:
    """The clients of a ServeGen file, and the lengths they send where that is published."""
    found: dict[str, Client] = {}
    for row in rows(path, ("client", "window_start_s", "rate_rps", "family", "p1", "p2")):
        client = found.setdefault(row["client"], Client(row["client"]))
        rate_rps, shape = number(path, row, "rate_rps"), number(path, row, "p1")
        if row["family"] not in ("Gamma", "Weibull"):
            raise TraceError(
                f"{path.name} has the family {row['family']!r}", "only Gamma and Weibull are known"
            )
        if rate_rps > 0 and shape > 0:
            start_s = number(path, row, "window_start_s")
            client.windows.append((start_s, rate_rps, row["family"], shape))
    for client in found.values():
        client.windows.sort()
    if tokens is not None:
        _read_lengths(tokens, found)
    return [found[name] for name in sorted(found)]


def _read_lengths(path: Path, by_name: dict[str, Client]) -> None:
    needed = ("client", "period_start_s", "field", "mean", *QUANTILE_COLUMNS)
    for row in rows(path, needed):
        client = by_name.get(row["client"])
        if client is None or row["field"] not in ("input_tokens", "output_tokens"):
            continue
        quantiles = [number(path, row, column) for column in QUANTILE_COLUMNS]
        table = length_table(quantiles, number(path, row, "mean"))
        period = int(number(path, row, "period_start_s") // PERIOD_S)
        if row["field"] == "input_tokens":
            client.input_tables[period] = table
        else:
            client.output_tables[period] = table


def length_table(quantiles: Sequence[float], mean: float) -> list[int]:
    """Equally likely lengths with these quantiles; the last hundredth such that the mean fits."""
    points = [(0.0, quantiles[0]), *zip(QUANTILES, quantiles, strict=True)]
    table = []
    body = int(TABLE * QUANTILES[-1])
    k = 0
    for i in range(body):
        u = (i + 0.5) / TABLE
        while points[k + 1][0] < u:
            k += 1
        (u0, x0), (u1, x1) = points[k], points[k + 1]
        table.append(x0 + (x1 - x0) * (u - u0) / (u1 - u0))
    rest = TABLE - body
    tail = (mean * TABLE - sum(table)) / rest
    tail = max(quantiles[-1], min(tail, MOST_TAIL * quantiles[-1]))
    return [max(1, round(x)) for x in table] + [max(1, round(tail))] * rest


def mixed_table(weighted: Sequence[tuple[float, Sequence[int]]]) -> list[int]:
    """Equally likely lengths of a mix of tables."""
    pairs = sorted((x, weight / len(t)) for weight, t in weighted for x in t)
    total = sum(weight for _, weight in pairs)
    table: list[int] = []
    seen = 0.0
    for x, weight in pairs:
        seen += weight
        while len(table) < TABLE and (len(table) + 0.5) / TABLE * total <= seen:
            table.append(x)
    return table or [1]
