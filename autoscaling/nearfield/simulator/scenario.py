"""What is simulated, as a file: regions, engines, pools, models, traffic, faults. Strict.

    simulation: spot-with-fallback
    duration_s: 3600
    regions:
      - {region: eu-west, jurisdiction: eu}
    engines:
      - {engine: l4, prefill_tokens_per_s: 9000, step_ms: 25, step_ms_per_sequence: 0.4}
    models:
      - {model: chat, slo: {ttft_s: 2}}
    pools:
      - {pool: l4, model: chat, engine: l4, usd_per_hour: 0.8, max_replicas: 20, boot: 45}
    traffic:
      - traffic: day
        model: chat
        arrivals: {kind: poisson, rate_rps: 5}
        input_tokens: 800
        output_tokens: 150

Times are seconds from the start, `rtt_ms` aside. `start_s` says at which second after UTC midnight
that is.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from nearfield.core.check import located, repeated
from nearfield.core.problems import Finding, Problem, did_you_mean, findings
from nearfield.core.spec import Name, Strict
from nearfield.core.yaml_document import Document
from nearfield.core.yaml_document import Path as At
from nearfield.core.yaml_file import read_document
from nearfield.policy.scale import CapacityKind
from pydantic import Field, ValidationError, model_validator

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


# ---- numbers that are drawn ---------------------------------------------------------------------


class Fixed(Strict):
    """Always the same."""

    kind: Literal["fixed"] = "fixed"
    value: NotNegative


class LogNormal(Strict):
    """By two of its quantiles."""

    kind: Literal["lognormal"] = "lognormal"
    p50: Positive
    p95: Positive
    most: Positive | None = Field(None, description="larger draws are cut to it")


class Exponential(Strict):
    """By its mean."""

    kind: Literal["exponential"] = "exponential"
    mean: Positive


class Recorded(Strict):
    """Values of one column of a CSV file (`.gz` as well), drawn alike."""

    kind: Literal["recorded"] = "recorded"
    file: str = Field(min_length=1, description="relative to the scenario")
    column: str = Field(min_length=1)
    where: dict[str, str] = Field({}, description="only rows with these values")
    times: Positive = Field(1.0, description="0.001 makes seconds of milliseconds")
    plus: NotNegative = Field(0.0, description="added to each")


Drawn = Annotated[Fixed | LogNormal | Exponential | Recorded, Field(discriminator="kind")]


# ---- where ---------------------------------------------------------------------------------------


class Region(Strict):
    """One region: a cluster with a gateway."""

    region: Name
    jurisdiction: Name
    utc_offset_h: float = Field(0.0, ge=-12, le=14, description="of its day, for diurnal traffic")
    rtt_ms: dict[str, NotNegative] = Field({}, description="to other regions; one way is enough")


class Site(Strict):
    """A gateway without replicas, near its clients."""

    site: Name
    jurisdiction: Name
    utc_offset_h: float = Field(0.0, ge=-12, le=14)
    rtt_ms: dict[str, NotNegative] = Field({}, description="to the regions")


class RttFile(Strict):
    """Round trips from a CSV file; what regions and sites say themselves is taken first."""

    file: str = Field(min_length=1, description="relative to the scenario")
    source: str = "src"
    target: str = "dst"
    column: str = Field("rtt_ms", description="milliseconds")


class Engine(Strict):
    """How fast one replica computes: prompts in chunks between the decode steps of a batch.

    A step of n sequences takes `step_ms + n x step_ms_per_sequence`, and the time of the prompt
    tokens that are computed with it; one of a single sequence `step_ms_alone`.
    """

    engine: Name
    prefill_tokens_per_s: Positive
    step_ms: Positive
    step_ms_per_sequence: NotNegative = 0.0
    step_ms_alone: Positive | None = Field(None, description="absent: as the others")
    request_ms: NotNegative = Field(0.0, description="of a request, outside of the engine")
    prefill_chunk_tokens: int = Field(512, ge=1)
    max_running: int = Field(16, ge=1, le=65536, description="sequences in a batch")
    max_queued: int = Field(256, ge=0, description="requests that wait for one replica")
    kv_tokens: int | None = Field(None, ge=1, description="KV cache; absent: never short of it")


class Spot(Strict):
    """How much spot capacity there is. Absent: always enough, and never taken back."""

    file: str | None = Field(None, description="CSV of trace_id, t_s, available_instances")
    trace: str | None = Field(None, description="the trace_id; absent: the file has one")
    times: Positive = Field(1.0, description="replicas for each recorded instance")
    offset_s: NotNegative = Field(0.0, description="where in the trace the simulation starts")
    mean_life_s: Positive | None = Field(None, description="of a replica, exponential")
    notice_s: NotNegative = Field(30.0, description="warning before a replica is taken")


class Prices(Strict):
    """A recorded price over time, which stands in for `usd_per_hour` from its first row on."""

    file: str = Field(min_length=1, description="CSV, relative to the scenario; .gz as well")
    time: str = Field("t_s", description="the column of the time, seconds")
    price: str = Field("usd_per_hour", description="the column of the price of one replica")
    where: dict[str, str] = Field({}, description="only rows with these values")
    offset_s: NotNegative = Field(0.0, description="where in the file the simulation starts")


class Pool(Strict):
    """Replicas of one model on one engine and kind of capacity, in some regions."""

    pool: Name
    model: Name
    engine: Name
    regions: list[Name] | None = Field(None, min_length=1, description="absent: in every region")
    capacity: CapacityKind = "on_demand"
    zone: str = ""
    products: list[Name] | None = Field(None, min_length=1, description="absent: everybody's")
    usd_per_hour: NotNegative
    prices: Prices | None = Field(None, description="absent: the price does not change")
    unit_usd: NotNegative = Field(0.0, description="what economy callers compare")
    handicap_ms: NotNegative = 0.0
    min_replicas: int = Field(0, ge=0)
    max_replicas: int = Field(1, ge=1)
    initial_replicas: int | None = Field(None, ge=0, description="absent: min_replicas")
    target_ongoing: Positive | None = Field(None, description="absent: 0.7 of max_running")
    boot: Drawn = Fixed(value=60.0)
    drain_s: NotNegative = Field(60.0, description="how long a stopping replica may finish")
    spot: Spot | None = None

    @model_validator(mode="before")
    @classmethod
    def _shorthands(cls, data: Any) -> Any:
        return _fixed(data, "boot")


class Slo(Strict):
    """What a request must keep not to be late."""

    ttft_s: Positive = 2.0
    total_s: Positive | None = None
    share: float = Field(0.99, gt=0, le=1, description="of the requests that must keep it")


class Scaling(Strict):
    """How the model is scaled in each region; see `policy.scale.ScalingSpec`."""

    policy: Literal["nearfield", "static"] = "nearfield"
    signals: Literal["requests", "tokens"] = Field(
        "tokens", description="what replicas tell of their work, and whether their speed"
    )
    interval_s: Positive = 1.0
    max_wait_s: Positive = 2.0
    max_late: float = Field(0.01, gt=0, lt=1)
    max_usd_per_hour: Positive | None = Field(None, description="for each region; absent: none")
    hold_s: NotNegative = 600.0
    idle_s: Positive = 300.0


class Model(Strict):
    model: Name
    slo: Slo = Slo()
    scaling: Scaling = Scaling()


# ---- who sends what ------------------------------------------------------------------------------


class Poisson(Strict):
    kind: Literal["poisson"] = "poisson"
    rate_rps: NotNegative


class Gamma(Strict):
    """Gaps of this coefficient of variation: 1 is Poisson, more comes in clumps."""

    kind: Literal["gamma"] = "gamma"
    rate_rps: NotNegative
    cv: Positive


class Diurnal(Strict):
    """A day's curve, by the hour of the place it comes from."""

    kind: Literal["diurnal"] = "diurnal"
    mean_rps: NotNegative
    peak_to_mean: float = Field(1.7, ge=1, le=2, description="above 2 a cosine would be negative")
    peak_hour: float = Field(14.0, ge=0, lt=24, description="local")
    cv: Positive = 1.0


