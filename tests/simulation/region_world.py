"""Many gateways, few regions, and more demand in one place than its region can serve.

    python -m tests.simulation.region_world

Simulated, over measured round trips (`data/README.md`). Gateways in cities send to regions of so
many slots each, first come first served. Each gateway polls each region about once a second and
knows besides only what it has sent itself. Latency is the round trip and the wait for a slot; what
the engine takes after that is the same everywhere and left out.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from nearfield.policy.endpoints import Ask, Caller, Endpoint, EndpointState
from nearfield.policy.route import Pick, Plan, pick, plan

from tests.simulation.rtt_replay import packaged

Chooser = Literal["nearfield", "always nearest", "fresh news", "random"]
"""`fresh news`: the same policy, told every region's true queue at every request."""

REGIONS = ("eu-central-1", "eu-west-1", "us-east-1", "ap-southeast-1")
EUROPE = (
    "Amsterdam",
    "Basel",
    "Brussels",
    "Dusseldorf",
    "Hamburg",
    "Nuremberg",
    "Prague",
    "Zurich",
)
CITIES = (*EUROPE, "Dublin", "London", "NewYork", "Chicago", "Malaysia", "Jakarta")
SLOTS = 40
HOLD_S = 0.4


@dataclass
class Region:
    busy: int = 0
    queue: deque[tuple[float, float, int]] = field(default_factory=deque)

    @property
    def load(self) -> int:
        return self.busy + len(self.queue)


@dataclass
class Gateway:
    city: str
    rtts_s: list[float]
    own: list[int]
    states: list[EndpointState]
    current: Plan


@dataclass
class Outcome:
    """Of each request: the way and the wait. And the first region's load, ten times a second."""

    added_s: list[float] = field(default_factory=list)
    waited_s: list[float] = field(default_factory=list)
    loads: list[int] = field(default_factory=list)


class World:
    def __init__(self, chooser: Chooser, seed: int, cities: Sequence[str] = CITIES) -> None:
        self.rng = random.Random(f"{seed} {chooser}")
        self.regions = [Region() for _ in REGIONS]
        self.chooser = chooser
        table = packaged()
        self.gateways = [
            self._gateway(city, [table[city].get(r, 0.001) for r in REGIONS]) for city in cities
        ]
        self.outcome = Outcome()

    def _gateway(self, city: str, rtts_s: list[float]) -> Gateway:
        states = [
            EndpointState(
                Endpoint(name, "m", "1", "p", "anywhere"),
                i,
                rtts_s[i],
                slots=SLOTS,
                max_queued=100_000,
                hold_s=HOLD_S,
            )
            for i, name in enumerate(REGIONS)
        ]
        first = plan(states, Ask("m"), Caller(), now_s=0)
        return Gateway(city, rtts_s, [0] * len(REGIONS), states, first)

    def run(self, load: float, seconds: float, seed: int) -> Outcome:
        """Offer `load` of all regions' capacity, as much in each city."""
        arrivals = random.Random(f"{seed} arrivals")
        rate_rps = load * len(REGIONS) * SLOTS / HOLD_S
        # when, what: 0 arrival, 1 end of a request, 2 poll, 3 a look at the loads
        events: list[tuple[float, int, int, int]] = [(0.0, 0, 0, 0), (5.0, 3, 0, 0)]
        for g in range(len(self.gateways)):
            for r in range(len(REGIONS)):
                events.append((self.rng.random(), 2, g, r))
        heapq.heapify(events)
        while events:
            now_s, kind, g, r = heapq.heappop(events)
            if now_s > seconds:
                break
            if kind == 0:
                self._arrive(now_s, arrivals, events)
                heapq.heappush(events, (now_s + arrivals.expovariate(rate_rps), 0, 0, 0))
            elif kind == 1:
                self._end(now_s, g, r, events)
            elif kind == 2:
                self._poll(now_s, g, r)
                heapq.heappush(events, (now_s + self.rng.uniform(0.8, 1.2), 2, g, r))
            else:
                self.outcome.loads.append(self.regions[0].load)
                heapq.heappush(events, (now_s + 0.1, 3, 0, 0))
        return self.outcome

    def _arrive(
        self, now_s: float, arrivals: random.Random, events: list[tuple[float, int, int, int]]
    ) -> None:
        g = arrivals.randrange(len(self.gateways))
        hold_s = arrivals.expovariate(1 / HOLD_S)
        gateway = self.gateways[g]
        if self.chooser == "always nearest":
            r = min(range(len(REGIONS)), key=gateway.rtts_s.__getitem__)
        elif self.chooser == "random":
            r = self.rng.randrange(len(REGIONS))
        else:
            if self.chooser == "fresh news":
                for i in range(len(REGIONS)):
                    self._poll(now_s, g, i)
            found = pick(gateway.current, gateway.own, self.rng.random())
            assert isinstance(found, Pick)
            r = found.candidate.state.number
        gateway.own[r] += 1
        region = self.regions[r]
        if region.busy < SLOTS:
            self._start(now_s, now_s, hold_s, g, r, events)
        else:
            region.queue.append((now_s, hold_s, g))

    def _start(
        self,
        now_s: float,
        came_s: float,
        hold_s: float,
        g: int,
        r: int,
        events: list[tuple[float, int, int, int]],
    ) -> None:
        self.regions[r].busy += 1
        heapq.heappush(events, (now_s + hold_s, 1, g, r))
        if came_s > 5:
            self.outcome.waited_s.append(now_s - came_s)
            self.outcome.added_s.append(now_s - came_s + self.gateways[g].rtts_s[r])

    def _end(self, now_s: float, g: int, r: int, events: list[tuple[float, int, int, int]]) -> None:
        region = self.regions[r]
        region.busy -= 1
        self.gateways[g].own[r] -= 1
        if region.queue:
            came_s, hold_s, whose = region.queue.popleft()
            self._start(now_s, came_s, hold_s, whose, r, events)

    def _poll(self, now_s: float, g: int, r: int) -> None:
        gateway, region = self.gateways[g], self.regions[r]
        known = gateway.states[r]
        gateway.states[r] = EndpointState(
            known.endpoint,
            r,
            known.rtt_s,
            slots=SLOTS,
            max_queued=known.max_queued,
            hold_s=HOLD_S,
            load=region.load,
            own=gateway.own[r],
            queue_age_s=now_s - region.queue[0][0] if region.queue else 0.0,
        )
        gateway.current = plan(
            gateway.states, Ask("m"), Caller(), now_s=now_s, previous=gateway.current
        )


def measure(chooser: Chooser, load: float, *, seconds: float = 60, seed: int = 1) -> Outcome:
    outcome = World(chooser, seed).run(load, seconds, seed)
    outcome.added_s.sort()
    outcome.waited_s.sort()
    return outcome


def main() -> None:
    print("simulated over measured round trips; milliseconds added, way and wait: mean / p50 / p99")
    choosers: tuple[Chooser, ...] = get_args(Chooser)
    print(f"{'':12}" + "".join(f"{name:>24}" for name in choosers))
    for load in (0.2, 0.4, 0.6, 0.8, 0.9):
        cells = []
        for chooser in choosers:
            got = measure(chooser, load, seconds=30 if chooser == "fresh news" else 60)
            n = len(got.added_s)
            figures = (sum(got.added_s) / n, got.added_s[n // 2], got.added_s[int(0.99 * n)])
            cells.append(" / ".join(f"{1000 * s:.0f}" for s in figures))
        print(f"load {load:<7.2f}" + "".join(cell.rjust(24) for cell in cells), flush=True)


if __name__ == "__main__":
    main()
