"""Ways that do not change, probes that differ: how often do the near-equals change?

python -m tests.simulation.jitter --seeds 1000
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Callable, Sequence

from nearfield.policy.endpoints import Ask, Caller, Endpoint, EndpointState
from nearfield.policy.route import Plan, plan
from nearfield.policy.rtt import Rtt

JITTER = 0.07
WARM_S, MEASURED_S = 60, 600
FIVE_EQUALS_S = (0.08,) * 5


def changes(
    rtts_s: Sequence[float],
    draw: Callable[[float], float],
    *,
    first_byte_s: float = 0.0,
    seconds: int = MEASURED_S,
) -> int:
    """Of the near-equals, after the first minute.

    Args:
        rtts_s: the true round trips, which stay.
        draw: one probe's error as a share, of a standard deviation or width of this.
    """
    ways = [Rtt() for _ in rtts_s]
    endpoints = [Endpoint(f"region-{i}", "chat", "1", "l4", "eu") for i in range(len(rtts_s))]
    current: Plan | None = None
    changed = 0
    for second in range(WARM_S + seconds):
        states = []
        for i, rtt_s in enumerate(rtts_s):
            ways[i] = ways[i].learn(max(1e-5, rtt_s * (1 + draw(JITTER))))
            states.append(
                EndpointState(endpoints[i], i, ways[i].level_s, slots=64, first_byte_s=first_byte_s)
            )
        following = plan(states, Ask("chat"), Caller(), now_s=second, previous=current)
        if current is not None and second >= WARM_S:
            changed += following.held != current.held
        current = following
    return changed


def gaussian(seed: int) -> Callable[[float], float]:
    noise = random.Random(seed)
    return lambda deviation: noise.gauss(0, deviation)


def uniform(seed: int) -> Callable[[float], float]:
    noise = random.Random(seed)
    return lambda width: noise.uniform(-width, width)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.jitter")
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--rtts-ms", default="80,80,80,80,80")
    options = parser.parse_args(argv)
    rtts_s = [float(text) / 1000 for text in options.rtts_ms.split(",")]
    found = Counter(changes(rtts_s, gaussian(seed)) for seed in range(options.seeds))
    for count, seeds in sorted(found.items()):
        print(f"{count} changes in {MEASURED_S // 60} minutes: {seeds} of {options.seeds} seeds")


if __name__ == "__main__":
    main()