class Burst(Strict):
    """A base rate, and bursts at random moments."""

    kind: Literal["burst"] = "burst"
    base_rps: NotNegative
    burst_rps: NotNegative = Field(description="during a burst")
    every_s: Positive = Field(description="mean time between two bursts")
    lasts_s: Positive = Field(description="of one burst, mean")
    cv: Positive = 1.0


class Requests(Strict):
    """A recorded trace with one row a request, in order of time."""

    kind: Literal["requests"] = "requests"
    file: str = Field(min_length=1, description="relative to the scenario; .gz as well")
    time: str = Field("arrival_s", description="the column of the time, seconds")
    input_tokens: str | None = Field("input_tokens", description="column; null: as in traffic")
    output_tokens: str | None = Field("output_tokens", description="column; null: as in traffic")
    offset_s: NotNegative = Field(0.0, description="where in the trace the simulation starts")
    repeat: bool = Field(False, description="from the beginning again at its end")
    times: Positive = Field(1.0, description="requests for each recorded one")


class Rates(Strict):
    """A recorded rate: one row a window, to the next row."""

    kind: Literal["rates"] = "rates"
    file: str = Field(min_length=1)
    time: str = "window_start_s"
    rate: str = "rate_rps"
    offset_s: NotNegative = 0.0
    repeat: bool = False
    times: Positive = 1.0
    cv: Positive = 1.0


