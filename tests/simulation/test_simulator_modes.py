"""Both modes of the simulator against each other, and against queues that are known by heart."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from nearfield.simulator.events import EventWorld
from nearfield.simulator.fluid import FluidWorld
from nearfield.simulator.result import Plain, result
from nearfield.simulator.scenario import Scenario

HERE = Path()
L4 = {
    "engine": "l4",
    "prefill_tokens_per_s": 9000,
    "step_ms": 20,
    "step_ms_per_sequence": 0.3,
    "max_running": 32,
}


def scenario(
    *,
    replicas: int,
    seconds: float,
    arrivals: dict[str, Any],
    engine: dict[str, Any] = L4,
    prompt: Any = None,
    answer: Any = None,
) -> Scenario:
    return Scenario.model_validate(
        {
            "simulation": "modes",
            "duration_s": seconds,
            "regions": [{"region": "eu", "jurisdiction": "eu"}],
            "local_rtt_ms": 0,
            "engines": [engine],
            "models": [{"model": "chat", "scaling": {"policy": "static"}}],
            "pools": [
                {
                    "pool": "l4",
                    "model": "chat",
                    "engine": engine["engine"],
                    "usd_per_hour": 1,
                    "max_replicas": 500,
                    "initial_replicas": replicas,
                }
            ],
            "traffic": [
                {
                    "traffic": "t",
                    "model": "chat",
                    "arrivals": arrivals,
                    "timeout_s": 1000,
                    "input_tokens": prompt or {"kind": "lognormal", "p50": 500, "p95": 2000},
                    "output_tokens": answer or {"kind": "lognormal", "p50": 100, "p95": 300},
                }
            ],
        }
    )


def run(kind: type[EventWorld] | type[FluidWorld], of: Scenario) -> Plain:
    world = kind(of, HERE)
    world.run()
    return result(world)


def erlang_c(servers: int, offered: float) -> float:
    """The share of requests that wait (Erlang, 1917)."""
    blocked = 1.0
    for k in range(1, servers + 1):
        blocked = offered * blocked / (k + offered * blocked)
    busy = offered / servers
    return blocked / (1.0 - busy + busy * blocked)


@pytest.mark.parametrize(("servers", "busy"), [(1, 0.5), (4, 0.7), (16, 0.8)])
def test_events_are_an_m_m_c_queue_where_they_should_be(servers: int, busy: float) -> None:
    """One replica of so many places whose speed company does not change, answers exponential, and
    so short that no wait is one for `policy.limit`, which would end it."""
    step_s, tokens = 1e-5, 1000.0
    hold_s = step_s * tokens
    rate_rps = busy * servers / hold_s
    seconds = 1000 * (10 + servers) / rate_rps
    engine = {
        "engine": "exp",
        "prefill_tokens_per_s": 1e12,
        "step_ms": 1000 * step_s,
        "prefill_chunk_tokens": 10**9,
        "max_running": servers,
        "max_queued": 60_000,
    }
    got = run(
        EventWorld,
        scenario(
            replicas=1,
            seconds=seconds,
            arrivals={"kind": "poisson", "rate_rps": rate_rps},
            engine=engine,
            prompt={"kind": "fixed", "value": 1},
            answer={"kind": "exponential", "mean": tokens},
        ),
    )
    share = erlang_c(servers, busy * servers)
    wait_s = share * hold_s / (servers * (1 - busy))
    mean_s = got["traffic"][0]["ttft_s"]["mean"] - step_s
    print(f"\nM/M/{servers} at {busy}: waits {mean_s:.3f} s, by Erlang's formula {wait_s:.3f} s")
    assert mean_s == pytest.approx(wait_s, rel=0.25)


CASES = {
    "few replicas, little load": (3, 1000, {"kind": "poisson", "rate_rps": 5}),
    "few replicas, much load": (3, 700, {"kind": "poisson", "rate_rps": 12}),
    "a dozen, half load": (12, 250, {"kind": "poisson", "rate_rps": 40}),
    "thirty": (30, 120, {"kind": "poisson", "rate_rps": 100}),
    "in clumps": (6, 500, {"kind": "gamma", "rate_rps": 18, "cv": 2.5}),
    "bursts": (
        12,
        600,
        {"kind": "burst", "base_rps": 15, "burst_rps": 45, "every_s": 120, "lasts_s": 60},
    ),
}
TOTAL, MEDIAN, TAIL, TAIL_S = 0.07, 0.15, 0.25, 0.03
"""How far the modes may differ, as docs/simulate.md states it: of the whole time, its median and
p95; of the first token, the median, and p95 (that, or so many seconds)."""


@pytest.mark.parametrize("name", CASES)
def test_the_modes_agree(name: str) -> None:
    replicas, seconds, arrivals = CASES[name]
    of = scenario(replicas=replicas, seconds=seconds, arrivals=arrivals)
    events, fluid = run(EventWorld, of), run(FluidWorld, of)
    lines = []
    for key, q, share, slack_s in (
        ("total_s", "p50", TOTAL, 0.0),
        ("total_s", "p95", TOTAL, 0.0),
        ("ttft_s", "p50", MEDIAN, 0.0),
        ("ttft_s", "p95", TAIL, TAIL_S),
    ):
        a, b = events["traffic"][0][key][q], fluid["traffic"][0][key][q]
        lines.append((f"{key} {q}: {a:.3f} {b:.3f} {b / a - 1:+.1%}", a, b, share, slack_s))
    print(f"\n{name}: " + ", ".join(line[0] for line in lines))
    for line, a, b, share, slack_s in lines:
        assert math.isclose(a, b, rel_tol=share, abs_tol=slack_s), line
    assert fluid["cost"]["usd"] == pytest.approx(events["cost"]["usd"], rel=1e-6)


def test_an_overload_is_the_same_in_both() -> None:
    """More than the replicas can do for a while: the backlog, and who is late of it."""
    arrivals = {"kind": "burst", "base_rps": 8, "burst_rps": 60, "every_s": 200, "lasts_s": 60}
    of = scenario(replicas=6, seconds=900, arrivals=arrivals)
    events, fluid = run(EventWorld, of), run(FluidWorld, of)
    late = [each["requests"]["late_fraction"] for each in (events, fluid)]
    done = [each["requests"]["done"] for each in (events, fluid)]
    print(f"\noverload: late {late[0]:.3f} and {late[1]:.3f}, done {done[0]} and {done[1]}")
    assert late[0] > 0.05
    assert late[1] == pytest.approx(late[0], abs=0.1)


@pytest.mark.parametrize("tick_s", [1.0, 5.0])
def test_who_is_sent_abroad_is_the_same_in_both(tick_s: float) -> None:
    """One region has more to do than its replicas can, the other one less: also where a tick is
    longer than a request takes, gateways must not believe in an overload that is none."""
    answer = {"kind": "lognormal", "p50": 20, "p95": 60}
    one = scenario(replicas=4, seconds=200, arrivals={"kind": "poisson", "rate_rps": 48})
    plain = one.model_dump(exclude_none=True)
    plain["tick_s"] = tick_s
    plain["regions"] = [
        {"region": "eu", "jurisdiction": "eu", "rtt_ms": {"us": 80.0}},
        {"region": "us", "jurisdiction": "us"},
    ]
    busy = plain["traffic"][0] | {"origin": ["eu"], "output_tokens": answer}
    calm = busy | {
        "traffic": "calm",
        "origin": ["us"],
        "arrivals": {"kind": "poisson", "rate_rps": 12.0},
    }
    plain["traffic"] = [busy, calm]
    of = Scenario.model_validate(plain)
    shares = [
        [each["abroad"] / each["done"] for each in run(kind, of)["traffic"]]
        for kind in (EventWorld, FluidWorld)
    ]
    print(f"\nabroad, tick {tick_s} s: events {shares[0]}, fluid {shares[1]}")
    assert shares[0][0] > 0.1
    for events, fluid in zip(*shares, strict=True):
        assert fluid == pytest.approx(events, abs=0.15)
