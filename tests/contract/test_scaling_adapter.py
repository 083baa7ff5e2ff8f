"""The scaling policy as Ray Serve's controller calls it: pickled, asked, told; no cluster."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
from nearfield.policy.scale import NO_DATA
from nearfield.serving import pools
from nearfield.serving.gate import Gate
from nearfield.serving.launches import Launches
from pydantic import ValidationError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's use of pydantic is not ours to mend
    from ray.serve._private.autoscaling_state import _resolve_policy_callable
    from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
    from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

DEPLOYMENT = DeploymentID(name="replica", app_name="chat")
FUNCTION = "nearfield.serving.scaling:Scaling"


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test is a controller of its own."""
    monkeypatch.setattr(pools, "_FLEETS", {})


class Deployment:
    """One deployment as the controller sees it. `totals`: what its replicas report, by name."""

    def __init__(self, app: str = "chat", **options: Any) -> None:
        self.app, self.running, self.target, self.now_s = app, 0, 0, 1_000_000.0
        self.config = AutoscalingConfig(
            min_replicas=0, max_replicas=20, target_ongoing_requests=4,
            policy=AutoscalingPolicy(policy_function=FUNCTION, policy_kwargs=options),
        )  # fmt: skip
        self.policy = _resolve_policy_callable(self.config.policy)
        self.state: dict[str, Any] = {}
        self.totals: dict[str, dict[str, float]] = {}
        self.queued = 0.0

    def report(self, **facts: float) -> None:
        """Every running replica reports these."""
        self.totals = {f"r{n}": dict(facts) for n in range(self.running)}

    def ask(self, seconds: float = 1.0) -> int:
        """So much later, the policy's answer."""
        self.now_s += seconds
        replicas = {f"r{n}": ReplicaID(f"r{n}", DEPLOYMENT) for n in range(self.running)}
        names = {name for facts in self.totals.values() for name in facts}
        metrics = {
            name: {
                replicas[key]: [TimeStampedValue(self.now_s - 0.5, facts[name])]
                for key, facts in self.totals.items()
                if key in replicas
            }
            for name in names
        }
        context = AutoscalingContext(
            deployment_id=DEPLOYMENT,
            deployment_name="replica",
            app_name=self.app,
            current_num_replicas=self.running,
            target_num_replicas=self.target,
            running_replicas=list(replicas.values()),
            total_num_requests=0.0,
            total_queued_requests=self.queued,
            aggregated_metrics={},
            raw_metrics=lambda: metrics,
            capacity_adjusted_min_replicas=0,
            capacity_adjusted_max_replicas=20,
            policy_state=dict(self.state),
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=self.now_s,
            config=self.config,
        )
        self.target, self.state = self.policy(context)
        return self.target


def busy(deployment: Deployment, seconds: int, *, rate: float, ongoing: float) -> int:
    """Traffic of so many requests a second, so many at once; boots take a second."""
    for _ in range(seconds):
        deployment.running = max(deployment.running, deployment.target)
        share = 1.0 / max(1, deployment.running)
        for n in range(deployment.running):
            own = deployment.totals.setdefault(f"r{n}", {"arrived_total": 0.0})
            own.update(running=ongoing * share, waiting=0.0, queue_age_s=0.0)
            own["arrived_total"] += rate * share
        deployment.ask()
    return deployment.target


def test_serve_pickles_it_by_value_and_it_is_small() -> None:
    policy = AutoscalingPolicy(policy_function=FUNCTION, policy_kwargs={"boot_s": 9})
    pickled = policy.get_serialized_policy_def()
    assert pickled is not None
    assert len(pickled) < 4096
    assert policy.get_policy().__name__ == "Scaling"


def test_totals_of_replicas_become_arrivals_and_concurrency_a_target() -> None:
    """Twenty-four requests at once, four for each: six replicas, and some headroom."""
    made = Deployment()
    made.running = made.target = 2
    assert 6 <= busy(made, 300, rate=40.0, ongoing=24.0) <= 9


