"""Plans on random wishes: more is never cheaper, and what is chosen fits, suffices and is the
cheapest of what does."""

from __future__ import annotations

import dataclasses
import math

from hypothesis import given, settings
from hypothesis import strategies as st
from nearfield.cli.market import kinds_of
from nearfield.core.catalog_files import read_catalog
from nearfield.policy.plan import (
    Choice,
    Machine,
    Market,
    RegionPlan,
    Wishes,
    Workload,
    plan,
    price,
    replicas_of,
)
from nearfield.policy.validate import architectures

CATALOG = read_catalog()
MODELS = architectures(CATALOG.models)
KINDS = kinds_of(CATALOG)
NAMES = [
    "llama-3.1-8b", "qwen3-30b-a3b", "mixtral-8x7b", "llama-3.1-70b", "deepseek-v3", "bge-large"
]  # fmt: skip
CHOSEN = ["L4", "L40S", "A100-80GB", "H100-80GB", "TPU-v5e", "MI300X", "T4", "EPYC-9654", "WSE-3"]
MARKET_KINDS = {name: KINDS[name] for name in CHOSEN}

usd = st.floats(0.1, 20.0)


@st.composite
def machines(draw: st.DrawFn) -> list[Machine]:
    found = []
    for name in draw(st.lists(st.sampled_from(CHOSEN), min_size=1, max_size=6)):
        count = draw(st.sampled_from([1, 2, 4, 8]))
        on_demand = draw(usd) * count
        spot = draw(st.one_of(st.none(), st.floats(0.1, 1.0)))
        found.append(
            Machine(
                "p", "r", f"{name}-{count}", name, count, on_demand,
                None if spot is None else on_demand * spot, draw(st.booleans()),
            )
        )  # fmt: skip
    return found


workloads = st.builds(
    Workload,
    rps=st.floats(0.01, 500),
    tokens_in=st.integers(1, 6000),
    tokens_out=st.integers(1, 1500),
    context=st.just(8000),
    ttft_slo_s=st.one_of(st.just(math.inf), st.floats(0.02, 20)),
    tpot_slo_s=st.one_of(st.just(math.inf), st.floats(0.003, 0.5)),
)
wishes = st.builds(
    Wishes,
    precisions=st.sampled_from([("bf16",), ("fp8",), ("bf16", "fp8", "int4")]),
    margin=st.floats(0, 1),
    headroom=st.floats(0, 1),
    spot=st.booleans(),
    on_demand_share=st.floats(0, 1),
    spot_extra=st.floats(0, 1),
    most=st.sampled_from([1, 64, 256]),
)


def asked(name: str, work: Workload) -> Workload:
    """Encoders answer with nothing."""
    return dataclasses.replace(work, tokens_out=0) if MODELS[name].task == "embed" else work


def made(name: str, have: list[Machine], work: Workload, how: Wishes) -> RegionPlan:
    work = asked(name, work)
    (found,) = plan(MODELS[name], {"r": work}, Market(MARKET_KINDS, {"r": have}), how)
    return found


def cost(found: RegionPlan) -> float:
    return math.inf if found.choice is None else found.choice.usd_h


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(NAMES), machines(), workloads, wishes, st.floats(1, 20))
def test_more_requests_are_never_cheaper(
    name: str, have: list[Machine], work: Workload, how: Wishes, times: float
) -> None:
    more = dataclasses.replace(work, rps=work.rps * times)
    assert cost(made(name, have, more, how)) >= cost(made(name, have, work, how)) - 1e-9


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(NAMES), machines(), workloads, wishes, st.floats(0.1, 1), st.floats(0.1, 1))
def test_a_tighter_slo_is_never_cheaper(
    name: str, have: list[Machine], work: Workload, how: Wishes, first: float, each: float
) -> None:
    tighter = dataclasses.replace(
        work, ttft_slo_s=work.ttft_slo_s * first, tpot_slo_s=work.tpot_slo_s * each
    )
    assert cost(made(name, have, tighter, how)) >= cost(made(name, have, work, how)) - 1e-9


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(NAMES), machines(), workloads, wishes)
def test_what_is_chosen_fits_suffices_and_keeps_the_slo(
    name: str, have: list[Machine], work: Workload, how: Wishes
) -> None:
    found = made(name, have, work, how)
    options = [found.choice, *(lost.best for lost in found.lost)]
    for choice in options:
        if choice is not None:
            check(choice, work, how)


def check(choice: Choice, work: Workload, how: Wishes) -> None:
    setup, load = choice.replica.setup, choice.replica.load
    chip = setup.chip
    assert setup.architecture.heads % setup.chips == 0
    assert setup.chips <= chip.group or setup.chips == 1
    assert choice.machine.by_chip or setup.chips <= choice.machine.count
    used = setup.weight_bytes / setup.chips
    used += load.running * setup.cache_bytes(work.tokens_in + work.tokens_out)
    assert used <= chip.memory_bytes
    assert setup.sequences(work.context) >= 1
    assert load.ttft_s * (1 + how.margin) <= work.ttft_slo_s * (1 + 1e-9)
    assert load.tpot_s * (1 + how.margin) <= work.tpot_slo_s * (1 + 1e-9)
    assert load.running <= how.most
    assert sum(part.replicas for part in choice.parts) >= choice.needed
    assert choice.needed * load.rps >= work.rps * (1 + how.headroom) * (1 - 1e-6)
    for part in choice.parts:
        assert part.capacity == "on-demand" or how.spot
        each = 1 if choice.machine.by_chip else choice.machine.count // setup.chips
        assert part.machines * each >= part.replicas
    if len(choice.parts) == 2:
        kept = next(part for part in choice.parts if part.capacity == "on-demand")
        assert kept.replicas >= how.on_demand_share * choice.needed - 1e-6


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(NAMES), machines(), workloads, wishes)
def test_the_cheapest_that_can_is_chosen(
    name: str, have: list[Machine], work: Workload, how: Wishes
) -> None:
    """Against every replica on every machine, priced one by one."""
    work = asked(name, work)
    costs = [
        choice.usd_h
        for machine in have
        for replica in replicas_of(MODELS[name], MARKET_KINDS[machine.accelerator], work, how)[0]
        if (choice := price(replica, machine, work.rps, how)) is not None
    ]
    found = made(name, have, work, how)
    assert math.isclose(cost(found), min(costs, default=math.inf), rel_tol=1e-9)
    assert {lost.accelerator for lost in found.lost} | (
        {found.choice.machine.accelerator} if found.choice else set()
    ) == set(MARKET_KINDS), "everything has its reason"
    assert all(lost.reason for lost in found.lost)
