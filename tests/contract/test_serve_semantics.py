"""Our model of Serve's wrapper around a policy, against the installed Ray's own code."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nearfield.policy.serve_semantics import ServeOptions, ServeState, serve_target

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's use of pydantic is not ours to mend
    from ray.serve import autoscaling_policy
    from ray.serve.config import AutoscalingConfig, AutoscalingContext


class Installed:
    """One deployment's policy as Serve's controller runs it: wrapped, then clipped."""

    def __init__(self, options: ServeOptions, monkeypatch: pytest.MonkeyPatch) -> None:
        self._config = AutoscalingConfig(
            min_replicas=options.min_replicas,
            max_replicas=options.max_replicas,
            upscale_delay_s=options.upscale_delay_s,
            downscale_delay_s=options.downscale_delay_s,
            downscale_to_zero_delay_s=options.downscale_to_zero_delay_s,
            upscaling_factor=options.upscaling_factor,
            downscaling_factor=options.downscaling_factor,
        )
        self._state: dict[str, Any] = {}
        self._desired = 0.0
        self.calls = 0
        self._policy = autoscaling_policy._apply_autoscaling_config(self._ask)
        self._clock = monkeypatch

    def _ask(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        self.calls += 1
        return self._desired, {"own": 1}

    def target(
        self, desired: float, *, running: int, target: int, requests: float, now_s: float
    ) -> int:
        self._desired = desired
        self._clock.setattr(autoscaling_policy.time, "time", lambda: now_s)
        context = AutoscalingContext(
            deployment_id=None,  # type: ignore[arg-type]
            deployment_name="replica",
            app_name="chat",
            current_num_replicas=running,
            target_num_replicas=target,
            running_replicas=[],
            total_num_requests=requests,
            total_queued_requests=0.0,
            aggregated_metrics={},
            raw_metrics={},
            capacity_adjusted_min_replicas=self._config.min_replicas,
            capacity_adjusted_max_replicas=self._config.max_replicas,
            policy_state=dict(self._state),
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=now_s,
            config=self._config,
        )
        decided, self._state = self._policy(context)
        # DeploymentAutoscalingState.apply_bounds, without a target capacity.
        least, most = self._config.min_replicas, self._config.max_replicas
        return max(least, min(most, math.ceil(decided)))


delays = st.sampled_from([0.0, 5.0, 30.0])


@st.composite
def runs(draw: st.DrawFn) -> tuple[ServeOptions, list[tuple[float, int, float, float]]]:
    most = draw(st.integers(1, 12))
    options = ServeOptions(
        min_replicas=draw(st.integers(0, min(3, most))),
        max_replicas=most,
        upscale_delay_s=draw(delays),
        downscale_delay_s=draw(delays),
        downscale_to_zero_delay_s=draw(st.one_of(st.none(), delays)),
        upscaling_factor=draw(st.sampled_from([0.3, 1.0, 2.5])),
        downscaling_factor=draw(st.sampled_from([0.3, 1.0, 2.5])),
    )
    step = st.tuples(
        st.one_of(st.integers(0, 15).map(float), st.floats(0, 15)),
        st.integers(0, 12),
        st.sampled_from([0.0, 0.0, 3.0]),
        st.sampled_from([0.1, 1.0, 5.0, 31.0]),
    )
    return options, draw(st.lists(step, min_size=1, max_size=30))


@given(runs())
@settings(max_examples=150, deadline=None)
def test_it_answers_as_the_installed_ray_does(
    run: tuple[ServeOptions, list[tuple[float, int, float, float]]],
) -> None:
    options, steps = run
    with pytest.MonkeyPatch.context() as monkeypatch:
        installed = Installed(options, monkeypatch)
        state, target, now_s, calls = ServeState(), options.min_replicas, 1000.0, 0

        for desired, running, requests, elapsed_s in steps:
            now_s += elapsed_s

            def ask(desired: float = desired) -> float:
                nonlocal calls
                calls += 1
                return desired

            expected = installed.target(
                desired, running=running, target=target, requests=requests, now_s=now_s
            )
            target, state = serve_target(
                ask,
                running=running,
                target=target,
                requests=requests,
                now_s=now_s,
                state=state,
                options=options,
            )
            assert target == expected
            assert calls == installed.calls


def test_at_zero_with_traffic_the_policy_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes our policy learn of the first request only once a replica runs."""
    options = ServeOptions(min_replicas=0, max_replicas=8, upscale_delay_s=0, downscale_delay_s=0)
    installed = Installed(options, monkeypatch)
    assert installed.target(7, running=0, target=0, requests=9.0, now_s=1.0) == 1
    assert installed.calls == 0