def test_a_changed_config_takes_no_replicas_past_for_a_burst() -> None:
    """Serve makes a new policy for it, which meets replicas that have counted for long."""
    made = Deployment()
    made.running = made.target = 2
    busy(made, 300, rate=40.0, ongoing=24.0)
    made.policy, made.state = _resolve_policy_callable(made.config.policy), {}
    assert 6 <= busy(made, 60, rate=40.0, ongoing=24.0) <= 9


def test_while_launches_of_its_node_type_fail_another_pool_takes_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failed_s: dict[str, float] = {}
    monkeypatch.setattr(pools, "_LAUNCHES", Launches(lambda: failed_s))
    options = {"model": "assistant", "boot_s": 600}
    spot = Deployment("spot", kind="spot", usd_per_hour=1, node_types=["l4-spot"], **options)
    steady = Deployment("steady", usd_per_hour=3, node_types=["l4"], **options)
    spot.target = 1  # Serve's own first replica, for a request that waits
    spot.queued = 1.0
    for _ in range(5):
        assert (spot.ask(), steady.ask()) == (1, 0)
    failed_s["l4-spot"] = spot.now_s
    for _ in range(5):
        spot.ask(), steady.ask()
    assert (spot.target, steady.target) == (1, 1)


def test_replicas_that_do_not_report_are_no_data_and_stay() -> None:
    made = Deployment()
    made.running = made.target = 3
    assert [made.ask() for _ in range(400)] == [3] * 400


def test_nobody_for_idle_s_is_zero() -> None:
    made = Deployment(idle_s=60)
    made.running = made.target = 1
    made.report(arrived_total=5, running=0, waiting=0, queue_age_s=0)
    answers = [made.ask() for _ in range(80)]
    assert answers[0] == 1
    assert answers[-1] == 0


def test_boots_and_losses_are_seen() -> None:
    watch, made = pools.Watch(), Deployment()
    made.policy = lambda context: (watch.read(context, made.now_s), (made.target, {}))[1]
    made.target = 2
    made.ask()
    made.ask(20.0)
    made.running = 1
    made.ask(10.0)
    signals = watch.signals("chat", 2.0, made.now_s)
    assert signals.boots_s == (30.0,)
    assert signals.starting == (30.0,)
    assert signals.arrivals is NO_DATA  # it runs, and has not said anything
    made.running = 0
    made.ask()
    assert watch.signals("chat", 2.0, made.now_s).lost == 1


def test_pools_of_one_model_are_decided_together() -> None:
    cheap = Deployment("chat-l4", model="chat", pool="l4", usd_per_hour=1.0)
    dear = Deployment("chat-h100", model="chat", pool="h100", usd_per_hour=9.0)
    cheap.running = cheap.target = 1
    for _ in range(200):
        busy(cheap, 1, rate=10.0, ongoing=8.0)
        dear.ask()
    assert cheap.target >= 2
    assert dear.target == 0
    assert set(cheap.state["nearfield"]["pools"]) == {"chat-l4", "chat-h100"}


def test_the_state_is_serves_to_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Deployment()
    made.running = made.target = 2
    busy(made, 300, rate=40.0, ongoing=24.0)
    made.state = json.loads(json.dumps(made.state, allow_nan=False))
    learnt = made.state["nearfield"]["groups"][""]["demand"]["closed"]
    monkeypatch.setattr(pools, "_FLEETS", {})  # another process
    made.ask()
    assert made.state["nearfield"]["groups"][""]["demand"]["closed"] >= learnt > 50


def test_options_are_strict() -> None:
    with pytest.raises(ValidationError, match="max_usd_per_hours"):
        Deployment(max_usd_per_hours=3)


def test_every_total_of_a_gate_is_known_to_the_policy() -> None:
    gate = Gate(1, 0)
    assert {"arrived_total", "refused_total", pools._waited(2.0)} <= gate.totals().keys()
    assert pools._waited(0.01) == "waited_0.1_total"
    assert pools._waited(3.0) == "waited_2_total"


def test_each_change_is_told_once_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="ray.serve.nearfield.scaling")
    made = Deployment()
    made.running = made.target = 1
    busy(made, 120, rate=30.0, ongoing=12.0)
    found = [line for line in caplog.messages if line.startswith("scaling chat: ")]
    assert found
    assert len(found) == len(set(found))
