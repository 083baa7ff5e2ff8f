"""What the scaling policy is compared with: policies of the same shape, `step` of `policy.scale`.

    Reactive        rate over a window by what a replica does, given up after a while: to be tuned
    ServeDefault    Ray Serve's own policy with its delays and look-back
    Kpa             Knative's autoscaler: stable and panic windows over concurrency

`static` of `nearfield.simulator.parts`, so many replicas always, is one of them, too.

Each is made anew for a run and remembers what it has seen itself; of the state it uses the clock
only. Each gets what it gets in the wild: Serve and Knative see concurrency, not work. Where a model
has several pools they are filled in the spec's order, as none of these knows of prices. On no data
Knative keeps what there is, as the original does; the others read a 0.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace

from nearfield.policy.scale import (
    NO_DATA,
    Decision,
    Measured,
    PoolTarget,
    ScalingSpec,
    Signals,
    State,
)
from nearfield.policy.serve_semantics import ServeOptions, ServeState, serve_target


class Window:
    """Amounts of the last so many seconds."""

    def __init__(self, over_s: float) -> None:
        self._over_s = over_s
        self._parts: deque[tuple[float, float, float]] = deque()  # end, length, amount
        self._length_s = self._amount = 0.0

    def add(self, now_s: float, elapsed_s: float, amount: float) -> None:
        """An amount that fell in the `elapsed_s` until now."""
        if elapsed_s > 0.0:
            self._parts.append((now_s, elapsed_s, amount))
            self._length_s += elapsed_s
            self._amount += amount
        while self._parts and self._parts[0][0] <= now_s - self._over_s:
            _, length_s, old = self._parts.popleft()
            self._length_s -= length_s
            self._amount = self._amount - old if self._parts else 0.0

    @property
    def rate(self) -> float:
        """Amount a second over the window, or over what is in it."""
        return max(0.0, self._amount) / self._length_s if self._parts else 0.0

    @property
    def largest(self) -> float:
        return max((part[2] for part in self._parts), default=0.0)


def fill(
    total: int, signals: Signals, state: State, spec: ScalingSpec, why: str
) -> tuple[Decision, State]:
    """`total` replicas over the pools, the first ones first, within their bounds."""
    counts = [pool.min_replicas for pool in spec.pools]
    rest = total - sum(counts)
    for i, pool in enumerate(spec.pools):
        more = max(0, min(rest, pool.max_replicas - counts[i]))
        counts[i] += more
        rest -= more
    targets = tuple(
        PoolTarget(pool.name, count, (), f"{count}: {why}")
        for pool, count in zip(spec.pools, counts, strict=True)
    )
    return Decision(targets, why, {"wanted": float(total)}), replace(state, now_s=signals.now_s)


class Reactive:
    """Replicas = rate over `window_s` / what one does / `utilisation`; the most that was wanted in
    the last `hold_s`. What an experienced operator would write; its three numbers are to be tuned
    for each trace, with the trace known, for the least cost at the allowed lateness."""

    def __init__(self, utilisation: float, window_s: float = 60.0, hold_s: float = 300.0) -> None:
        self._utilisation = utilisation
        self._window, self._wanted = Window(window_s), Window(hold_s)

    def __call__(self, signals: Signals, state: State, spec: ScalingSpec) -> tuple[Decision, State]:
        elapsed_s = _elapsed(signals, state)
        use_work = all(pool.work_in is not NO_DATA for pool in signals.pools)
        came = sum(_or_zero(p.work_in if use_work else p.arrivals) for p in signals.pools)
        self._window.add(signals.now_s, elapsed_s, came)
        speeds = [_or_zero(pool.replica_work_s) for pool in signals.pools]
        known = [_or_zero(pool.work_s) for pool in spec.pools]
        speed = next((s for s in (*speeds, *known) if s > 0.0), 0.0)
        if speed <= 0.0 or elapsed_s <= 0.0:
            total = sum(pool.running + len(pool.starting) for pool in signals.pools)
            self._wanted.add(signals.now_s, 1.0, total)  # by whoever started them
            return fill(total, signals, state, spec, "nothing is known yet")
        wanted = math.ceil(self._window.rate / (speed * self._utilisation) - 1e-9)
        self._wanted.add(signals.now_s, elapsed_s, wanted)
        why = f"{self._window.rate:.3g} work/s at {self._utilisation:.0%} of {speed:.3g} each"
        return fill(int(self._wanted.largest), signals, state, spec, why)


class ServeDefault:
    """Ray Serve's default policy (`ray.serve.autoscaling_policy`, Ray 2.60): ongoing requests over
    `look_back_s`, divided by `target_ongoing` (Serve's default is 2: give it the engine's batch),
    inside Serve's own wrapper with its delays of 30 s up and 600 s down."""

    def __init__(
        self,
        target_ongoing: float | None = None,
        *,
        look_back_s: float = 30.0,
        upscale_delay_s: float = 30.0,
        downscale_delay_s: float = 600.0,
    ) -> None:
        self._target_ongoing = target_ongoing
        self._ongoing = Window(look_back_s)
        self._delays = (upscale_delay_s, downscale_delay_s)
        self._wish = ServeState()
        self._target: int | None = None

    def __call__(self, signals: Signals, state: State, spec: ScalingSpec) -> tuple[Decision, State]:
        elapsed_s = _elapsed(signals, state)
        ongoing = sum(_or_zero(pool.ongoing) for pool in signals.pools)
        self._ongoing.add(signals.now_s, elapsed_s, ongoing * elapsed_s)
        running = sum(pool.running for pool in signals.pools)
        if self._target is None:
            self._target = running + sum(len(pool.starting) for pool in signals.pools)
        each = self._target_ongoing or spec.pools[0].target_ongoing
        requests = self._ongoing.rate
        self._target, self._wish = serve_target(
            lambda: requests / each if running else self._target or 0,
            running=running,
            target=self._target,
            requests=requests,
            now_s=signals.now_s,
            state=self._wish,
            options=ServeOptions(
                min_replicas=sum(pool.min_replicas for pool in spec.pools),
                max_replicas=sum(pool.max_replicas for pool in spec.pools),
                upscale_delay_s=self._delays[0],
                downscale_delay_s=self._delays[1],
            ),
        )
        why = f"{requests:.3g} requests at once, {each:.3g} for each"
        return fill(self._target, signals, state, spec, why)


