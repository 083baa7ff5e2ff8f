"""How far the roofline is off: every published figure of the catalogue, predicted and compared.

    errors = [off(figure, ...) for figure in figures]
    summary(errors).median, summary(errors).worst

An error is a ratio, predicted over published, and counts alike in both directions: a prediction of
half and one of double are both off by a factor of two.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from nearfield.core.architecture import Architecture, architecture_of
from nearfield.core.catalog import Accelerator, Family, Figure, KnownModel, Shares
from nearfield.policy.roofline import Chip, Efficiency, Setup

ASSUMED = Efficiency(
    compute_16=0.6,
    compute_8=0.5,
    bandwidth=0.7,
    layer_s=40e-6,
    prompt_layer_s=100e-6,
    activations=16.0,
    reduce_s=20e-6,
)
"""Of families that no published figure was found for."""
UNMEASURED = 0.8
"""Share of a data sheet's rate that a matrix product reaches where nobody has measured it; those
that were measured reach 0.51 to 0.97, the median 0.79."""


@dataclass(frozen=True, slots=True)
class Off:
    """A figure and its prediction, in the figure's unit."""

    figure: Figure
    predicted: float

    @property
    def ratio(self) -> float:
        """Predicted over published."""
        return self.predicted / self.figure.value

    @property
    def error(self) -> float:
        """Above 0: by so much of the smaller one of the two they differ."""
        return max(self.ratio, 1.0 / self.ratio) - 1.0


@dataclass(frozen=True, slots=True)
class Summary:
    """Of many: the median and the worst error, and which that is."""

    count: int
    median: float
    worst: float
    worst_of: Off | None


def summary(errors: Iterable[Off]) -> Summary:
    """What to print."""
    each = sorted(errors, key=lambda off: off.error)
    if not each:
        return Summary(0, math.nan, math.nan, None)
    return Summary(len(each), statistics.median(o.error for o in each), each[-1].error, each[-1])


def efficiency_of(family: Family, shares: Mapping[Family, Shares]) -> Efficiency:
    """The shares that a family reaches: the catalogue's, else assumed."""
    found = shares.get(family)
    if found is None:
        return ASSUMED
    return Efficiency(
        compute_16=found.compute_16,
        compute_8=found.compute_8,
        bandwidth=found.bandwidth,
        layer_s=found.layer_us * 1e-6,
        prompt_layer_s=found.prompt_layer_us * 1e-6,
        activations=found.activations,
        reduce_s=found.reduce_us * 1e-6,
        link=found.link,
        source=found.basis,
    )


def chip_of(accelerator: Accelerator, efficiency: Efficiency) -> Chip:
    """An accelerator of the catalogue as the roofline knows it."""
    sixteen = accelerator.dense.get("bf16") or accelerator.dense.get("fp16")
    reached = UNMEASURED
    if accelerator.measured_bf16_tflops is not None and sixteen:
        reached = accelerator.measured_bf16_tflops / sixteen
    link = accelerator.interconnect
    return Chip(
        name=accelerator.name,
        memory_bytes=accelerator.memory_gb * 1e9,
        bandwidth_bytes_s=accelerator.bandwidth_gb_s * 1e9,
        rates={name: rate * 1e12 * reached for name, rate in accelerator.dense.items()},
        link_bytes_s=0.0 if link is None else link.gb_s * 1e9,
        group=1 if link is None else link.chips,
        efficiency=efficiency,
        mesh=link is not None and link.mesh,
    )


def architectures(known: Mapping[str, KnownModel]) -> dict[str, Architecture]:
    """The catalogue's models, by every name they have."""
    return {name: architecture_of(name, model.config) for name, model in known.items()}


def like(figures: Iterable[Figure], models: Mapping[str, Architecture], task: str) -> list[Figure]:
    """Those of models that do the same: how far off encoders are says nothing of generators."""
    return [figure for figure in figures if models[figure.model].task == task]


def predict(figure: Figure, setup: Setup) -> float:
    """What the roofline says instead of the figure, in its unit."""
    n, m = float(figure.tokens_in), float(figure.tokens_out)
    if figure.metric == "ttft_ms":
        return 1000.0 * setup.prefill_s(n, figure.batch or 1)
    running = figure.batch or max(1, setup.sequences(n + m))
    if figure.batch is None and figure.most is not None:
        running = min(running, figure.most)
    step_s = setup.step_s(running, figure.cache or n + m / 2.0)
    if figure.metric == "tpot_ms":
        waits_s = (running - 1) * setup.prefill_s(n) / m if running > 1 else 0.0
        return 1000.0 * (step_s + waits_s)
    prompts_s = 0.0 if figure.cached_prompt else setup.prefill_s(n, running)
    whole_s = prompts_s + m * step_s
    return whole_s if figure.metric == "latency_s" else running * m / whole_s


def setup_of(figure: Figure, model: Architecture, chip: Chip) -> Setup:
    """What a figure was measured on."""
    kv_bytes = 2.0 if figure.kv == "bf16" else 1.0
    return Setup(model, chip, figure.precision, figure.chips, kv_bytes)


def validate(
    figures: Sequence[Figure],
    accelerators: Mapping[str, Accelerator],
    models: Mapping[str, Architecture],
    shares: Mapping[Family, Shares],
) -> list[Off]:
    """Every figure, predicted.

    Raises:
        KeyError: a figure names an accelerator or a model that the catalogue lacks.
    """
    found = []
    for figure in figures:
        accelerator = accelerators[figure.accelerator]
        chip = chip_of(accelerator, efficiency_of(accelerator.family, shares))
        setup = setup_of(figure, models[figure.model], chip)
        found.append(Off(figure, predict(figure, setup)))
    return found
