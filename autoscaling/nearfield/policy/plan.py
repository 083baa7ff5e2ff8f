"""On which hardware a model should run, where, at what cost: the cheapest that keeps the SLO.

    found = plan(model, workloads, market, wishes)

For every accelerator of the catalogue, number of chips and precision asked for: does it fit, what
load keeps the SLO (`nearfield.policy.roofline`), how many replicas is that, on how many machines,
at which price. The cheapest is chosen, region by region; every other accelerator gets its reason.

Costs only ever grow with the rate and with a tighter SLO: a tighter SLO lowers the load that one
replica may carry, so replicas, machines and dollars grow in steps; and the least of costs that
grow grows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from nearfield.core.architecture import Architecture
from nearfield.policy.roofline import Chip, Load, Setup, highest_load, load_of

HOURS_A_MONTH = 730.0

Engine = Literal["vllm", "generate", "remote"]


@dataclass(frozen=True, slots=True)
class Kind:
    """An accelerator to choose from.

    Attributes:
        engine: which of our engines runs on it. rechecked: every figure that decides was.
        native_16: "bf16", or "fp16" where the chip has only that; None: no rate is published.
        embeds: the precision in which our embedding engine computes on it; None: it does not run.
    """

    chip: Chip
    engine: Engine
    native_16: str | None
    rechecked: bool = True
    embeds: str | None = None

    def native(self, precision: str) -> str:
        """The precision in which it computes: bf16 and fp16 are one where it has only the other."""
        if precision in ("bf16", "fp16") and self.native_16 is not None:
            return self.native_16
        return precision


@dataclass(frozen=True, slots=True)
class Machine:
    """What can be had in one place, prices in US dollars an hour.

    Attributes:
        provider: of `gcp`. place: its region. accelerator: of which it has so many.
        by_chip: sold chip by chip, so that a group is of any size.
    """

    provider: str
    place: str
    name: str
    accelerator: str
    count: int
    on_demand_usd_h: float | None
    spot_usd_h: float | None
    by_chip: bool = False


@dataclass(frozen=True, slots=True)
class Workload:
    """What one region is to carry.

    Attributes:
        rps: requests/s to plan for, the peak. tokens_in, tokens_out: of a request, the mean; out is
            0 for embeddings. context: the longest that must fit, tokens.
        ttft_slo_s: on the 95th percentile. tpot_slo_s: on the mean.
    """

    rps: float
    tokens_in: int
    tokens_out: int
    context: int
    ttft_slo_s: float = math.inf
    tpot_slo_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Wishes:
    """How to plan. All of these are choices, not facts.

    Attributes:
        precisions: of the weights, that are acceptable.
        margin: times are planned to be so much shorter than the SLO, for the roofline's error.
        headroom: share of capacity kept free above the planned rate.
        spot: whether replicas may run on spot machines at all; on_demand_share: of the replicas,
            that always run on demand; spot_extra: spot replicas more than needed, to lose some.
        most: requests in one replica at once.
    """

    precisions: tuple[str, ...] = ("bf16",)
    margin: float = 0.2
    headroom: float = 0.2
    spot: bool = True
    on_demand_share: float = 0.2
    spot_extra: float = 0.25
    most: int = 256


@dataclass(frozen=True, slots=True)
class Replica:
    """One replica of the model: what it takes, and what it carries within the SLO."""

    kind: Kind
    setup: Setup
    load: Load

    @property
    def chips(self) -> int:
        """Tensor parallelism."""
        return self.setup.chips

    @property
    def label(self) -> str:
        """`H100-80GB x2 fp8`."""
        times = "" if self.chips == 1 else f" x{self.chips}"
        return f"{self.kind.chip.name}{times} {self.setup.precision}"


@dataclass(frozen=True, slots=True)
class Part:
    """Replicas of one capacity type."""

    capacity: Literal["on-demand", "spot"]
    replicas: int
    machines: int
    usd_h: float


@dataclass(frozen=True, slots=True)
class Choice:
    """A way to carry a region's workload.

    Attributes:
        needed: replicas without what spot adds.
    """

    replica: Replica
    machine: Machine
    needed: int
    parts: tuple[Part, ...]

    @property
    def usd_h(self) -> float:
        """All of it."""
        return sum(part.usd_h for part in self.parts)

    @property
    def usd_month(self) -> float:
        """Of 730 hours."""
        return self.usd_h * HOURS_A_MONTH


@dataclass(frozen=True, slots=True)
class Lost:
    """An accelerator that was not chosen, and why.

    Attributes:
        best: the cheapest way to use it, where there is one. priced: it could be had here.
    """

    accelerator: str
    reason: str
    best: Choice | None = None
    priced: bool = True


@dataclass(frozen=True, slots=True)
class RegionPlan:
    """One region: what was chosen, or None; the others, cheapest first, then those that cannot."""

    region: str
    workload: Workload
    choice: Choice | None
    lost: tuple[Lost, ...]

    @property
    def usd_per_million_tokens(self) -> float:
        """In and out together, at the planned rate."""
        each = self.workload.tokens_in + self.workload.tokens_out
        tokens_h = self.workload.rps * 3600.0 * each
        return math.nan if self.choice is None else self.choice.usd_h / tokens_h * 1e6


@dataclass(frozen=True, slots=True)
class Market:
    """What there is: accelerators by name, machines by the region they may serve."""

    kinds: Mapping[str, Kind]
    machines: Mapping[str, Sequence[Machine]] = field(default_factory=dict)


def plan(
    model: Architecture, workloads: Mapping[str, Workload], market: Market, wishes: Wishes
) -> list[RegionPlan]:
    """The cheapest way for each region, and why not the others."""
    made: dict[tuple[Workload, str, int], tuple[list[Replica], str]] = {}
    plans = []
    for region, workload in workloads.items():
        by_accelerator: dict[str, list[Machine]] = {name: [] for name in market.kinds}
        for machine in market.machines.get(region, ()):
            by_accelerator[machine.accelerator].append(machine)
        found: list[Lost] = []
        for name, machines in by_accelerator.items():
            kind = market.kinds[name]
            most = max((_largest_group(kind, machine) for machine in machines), default=0)
            # All of a workload but its rate decides about one replica.
            key = (replace(workload, rps=0.0), name, most)
            if key not in made:
                made[key] = replicas_of(model, kind, workload, wishes, chips=most or None)
            found.append(_cheapest(name, *made[key], machines, workload, wishes, region))
        plans.append(_decided(region, workload, found))
    return plans


def replicas_of(
    model: Architecture, kind: Kind, workload: Workload, wishes: Wishes, *, chips: int | None = None
) -> tuple[list[Replica], str]:
    """Every replica on this accelerator that keeps the SLO; if there is none, why.

    Args:
        chips: the largest group; absent: as many as its link joins.
    """
    chip = kind.chip
    if kind.engine == "remote":
        return [], "none of our engines runs on it; an endpoint of it is a pool with engine remote"
    precisions = wishes.precisions
    if model.task == "embed":
        if kind.embeds is None:
            return [], "our embedding engine does not run on it"
        precisions = (kind.embeds,)
    if kind.native_16 is None:
        return [], "no dense compute rate is published, so the first token cannot be timed"
    found: list[Replica] = []
    reasons: list[tuple[int, str]] = []
    groups = [n for n in (1, 2, 4, 8, 16) if n <= min(chips or chip.group, chip.group)]
    for precision in precisions:
        for group in groups:
            if model.heads % group:
                continue
            setup = Setup(model, chip, kind.native(precision), group)
            reason = _unfit(setup, workload)
            if reason is None:
                load = highest_load(
                    setup,
                    workload.tokens_in,
                    workload.tokens_out,
                    ttft_slo_s=workload.ttft_slo_s / (1.0 + wishes.margin),
                    tpot_slo_s=workload.tpot_slo_s / (1.0 + wishes.margin),
                    most=wishes.most,
                )
                if load is not None:
                    found.append(Replica(kind, setup, load))
                    continue
                reason = _too_slow(setup, workload, wishes)
            reasons.append(reason)
    return found, max(reasons, default=(0, "no group of its chips divides the model's heads"))[1]


def _unfit(setup: Setup, workload: Workload) -> tuple[int, str] | None:
    """Why it cannot run at all; how far it came, to tell the reason that came farthest."""
    chip, group = setup.chip, setup.chips
    if chip.rate(setup.precision) is None:
        return 0, f"it does not compute in {setup.precision}"
    if setup.room_bytes <= 0:
        have = group * (setup.room_bytes + setup.weight_bytes / group) / 1e9
        need = setup.weight_bytes / 1e9
        return 10 + group, (
            f"{need:,.0f} GB of {setup.precision} weights do not fit in "
            f"{group} x {have / group:.1f} GB"
        )
    if setup.sequences(workload.context) < 1:
        return 30 + group, (
            f"a context of {workload.context:,} tokens takes "
            f"{setup.cache_bytes(workload.context) / 1e9:.1f} GB a chip, "
            f"{setup.room_bytes / 1e9:.1f} GB are left beside the weights"
        )
    return None


def _too_slow(setup: Setup, workload: Workload, wishes: Wishes) -> tuple[int, str]:
    """Which promise it breaks with a single request."""
    alone = load_of(setup, 1, workload.tokens_in, workload.tokens_out)
    times = "" if setup.chips == 1 else f" on {setup.chips}"
    what = "the first token" if workload.tokens_out else "an answer"
    less = f" with a margin of {wishes.margin:.0%}" if wishes.margin else ""
    if alone.ttft_s > workload.ttft_slo_s / (1.0 + wishes.margin):
        return 60 + setup.chips, (
            f"{what} takes {alone.ttft_s * 1000:,.0f} ms{times}, with one request alone; "
            f"{workload.ttft_slo_s * 1000:,.0f} are allowed{less}"
        )
    return 60 + setup.chips, (
        f"a token takes {alone.tpot_s * 1000:,.1f} ms{times}, with one request alone; "
        f"{workload.tpot_slo_s * 1000:,.1f} are allowed{less}"
    )


def _largest_group(kind: Kind, machine: Machine) -> int:
    return kind.chip.group if machine.by_chip else min(kind.chip.group, machine.count)


def _cheapest(
    name: str,
    replicas: Sequence[Replica],
    reason: str,
    machines: Sequence[Machine],
    workload: Workload,
    wishes: Wishes,
    region: str,
) -> Lost:
    """The cheapest way to use an accelerator, with its reason still to be found."""
    if not replicas:
        return Lost(name, reason, priced=bool(machines))
    if not machines:
        return Lost(name, f"no price of it in {region}", priced=False)
    best: Choice | None = None
    for replica in replicas:
        for machine in machines:
            choice = price(replica, machine, workload.rps, wishes)
            if choice is not None and (best is None or choice.usd_h < best.usd_h):
                best = choice
    if best is None:
        return Lost(name, "its machines are sold as spot only, and a share must run on demand")
    return Lost(name, "", best)


def price(replica: Replica, machine: Machine, rps: float, wishes: Wishes) -> Choice | None:
    """What it costs to carry so much; None if this machine cannot be had as wished."""
    if machine.by_chip:
        each, unit = 1, float(replica.chips)
    elif replica.chips > machine.count:
        return None
    else:
        each, unit = machine.count // replica.chips, 1.0
    needed = _needed(replica, rps, wishes)
    ways: list[tuple[Part, ...]] = []
    if machine.on_demand_usd_h is not None:
        ways.append((_part("on-demand", needed, each, unit * machine.on_demand_usd_h),))
    if wishes.spot and machine.spot_usd_h is not None:
        kept = math.ceil(wishes.on_demand_share * needed - 1e-9)
        spare = math.ceil((needed - kept) * (1.0 + wishes.spot_extra) - 1e-9)
        spot = _part("spot", spare, each, unit * machine.spot_usd_h)
        if kept == 0:
            ways.append((spot,))
        elif machine.on_demand_usd_h is not None and spare:
            base = _part("on-demand", kept, each, unit * machine.on_demand_usd_h)
            ways.append((base, spot))
    if not ways:
        return None
    parts = min(ways, key=lambda way: sum(part.usd_h for part in way))
    return Choice(replica, machine, needed, parts)


def _needed(replica: Replica, rps: float, wishes: Wishes) -> int:
    """Replicas for so many requests/s, with headroom."""
    return max(1, math.ceil(rps * (1.0 + wishes.headroom) / replica.load.rps - 1e-9))


def _part(capacity: Literal["on-demand", "spot"], replicas: int, each: int, usd_h: float) -> Part:
    machines = math.ceil(replicas / each)
    return Part(capacity, replicas, machines, machines * usd_h)


def _decided(region: str, workload: Workload, found: Iterable[Lost]) -> RegionPlan:
    able = sorted(
        (each.best for each in found if each.best is not None),
        key=lambda choice: (choice.usd_h, choice.machine.accelerator),
    )
    unable = [each for each in found if each.best is None]
    unable.sort(key=lambda each: not each.priced)  # first those that money could buy
    if not able:
        return RegionPlan(region, workload, None, tuple(unable))
    chosen, *others = able
    lost = [Lost(each.machine.accelerator, _dearer(each, chosen), each) for each in others]
    return RegionPlan(region, workload, chosen, (*lost, *unable))


def _dearer(other: Choice, chosen: Choice) -> str:
    times = other.usd_h / chosen.usd_h
    if times < 1.005:
        return "costs the same"
    return f"costs {times:.1f} times as much" if times >= 2 else f"costs {times - 1:.0%} more"


@dataclass(frozen=True, slots=True)
class Ownership:
    """What machines of one's own cost. All of it assumed by whoever asks.

    Attributes:
        machine_usd: to buy one. accelerators: in it. power_w: of the whole machine under load.
        years: until it is written off. upkeep: a year, as a share of its price: space, hands,
            spare parts. pue: power of the building over power of the machines.
    """

    machine_usd: float
    accelerators: int
    power_w: float
    years: float = 4.0
    usd_per_kwh: float = 0.12
    pue: float = 1.4
    upkeep: float = 0.08

    @property
    def usd_h(self) -> float:
        """Of one machine, whether it is used or not; it is taken to draw its power always."""
        hours = self.years * 12.0 * HOURS_A_MONTH
        owned = self.machine_usd / hours + self.machine_usd * self.upkeep / (12.0 * HOURS_A_MONTH)
        return owned + self.power_w / 1000.0 * self.pue * self.usd_per_kwh


@dataclass(frozen=True, slots=True)
class OwnPlan:
    """A workload on machines of one's own, against a cloud that is paid by the hour.

    Attributes:
        break_even: share of the hours at this load above which owning is cheaper; above 1: never.
    """

    replica: Replica
    replicas: int
    machines: int
    usd_h: float
    cloud_usd_h: float

    @property
    def break_even(self) -> float:
        return self.usd_h / self.cloud_usd_h


def own(
    replicas: Sequence[Replica],
    ownership: Ownership,
    rps: float,
    cloud_usd_h: float,
    wishes: Wishes,
) -> OwnPlan | None:
    """The cheapest way on such machines; None if no replica fits in one."""
    best: OwnPlan | None = None
    for replica in replicas:
        if replica.chips > ownership.accelerators:
            continue
        needed = _needed(replica, rps, wishes)
        machines = math.ceil(needed / (ownership.accelerators // replica.chips))
        usd_h = machines * ownership.usd_h
        if best is None or usd_h < best.usd_h:
            best = OwnPlan(replica, needed, machines, usd_h, cloud_usd_h)
    return best
