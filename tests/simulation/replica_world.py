"""Replicas of unlike speed under one stream of requests: who chooses how, and what the last wait.

    python -m tests.simulation.replica_world

Simulated, not measured. A replica computes up to `slots` requests at once, first come first
served; each gets the speed of `alone_tokens_s` until together they would exceed `tokens_s`.
Requests arrive at random (Poisson), their prompts and answers are of very different length
(log-normal), and only the prompt's length is known beforehand.

The chooser under test sees each replica as of its last poll, a quarter of a second ago at most,
and its own requests. leastconn has its own requests, as HAProxy does, and with weights it has been
told the speeds. Power of two, Serve's way, is given more than in life: the true queue, without
delay, of both replicas it looks at.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from nearfield.policy.rank import Place, ReplicaState, choose, places

Chooser = Literal["nearfield", "leastconn", "weighted leastconn", "power of two"]
POLL_S = 0.25
MEAN_PROMPT, MEAN_ANSWER = 100.0, 100.0
SPREAD = 1.0
"""Standard deviation of the logarithm of both lengths."""


@dataclass
class Job:
    arrived_s: float
    gateway: int
    replica: int
    work: float
    known: float
    left: float = 0.0


@dataclass
class Replica:
    """One replica: who runs, who waits, and up to when that has been computed."""

    spec: ReplicaState
    running: list[Job] = field(default_factory=list)
    queue: deque[Job] = field(default_factory=deque)
    at_s: float = 0.0
    version: int = 0

    def speed(self) -> float:
        """Tokens a second of each running request."""
        return min(self.spec.alone_tokens_s, self.spec.tokens_s / max(1, len(self.running)))

    def advance(self, now_s: float) -> None:
        done = (now_s - self.at_s) * self.speed()
        for job in self.running:
            job.left -= done
        self.at_s = now_s

    def fill(self) -> None:
        while self.queue and len(self.running) < self.spec.slots:
            self.running.append(self.queue.popleft())
        self.version += 1

    def next_s(self) -> float:
        """When the next running request finishes."""
        if not self.running:
            return math.inf
        return self.at_s + max(0.0, min(job.left for job in self.running)) / self.speed()


@dataclass
class Gateway:
    """What one gateway knows: its own requests, and the last poll."""

    own: list[int]
    own_work: list[float]
    polled: tuple[Place, ...] = ()


class World:
    """Replicas, gateways and a clock."""

    def __init__(
        self, specs: Sequence[ReplicaState], chooser: Chooser, *, gateways: int, seed: int
    ) -> None:
        self.replicas = [Replica(spec) for spec in specs]
        self.gateways = [Gateway([0] * len(specs), [0.0] * len(specs)) for _ in range(gateways)]
        self._choose: Callable[[Gateway, float], int] = {
            "nearfield": self._nearfield,
            "leastconn": self._leastconn,
            "power of two": self._power_of_two,
            "weighted leastconn": self._weighted_leastconn,
        }[chooser]
        self._rng = random.Random(f"{seed} choices")
        self._turn = self._polls = 0

    def run(self, rate_rps: float, requests: int, seed: int) -> list[float]:
        """Latencies, seconds, of so many requests, the first tenth left out."""
        arrivals = random.Random(f"{seed} arrivals")  # the same for every chooser
        took_s: list[float] = []
        ends: list[tuple[float, int, int]] = []
        for _ in self.gateways:
            self._poll(0.0)
        arriving_s, polled_s, sent = arrivals.expovariate(rate_rps), POLL_S, 0
        while sent < requests or any(r.running for r in self.replicas):
            end_s = ends[0][0] if ends else math.inf
            come_s = arriving_s if sent < requests else math.inf
            now_s = min(end_s, come_s, polled_s)
            if now_s == polled_s:
                self._poll(now_s)
                polled_s += POLL_S / len(self.gateways)
                continue
            if now_s == end_s:
                _, version, number = heapq.heappop(ends)
                replica = self.replicas[number]
                if version != replica.version:
                    continue
                took_s += self._finish(replica, now_s)
            else:
                number = self._arrive(now_s, sent, arrivals)
                replica = self.replicas[number]
                arriving_s = now_s + arrivals.expovariate(rate_rps)
                sent += 1
            heapq.heappush(ends, (replica.next_s(), replica.version, number))
        return took_s[requests // 10 :]

    def _arrive(self, now_s: float, sent: int, arrivals: random.Random) -> int:
        mu = -(SPREAD**2) / 2
        prompt = MEAN_PROMPT * arrivals.lognormvariate(mu, SPREAD)
        answer = MEAN_ANSWER * arrivals.lognormvariate(mu, SPREAD)
        gateway = self.gateways[sent % len(self.gateways)]
        known = prompt + MEAN_ANSWER
        number = self._choose(gateway, known)
        gateway.own[number] += 1
        gateway.own_work[number] += known
        work = prompt + answer
        job = Job(now_s, sent % len(self.gateways), number, work, known, left=work)
        replica = self.replicas[number]
        replica.advance(now_s)
        replica.queue.append(job)
        replica.fill()
        return number

    def _finish(self, replica: Replica, now_s: float) -> list[float]:
        replica.advance(now_s)
        done = [job for job in replica.running if job.left <= 1e-6]
        replica.running = [job for job in replica.running if job.left > 1e-6]
        for job in done:
            gateway = self.gateways[job.gateway]
            gateway.own[job.replica] -= 1
            gateway.own_work[job.replica] -= job.known
        replica.fill()
        return [now_s - job.arrived_s for job in done]

    def _poll(self, now_s: float) -> None:
        """The next gateway in turn hears from every replica."""
        gateway = self.gateways[self._polls % len(self.gateways)]
        self._polls += 1
        states = []
        for number, replica in enumerate(self.replicas):
            replica.advance(now_s)
            jobs = [*replica.running, *replica.queue]
            states.append(
                replica.spec._replace(
                    load=len(jobs),
                    work=sum(job.known for job in jobs),
                    own=gateway.own[number],
                    own_work=gateway.own_work[number],
                    queue_age_s=now_s - replica.queue[0].arrived_s if replica.queue else 0.0,
                )
            )
        gateway.polled = places(states)

    def _nearfield(self, gateway: Gateway, known: float) -> int:
        found = choose(
            gateway.polled, gateway.own, gateway.own_work, self._rng.random(), tokens=known
        )
        assert found is not None
        return found.state.number

    def _leastconn(self, gateway: Gateway, known: float) -> int:
        return self._least(gateway, [1.0] * len(self.replicas))

    def _weighted_leastconn(self, gateway: Gateway, known: float) -> int:
        return self._least(gateway, [r.spec.tokens_s for r in self.replicas])

    def _least(self, gateway: Gateway, weights: Sequence[float]) -> int:
        self._turn += 1
        size = len(self.replicas)
        order = [(i + self._turn) % size for i in range(size)]  # equals in turn
        return min(order, key=lambda i: (gateway.own[i] + 1) / weights[i])

    def _power_of_two(self, gateway: Gateway, known: float) -> int:
        pair = self._rng.sample(range(len(self.replicas)), 2)
        return min(pair, key=lambda i: len(self.replicas[i].running) + len(self.replicas[i].queue))


def slots(name: str, fast: int, slow: int, factor: float) -> list[ReplicaState]:
    """Replicas that compute four requests at once, each for itself; fast ones `factor` times."""
    speeds = [1000.0 * factor] * fast + [1000.0] * slow
    return [
        ReplicaState(i, f"{name}-{i}", 4 * s, s, slots=4, max_queued=1 << 30)
        for i, s in enumerate(speeds)
    ]


def batching(name: str, fast: int, slow: int, factor: float) -> list[ReplicaState]:
    """Replicas that batch 16 requests: one alone has a quarter of their joint speed."""
    speeds = [4000.0 * factor] * fast + [4000.0] * slow
    return [
        ReplicaState(i, f"{name}-{i}", s, s / 4, slots=16, max_queued=1 << 30)
        for i, s in enumerate(speeds)
    ]


def latencies(
    specs: Sequence[ReplicaState],
    chooser: Chooser,
    *,
    load: float,
    requests: int,
    gateways: int = 1,
    seed: int = 1,
) -> list[float]:
    """Sorted latencies at a load that is a share of what the replicas can compute together."""
    rate_rps = load * sum(s.tokens_s for s in specs) / (MEAN_PROMPT + MEAN_ANSWER)
    world = World(specs, chooser, gateways=gateways, seed=seed)
    return sorted(world.run(rate_rps, requests, seed))


def quantile(ordered: Sequence[float], q: float) -> float:
    return ordered[int(q * len(ordered))]


def main() -> None:
    print("simulated, milliseconds: mean / p50 / p99")
    choosers: tuple[Chooser, ...] = get_args(Chooser)
    print(f"{'':44}" + "".join(f"{name:>22}" for name in choosers))
    for label, specs in (
        ("2 fast (4x) + 4 slow, slots", slots("s", 2, 4, 4.0)),
        ("2 fast (4x) + 4 slow, batching", batching("b", 2, 4, 4.0)),
        ("6 alike, slots", slots("a", 0, 6, 1.0)),
    ):
        for gateways in (1, 3):
            for load in (0.5, 0.7, 0.85, 0.95):
                row = f"{label}, {gateways} gw, load {load:.2f}"
                cells = []
                for chooser in choosers:
                    took_s = latencies(specs, chooser, load=load, requests=30000, gateways=gateways)
                    figures = (
                        sum(took_s) / len(took_s),
                        *(quantile(took_s, q) for q in (0.5, 0.99)),
                    )
                    cells.append(" / ".join(f"{1000 * s:.0f}" for s in figures).rjust(22))
                print(f"{row:44}" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
