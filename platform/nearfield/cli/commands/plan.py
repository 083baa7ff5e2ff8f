"""`nearfield plan`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click
from nearfield.cli.main import EXIT_FAILED
from nearfield.cli.output import json_option, print_json
from nearfield.core.errors import BadRequest

if TYPE_CHECKING:
    from nearfield.cli.market import Wanted
    from nearfield.cli.model_sizes import ModelSize
    from nearfield.cli.plan_report import Report
    from nearfield.core.catalog import Accelerator
    from nearfield.policy.plan import Market, Ownership, OwnPlan, RegionPlan, Wishes, Workload

PRECISIONS = ("bf16", "fp16", "fp8", "int8", "int4")
HOST_SHARE = 1.4
"""Power of a machine over that of its accelerators, where --power-w does not say it. Assumed."""

_above_0 = click.FloatRange(min=0, min_open=True)
_share = click.FloatRange(min=0, max=1)


@click.command
@click.argument("model")
@click.option("--rps", type=_above_0, required=True, help="Requests/s to plan for: the peak.")
@click.option("--slo-ttft-ms", type=_above_0, help="First token within, for 95 of 100.")
@click.option("--slo-tpot-ms", type=_above_0, help="Mean time of each token after it.")
@click.option(
    "--input-tokens",
    type=click.IntRange(1),
    default=1000,
    show_default=True,
    help="Of a request, the mean.",
)
@click.option(
    "--output-tokens",
    type=click.IntRange(0),
    default=250,
    show_default=True,
    help="Likewise of an answer. An embedding model has none.",
)
@click.option(
    "--context",
    type=click.IntRange(1),
    metavar="TOKENS",
    help="Longest prompt and answer that must fit; absent: those two.",
)
@click.option(
    "--regions",
    metavar="NAME[=RPS],...",
    help="nearfield's regions (names or files) or a cloud's: eu-west,us-east=30,gcp/europe-west4. "
    "What has no =RPS shares the rest. Absent: anywhere.",
)
@click.option(
    "--within-km",
    type=_above_0,
    default=1500.0,
    show_default=True,
    help="How far from a region of nearfield's its machines may be, under the same law.",
)
@click.option(
    "--providers",
    metavar="NAME,...",
    help="Whose prices: aws, azure, gcp, small-clouds, all. Absent: the first three.",
)
@click.option(
    "--precision",
    metavar="NAME,...",
    help=f"Of the weights: {', '.join(PRECISIONS)}, or any. Absent: the checkpoint's own; another "
    "one changes answers, so it is never chosen unasked.",
)
@click.option(
    "--spot/--no-spot", default=True, show_default=True, help="Use spot machines beside others."
)
@click.option(
    "--on-demand-share",
    type=_share,
    default=0.2,
    show_default=True,
    help="Of the replicas, that always run on demand.",
)
@click.option(
    "--spot-extra",
    type=click.FloatRange(min=0),
    default=0.25,
    show_default=True,
    help="Spot replicas more than needed, so that some may be lost.",
)
@click.option(
    "--margin",
    type=click.FloatRange(min=0),
    default=0.2,
    show_default=True,
    help="Times are planned to be so much shorter than the SLO, for the model's error.",
)
@click.option(
    "--headroom",
    type=click.FloatRange(min=0),
    default=0.2,
    show_default=True,
    help="Capacity kept free above --rps.",
)
@click.option(
    "--max-running",
    type=click.IntRange(1, 4096),
    default=256,
    show_default=True,
    help="Requests in one replica at once.",
)
@click.option("--max-usd", type=_above_0, help="A month; a dearer plan is refused.")
@click.option("--on-prem", metavar="ACCELERATOR", help="Compare with machines of your own.")
@click.option("--capex-usd", type=_above_0, help="What one such machine costs; with --on-prem.")
@click.option(
    "--machine-accelerators",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="In one such machine.",
)
@click.option("--power-w", type=_above_0, help="It draws; absent: its accelerators and 40 %.")
@click.option("--years", type=_above_0, default=4.0, show_default=True, help="Until written off.")
@click.option("--usd-per-kwh", type=_above_0, default=0.12, show_default=True, help="Electricity.")
@click.option(
    "--pue",
    type=click.FloatRange(min=1),
    default=1.4,
    show_default=True,
    help="Power of the building over that of its machines.",
)
@click.option(
    "--upkeep",
    type=_share,
    default=0.08,
    show_default=True,
    help="A year, of the machine's price: space, hands, spare parts.",
)
@click.option(
    "--catalog",
    "catalogs",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A folder with hardware/ or prices/ of your own, beside nearfield's.",
)
@click.option(
    "--write",
    "target",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write the plan as the model's YAML; for several regions, one FILE each, with its name.",
)
@click.option("--all", "everything", is_flag=True, help="Show every alternative, and its reason.")
@json_option
def plan(
    model: str, rps: float, slo_ttft_ms: float | None, slo_tpot_ms: float | None,
    input_tokens: int, output_tokens: int, context: int | None, regions: str | None,
    within_km: float, providers: str | None, precision: str | None, spot: bool,
    on_demand_share: float, spot_extra: float, margin: float, headroom: float, max_running: int,
    max_usd: float | None, on_prem: str | None, capex_usd: float | None,
    machine_accelerators: int, power_w: float | None, years: float, usd_per_kwh: float,
    pue: float, upkeep: float, catalogs: tuple[Path, ...], target: Path | None,
    everything: bool, as_json: bool,
) -> int:  # fmt: skip
    """Plan where a model should run: hardware, precision, region, replicas, cost.

    MODEL is a config.json or its folder, a model's YAML, hf://org/model, or a known name. Nothing
    is started and nobody is asked: prices and data sheets are the catalogue's, with their dates.
    Times come from a roofline model; how far it is off published measurements is printed.

    \b
    nearfield plan llama-3.1-8b --rps 20 --slo-ttft-ms 500
    nearfield plan llama-3.1-70b --rps 50 --slo-ttft-ms 800 --slo-tpot-ms 60 \\
        --precision fp8 --regions eu-west,us-east=30
    nearfield plan deployments/models/embed.yaml --rps 500 --input-tokens 128 --output-tokens 0
    nearfield plan llama-3.1-8b --rps 20 --on-prem L40S --capex-usd 90000
    nearfield plan llama-3.1-8b --rps 20 --regions eu-west --write chat.yaml

    Exit code 1 if no plan keeps the SLO in every region, or within --max-usd.
    """
    from nearfield.cli.market import market_of, providers_of, wanted_regions
    from nearfield.cli.model_sizes import model_size
    from nearfield.cli.plan_report import Report, show
    from nearfield.cli.plan_report import as_json as report_json
    from nearfield.core.catalog_files import read_catalog
    from nearfield.policy.plan import Wishes
    from nearfield.policy.plan import plan as plan_regions
    from nearfield.policy.validate import architectures, like, validate

    catalog = read_catalog(catalogs)
    size = model_size(model, catalog.models)
    if size.architecture.task == "embed":
        output_tokens = 0
        if precision is not None:
            raise BadRequest(
                "--precision: an embedding model is computed in 16 bits on GPUs and in 32 on "
                "processors: leave it out",
                param="precision",
            )
    elif output_tokens == 0:
        raise BadRequest(
            "--output-tokens 0: this model generates, so it is at least 1", param="output_tokens"
        )
    wishes = Wishes(
        precisions=_precisions(precision, size),
        margin=margin,
        headroom=headroom,
        spot=spot,
        on_demand_share=on_demand_share,
        spot_extra=spot_extra,
        most=max_running,
    )
    whose = providers_of(providers, catalog)
    wanted = wanted_regions(regions, catalog, whose, within_km)
    longest = _context(context or size.context, size, input_tokens + output_tokens)
    market = market_of(catalog, wanted, whose)
    loads = _workloads(wanted, rps, input_tokens, output_tokens, longest, slo_ttft_ms, slo_tpot_ms)
    plans = plan_regions(size.architecture, loads, market, wishes)
    ownership = owned = None
    if on_prem is not None:
        ownership = _ownership(
            on_prem, market, catalog.accelerators.get(on_prem), capex_usd, machine_accelerators,
            power_w, years, usd_per_kwh, pue, upkeep,
        )  # fmt: skip
        owned = _own(on_prem, ownership, size, loads, market, plans, wishes)
    models = architectures(catalog.models)
    figures = like(catalog.figures, models, size.architecture.task)
    report = Report(
        size,
        plans,
        wishes,
        catalog,
        whose,
        validate(figures, catalog.accelerators, models, catalog.shares),
        ownership,
        owned,
    )
    within = max_usd is None or report.usd_month <= max_usd
    written = _write(target, report) if target is not None and report.feasible and within else []
    if as_json:
        files = [str(path) for path in written]
        print_json({**report_json(report), "within_max_usd": within, "written": files})
    else:
        show(report, everything=everything)
        for path in written:
            click.echo(f"\nwrote {path}. Next: nearfield check {path}")
    if not within:
        raise click.ClickException(
            f"--max-usd {max_usd:g}: the cheapest plan costs {report.usd_month:,.0f} USD a month: "
            "raise it, relax the SLO, or allow --precision fp8"
        )
    return 0 if report.feasible else EXIT_FAILED


def _precisions(given: str | None, size: ModelSize) -> tuple[str, ...]:
    if given is None:
        return (size.precision,)
    if given == "any":
        return ("bf16", "fp8", "int8", "int4")
    names = tuple(name.strip() for name in given.split(",") if name.strip())
    for name in names:
        if name not in PRECISIONS:
            raise BadRequest(
                f"--precision: {name!r} is none of {', '.join(PRECISIONS)}, or any",
                param="precision",
            )
    return names


def _context(given: int | None, size: ModelSize, each: int) -> int:
    longest = given or each
    if longest < each:
        raise BadRequest(
            f"--context {longest} is shorter than a request of {each} tokens in and out: raise it, "
            "or lower --input-tokens or --output-tokens",
            param="context",
        )
    most = size.architecture.context
    if longest > most:
        remedy = "lower --context" if longest > each else "lower --input-tokens or --output-tokens"
        if size.architecture.task == "embed":
            remedy = f"say how long a text is, in the mean: --input-tokens {min(128, most)}"
        raise BadRequest(
            f"--context: {longest:,} tokens are more than the {most:,} that {size.name} was made "
            f"for: {remedy}",
            param="context",
        )
    return longest


def _workloads(
    wanted: list[Wanted], rps: float, tokens_in: int, tokens_out: int, context: int,
    ttft_ms: float | None, tpot_ms: float | None,
) -> dict[str, Workload]:  # fmt: skip
    from nearfield.policy.plan import Workload

    told = sum(region.rps or 0.0 for region in wanted)
    open_regions = sum(region.rps is None for region in wanted)
    rest = rps - told
    if rest < -1e-9 or (open_regions and rest <= 0):
        raise BadRequest(
            f"--regions: {told:g} requests/s are given to regions, --rps is {rps:g}: raise --rps "
            "to their sum",
            param="rps",
        )
    if not open_regions and abs(rest) > 1e-9:
        raise BadRequest(
            f"--regions: the regions' requests/s add up to {told:g}, --rps is {rps:g}: leave one "
            "region without =RPS to take the rest",
            param="rps",
        )
    return {
        region.name: Workload(
            rest / open_regions if region.rps is None else region.rps,
            tokens_in,
            tokens_out,
            context,
            math.inf if ttft_ms is None else ttft_ms / 1000.0,
            math.inf if tpot_ms is None else tpot_ms / 1000.0,
        )
        for region in wanted
    }


def _ownership(
    name: str, market: Market, accelerator: Accelerator | None, machine_usd: float | None,
    count: int, power_w: float | None, years: float, usd_per_kwh: float, pue: float, upkeep: float,
) -> Ownership:  # fmt: skip
    from nearfield.core.problems import did_you_mean
    from nearfield.policy.plan import Ownership

    if accelerator is None:
        near = did_you_mean(name, market.kinds)
        raise BadRequest(
            f"--on-prem: {name!r} is not in the catalogue: "
            + (f"did you mean {near}? " if near else "")
            + f"It has {', '.join(market.kinds)}",
            param="on_prem",
        )
    if machine_usd is None:
        raise BadRequest(
            f"--capex-usd is missing: what does a machine with {count} {name} cost you? The "
            "catalogue has no prices of machines to buy",
            param="capex_usd",
        )
    if power_w is None:
        if accelerator.power_w is None:
            raise BadRequest(
                f"--power-w is missing: the power of {name} is not published", param="power_w"
            )
        power_w = HOST_SHARE * count * accelerator.power_w
    return Ownership(machine_usd, count, power_w, years, usd_per_kwh, pue, upkeep)


def _own(
    name: str, ownership: Ownership, size: ModelSize, loads: dict[str, Workload],
    market: Market, plans: list[RegionPlan], wishes: Wishes,
) -> OwnPlan | None:  # fmt: skip
    """All regions' load in one place of one's own; None if a region has no plan to compare with."""
    from nearfield.policy.plan import own, replicas_of

    workload = next(iter(loads.values()))
    replicas, reason = replicas_of(
        size.architecture, market.kinds[name], workload, wishes, chips=ownership.accelerators
    )
    if not replicas:
        raise BadRequest(f"--on-prem {name}: {reason}", param="on_prem")
    choices = [plan.choice for plan in plans if plan.choice is not None]
    if len(choices) < len(plans):
        return None
    total = sum(each.rps for each in loads.values())
    return own(replicas, ownership, total, sum(choice.usd_h for choice in choices), wishes)


def _write(target: Path, report: Report) -> list[Path]:
    from nearfield.cli.plan_yaml import config_of

    written = []
    for each in report.plans:
        choice = each.choice
        assert choice is not None
        accelerator = report.catalog.accelerators[choice.machine.accelerator]
        path = target
        if len(report.plans) > 1:
            where = each.region.replace("/", "-")
            path = target.with_name(f"{target.stem}.{where}{target.suffix or '.yaml'}")
        if path.exists():
            raise BadRequest(
                f"--write: {path} exists, and nothing is overwritten: choose another name",
                param="write",
            )
        path.write_text(config_of(each, report.size, accelerator), encoding="utf-8")
        written.append(path)
    return written
