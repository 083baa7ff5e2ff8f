"""`python -m benchmarks.autoscaling NAME`: each is a module of this package with a `main`."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "pools": "a noisy neighbour on a shared cluster, and what pools of its own cost",
    "traces": "recorded traffic: the policy against an oracle, Ray Serve's, Knative's and others",
    "speed": "requests that `nearfield simulate` simulates in a second of a core",
    "spot": "recorded spot capacity at recorded prices: what it saves, and at what latency",
    "record": "a real run for `nearfield simulate --calibrate`",
}


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in COMMANDS:
        known = "\n".join(f"  {name:10} {what}" for name, what in COMMANDS.items())
        print(f"usage: python -m benchmarks.autoscaling NAME [OPTIONS]\n\n{known}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"benchmarks.autoscaling.{arguments[0]}")
    code: int = module.main(arguments[1:])
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
