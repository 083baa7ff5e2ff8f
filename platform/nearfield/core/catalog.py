"""The catalogue's files: accelerators, prices, known models, published benchmarks. Strict.

    hardware: nvidia          prices: gcp             models: known       published: llm
    accelerators: [...]       offers: {...}           known: {...}        figures: [...]

Every figure has a source. A figure that nobody re-checked says so (`evidence`, `unconfirmed`) and
is shown as such wherever it decides anything.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from nearfield.core.spec import Name, Strict
from pydantic import Field, model_validator

Amount = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Usd = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Date = Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]
Url = Annotated[str, Field(pattern=r"^https?://\S+$")]

Precision = Literal["bf16", "fp16", "fp8", "int8", "int4"]
Dense = Literal["fp32", "bf16", "fp16", "fp8", "int8"]
Family = Literal["nvidia", "amd", "tpu", "neuron", "gaudi", "ipu", "wafer", "cpu", "apple"]

Evidence = Literal["vendor", "table", "press", "derived", "not-rechecked"]
"""How far to trust a row: read in the vendor's own page; from a cited table; read in independent
pages; computed from other published figures, as the note says; as first noted down."""


class Interconnect(Strict):
    """What joins the chips of one machine or slice."""

    name: str = Field(min_length=1)
    gb_s: Amount = Field(description="of one chip, one direction, 1e9 bytes/s")
    chips: int = Field(ge=2, le=9216, description="how many one tensor-parallel group may span")
    mesh: bool = Field(
        False, description="a wire to each other chip: a smaller group has only its share of them"
    )
    evidence: Evidence
    source: Url


class RayNames(Strict):
    """How Ray calls it: the resource that a replica asks for, and the label a node has."""

    resource: str = Field(min_length=1, description="GPU, TPU, HPU, neuron_cores, CPU, ...")
    per_chip: Amount = Field(1.0, description="of that resource")
    accelerator_type: str | None = Field(
        None, description="value of the label ray.io/accelerator-type; absent: Ray sets none"
    )


class Accelerator(Strict):
    """One chip.

    `dense` holds rates of dense matrix products, never those "with sparsity", which are twice as
    high on paper and not reached by a model that was not pruned for it.
    """

    name: Name
    title: str = Field(min_length=1)
    family: Family
    memory_gb: Amount = Field(description="1e9 bytes; where a vendor means 2**30, a little more")
    memory: str = Field(min_length=1, description="HBM3, GDDR6, SRAM, ...")
    bandwidth_gb_s: Amount
    dense: dict[Dense, Amount] = Field({}, description="tera-operations/s by precision")
    measured_bf16_tflops: Amount | None = Field(
        None,
        description="the highest that somebody has measured in a matrix product, or what a "
        "published timing amounts to: then the note says so",
    )
    power_w: Amount | None = None
    power: str | None = Field(None, description="what the vendor calls that power")
    interconnect: Interconnect | None = None
    ray: RayNames
    engine: Literal["vllm", "generate", "remote"] = Field(
        description="which of our engines serves language models on it; remote: none does, an "
        "upstream may"
    )
    evidence: Evidence
    unconfirmed: list[str] = Field([], description="fields that are not re-checked")
    sources: list[Url] = Field(min_length=1)
    note: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.power_w is None) != (self.power is None):
            raise ValueError("power and power_w go together")
        for field in self.unconfirmed:
            if field.split(".")[0] not in type(self).model_fields:
                raise ValueError(f"unconfirmed: names {field!r}, which is no field")
        rates = self.dense
        sixteen = rates.get("bf16") or rates.get("fp16")
        for eight in ("fp8", "int8"):
            if sixteen and eight in rates and rates[eight] > 2.05 * sixteen:
                raise ValueError(
                    f"dense.{eight}: {rates[eight]:g} is more than twice the 16-bit rate "
                    f"{sixteen:g}: that is a figure with sparsity, halve it"
                )
        if self.measured_bf16_tflops and sixteen and self.measured_bf16_tflops > sixteen:
            raise ValueError("measured_bf16_tflops is above the data sheet's rate: which is wrong?")
        return self


class HardwareFile(Strict):
    """Accelerators of one vendor."""

    hardware: Name
    accelerators: list[Accelerator] = Field(min_length=1)


class Source(Strict):
    """Where figures come from, and under which terms."""

    title: str = Field(min_length=1)
    url: Url
    licence: str = Field(min_length=1)
    date: Date | None = Field(None, description="of the figures")
    note: str = ""


class Place(Strict):
    """Where a provider's region is. Coordinates are its city's."""

    city: str = Field(min_length=1)
    jurisdiction: Name
    latitude: float = Field(ge=-90, le=90)
    longitude: float = Field(ge=-180, le=180)


class Machine(Strict):
    """A machine type: which accelerators are in it."""

    accelerator: Name
    count: int = Field(ge=1)


class Offer(Strict):
    """What a machine costs an hour."""

    on_demand_usd_h: Usd | None = None
    spot_usd_h: Usd | None = None

    @model_validator(mode="after")
    def _costs_something(self) -> Self:
        if self.on_demand_usd_h is None and self.spot_usd_h is None:
            raise ValueError("on_demand_usd_h is missing: an offer has at least one price")
        return self


class PriceFile(Strict):
    """Prices of one provider.

    `places` lacks the regions whose provider does not say where they are: only a plan without
    regions may use them.
    """

    prices: Name
    currency: Literal["USD"] = "USD"
    spot: Literal["published", "derived", "absent"] = Field(
        description="derived: the published saving, on the on-demand price"
    )
    source: Source
    spot_source: Source | None = None
    chips: bool = Field(
        False, description="sold by the chip, in any number up to what their link joins"
    )
    machines: dict[str, Machine] = Field(min_length=1)
    places: dict[str, Place] = Field({})
    offers: dict[str, dict[str, Offer]] = Field(min_length=1, description="by region and machine")

    @model_validator(mode="after")
    def _known(self) -> Self:
        for region, machines in self.offers.items():
            for machine in machines:
                if machine not in self.machines:
                    raise ValueError(f"offers: {region} has {machine}, which is not in machines")
        for region in self.places:
            if region not in self.offers:
                raise ValueError(f"places: {region} has no offers")
        return self


class SameShape(Strict):
    """Another model of a shape: where its weights are, and its context where that differs."""

    repository: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    context: int | None = Field(None, ge=1)


class KnownModel(Strict):
    """A model's config.json, as far as it decides its size."""

    source: Url
    parameters_b: Amount = Field(description="as its publisher states, 1e9")
    also: dict[Name, SameShape] = Field({}, description="other models of this shape")
    config: dict[str, Any] = Field(min_length=1)

    def others(self) -> dict[str, KnownModel]:
        """The models of `also`, each by itself."""
        return {
            name: KnownModel(
                source=f"https://huggingface.co/{other.repository}/blob/main/config.json",
                parameters_b=self.parameters_b,
                config=self.config
                if other.context is None
                else {**self.config, "max_position_embeddings": other.context},
            )
            for name, other in self.also.items()
        }