class Clients(Strict):
    """ServeGen's form: each client's rate and gaps in each window, and the lengths it sends."""

    kind: Literal["clients"] = "clients"
    file: str = Field(min_length=1, description="client, window_start_s, rate_rps, family, p1, p2")
    tokens: str | None = Field(None, description="client, period_start_s, field, mean, p1 ... p99")
    window_s: Positive = 600.0
    offset_s: NotNegative = 0.0
    times: Positive = Field(1.0, description="rate over the recorded one")


Arrivals = Annotated[
    Poisson | Gamma | Diurnal | Burst | Requests | Rates | Clients, Field(discriminator="kind")
]


class Traffic(Strict):
    """A class of callers at one or several places, each of which sends this much."""

    traffic: Name
    model: Name
    origin: list[Name] | None = Field(None, min_length=1, description="absent: every region")
    arrivals: Arrivals
    input_tokens: Drawn | None = Field(None, description="absent: the trace's")
    output_tokens: Drawn | None = None
    product: Name | None = None
    jurisdictions: list[Name] | None = Field(None, min_length=1, description="absent: anywhere")
    mode: Literal["nearest", "economy"] = "nearest"
    criticality: Literal["critical", "default", "sheddable"] = "default"
    timeout_s: Positive = 120.0
    draws: str | None = Field(
        None, description="traffic with the same word here draws the same; absent: its name"
    )

    @model_validator(mode="before")
    @classmethod
    def _shorthands(cls, data: Any) -> Any:
        return _fixed(_fixed(data, "input_tokens"), "output_tokens")


# ---- what goes wrong -----------------------------------------------------------------------------


class LoseReplicas(Strict):
    """Some replicas are gone at once, with what they computed."""

    kind: Literal["lose_replicas"] = "lose_replicas"
    at_s: NotNegative
    region: Name
    pool: Name
    count: int = Field(1, ge=1)


class SlowReplicas(Strict):
    """Some replicas compute slower for a while."""

    kind: Literal["slow_replicas"] = "slow_replicas"
    at_s: NotNegative
    lasts_s: Positive
    region: Name
    pool: Name
    count: int = Field(1, ge=1)
    factor: float = Field(4.0, gt=1, description="times as long")


class LoseRegion(Strict):
    """A region is silent for a while, and comes back empty."""

    kind: Literal["lose_region"] = "lose_region"
    at_s: NotNegative
    lasts_s: Positive
    region: Name


