"""The scaling policy as Ray Serve's controller calls it: pickled, asked, told; no cluster."""

from __future__ import annotations

import math
import time
import warnings
from collections import Counter
from typing import Any

import pytest
from nearfield.api.scaling import KEY, ModelScaling, parse_model
from nearfield.policy.scale import NO_DATA
from nearfield.serving import pools, surroundings
from nearfield.serving.cluster import Waiting
from nearfield.serving.departure import LATER_S, LEAVES, STARTED
from nearfield.serving.gate import Gate
from nearfield.serving.surroundings import Surroundings
from nearfield.serving.watch import Watch, _waited
from pydantic import ValidationError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's use of pydantic is not ours to mend
    from ray.serve._private.autoscaling_state import _resolve_policy_callable
    from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
    from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

DEPLOYMENT = DeploymentID(name="replica", app_name="chat")
FUNCTION = "nearfield.serving.scaling:Scaling"


class Head:
    """The cluster's head as the adapter asks it.

    Attributes:
        wait: replicas that wait for a machine. failed_s: when launches failed, by node type.
        elastic: a node autoscaler is at work.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kept_: dict[str, bytes] = {}
        self.wait: dict[str, int] = {}
        self.failed_s: dict[str, float] = {}
        self.elastic = False
        self.monkeypatch = monkeypatch
        self.restart()

    def restart(self) -> None:
        """Another controller takes over."""
        self.monkeypatch.setattr(pools, "_FLEETS", {})
        self.surroundings = Surroundings(lambda: self)
        self.monkeypatch.setattr(pools, "_SURROUNDINGS", self.surroundings)

    def waiting(self) -> Waiting:
        count = Counter(self.wait)
        return Waiting(count, count, Counter(), self.elastic, self.failed_s)

    def keep(self, key: str, value: bytes) -> None:
        self.kept_[key] = value

    def kept(self, key: str) -> bytes | None:
        return self.kept_.get(key)

    def told(self, model: str) -> ModelScaling:
        self.surroundings.read()
        return parse_model(self.kept_[KEY + model])


@pytest.fixture(autouse=True)
def head(monkeypatch: pytest.MonkeyPatch) -> Head:
    """Each test is a controller of its own."""
    return Head(monkeypatch)


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
                if key in replicas and name in facts
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
            fresh = {"arrived_total": 0.0, STARTED: deployment.now_s}
            own = deployment.totals.setdefault(f"r{n}", fresh)
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


def test_while_launches_of_its_node_type_fail_another_pool_takes_over(head: Head) -> None:
    options = {"model": "assistant", "boot_s": 600}
    spot = Deployment("spot", kind="spot", usd_per_hour=1, node_types=["l4-spot"], **options)
    steady = Deployment("steady", usd_per_hour=3, node_types=["l4"], **options)
    spot.target = 1  # Serve's own first replica, for a request that waits
    spot.queued = 1.0
    for _ in range(5):
        assert (spot.ask(), steady.ask()) == (1, 0)
    head.failed_s["l4-spot"] = spot.now_s
    head.surroundings.read()
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
    watch, made = Watch(), Deployment()
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


def test_pools_of_one_model_are_decided_together(head: Head) -> None:
    cheap = Deployment("chat-l4", model="chat", pool="l4", usd_per_hour=1.0)
    dear = Deployment("chat-h100", model="chat", pool="h100", usd_per_hour=9.0)
    cheap.running = cheap.target = 1
    for _ in range(200):
        busy(cheap, 1, rate=10.0, ongoing=8.0)
        dear.ask()
    assert cheap.target >= 2
    assert dear.target == 0
    assert {p.application for p in head.told("chat").pools} == {"chat-l4", "chat-h100"}


def test_what_was_learnt_outlives_the_controller(head: Head) -> None:
    """Demand, speeds and boots. And the replicas of the one before are neither new nor busy."""
    made = Deployment(boot_s=600)
    made.target = 2
    made.ask()
    made.ask(20.0)
    busy(made, 300, rate=40.0, ongoing=24.0)
    was, settled = head.told("chat"), made.target
    assert was.terms["lead_s"] == pytest.approx(26.0)  # a boot of 21 s was seen, and 5
    head.restart()
    made.policy, made.state = _resolve_policy_callable(made.config.policy), {}
    running, made.running = made.running, 0  # Serve has not found them again yet
    made.ask()
    made.running = running
    assert busy(made, 30, rate=40.0, ongoing=24.0) <= settled + 1
    told = head.told("chat")
    assert told.terms["lead_s"] == was.terms["lead_s"]
    assert told.terms["level"] == pytest.approx(was.terms["level"], rel=0.1)


def test_the_pools_of_a_model_meet_a_new_controller_one_by_one(head: Head) -> None:
    """What was learnt of one that it has not been asked about yet is kept for it."""
    options = {"model": "assistant"}
    busy_one = Deployment("busy", usd_per_hour=1.0, **options)
    idle = Deployment("idle", usd_per_hour=2.0, **options)
    busy_one.running = busy_one.target = 1
    for _ in range(100):
        busy(busy_one, 1, rate=5.0, ongoing=4.0)
        idle.ask()
    before = head.told("assistant")
    head.restart()
    for each in (busy_one, idle):
        each.policy = _resolve_policy_callable(each.config.policy)
    for _ in range(3):
        idle.ask()
    busy_one.ask(3.0)
    assert head.told("assistant").terms["lead_s"] == before.terms["lead_s"]


def test_a_notice_makes_room_for_the_next_and_is_a_loss_once() -> None:
    """Serve starts another beside it at once, and stops it when that one serves."""
    watch, made = Watch(), Deployment()
    made.policy = lambda context: (watch.read(context, made.now_s), (made.target, {}))[1]
    made.running = made.target = 3
    made.report(arrived_total=0, running=1)
    made.ask()
    made.totals["r1"][LEAVES] = due_s = made.now_s + 30
    made.totals["r2"][LEAVES] = LATER_S
    made.ask()
    signals = watch.signals("chat", 2.0, made.now_s)
    assert [(n.replica, n.due_s) for n in signals.notices] == [("r1", due_s), ("r2", math.inf)]
    assert (signals.running, len(signals.starting), signals.lost) == (3, 2, 2)
    made.running = 1
    made.ask()
    signals = watch.signals("chat", 2.0, made.now_s)
    assert (signals.running, len(signals.starting), signals.lost) == (1, 2, 0)
    made.totals["r0"][LEAVES] = due_s
    made.ask()
    made.totals["r0"][LEAVES] = 0.0  # it stays after all
    made.ask()
    assert watch.signals("chat", 2.0, made.now_s).notices == ()


def test_the_policy_replaces_what_has_a_notice(head: Head) -> None:
    made = Deployment()
    made.running = made.target = 2
    settled = busy(made, 300, rate=40.0, ongoing=24.0)
    made.totals["r0"][LEAVES] = made.now_s + 30
    made.ask()
    assert made.ask() >= settled  # of others: Serve counts the one that leaves for nothing
    (pool,) = head.told("chat").pools
    assert pool.leaving == 1


def test_a_first_replica_that_finds_no_machine_is_replaced_though_serve_asks_nobody(
    head: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At zero with requests Serve starts one by itself, and its policy is not asked any more."""
    options = {"model": "assistant", "boot_s": 600}
    tpu = Deployment("tpu", usd_per_hour=1, **options)
    gpu = Deployment("gpu", usd_per_hour=3, **options)
    for _ in range(5):
        assert (tpu.ask(), gpu.ask()) == (0, 0)
    for _ in range(pools.PASSED_OVER):
        assert gpu.ask() == 0  # the other is deleted, for all that is known
    head.wait["tpu"] = 1
    head.surroundings.read()
    for _ in range(5):
        assert gpu.ask() == 0  # it may start any moment
    clock_s = time.monotonic() + surroundings.PLACE_S
    monkeypatch.setattr(surroundings.time, "monotonic", lambda: clock_s)
    for _ in range(70):  # not forgotten, however long it takes
        assert gpu.ask() == 1