class ModelsFile(Strict):
    """Shapes of models."""

    models: Name
    known: dict[Name, KnownModel] = Field(min_length=1)


class Figure(Strict):
    """One published measurement.

    `metric`: tokens_s is output tokens/s of the whole group of chips; ttft_ms of one prompt alone,
    or of `batch` together; tpot_ms between tokens, with `batch` requests always running; latency_s
    of a whole batch. An encoder's figures are ttft_ms with no tokens out.
    `use`: fit, the shares reached were fitted to it; check, they have not seen it; rate, the
    accelerator's own rate was taken from it, so that it judges nothing.
    """

    source: Name
    model: Name
    accelerator: Name
    chips: int = Field(1, ge=1)
    precision: Precision
    kv: Literal["fp8", "int8", "bf16"] = "bf16"
    batch: int | None = Field(None, ge=1, description="absent: as many as fit in memory")
    most: int | None = Field(
        None, ge=1, description="the engine's own bound, where batch is absent"
    )
    tokens_in: int = Field(ge=1)
    tokens_out: int = Field(ge=0)
    cache: int | None = Field(None, ge=1, description="tokens read a step, if always the same")
    cached_prompt: bool = Field(False, description="prompts were repeated and came from a cache")
    metric: Literal["tokens_s", "ttft_ms", "tpot_ms", "latency_s"]
    value: Amount
    use: Literal["fit", "check", "rate"]

    @model_validator(mode="after")
    def _has_tokens(self) -> Self:
        if self.tokens_out == 0 and self.metric != "ttft_ms":
            raise ValueError(f"tokens_out is 0, and {self.metric} is of answers: use ttft_ms")
        return self


class PublishedFile(Strict):
    """Published benchmarks, to measure the model against."""

    published: Name
    sources: dict[Name, Source] = Field(min_length=1)
    figures: list[Figure] = Field(min_length=1)

    @model_validator(mode="after")
    def _cited(self) -> Self:
        for figure in self.figures:
            if figure.source not in self.sources:
                raise ValueError(f"figures: {figure.source} is not among the sources")
        return self


class Shares(Strict):
    """What a family reaches of its data sheets: `nearfield.policy.roofline.Efficiency`."""

    compute_16: float = Field(gt=0, le=1)
    compute_8: float = Field(gt=0, le=1)
    bandwidth: float = Field(gt=0, le=1)
    layer_us: float = Field(ge=0)
    prompt_layer_us: float = Field(ge=0)
    activations: float = Field(ge=0)
    reduce_us: float = Field(ge=0)
    link: float = Field(0.7, gt=0, le=1)
    basis: Literal["fitted", "assumed"]
    note: str = ""


class EfficiencyFile(Strict):
    """Shares reached, by family. Written by scripts/fit_roofline.py."""

    efficiency: Name
    families: dict[Family, Shares]