Fault = Annotated[LoseReplicas | SlowReplicas | LoseRegion, Field(discriminator="kind")]


class Scenario(Strict):
    """A whole scenario."""

    simulation: Name
    seed: int = 1
    mode: Literal["events", "fluid"] = "events"
    start_s: NotNegative = Field(0.0, description="seconds after UTC midnight at the start")
    duration_s: Positive
    window_s: Positive | None = Field(None, description="of the plots; absent: 1/240 of it all")
    tick_s: Positive = Field(1.0, description="a step of the fluid mode")
    packets: int = Field(8, ge=1, le=1000, description="of each traffic in a tick, in fluid mode")
    rtts: RttFile | None = None
    local_rtt_ms: NotNegative = 1.0
    regions: list[Region] = Field(min_length=1)
    sites: list[Site] = Field([])
    engines: list[Engine] = Field(min_length=1)
    models: list[Model] = Field(min_length=1)
    pools: list[Pool] = Field(min_length=1)
    traffic: list[Traffic] = Field(min_length=1)
    faults: list[Fault] = Field([])


def _fixed(data: Any, key: str) -> Any:
    """A number stands for itself."""
    value = data.get(key) if isinstance(data, dict) else None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {**data, key: {"kind": "fixed", "value": value}}
    return data


# ---- reading -------------------------------------------------------------------------------------


def read(path: Path, name: str | None = None) -> Scenario | list[Problem]:
    """The scenario of a file, or everything that is wrong with it."""
    name = str(path) if name is None else name
    document = read_document(path, name)
    return [document] if isinstance(document, Problem) else of(document, path, name)


def of(document: Document, path: Path, name: str) -> Scenario | list[Problem]:
    """What a file that was read says.

    Args:
        path: where it lies: its files are relative to it. name: as the user knows it.
    """
    if document.duplicates:
        return [located(name, document, finding) for finding in repeated(document)]
    try:
        scenario = Scenario.model_validate(document.value, strict=True)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
        found = findings(details, Scenario, document.value)
        return [located(name, document, finding) for finding in found]
    return [located(name, document, finding) for finding in check(scenario, path)] or scenario


def check(scenario: Scenario, path: Path) -> Iterator[Finding]:
    """What no section can know by itself: names that nothing has, files that are not there."""
    regions = [region.region for region in scenario.regions]
    places = regions + [site.site for site in scenario.sites]
    models = [model.model for model in scenario.models]
    engines = [engine.engine for engine in scenario.engines]
    pools = [pool.pool for pool in scenario.pools]
    for section, names in (
        ("regions", places),
        ("engines", engines),
        ("models", models),
        ("traffic", [traffic.traffic for traffic in scenario.traffic]),
    ):
        for index, name in enumerate(names):
            if name in names[:index]:
                yield Finding((section, index), "has a name twice", "choose another name", name)
    for i, pool in enumerate(scenario.pools):
        at: At = ("pools", i)
        yield from _known((*at, "model"), pool.model, models, "model")
        yield from _known((*at, "engine"), pool.engine, engines, "engine")
        for k, region in enumerate(pool.regions or ()):
            yield from _known((*at, "regions", k), region, regions, "region")
        if pool.min_replicas > pool.max_replicas:
            yield Finding(
                (*at, "min_replicas"),
                f"is above max_replicas, which is {pool.max_replicas}",
                "lower min_replicas or raise max_replicas",
                pool.min_replicas,
            )
        if (pool.initial_replicas or 0) > pool.max_replicas:
            yield Finding(
                (*at, "initial_replicas"),
                f"is above max_replicas, which is {pool.max_replicas}",
                "lower initial_replicas or raise max_replicas",
                pool.initial_replicas,
            )
        if pool.spot is not None and pool.capacity != "spot":
            yield Finding(
                (*at, "spot"),
                "goes with capacity: spot only",
                "write capacity: spot, or remove the section",
            )
        for other in scenario.pools[:i]:
            there = set(pool.regions or regions) & set(other.regions or regions)
            if (other.pool, other.model) == (pool.pool, pool.model) and there:
                yield Finding(
                    (*at, "pool"),
                    f"is the name of another pool of {pool.model} in {min(there)}",
                    "choose another name",
                    pool.pool,
                )
    for i, traffic in enumerate(scenario.traffic):
        at = ("traffic", i)
        yield from _known((*at, "model"), traffic.model, models, "model")
        for k, place in enumerate(traffic.origin or ()):
            yield from _known((*at, "origin", k), place, places, "region or site")
        yield from _lengths(traffic, at)
    for i, fault in enumerate(scenario.faults):
        yield from _known(("faults", i, "region"), fault.region, regions, "region")
        if not isinstance(fault, LoseRegion):
            yield from _known(("faults", i, "pool"), fault.pool, pools, "pool")
    for at, file in files(scenario):
        if not (path.parent / file).is_file():
            yield Finding(at, "does not exist", "check the path; it is relative to this file", file)
    yield from _distances(scenario, path)


