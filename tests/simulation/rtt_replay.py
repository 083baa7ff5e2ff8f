"""Measured round trips, replayed through the routing policy: what does not knowing the best cost?

    python -m tests.simulation.rtt_replay              170 cities, 21 regions, ten minutes, 1 min
    python -m tests.simulation.rtt_replay --quick

A gateway in every city probes every region once a second and sends requests. The distances are
measured (`data/README.md`, and more tables from the shared data where it lies beside the
repository). What happens to them during the replay is assumed, and stated in `Weather`: every
probe and request differs by 7 %, ways drift, and now and then one becomes a long way round.

The policy sees its probes only. It is compared with one that knows at every moment which way is
the shortest. `jitter known` is harder than that: it knows even each request's own noise beforehand,
which nobody can.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nearfield.policy.endpoints import Ask, Caller, Endpoint, EndpointState
from nearfield.policy.route import Pick, Plan, pick, plan
from nearfield.policy.rtt import Rtt

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
TABLE = HERE / "data" / "edge_to_region_rtt_ms.csv"

Distances = Mapping[str, Mapping[str, float]]
"""Round trips in seconds: from, to."""

ASK, ANYONE = Ask("m"), Caller()


@dataclass(frozen=True, slots=True)
class Weather:
    """What befalls the ways. All of it assumed; drift as large as a published series of weekly
    averages between regions shows (coefficient of variation 1.6 % in the median, 4.7 % at p90).

    Attributes:
        jitter: standard deviation of one probe or request from its way's round trip, a share.
        drift: standard deviation of a way's slow changes, a share; drift_s: over how long.
        detour_every_s: mean time between two detours of one way. detour_s: how long one lasts.
        detour: how many times longer the way then is, drawn between.
    """

    jitter: float = 0.07
    drift: float = 0.03
    drift_s: float = 300.0
    detour_every_s: float = 1800.0
    detour_s: float = 120.0
    detour: tuple[float, float] = (1.2, 3.0)


class Way:
    """One way's true round trip as time goes by."""

    def __init__(self, rtt_s: float, weather: Weather, rng: random.Random) -> None:
        self.rtt_s = rtt_s
        self._base_s = rtt_s
        self._weather = weather
        self._rng = rng
        self._drift = rng.gauss(0, weather.drift)
        self._detour = 1.0
        self._until_s = 0.0
        self._next_s = rng.expovariate(1 / weather.detour_every_s)

    def step(self, now_s: float) -> None:
        """One second on."""
        weather, rng = self._weather, self._rng
        keep = math.exp(-1 / weather.drift_s)
        self._drift = keep * self._drift + rng.gauss(0, weather.drift * math.sqrt(1 - keep**2))
        if now_s >= self._next_s:
            self._detour = rng.uniform(*weather.detour)
            self._until_s = now_s + rng.expovariate(1 / weather.detour_s)
            self._next_s = self._until_s + rng.expovariate(1 / weather.detour_every_s)
        elif now_s >= self._until_s:
            self._detour = 1.0
        self.rtt_s = self._base_s * max(0.5, 1 + self._drift) * self._detour

    def measured_s(self) -> float:
        return self.rtt_s * max(0.1, 1 + self._rng.gauss(0, self._weather.jitter))


@dataclass
class Result:
    """Sums over all requests, seconds, and how often each city changed its mind."""

    requests: int = 0
    policy_s: float = 0.0
    best_s: float = 0.0
    known_s: float = 0.0
    last_probe_s: float = 0.0
    fixed_s: float = 0.0
    changes: int = 0
    city_hours: float = 0.0
    worst: dict[str, float] = field(default_factory=dict)

    def added(self, seconds: float) -> float:
        """A share of what always knowing the best takes."""
        return seconds / self.best_s - 1


def replay(
    distances: Distances, *, seconds: int, seed: int, weather: Weather | None = None
) -> Result:
    """Replay so many seconds, after a first minute that is not counted."""
    weather = weather or Weather()
    result = Result()
    for city in distances:
        before_s, before_best_s = result.policy_s, result.best_s
        _replay_city(
            city, distances[city], result, seconds, random.Random(f"{seed} {city}"), weather
        )
        result.worst[city] = (result.policy_s - before_s) / (result.best_s - before_best_s) - 1
    return result