def test_a_machine_that_a_node_autoscaler_may_bring_is_waited_for(
    head: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Deployment(boot_s=600)
    made.target = 1
    head.wait["chat"], head.elastic = 1, True
    made.ask()
    head.surroundings.read()
    clock_s = time.monotonic() + surroundings.PLACE_S
    monkeypatch.setattr(surroundings.time, "monotonic", lambda: clock_s)
    assert head.surroundings.stuck("chat") == 0
    head.elastic = False
    head.surroundings.read()
    assert head.surroundings.stuck("chat") == 1


def test_cheap_pools_come_first_whoever_is_deployed_first(head: Head) -> None:
    """By what a request at once costs: the price of a replica alone says nothing."""
    options = {"model": "assistant"}
    small = Deployment("small", usd_per_hour=1, **options)
    large = Deployment("large", usd_per_hour=2, **options)
    large.config.target_ongoing_requests = 16
    small.ask(), large.ask()
    small.queued = 1.0
    for _ in range(3):
        large.ask(), small.ask()
    assert [pool.application for pool in head.told("assistant").pools] == ["large", "small"]
    assert (large.target, small.target) == (1, 0)


def test_options_are_strict() -> None:
    with pytest.raises(ValidationError, match="max_usd_per_hours"):
        Deployment(max_usd_per_hours=3)


def test_every_total_of_a_gate_is_known_to_the_policy() -> None:
    gate = Gate(1, 0)
    assert {"arrived_total", "refused_total", _waited(2.0)} <= gate.totals().keys()
    assert _waited(0.01) == "waited_0.1_total"
    assert _waited(3.0) == "waited_2_total"


def test_each_change_is_told_once_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="ray.serve.nearfield.scaling")
    made = Deployment()
    made.running = made.target = 1
    busy(made, 120, rate=30.0, ongoing=12.0)
    found = [line for line in caplog.messages if line.startswith("scaling chat: ")]
    assert found
    assert len(found) == len(set(found))