def files(scenario: Scenario) -> Iterator[tuple[At, str]]:
    """The files that a scenario reads, and where it names them."""
    if scenario.rtts is not None:
        yield ("rtts", "file"), scenario.rtts.file
    for i, pool in enumerate(scenario.pools):
        if isinstance(pool.boot, Recorded):
            yield ("pools", i, "boot", "file"), pool.boot.file
        if pool.prices is not None:
            yield ("pools", i, "prices", "file"), pool.prices.file
        if pool.spot is not None and pool.spot.file is not None:
            yield ("pools", i, "spot", "file"), pool.spot.file
    for i, traffic in enumerate(scenario.traffic):
        at: At = ("traffic", i)
        for key in ("input_tokens", "output_tokens"):
            drawn = getattr(traffic, key)
            if isinstance(drawn, Recorded):
                yield (*at, key, "file"), drawn.file
        arrivals = traffic.arrivals
        if isinstance(arrivals, Requests | Rates | Clients):
            yield (*at, "arrivals", "file"), arrivals.file
        if isinstance(arrivals, Clients) and arrivals.tokens is not None:
            yield (*at, "arrivals", "tokens"), arrivals.tokens


def _known(at: At, name: str, known: list[str], what: str) -> Iterator[Finding]:
    if name not in known:
        meant = did_you_mean(name, known)
        remedy = f"did you mean {meant}?" if meant else f"known: {', '.join(known)}"
        yield Finding(at, f"names no {what} of this scenario", remedy, name)


def _lengths(traffic: Traffic, at: At) -> Iterator[Finding]:
    arrivals = traffic.arrivals
    for key in ("input_tokens", "output_tokens"):
        if getattr(traffic, key) is not None:
            continue
        if isinstance(arrivals, Requests) and getattr(arrivals, key) is not None:
            continue
        if isinstance(arrivals, Clients) and arrivals.tokens is not None:
            continue
        yield Finding(
            (*at, key),
            f"is missing: arrivals of kind {arrivals.kind} bring no lengths",
            f"add {key}: 500",
            has_value=False,
        )


def _distances(scenario: Scenario, path: Path) -> Iterator[Finding]:
    from nearfield.simulator.traces import TraceError, distances

    try:
        table = distances(scenario, path.parent)
    except FileNotFoundError:
        return  # said already
    except TraceError as error:
        yield Finding(("rtts", "file"), error.message, error.remedy)
        return
    places = [("regions", region.region) for region in scenario.regions]
    places += [("sites", site.site) for site in scenario.sites]
    for section, place in places:
        missing = [r.region for r in scenario.regions if (place, r.region) not in table]
        if missing:
            index = [name for kind, name in places if kind == section].index(place)
            yield Finding(
                (section, index, "rtt_ms"),
                f"says nothing about {', '.join(missing)}",
                f"add rtt_ms: {{{missing[0]}: 80}}, here or there",
                has_value=False,
            )
