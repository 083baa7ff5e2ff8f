"""The scaling policy whatever is signalled: bounds and budget hold, no data gives nothing up."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from nearfield.policy import mix, spot
from nearfield.policy.scale import (
    NO_DATA,
    Decision,
    Notice,
    PoolSignals,
    PoolSpec,
    ScalingSpec,
    Signals,
    State,
    step,
)

from tests.support.scaling import World

amounts = st.one_of(st.just(NO_DATA), st.just(0.0), st.floats(0, 1e6))
speeds = st.one_of(st.just(NO_DATA), st.floats(0.1, 1e4))


@st.composite
def specs(draw: st.DrawFn) -> ScalingSpec:
    pools = []
    for number in range(draw(st.integers(1, 4))):
        most = draw(st.integers(0, 40))
        pools.append(
            PoolSpec(
                f"p{number}",
                kind=draw(st.sampled_from(["spot", "on_demand"])),
                products=draw(st.sampled_from([frozenset(), frozenset({"x"})])),
                min_replicas=draw(st.integers(0, min(2, most))),
                max_replicas=most,
                usd_per_hour=draw(st.floats(0.0, 20.0)),
                target_ongoing=draw(st.floats(0.5, 64.0)),
                work_s=draw(speeds),
                boot_s=draw(st.floats(1.0, 900.0)),
            )
        )
    budget = draw(st.one_of(st.just(math.inf), st.floats(0.5, 200.0)))
    return ScalingSpec(
        tuple(pools), max_usd_per_hour=budget, idle_s=draw(st.sampled_from([0.0, 30.0, 300.0]))
    )


@st.composite
def histories(draw: st.DrawFn) -> tuple[ScalingSpec, list[Signals]]:
    spec = draw(specs())
    now_s, found = draw(st.floats(0, 1e9)), []
    for _ in range(draw(st.integers(1, 12))):
        now_s += draw(st.sampled_from([0.0, 0.1, 1.0, 5.0, 60.0, 1e5]))
        pools = []
        for pool in spec.pools:
            if draw(st.integers(0, 9)) == 0:
                continue
            running = draw(st.integers(0, 30))
            notices = tuple(
                Notice(f"r{i}", now_s + draw(st.floats(0, 120)))
                for i in range(draw(st.integers(0, min(3, running))))
            )
            pools.append(
                PoolSignals(
                    pool.name,
                    running,
                    starting=tuple(draw(st.lists(st.floats(0, 4000), max_size=3))),
                    draining=draw(st.integers(0, 3)),
                    ongoing=draw(amounts),
                    queued=draw(amounts),
                    arrivals=draw(amounts),
                    late=draw(amounts),
                    work_in=draw(amounts),
                    replica_work_s=draw(speeds),
                    queue_age_s=draw(amounts),
                    boots_s=tuple(draw(st.lists(st.floats(0, 2000), max_size=2))),
                    usd_per_hour=draw(st.one_of(st.just(NO_DATA), st.floats(0, 30))),
                    notices=notices,
                    lost=draw(st.integers(0, 3)),
                    refused=draw(st.integers(0, 2)),
                )
            )
        found.append(Signals(now_s, tuple(pools)))
    return spec, found


def price(spec: PoolSpec, signals: PoolSignals | None) -> float:
    given_usd = NO_DATA if signals is None else signals.usd_per_hour
    return spec.usd_per_hour if given_usd is NO_DATA else given_usd


def leaving(signals: PoolSignals | None) -> int:
    return 0 if signals is None else signals.draining + len(signals.notices)


@given(histories())
@settings(max_examples=40, deadline=None)
def test_bounds_budget_reasons_and_repeatability(
    history: tuple[ScalingSpec, list[Signals]],
) -> None:
    spec, steps = history
    state, again = State(), State()
    for signals in steps:
        decision, state = step(signals, state, spec)
        same, again = step(signals, again, spec)
        assert (decision, state) == (same, again)
        assert [t.name for t in decision.targets] == [p.name for p in spec.pools]
        seen = {p.name: p for p in signals.pools}
        bill = least = 0.0
        for target, pool in zip(decision.targets, spec.pools, strict=True):
            own = seen.get(pool.name)
            assert pool.min_replicas <= target.replicas <= pool.max_replicas
            assert target.reason.startswith(f"{target.replicas}: ")
            if own is not None:
                order = sorted(own.notices, key=lambda n: (n.due_s, n.replica))
                assert target.drain == tuple(n.replica for n in order)
            usd = price(pool, own)
            bill += usd * (target.replicas + leaving(own))
            least += usd * (pool.min_replicas + leaving(own))
        assert bill <= max(spec.max_usd_per_hour, least) + 1e-6
        assert all(math.isfinite(value) for value in decision.terms.values())
    plain = json.loads(json.dumps(state.to_plain(), allow_nan=False))
    assert State.from_plain(plain) == state


@given(histories())
@settings(max_examples=30, deadline=None)
def test_no_data_never_scales_down(history: tuple[ScalingSpec, list[Signals]]) -> None:
    spec, steps = history
    spec = replace(spec, max_usd_per_hour=math.inf)
    state, before = State(), None
    for signals in steps:
        decision, state = step(signals, state, spec)
        before = decision
    assert before is not None
    dark = tuple(PoolSignals(p.name, 1, ongoing=NO_DATA, arrivals=NO_DATA) for p in spec.pools[::2])
    after, _ = step(Signals(steps[-1].now_s + 3600.0, dark), state, spec)
    for old, new in zip(before.targets, after.targets, strict=True):
        assert new.replicas >= old.replicas


def settled(rate: float, boot_s: float, seconds: int = 1500) -> list[Decision]:
    spec = ScalingSpec((PoolSpec("gpu", max_replicas=200, boot_s=boot_s),), hold_s=120.0)
    made = World(spec, {"gpu": 10.0}, boot_s=boot_s).run(seconds, rate)
    return [decision for _, decision in made.decisions]


@given(st.floats(0.5, 900.0), st.sampled_from([5.0, 30.0, 120.0]))
@settings(max_examples=6, deadline=None)
def test_constant_load_settles_without_flapping(rate: float, boot_s: float) -> None:
    targets = [d.target("gpu").replicas for d in settled(rate, boot_s)]
    last = targets[-600:]
    # Less as trust grows; back by a few in a hundred at most, and not once a minute.
    assert all(b - min(last[:i]) <= max(1.0, 0.06 * b) for i, b in enumerate(last) if i)
    assert sum(a != b for a, b in pairwise(last)) <= 10
    assert last[0] - last[-1] <= max(1.0, 0.1 * last[-1])
    assert 10.0 * last[-1] >= rate


@given(st.floats(1.0, 400.0), st.floats(1.0, 3.0))
@settings(max_examples=4, deadline=None)
def test_more_load_never_has_fewer_replicas(rate: float, factor: float) -> None:
    less = settled(rate, 30.0, 900)[-1].target("gpu").replicas
    more = settled(rate * factor, 30.0, 900)[-1].target("gpu").replicas
    assert more >= less


offers = st.lists(
    st.builds(
        lambda work, usd, least, room, have, boot: mix.Offer(
            work, usd, min(have, least + room), least, least + room, boot
        ),
        st.floats(1.0, 100.0),
        st.floats(0.01, 50.0),
        st.integers(0, 2),
        st.integers(0, 12),
        st.integers(0, 14),
        st.floats(1.0, 900.0),
    ),
    min_size=1,
    max_size=5,
)


@given(offers, st.floats(0.0, 2000.0))
@settings(max_examples=100)
def test_a_mix_covers_what_it_can_and_no_replica_is_idle(
    found: list[mix.Offer], work_s: float
) -> None:
    counts = mix.cover(work_s, tuple(found))
    done = sum(c * o.work_s for c, o in zip(counts, found, strict=True))
    for count, offer in zip(counts, found, strict=True):
        assert offer.least <= count <= offer.most
        if count > offer.least:
            assert done - offer.work_s < work_s
    if done < work_s - 1e-6:
        assert list(counts) == [offer.most for offer in found]


@given(
    offers,
    st.lists(st.floats(0.0, 20.0), min_size=5, max_size=5),
    st.floats(0.0, 500.0),
    st.floats(0.0, 1.0),
)
@settings(max_examples=60)
def test_a_hedge_covers_no_less_than_the_mix(
    found: list[mix.Offer], exposed_usd: list[float], work_s: float, least: float
) -> None:
    exposed = [o._replace(exposed_usd=usd) for o, usd in zip(found, exposed_usd, strict=False)]
    counts = mix.hedged(work_s, least * work_s, tuple(exposed))
    assert all(o.least <= count <= o.most for o, count in zip(exposed, counts, strict=True))
    done = sum(o.work_s * count for o, count in zip(exposed, counts, strict=True))
    assert done >= min(work_s, sum(o.work_s * o.most for o in exposed)) - 1e-6


@given(
    st.integers(0, 30),
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 12)), min_size=1, max_size=5),
)
def test_spreading_keeps_the_total(total: int, zones: list[tuple[int, int]]) -> None:
    have, room = tuple(z[0] for z in zones), tuple(z[1] for z in zones)
    counts = spot.spread(total, have, room, (0.05,) * len(zones))
    assert sum(counts) == min(total, sum(room))
    assert all(0 <= c <= r for c, r in zip(counts, room, strict=True))