def _replay_city(
    city: str,
    rtts_s: Mapping[str, float],
    result: Result,
    seconds: int,
    rng: random.Random,
    weather: Weather,
) -> None:
    regions = sorted(rtts_s)
    ways = [Way(rtts_s[region], weather, rng) for region in regions]
    endpoints = [Endpoint(region, "m", "1", "p", "anywhere") for region in regions]
    estimates = [Rtt()] * len(regions)
    probes_s = [0.0] * len(regions)
    due_s = [rng.random() for _ in regions]
    own = [0] * len(regions)
    fixed = min(range(len(regions)), key=lambda i: rtts_s[regions[i]])
    current: Plan | None = None
    held: frozenset[int] | None = None
    for now_s in range(seconds + 60):
        for i, way in enumerate(ways):
            way.step(now_s)
            if now_s >= due_s[i]:
                due_s[i] += rng.uniform(0.8, 1.2)
                probes_s[i] = way.measured_s()
                estimates[i] = estimates[i].learn(probes_s[i])
        states = [
            EndpointState(endpoints[i], i, estimates[i].level_s, slots=1000)
            for i in range(len(regions))
            if estimates[i].probes
        ]
        current = plan(states, ASK, ANYONE, now_s=now_s, previous=current)
        if now_s < 60:
            continue
        result.changes += held is not None and current.held != held
        held = current.held
        found = pick(current, own, rng.random())
        assert isinstance(found, Pick)
        # One request of each kind, with the same noise on the same way.
        taken_s = [way.measured_s() for way in ways]
        best = min(range(len(ways)), key=lambda i: ways[i].rtt_s)
        result.requests += 1
        result.policy_s += taken_s[found.candidate.state.number]
        result.best_s += taken_s[best]
        result.known_s += min(taken_s)
        result.last_probe_s += taken_s[min(range(len(ways)), key=probes_s.__getitem__)]
        result.fixed_s += taken_s[fixed]
    result.city_hours += seconds / 3600


def packaged() -> dict[str, dict[str, float]]:
    """170 cities to 21 regions."""
    with TABLE.open(encoding="utf-8", newline="") as lines:
        return {
            row["city"]: {k: float(v) / 1000 for k, v in row.items() if k != "city" and v}
            for row in csv.DictReader(lines)
        }


def shared_folder() -> Path | None:
    """The shared data's `network/`, inside the repository or beside it."""
    for parent in (REPOSITORY, REPOSITORY.parent):
        folder = parent / "shared" / "data" / "network"
        if folder.is_dir():
            return folder
    return None


def shared_tables(folder: Path) -> Iterator[tuple[str, dict[str, dict[str, float]]]]:
    """The tables of the shared data, each with a name: ways from a place to itself left out, so
    that those between regions are about where to go when the home region cannot."""
    for name, source, target in (
        ("edge_to_region_rtt.csv.gz", "edge_city", "region"),
        ("aws_region_rtt.csv", "src", "dst"),
        ("azure_region_rtt.csv", "src", "dst"),
    ):
        opener = gzip.open if name.endswith(".gz") else open
        table: dict[str, dict[str, float]] = {}
        with opener(folder / name, "rt", encoding="utf-8", newline="") as lines:
            for row in csv.DictReader(lines):
                if row["rtt_ms"] and row[source] != row[target]:
                    table.setdefault(row[source], {})[row[target]] = float(row["rtt_ms"]) / 1000
        yield name, {place: ways for place, ways in table.items() if len(ways) > 1}


def few_regions(distances: Distances, count: int, seed: int) -> dict[str, dict[str, float]]:
    """The same cities, each with `count` regions drawn for it: most deployments are not in all."""
    rng = random.Random(seed)
    return {
        city: {name: ways[name] for name in rng.sample(sorted(ways), min(count, len(ways)))}
        for city, ways in distances.items()
    }


def every(distances: Distances, step: int) -> dict[str, Mapping[str, float]]:
    return {city: distances[city] for city in sorted(distances)[::step]}


def line(name: str, result: Result) -> str:
    worst = sorted(result.worst.values())
    return (
        f"{name:34} {result.requests:8,}  {result.added(result.policy_s):+7.2%}"
        f"  {worst[int(0.95 * (len(worst) - 1))]:+7.2%}"
        f"  {result.policy_s / result.known_s - 1:+7.2%}"
        f"  {result.added(result.last_probe_s):+7.2%}  {result.added(result.fixed_s):+7.2%}"
        f"  {result.changes / result.city_hours:6.1f}"
    )


HEAD = (
    f"{'':34} {'':>8}  mean added latency over always knowing the best\n"
    f"{'round trips (measured)':34} {'requests':>8}  {'policy':>7}  {'p95 city':>7}"
    f"  {'jitter known':>7}  {'last probe':>7}  {'never moves':>7}  changes/h per city"
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.rtt_replay")
    parser.add_argument("--quick", action="store_true", help="fewer cities, five minutes each")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(argv)
    seconds, step = (300, 8) if options.quick else (600, 1)
    cities = every(packaged(), step)
    tables: list[tuple[str, Distances]] = [("cities, 21 regions", cities)]
    tables += [
        (f"cities, {count} regions each", few_regions(cities, count, options.seed))
        for count in (3, 8)
    ]
    folder = shared_folder()
    if folder is None:
        print("No shared/data/network here: the tables between regions are left out.")
    else:
        tables += [
            (f"shared {name}", every(table, step))
            for name, table in shared_tables(folder)
            if "edge" not in name
        ]
    print(HEAD)
    for name, table in tables:
        print(line(name, replay(table, seconds=seconds, seed=options.seed)), flush=True)


if __name__ == "__main__":
    main()
