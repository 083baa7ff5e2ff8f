"""The placements that nearfield's spot policy is compared with do what their papers say."""

from __future__ import annotations

from nearfield.policy.scale import PoolSignals, PoolSpec

from benchmarks.autoscaling.spot_baselines import Base, SpotHedge, SpotOnly

PRICES = {"a": 1, "b": 2, "c": 3}
SPECS = [PoolSpec(z, kind="spot", max_replicas=9, usd_per_hour=u) for z, u in PRICES.items()]


def seen(*pools: PoolSignals) -> list[tuple[PoolSpec, PoolSignals]]:
    return list(zip(SPECS, pools, strict=True))


def test_spothedge_spreads_and_leaves_out_a_zone_that_takes_machines_back() -> None:
    policy = SpotHedge(2)
    none = seen(*(PoolSignals(z, 0) for z in "abc"))
    assert policy.place(4, 0.0, none) == {"a": 2, "b": 2, "c": 2}
    assert policy.on_demand(4, [pool for _, pool in none]) == 4  # until spot is ready
    lost = seen(PoolSignals("a", 0, lost=2), PoolSignals("b", 2), PoolSignals("c", 2))
    assert policy.place(4, 1.0, lost) == {"a": 0, "b": 3, "c": 3}
    assert policy.on_demand(4, [pool for _, pool in lost]) == 2
    back = seen(PoolSignals("a", 1, boots_s=(60.0,)), PoolSignals("b", 2), PoolSignals("c", 2))
    assert policy.place(4, 2.0, back) == {"a": 2, "b": 2, "c": 2}


def test_with_fewer_than_two_zones_left_spothedge_tries_all_again() -> None:
    policy = SpotHedge(0)
    refused = seen(*(PoolSignals(z, 0, refused=1) for z in "abc"))
    assert sum(policy.place(3, 0.0, refused).values()) == 3


def test_naive_spot_and_a_base_on_demand() -> None:
    none = seen(*(PoolSignals(z, 0) for z in "abc"))
    assert SpotOnly().place(5, 0.0, none) == {"a": 2, "b": 2, "c": 1}
    assert SpotOnly(1).place(5, 0.0, none) == {"a": 5, "b": 0, "c": 0}
    base = Base(0.5)
    refused = seen(PoolSignals("a", 0, refused=1), PoolSignals("b", 0), PoolSignals("c", 0))
    assert base.on_demand(5, ()) == 3
    assert base.place(5, 0.0, refused) == {"a": 0, "b": 1, "c": 1}
