"""How fast a language model can be on a chip: a roofline model of serving, from data sheets.

    prefill    compute-bound: 2 operations per parameter and token, and the attention matrix
    decode     bandwidth-bound: the weights once per step, and every running sequence's KV cache
    both       tensor parallelism's two all-reduces a layer, and a fixed cost per layer

(S. Williams et al., "Roofline", CACM 2009; for transformers R. Pope et al., "Efficiently Scaling
Transformer Inference", arXiv:2211.05102.) The parts of a step run one after the other, so their
times are added; within a part the larger of computing and reading counts.

What data sheets promise nobody reaches. `Efficiency` holds the shares that are reached, one set
for a family of chips, fitted to published benchmarks (`scripts/fit_roofline.py`); how far the
model is off, on those it was fitted to and on others, is measured by `nearfield.policy.validate`
and printed with every plan.

Batching is taken as engines with continuous batching do it: a prompt is computed ahead of the
running sequences, which wait for it. With b requests always running, each of n tokens in and m
out, one round is b prompts and m steps:

    output rate          b m / (b P + m S(b))
    time per token       S(b) + (b - 1) P / m
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from nearfield.core.architecture import Architecture

WEIGHT_BYTES: dict[str, float] = {
    "fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5625
}  # fmt: skip
"""Bytes a parameter, by precision of the weights; int4 with one 16-bit scale for each 32, unpacked
and computed with in 16 bits. `bf16` and `fp16` are one where a chip has only the other."""

USABLE = 0.9
"""Share of a chip's memory for weights and cache; vLLM's default `gpu_memory_utilization`."""
WORKSPACE = 0.03
"""Share of it for activations and graphs, assumed."""


@dataclass(frozen=True, slots=True)
class Efficiency:
    """What a family of chips reaches of its data sheets.

    Attributes:
        compute_16: share of the highest measured rate of a matrix product in 16 bits; compute_8:
            likewise of the 8-bit rate.
        bandwidth: share of the memory's.
        layer_s: fixed time per layer of a step: kernels' starts, everything small; prompt_layer_s:
            likewise of a prompt, which no recorded graph of kernels serves.
        activations: how often a token's activations pass through memory, per layer.
        reduce_s: fixed time of an all-reduce among chips. link: share of the link's rate.
        source: "fitted" to published figures, or "assumed" where there are none.
    """

    compute_16: float
    compute_8: float
    bandwidth: float
    layer_s: float
    prompt_layer_s: float
    activations: float
    reduce_s: float
    link: float = 0.7
    source: Literal["fitted", "assumed"] = "assumed"


@dataclass(frozen=True, slots=True)
class Chip:
    """An accelerator in numbers: bytes, bytes/s, operations/s.

    Attributes:
        rates: highest rate of a dense matrix product by precision: measured where somebody has,
            else the data sheet's. Empty where none is published.
        link_bytes_s: of one chip to all others of the largest group, one direction; 0: no link.
        group: how many chips that is. mesh: with a wire to each, so that fewer chips have less.
    """

    name: str
    memory_bytes: float
    bandwidth_bytes_s: float
    rates: dict[str, float]
    link_bytes_s: float
    group: int
    efficiency: Efficiency
    mesh: bool = False

    def link(self, chips: int) -> float:
        """Bytes/s of one chip to the others of a group of so many."""
        share = (chips - 1) / (self.group - 1) if self.mesh else 1.0
        return self.link_bytes_s * share * self.efficiency.link

    def rate(self, precision: str) -> float | None:
        """Operations/s with weights of that precision; None if it does not compute with them."""
        sixteen = self.rates.get("bf16") or self.rates.get("fp16")
        if precision in ("bf16", "fp16", "int4"):
            return None if sixteen is None else sixteen * self.efficiency.compute_16
        if precision == "fp32":
            full = self.rates.get("fp32")
            return None if full is None else full * self.efficiency.compute_16
        eight = self.rates.get(precision)
        return None if eight is None else eight * self.efficiency.compute_8


@dataclass(frozen=True, slots=True)
class Setup:
    """A model in a precision on a group of equal chips: one replica.

    Attributes:
        chips: tensor parallelism. kv_bytes: of one element of the cache.
    """

    architecture: Architecture
    chip: Chip
    precision: str
    chips: int = 1
    kv_bytes: float = 2.0

    @property
    def weight_bytes(self) -> float:
        """Of all weights. Embedding and head stay in 16 bits where the rest is quantised."""
        model = self.architecture
        kept = model.lookup + model.head
        return (
            max(2.0, WEIGHT_BYTES[self.precision]) * kept
            + (model.parameters - kept) * WEIGHT_BYTES[self.precision]
        )

    def cache_bytes(self, tokens: float) -> float:
        """On one chip, for one sequence. Heads are split over chips, as far as there are any."""
        shards = min(self.chips, self.architecture.kv_shards)
        return self.architecture.cached(tokens) * self.kv_bytes / shards

    @property
    def room_bytes(self) -> float:
        """What one chip has left for the cache; negative: the weights do not fit."""
        usable = self.chip.memory_bytes * USABLE * (1.0 - WORKSPACE)
        return usable - self.weight_bytes / self.chips

    def sequences(self, tokens: float) -> int:
        """How many sequences of so many tokens fit at once; 0: not even one."""
        room = self.room_bytes
        if room <= 0:
            return 0
        each = self.cache_bytes(tokens)
        return int(room / each) if each > 0 else 1_000_000

    def prefill_s(self, tokens: float, prompts: float = 1.0) -> float:
        """Computing prompts of so many tokens each, together.

        Raises:
            ValueError: no compute rate of this chip is published for the precision.
        """
        model, chip = self.architecture, self.chip
        total = tokens * prompts
        operations = 2.0 * model.active * total
        causal = 1.0 if model.task == "embed" else 0.5
        operations += 2.0 * causal * total * model.attention_width * model.reach(tokens)
        if model.task == "generate":  # the head computes the last position only
            operations -= 2.0 * model.head * (total - prompts)
        compute_s = operations / (self._rate() * self.chips)
        read_s = self._weights_s(total) + self.cache_bytes(total) / self._bandwidth()
        return max(compute_s, read_s) + self._around_s(total, chip.efficiency.prompt_layer_s)

    def step_s(self, running: float, context: float) -> float:
        """One token more for so many running sequences of so many tokens."""
        model = self.architecture
        weights_s = self._weights_s(running)
        rate = self.chip.rate(self.precision)
        if rate is not None:
            weights_s = max(weights_s, 2.0 * model.active * running / (rate * self.chips))
        attention_s = running * self.cache_bytes(context) / self._bandwidth()
        around_s = self._around_s(running, self.chip.efficiency.layer_s)
        return weights_s + attention_s + around_s

    def round_s(self, running: float, tokens_in: float, tokens_out: float) -> tuple[float, float]:
        """Times of a prompt, and of a step with so many running in the middle of their answers."""
        return self.prefill_s(tokens_in), self.step_s(running, tokens_in + tokens_out / 2.0)

    def _rate(self) -> float:
        rate = self.chip.rate(self.precision)
        if rate is None:
            raise ValueError(f"no {self.precision} compute rate of {self.chip.name} is published")
        return rate

    def _bandwidth(self) -> float:
        return self.chip.bandwidth_bytes_s * self.chip.efficiency.bandwidth

    def _weights_s(self, tokens: float) -> float:
        model = self.architecture
        quantised = (model.touched(tokens) - model.head) * WEIGHT_BYTES[self.precision]
        return (quantised + 2.0 * model.head) / (self.chips * self._bandwidth())

    def _around_s(self, tokens: float, layer_s: float) -> float:
        """What is done around the matrix products, and between chips."""
        model, efficiency = self.architecture, self.chip.efficiency
        message = tokens * model.hidden * 2.0
        passes_s = efficiency.activations * message / self._bandwidth()
        around_s = model.layers * (layer_s + passes_s)
        if self.chips == 1:
            return around_s
        sent = 2.0 * (self.chips - 1) / self.chips * message
        reduce_s = efficiency.reduce_s + sent / self.chip.link(self.chips)
        return around_s + 2.0 * model.layers * reduce_s


@dataclass(frozen=True, slots=True)
class Load:
    """One replica at a load it can hold.

    Attributes:
        rps: requests/s. running: of them at once, in the mean. ttft_s: time to the first token,
            the 95th percentile; ttft_mean_s. tpot_s: time per token after it, mean.
        prefill_share: of its time, for prompts.
    """

    rps: float
    running: int
    ttft_s: float
    ttft_mean_s: float
    tpot_s: float
    prefill_share: float


def load_of(setup: Setup, running: int, tokens_in: float, tokens_out: float) -> Load:
    """What a replica carries when so many requests run in it, arrivals being random.

    A prompt waits for the prompts before it: M/D/1 by their service time, with the exponential
    tail of heavy traffic (J. Kingman, "The single server queue in heavy traffic", 1961), and for
    the step that is under way.
    """
    if tokens_out < 1:  # an encoder: nothing but prompts, batched
        return _encoder_load(setup, running, tokens_in)
    prefill_s, step_s = setup.round_s(running, tokens_in, tokens_out)
    rps = running / (tokens_out * step_s + running * prefill_s)
    share = rps * prefill_s
    wait_s = prefill_s / (2.0 * (1.0 - share))
    tail_s = wait_s * math.log(share / 0.05) if share > 0.05 else 0.0
    return Load(
        rps=rps,
        running=running,
        ttft_s=prefill_s + step_s + tail_s,
        ttft_mean_s=prefill_s + step_s / 2.0 + share * wait_s,
        tpot_s=step_s + (running - 1) * prefill_s / tokens_out,
        prefill_share=share,
    )


def _encoder_load(setup: Setup, running: int, tokens_in: float) -> Load:
    """Batches of so many: a request waits for the batch before its own."""
    batch_s = setup.prefill_s(tokens_in, running)
    return Load(running / batch_s, running, 2.0 * batch_s, 1.5 * batch_s, 0.0, 1.0)


def highest_load(
    setup: Setup,
    tokens_in: float,
    tokens_out: float,
    *,
    ttft_slo_s: float = math.inf,
    tpot_slo_s: float = math.inf,
    most: int = 1024,
) -> Load | None:
    """The highest load that keeps the SLO and fits in memory; None if even one request does not.

    Rate and times both grow with the number running, so the highest is found by bisection.
    """

    def kept(running: int) -> Load | None:
        load = load_of(setup, running, tokens_in, tokens_out)
        return load if load.ttft_s <= ttft_slo_s and load.tpot_s <= tpot_slo_s else None

    most = min(most, setup.sequences(tokens_in + tokens_out))
    if most < 1 or (best := kept(1)) is None:
        return None
    if (highest := kept(most)) is not None:
        return highest
    low, high = 1, most
    while high - low > 1:
        middle = (low + high) // 2
        if (load := kept(middle)) is not None:
            low, best = middle, load
        else:
            high = middle
    return best
