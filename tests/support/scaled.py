"""What tests of scaling on a real Ray have in common: a replica's scaling, and callers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from nearfield.core.scaling import SCALING_POLICY


def autoscaling(least: int, most: int, at_once: float, **options: Any) -> dict[str, Any]:
    """Serve's `autoscaling_config` with nearfield's policy, as quick as Serve can be.

    Args:
        at_once: requests that one replica should have. options: of the policy.
    """
    return {
        "min_replicas": least,
        "max_replicas": most,
        "target_ongoing_requests": at_once,
        "upscale_delay_s": 0,
        "downscale_delay_s": 0,
        "metrics_interval_s": 0.5,
        "look_back_period_s": 2,
        "policy": {"policy_function": SCALING_POLICY, "policy_kwargs": options},
    }


@contextmanager
def callers(at_once: int, ask: Callable[[], int | None]) -> Iterator[list[int]]:
    """So many callers, each asking again when it is answered. Yields the statuses they got.

    Args:
        ask: a request's status; None: it has none, and does not count. It ends within 100 s.
    """
    ended, statuses = threading.Event(), list[int]()

    def call() -> None:
        while not ended.is_set():
            status = ask()
            if status is not None:
                statuses.append(status)

    threads = [threading.Thread(target=call) for _ in range(at_once)]
    for thread in threads:
        thread.start()
    try:
        yield statuses
    finally:
        ended.set()
        for thread in threads:
            thread.join(timeout=100)