class Kpa:
    """Knative's pod autoscaler, with the defaults of its `config-autoscaler`.

    Stable window 60 s, panic window a tenth of it, panic at twice what the ready pods are for,
    70 % of the container's concurrency as target, at most a thousandfold up and by half down
    each time, zero after the grace period. Source: knative/serving, `pkg/autoscaler/scaling/
    autoscaler.go` and `config/core/configmaps/autoscaler.yaml`.
    """

    STABLE_S, PANIC_S = 60.0, 6.0
    PANIC_THRESHOLD = 2.0
    UTILISATION = 0.7
    MOST_UP, MOST_DOWN = 1000.0, 2.0
    ZERO_GRACE_S = 30.0
    TICK_S = 2.0

    def __init__(self, concurrency: float | None = None) -> None:
        """
        Args:
            concurrency: requests that one replica can have at once (`containerConcurrency`);
                the spec's `target_ongoing` if absent, which then is the target itself.
        """
        self._target = None if concurrency is None else concurrency * self.UTILISATION
        self._stable, self._panic = Window(self.STABLE_S), Window(self.PANIC_S)
        self._panic_s: float | None = None
        self._most = 0
        self._idle_s: float | None = None
        self._decided: int | None = None
        self._ticked_s = -math.inf

    def __call__(self, signals: Signals, state: State, spec: ScalingSpec) -> tuple[Decision, State]:
        now_s, elapsed_s = signals.now_s, _elapsed(signals, state)
        ongoing = sum(_or_zero(pool.ongoing) for pool in signals.pools)
        for window in (self._stable, self._panic):
            window.add(now_s, elapsed_s, ongoing * elapsed_s)
        ready = sum(pool.running for pool in signals.pools)
        blind = all(pool.ongoing is NO_DATA for pool in signals.pools)
        if self._decided is None:
            self._decided = ready + sum(len(pool.starting) for pool in signals.pools)
            if ready > 1:  # without history it begins in panic: what there is stays
                self._panic_s, self._most = now_s, ready
        elif not blind and now_s - self._ticked_s >= self.TICK_S - 1e-9:
            self._ticked_s = now_s
            self._decided = self._decide(now_s, ready, spec)
        why = f"{self._stable.rate:.3g} requests at once in 60 s, {self._panic.rate:.3g} in 6 s" + (
            ", panic" if self._panic_s is not None else ""
        )
        return fill(self._decided, signals, state, spec, why)

    def _decide(self, now_s: float, ready: int, spec: ScalingSpec) -> int:
        each = self._target or spec.pools[0].target_ongoing
        pods = max(1, ready)
        most = math.ceil(self.MOST_UP * pods)
        least = math.floor(ready / self.MOST_DOWN)
        stable = min(most, max(least, math.ceil(self._stable.rate / each - 1e-9)))
        wanted = math.ceil(self._panic.rate / each - 1e-9)
        panic = min(most, max(least, wanted))
        over = wanted / pods >= self.PANIC_THRESHOLD
        if over:
            self._panic_s = now_s
        elif self._panic_s is not None and now_s - self._panic_s > self.STABLE_S:
            self._panic_s, self._most = None, 0
        desired = stable
        if self._panic_s is not None:  # only up while in panic
            desired = max(stable, panic)
            self._most = desired = max(desired, self._most)
        if desired == 0 and (self._decided or 0) > 0:
            self._idle_s = now_s if self._idle_s is None else self._idle_s
            return 0 if now_s - self._idle_s >= self.ZERO_GRACE_S else 1
        self._idle_s = None
        return desired


def _elapsed(signals: Signals, state: State) -> float:
    return signals.now_s - state.now_s if math.isfinite(state.now_s) else 0.0


def _or_zero(value: Measured) -> float:
    return 0.0 if value is NO_DATA else value
