"""A plan for people and as JSON: what was chosen, why not the others, what all of it rests on.

Every figure is labelled: published (a price, a data sheet), measured (by whoever published it),
modelled (by the roofline, whose error is told), assumed (a choice, that an option changes).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click
from nearfield.cli.model_sizes import ModelSize
from nearfield.cli.output import print_table
from nearfield.core.catalog_files import Catalog
from nearfield.policy.plan import (
    HOURS_A_MONTH,
    Choice,
    Lost,
    Ownership,
    OwnPlan,
    RegionPlan,
    Wishes,
)
from nearfield.policy.validate import Off, Summary, summary

SHOWN = 8
"""Alternatives of a region that are shown to a person, unless all are asked for."""


@dataclass(frozen=True, slots=True)
class Report:
    """Everything there is to tell.

    Attributes:
        off: published figures and their predictions. providers: whose prices were looked at.
    """

    size: ModelSize
    plans: Sequence[RegionPlan]
    wishes: Wishes
    catalog: Catalog
    providers: Sequence[str]
    off: Sequence[Off]
    ownership: Ownership | None = None
    own: OwnPlan | None = None

    @property
    def choices(self) -> list[Choice]:
        """Of all regions that have a plan."""
        return [plan.choice for plan in self.plans if plan.choice is not None]

    @property
    def usd_month(self) -> float:
        """Of those together."""
        return sum(choice.usd_month for choice in self.choices)

    @property
    def feasible(self) -> bool:
        """Whether every region has one."""
        return all(plan.choice is not None for plan in self.plans)

    def error(self, use: str, family: str | None = None) -> Summary:
        """Of the roofline, on figures it was fitted to or not."""
        accelerators = self.catalog.accelerators
        return summary(
            each
            for each in self.off
            if each.figure.use == use
            and family in (None, accelerators[each.figure.accelerator].family)
        )

    def families(self) -> list[str]:
        """Of the chosen accelerators."""
        names = {self.own.replica.kind.chip.name} if self.own is not None else set()
        names |= {choice.machine.accelerator for choice in self.choices}
        return sorted({self.catalog.accelerators[name].family for name in names})


def as_json(report: Report) -> dict[str, Any]:
    """The whole plan: one document."""
    size, first = report.size, report.plans[0].workload
    embeds = size.architecture.task == "embed"  # the engine decides in what it computes
    return {
        "model": {
            "name": size.name,
            "parameters": size.architecture.parameters,
            "active_parameters": size.architecture.active,
            "checkpoint_precision": None if embeds else size.precision,
            "source": size.source,
            "from": size.told,
        },
        "workload": {
            "tokens_in": first.tokens_in,
            "tokens_out": first.tokens_out,
            "context": first.context,
            "slo_ttft_ms": _ms(first.ttft_slo_s),
            "slo_tpot_ms": _ms(first.tpot_slo_s),
        },
        "feasible": report.feasible,
        "usd_month": round(report.usd_month, 2) if report.feasible else None,
        "regions": [_region_json(plan) for plan in report.plans],
        "on_premises": _own_json(report),
        "assumed": {
            "precisions": [] if embeds else list(report.wishes.precisions),
            "margin": report.wishes.margin,
            "headroom": report.wishes.headroom,
            "spot": report.wishes.spot,
            "on_demand_share": report.wishes.on_demand_share,
            "spot_extra": report.wishes.spot_extra,
            "max_running": report.wishes.most,
            "hours_a_month": HOURS_A_MONTH,
        },
        "model_error": {
            "fitted": _error_json(report.error("fit")),
            "held_out": _error_json(report.error("check")),
            "held_out_by_family": {
                family: _error_json(report.error("check", family)) for family in report.families()
            },
        },
        "prices": {
            name: {
                "source": report.catalog.prices[name].source.url,
                "date": report.catalog.prices[name].source.date,
                "spot": report.catalog.prices[name].spot,
            }
            for name in report.providers
        },
    }


def _region_json(plan: RegionPlan) -> dict[str, Any]:
    return {
        "region": plan.region,
        "rps": plan.workload.rps,
        "choice": None if plan.choice is None else _choice_json(plan.choice, plan),
        "usd_per_million_tokens": _rounded(plan.usd_per_million_tokens),
        "alternatives": [
            {
                "accelerator": lost.accelerator,
                "reason": lost.reason,
                "best": None if lost.best is None else _choice_json(lost.best, plan),
            }
            for lost in plan.lost
        ],
    }


def _choice_json(choice: Choice, plan: RegionPlan) -> dict[str, Any]:
    replica, setup = choice.replica, choice.replica.setup
    return {
        "provider": choice.machine.provider,
        "place": choice.machine.place,
        "machine": choice.machine.name,
        "accelerator": choice.machine.accelerator,
        "precision": setup.precision,
        "tensor_parallel": replica.chips,
        "replicas_needed": choice.needed,
        "parts": [
            {
                "capacity": part.capacity,
                "replicas": part.replicas,
                "machines": part.machines,
                "usd_h": round(part.usd_h, 4),
            }
            for part in choice.parts
        ],
        "usd_h": round(choice.usd_h, 4),
        "usd_month": round(choice.usd_month, 2),
        "modelled": {
            "ttft_p95_ms": _ms(replica.load.ttft_s),
            "ttft_mean_ms": _ms(replica.load.ttft_mean_s),
            "tpot_ms": _ms(replica.load.tpot_s),
            "replica_rps": _rounded(replica.load.rps),
            "replica_running": replica.load.running,
            "replica_tokens_out_s": _rounded(replica.load.rps * plan.workload.tokens_out),
            "prefill_share": _rounded(replica.load.prefill_share),
        },
        "memory": {
            "weights_gb_a_chip": _rounded(setup.weight_bytes / setup.chips / 1e9),
            "cache_gb_a_chip": _rounded(setup.room_bytes / 1e9),
            "sequences_that_fit": setup.sequences(
                plan.workload.tokens_in + plan.workload.tokens_out
            ),
        },
        "rechecked": replica.kind.rechecked,
    }


def _own_json(report: Report) -> dict[str, Any] | None:
    if report.own is None or report.ownership is None:
        return None
    own, each = report.own, report.ownership
    return {
        "hardware": own.replica.label,
        "replicas": own.replicas,
        "machines": own.machines,
        "usd_month": round(own.usd_h * HOURS_A_MONTH, 2),
        "cloud_usd_month": round(own.cloud_usd_h * HOURS_A_MONTH, 2),
        "break_even_utilisation": _rounded(own.break_even),
        "assumed": {
            "machine_usd": each.machine_usd,
            "machine_accelerators": each.accelerators,
            "power_w": each.power_w,
            "years": each.years,
            "usd_per_kwh": each.usd_per_kwh,
            "pue": each.pue,
            "upkeep": each.upkeep,
        },
    }


def _error_json(told: Summary) -> dict[str, Any]:
    worst = told.worst_of
    return {
        "figures": told.count,
        "median": _rounded(told.median),
        "worst": _rounded(told.worst),
        "worst_of": None if worst is None else _figure(worst),
    }


def show(report: Report, *, everything: bool) -> None:
    """For a person."""
    size, first = report.size, report.plans[0].workload
    checkpoint = "" if size.architecture.task == "embed" else f", checkpoint in {size.precision}"
    click.echo(
        f"{click.style(size.name, bold=True)}: {_count(size.architecture.parameters)} parameters"
        + _active(report)
        + f"{checkpoint} ({size.told})"
    )
    click.echo(_asked(report) + "\n")
    rows = [_row(plan, plan.choice) for plan in report.plans if plan.choice is not None]
    if rows:
        times = ["first token", "a token", "tokens/s each"] if first.tokens_out else ["answer in"]
        print_table(["region", "hardware", "replicas", *times, "$/month", "$/1M tokens"], rows)
    for plan in report.plans:
        if plan.choice is not None:
            click.echo(_where(plan, plan.choice))
    for plan in report.plans:
        if plan.choice is None:
            _nothing(plan)
    if len(report.plans) > 1 and report.feasible:
        click.echo(f"\nTogether {_usd(report.usd_month)} a month.")
    for plan in report.plans:
        _others(plan, everything)
    _on_premises(report)
    _rests_on(report)


def _active(report: Report) -> str:
    model = report.size.architecture
    return f" ({_count(model.active)} for each token)" if model.experts else ""


def _asked(report: Report) -> str:
    first = report.plans[0].workload
    rps = sum(plan.workload.rps for plan in report.plans)
    said = f"{rps:g} requests/s of {first.tokens_in:,} tokens in"
    if first.tokens_out:
        said += f" and {first.tokens_out:,} out, contexts up to {first.context:,}"
    if not math.isinf(first.ttft_slo_s):
        what = "the first token" if first.tokens_out else "the answer"
        said += f"; {what} within {first.ttft_slo_s * 1000:,.0f} ms (p95)"
    if not math.isinf(first.tpot_slo_s):
        said += f"; a token each {first.tpot_slo_s * 1000:,.0f} ms"
    return said


def _row(plan: RegionPlan, choice: Choice) -> list[str]:
    load = choice.replica.load
    times = [f"{load.ttft_s * 1000:,.0f} ms"]
    if plan.workload.tokens_out:
        times += [f"{load.tpot_s * 1000:,.1f} ms", f"{load.rps * plan.workload.tokens_out:,.0f}"]
    return [
        plan.region,
        choice.replica.label,
        " + ".join(f"{part.replicas} {part.capacity}" for part in choice.parts),
        *times,
        _usd(choice.usd_month),
        _cents(plan.usd_per_million_tokens),
    ]


def _where(plan: RegionPlan, choice: Choice) -> str:
    """Which machines, and how a replica fits in: a line."""
    setup, load, machine = choice.replica.setup, choice.replica.load, choice.machine
    each = choice.replica.chips if machine.by_chip else 1
    machines = " + ".join(f"{part.machines * each}" for part in choice.parts)
    weights = setup.weight_bytes / setup.chips / 1e9
    fits = setup.sequences(plan.workload.tokens_in + plan.workload.tokens_out)
    cache = (
        f", cache {setup.room_bytes / 1e9:,.1f} ({fits:,} fit)" if plan.workload.tokens_out else ""
    )
    return (
        f"{click.style(plan.region, bold=True)}: {machines} {machine.name} of {machine.provider} "
        f"in {machine.place}. A replica carries {_short(load.rps)} requests/s, {load.running} at "
        f"once; of {setup.chip.memory_bytes / 1e9:,.0f} GB a chip weights take "
        f"{_short(weights)}{cache}."
    )


def _nothing(plan: RegionPlan) -> None:
    click.echo(
        f"{click.style(plan.region, bold=True)}: nothing in the catalogue can carry this. What "
        "came nearest, and what would help: "
        + click.style("relax the SLO, shorten the context, or allow --precision fp8", bold=True)
    )


def _others(plan: RegionPlan, everything: bool) -> None:
    shown = plan.lost if everything else plan.lost[:SHOWN]
    if not shown:
        return
    click.echo(f"\nWhy not, in {plan.region}:")
    print_table(
        ["hardware", "$/month", "reason"],
        [[_label(lost), _cost(lost), lost.reason] for lost in shown],
    )
    left = len(plan.lost) - len(shown)
    if left:
        click.echo(click.style(f"and {left} more: --all", dim=True))


def _label(lost: Lost) -> str:
    return lost.accelerator if lost.best is None else lost.best.replica.label


def _cost(lost: Lost) -> str:
    return "" if lost.best is None else _usd(lost.best.usd_month)


def _on_premises(report: Report) -> None:
    own, each = report.own, report.ownership
    if own is None or each is None:
        return
    click.echo(
        f"\nMachines of one's own: {own.machines} with {each.accelerators} "
        f"{own.replica.kind.chip.name} each, for {own.replicas} replicas of {own.replica.label}: "
        f"{_usd(own.usd_h * HOURS_A_MONTH)} a month, used or not; the cloud "
        f"{_usd(own.cloud_usd_h * HOURS_A_MONTH)} if it runs all the time."
    )
    if own.break_even >= 1:
        said = "The cloud is cheaper even at full use"
    else:
        said = f"Owning is cheaper above {own.break_even:.0%} of the hours at this load"
    click.echo(
        f"{click.style(said, bold=True)} (modelled; assumed: {_usd(each.machine_usd)} a machine "
        f"over {each.years:g} years, {each.power_w:,.0f} W, {each.usd_per_kwh:g} USD/kWh, "
        f"PUE {each.pue:g}, upkeep {each.upkeep:.0%} a year)."
    )


def _rests_on(report: Report) -> None:
    click.echo("\nWhat this rests on:")
    held, fit = report.error("check"), report.error("fit")
    of = "encoders" if report.size.architecture.task == "embed" else "language models"
    fitted = "it was fitted to none of them"
    if fit.count:
        fitted = f"by {fit.median:.0%} and {fit.worst:.0%} on those it was fitted to ({fit.count})"
    click.echo(
        f"  modelled   times and rates, by a roofline. Against published measurements of {of} "
        f"that it has not seen it is off by {held.median:.0%} in the median, {held.worst:.0%} at "
        f"worst ({held.count} figures); {fitted}"
    )
    for family in report.families():
        told = report.error("check", family)
        if told.worst_of is None:
            click.echo(f"             {family}: no published figure to compare with: unchecked")
        else:
            click.echo(
                f"             {family}: {told.median:.0%} and {told.worst:.0%} ({told.count}); "
                f"the worst: {_figure(told.worst_of)}"
            )
    dates = ", ".join(
        f"{name} {report.catalog.prices[name].source.date}" for name in report.providers
    )
    click.echo(f"  published  list prices ({dates}); accelerators from their data sheets")
    derived = [n for n in report.providers if report.catalog.prices[n].spot == "derived"]
    if derived:
        click.echo(f"             spot of {', '.join(derived)}: the published saving on that price")
    unsure = sorted(
        {
            choice.machine.accelerator
            for choice in report.choices
            if not choice.replica.kind.rechecked
        }
    )
    for name in unsure:
        each = report.catalog.accelerators[name]
        fields = ", ".join(each.unconfirmed) or "all figures"
        click.echo(f"             {name}: not re-checked: {fields}")
    wishes = report.wishes
    spot = "no spot"
    if wishes.spot:
        spot = (
            f"{wishes.on_demand_share:.0%} of the replicas on demand, {wishes.spot_extra:.0%} more "
            "on spot than needed"
        )
    click.echo(
        f"  assumed    {wishes.margin:.0%} margin below the SLO, for the model's error; "
        f"{wishes.headroom:.0%} headroom above the rate; {spot}; a cache in 16 bits; "
        f"{HOURS_A_MONTH:g} hours a month; arrivals at random, shared evenly; a host that "
        "keeps up with its chips; no way to the client"
    )


def _figure(off: Off) -> str:
    figure = off.figure
    batch = "as many as fit" if figure.batch is None else f"batch {figure.batch}"
    return (
        f"{figure.model} on {figure.chips} {figure.accelerator} {figure.precision}, {batch}, "
        f"{figure.tokens_in}/{figure.tokens_out}, {figure.metric}: {off.predicted:,.4g} for "
        f"{figure.value:,.4g} ({figure.source})"
    )


def _count(number: float) -> str:
    if number >= 1e9:
        return f"{number / 1e9:,.1f} billion"
    return f"{number / 1e6:,.1f} million"


def _usd(amount: float) -> str:
    return f"${amount:,.0f}" if amount >= 100 else f"${amount:,.2f}"


def _short(number: float) -> str:
    """Three digits that say something."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _cents(amount: float) -> str:
    """Of dollars: at least two digits that say something."""
    return f"{amount:,.2f}" if amount >= 0.1 else f"{amount:.2g}"


def _ms(seconds: float) -> float | None:
    return None if math.isinf(seconds) else round(seconds * 1000, 2)


def _rounded(number: float) -> float | None:
    return None if math.isnan(number) or math.isinf(number) else float(f"{number:.5g}")
