"""The baselines of the scaling benchmark do what their models do."""

from __future__ import annotations

from nearfield.policy.scale import PoolSignals, PoolSpec, ScalingSpec, Signals, State
from nearfield.simulator.parts import Step, static

from benchmarks.autoscaling.baselines import Kpa, Reactive, ServeDefault

SPEC = ScalingSpec((PoolSpec("gpu", max_replicas=100, target_ongoing=10.0, work_s=10.0),))


class Deployment:
    """One pool under a baseline; boots take no time."""

    def __init__(self, policy: Step, running: int = 1) -> None:
        self.policy, self.running, self.state, self.now_s = policy, running, State(), 0.0

    def run(self, seconds: int, ongoing: float) -> list[int]:
        found = []
        for _ in range(seconds):
            self.now_s += 1.0
            pool = PoolSignals("gpu", self.running, ongoing=ongoing, arrivals=ongoing)
            decision, self.state = self.policy(Signals(self.now_s, (pool,)), self.state, SPEC)
            self.running = decision.target("gpu").replicas
            assert decision.target("gpu").reason
            found.append(self.running)
        return found


def test_static_is_static() -> None:
    assert set(Deployment(static({"gpu": 7})).run(50, 500.0)) == {7}


def test_reactive_follows_the_rate_and_holds_what_it_had() -> None:
    made = Deployment(Reactive(0.8, window_s=10.0, hold_s=60.0))
    assert made.run(30, 80.0)[-1] == 10
    assert made.run(55, 8.0)[-1] == 10
    assert made.run(30, 8.0)[-1] == 1


def test_serves_default_waits_thirty_seconds_up_and_ten_minutes_down() -> None:
    made = Deployment(ServeDefault())
    up = made.run(120, 50.0)
    assert set(up[:30]) == {1}
    assert up[-1] == 5
    down = made.run(700, 10.0)
    assert down[590] == 5
    assert down[-1] == 1


def test_knative_panics_at_twice_its_capacity_and_does_not_fall_meanwhile() -> None:
    made = Deployment(Kpa())
    made.run(90, 10.0)
    assert made.run(10, 60.0)[-1] >= 5  # the panic window has seen it, the stable one has not
    made.run(50, 10.0)
    assert made.running >= 5
    made.run(120, 10.0)
    assert made.running == 1


def test_knative_keeps_what_it_finds_until_it_has_seen_a_minute() -> None:
    assert min(Deployment(Kpa(), running=8).run(59, 5.0)) == 8


def test_knative_goes_to_zero_after_its_grace() -> None:
    made = Deployment(Kpa())
    made.run(70, 10.0)
    made.run(62, 0.0)
    assert made.running == 1
    made.run(60, 0.0)
    assert made.running == 0
