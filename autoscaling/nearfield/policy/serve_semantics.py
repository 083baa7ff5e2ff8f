"""What Ray Serve does to a policy's answer before it becomes a target.

Serve wraps every policy: at zero replicas with traffic it answers by itself and does not ask; else
it scales the change by a factor, waits until the wish has stood for a delay, and clips to bounds.
The simulator puts this around policies that run in Serve, so that what is simulated is what would
happen. `tests/contract/test_serve_semantics.py` holds it against the installed Ray's own code
(`ray.serve.autoscaling_policy._apply_autoscaling_config` and `apply_bounds`, Ray 2.60).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

EPSILON_S = 1e-6
"""Serve's tolerance where it compares a delay."""


class ServeOptions(NamedTuple):
    """Those of `autoscaling_config` that matter here, with Serve's defaults."""

    min_replicas: int = 1
    max_replicas: int = 1
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0
    downscale_to_zero_delay_s: float | None = None
    upscaling_factor: float = 1.0
    downscaling_factor: float = 1.0


class ServeState(NamedTuple):
    """The wish that waits. direction: 1 up, -1 down, 0 none; since_s: when it was first wished."""

    direction: int = 0
    since_s: float | None = None


def serve_target(
    ask: Callable[[], float],
    *,
    running: int,
    target: int,
    requests: float,
    now_s: float,
    state: ServeState,
    options: ServeOptions,
) -> tuple[int, ServeState]:
    """Serve's next target.

    Args:
        ask: the policy; called at most once, and not at zero replicas with traffic.
        running, target: replicas that can serve, and the target so far.
        requests: running and queued ones.
    """
    if running == 0 and requests > 0:
        return _clip(max(math.ceil(options.upscaling_factor), target), options), state
    desired = _scaled(ask(), running, options)
    if running == 0 and desired > 0:
        return _clip(desired, options), state
    decided, state = _delayed(max(0, desired), target, now_s, state, options)
    return _clip(decided, options), state


def _clip(replicas: int, options: ServeOptions) -> int:
    return max(options.min_replicas, min(options.max_replicas, replicas))


def _scaled(desired: float, running: int, options: ServeOptions) -> int:
    if running == 0:
        return math.ceil(desired)
    change = desired - running
    factor = options.upscaling_factor if change > 0 else options.downscaling_factor
    scaled = math.ceil(running + factor * change)
    stuck = math.ceil(desired) < running and scaled == running
    return scaled - 1 if stuck else scaled


def _delayed(
    desired: int, target: int, now_s: float, state: ServeState, options: ServeOptions
) -> tuple[int, ServeState]:
    direction = (desired > target) - (desired < target)
    if direction == 0:
        return target, ServeState()
    since_s = state.since_s if state.direction == direction and state.since_s is not None else now_s
    delay_s = options.upscale_delay_s
    if direction < 0:
        delay_s = options.downscale_delay_s
        if target > 1:
            desired = max(1, desired)  # to zero only from one
        elif options.downscale_to_zero_delay_s is not None:
            delay_s = options.downscale_to_zero_delay_s
    if now_s - since_s + EPSILON_S >= delay_s:
        return desired, ServeState()
    return target, ServeState(direction, since_s)
