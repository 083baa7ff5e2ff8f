"""`nearfield pools plan` without a scenario: products as typed, an engine from the roofline."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nearfield.core.errors import BadRequest

if TYPE_CHECKING:
    from nearfield.core.catalog_files import Catalog
    from nearfield.simulator.scenario import Scenario

_PRODUCT = re.compile(
    r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)=(?P<base>\d+(?:\.\d+)?)(?:\.\.(?P<burst>\d+(?:\.\d+)?))?"
    r":(?P<prompt>\d+)/(?P<answer>\d+)"
)
DURATION_S = 3600.0
BURST_EVERY_S, BURST_LASTS_S = 480.0, 60.0
"""Of products that are given two rates. Assumed."""
P95_TO_P50 = 3.0
MEAN_TO_P50 = 1.25
"""Of lengths: a lognormal's with that p95. Assumed."""
CHUNK_TOKENS, MOST_RUNNING = 1024, 64
MANY = 33
UTILISATION = 0.35
"""Of the shared pool as it is, where nobody says how large it is. Assumed."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a replica runs on. name: `aws/us-east-1/g6.xlarge`."""

    name: str
    usd_per_hour: float
    accelerator: str
    chips: int


def case_of(
    products: Sequence[str], catalog: Catalog, *, model: str, precision: str | None,
    machine: Machine, replicas: int | None,
) -> Scenario:  # fmt: skip
    """One pool of that machine, shared by those products.

    Raises:
        BadRequest: a product is no `NAME=RPS:IN/OUT`, or the model does not fit the machine.
    """
    from nearfield.simulator.scenario import Scenario

    engine = _engine(catalog, model, precision, machine)
    traffic = [_traffic(text) for text in products]
    names = [each["product"] for each in traffic]
    for name in names:
        if names.count(name) > 1:
            raise BadRequest(f"--product: {name} stands there twice", param="product")
    served = re.sub(r"[^A-Za-z0-9._-]+", "-", model.removesuffix("/").rpartition("/")[2])
    pool = {"pool": "everybody", "model": served, "engine": machine.accelerator,
            "max_replicas": 100_000, "usd_per_hour": machine.usd_per_hour}  # fmt: skip
    data: dict[str, Any] = {
        "simulation": f"{served}-on-{machine.name.rpartition('/')[2]}",
        "duration_s": DURATION_S,
        "regions": [{"region": "here", "jurisdiction": "here"}],
        "engines": [{"engine": machine.accelerator, **engine}],
        "models": [{"model": served}],
        "pools": [pool],
        "traffic": [{"model": served, **each} for each in traffic],
    }
    scenario = Scenario.model_validate(data)
    if replicas is None:
        from pathlib import Path

        from nearfield.simulator.neighbours import Case

        replicas = Case(scenario, Path()).enough(UTILISATION)
    data["pools"] = [{**pool, "initial_replicas": replicas}]
    return Scenario.model_validate(data)


def _traffic(text: str) -> dict[str, Any]:
    found = _PRODUCT.fullmatch(text)
    if found is None:
        raise BadRequest(
            f"--product: {text!r} is none: write NAME=RPS:IN/OUT, or NAME=BASE..BURST:IN/OUT, as "
            "chat=9:400/120 or reports=0.2..2.5:6000/180",
            param="product",
        )
    base, burst = float(found["base"]), found["burst"]
    arrivals: dict[str, Any] = {"kind": "poisson", "rate_rps": base}
    if burst is not None:
        arrivals = {
            "kind": "burst", "base_rps": base, "burst_rps": float(burst),
            "every_s": BURST_EVERY_S, "lasts_s": BURST_LASTS_S,
        }  # fmt: skip
    return {
        "traffic": found["name"],
        "product": found["name"],
        "arrivals": arrivals,
        "input_tokens": _lengths(int(found["prompt"])),
        "output_tokens": _lengths(int(found["answer"])),
    }


def _lengths(mean: int) -> dict[str, Any]:
    if mean == 0:
        return {"kind": "fixed", "value": 0}
    p50 = mean / MEAN_TO_P50
    return {"kind": "lognormal", "p50": p50, "p95": P95_TO_P50 * p50}


def _engine(catalog: Catalog, name: str, precision: str | None, machine: Machine) -> dict[str, Any]:
    """Timings of one replica, by the roofline that `nearfield plan` uses."""
    from nearfield.cli.market import kinds_of
    from nearfield.cli.model_sizes import model_size
    from nearfield.policy.roofline import Setup

    size = model_size(name, catalog.models)
    accelerator, chips = machine.accelerator, machine.chips
    kind = kinds_of(catalog)[accelerator]
    wanted = kind.native(precision or size.precision)
    if kind.native_16 is None or kind.chip.rate(wanted) is None:
        raise BadRequest(
            f"--precision {wanted}: no rate of {accelerator} is published for it: choose another "
            "precision, or another --price",
            param="precision",
        )
    setup = Setup(size.architecture, kind.chip, wanted, chips)
    kv_tokens = setup.sequences(1.0)
    if kv_tokens < CHUNK_TOKENS:
        raise BadRequest(
            f"--price: {name} in {wanted} does not fit {chips} {accelerator}: choose a larger "
            "machine, or --precision fp8",
            param="price",
        )
    one_s, many_s = setup.step_s(1, CHUNK_TOKENS), setup.step_s(MANY, CHUNK_TOKENS)
    return {
        # As if chunks were computed by themselves: they share a step's reading of the weights.
        "prefill_tokens_per_s": CHUNK_TOKENS / setup.prefill_s(CHUNK_TOKENS),
        "step_ms": 1000 * one_s,
        "step_ms_per_sequence": 1000 * (many_s - one_s) / (MANY - 1),
        "prefill_chunk_tokens": CHUNK_TOKENS,
        "max_running": MOST_RUNNING,
        "kv_tokens": kv_tokens,
    }
