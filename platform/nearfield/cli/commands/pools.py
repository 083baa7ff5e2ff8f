"""`nearfield pools`."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from nearfield.cli.main import EXIT_FAILED, EXIT_INVALID
from nearfield.cli.output import json_option, print_json, print_table
from nearfield.core.errors import BadRequest

if TYPE_CHECKING:
    from nearfield.cli.pools_case import Machine
    from nearfield.simulator.isolation import Comparison, Row
    from nearfield.simulator.neighbours import Fare
    from nearfield.simulator.scenario import Scenario

_FILE = click.Path(dir_okay=False, path_type=Path)
HOURS = 730.0
"""Of a month."""


@click.group(invoke_without_command=True)
@click.pass_context
def pools(ctx: click.Context) -> None:
    """Pools: who shares replicas with whom, and what it would cost not to.

    \b
    nearfield pools plan examples/scenarios/shared-cluster.yaml
    nearfield pools plan mine.yaml --slo-p99-ms 500 --json | jq .choice
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@pools.command
@click.argument("scenario", type=_FILE, metavar="[SCENARIO]", required=False)
@click.option(
    "--product",
    "products",
    multiple=True,
    metavar="NAME=RPS:IN/OUT",
    help="Instead of a scenario, each product: requests/s, or BASE..BURST for a minute in eight; "
    "tokens of a prompt and of an answer, the mean. With --model and --price.",
)
@click.option("--model", help="Which of the scenario's; with --product, as of `nearfield plan`.")
@click.option("--precision", help="With --product: of the weights. [default: the checkpoint's]")
@click.option(
    "--noisy", metavar="PRODUCT", help="Whom to protect the others from. [default: who bursts most]"
)
@click.option(
    "--slo-p99-ms",
    "goals",
    multiple=True,
    metavar="[PRODUCT=]MS",
    help="First token of 99 in 100 within: of each product but the noisy one, or of this one. "
    "[default: 700]",
)
@click.option(
    "--replicas",
    type=click.IntRange(1),
    help="Of the shared pool as it is now. [default: the scenario's initial_replicas]",
)
@click.option(
    "--price",
    metavar="PROVIDER/PLACE/MACHINE",
    help="A replica's price from the catalogue: aws/us-east-1/g6.xlarge. [default: the scenario's]",
)
@click.option(
    "--limit",
    "limited",
    multiple=True,
    metavar="PRODUCT=TOKENS",
    help="Compare with a limit on its tokens a minute, too: who pays then is refused.",
)
@click.option(
    "--in-turn",
    is_flag=True,
    help="The engine serves products in turn, as generate does: fair-queued may be chosen.",
)
@click.option("--seed", type=int, help="Instead of the scenario's.")
@click.option("--all", "thorough", is_flag=True, help="Every size, to 60 % more than now. Slow.")
@click.option("--report", type=_FILE, metavar="FILE.html", help="Write the page with the plot.")
@json_option
def plan(
    scenario: Path | None, products: tuple[str, ...], model: str | None, precision: str | None,
    noisy: str | None, goals: tuple[str, ...], replicas: int | None, price: str | None,
    limited: tuple[str, ...], in_turn: bool, seed: int | None, thorough: bool,
    report: Path | None, as_json: bool,
) -> int:  # fmt: skip
    """Price isolation: what pools of their own would cost products, and gain them.

    SCENARIO says which products share a model, and what they send: see docs/simulate.md. It is
    run event by event, through the production code for routing, ranking and limits, on shared,
    fair-queued, dedicated and mixed pools of more and more replicas, each with the same requests,
    until all products but the noisy one have what --slo-p99-ms promises them.

    A row is dominated where another costs no more and is no slower for the others. Of the rest,
    each says what its last dollars have bought. Watch the noisy product's own column: that is
    who pays for the others' quiet.

    \b
    nearfield pools plan examples/scenarios/shared-cluster.yaml
    nearfield pools plan mine.yaml --slo-p99-ms 500 --slo-p99-ms reports=8000
    nearfield pools plan mine.yaml --price aws/us-east-1/g6.xlarge --report pools.html
    nearfield pools plan --model llama-3.1-8b --precision fp8 --price aws/us-east-1/g6.xlarge \\
        --product chat=9:400/120 --product reports=0.2..2.5:6000/180

    Exit code 1 if no layout keeps the promises, 2 if the scenario is invalid.
    """
    from nearfield.cli.commands.simulate import (
        check_folders,
        progress_bar,
        read_scenario,
        write_file,
    )
    from nearfield.simulator.isolation import compare
    from nearfield.simulator.neighbours import Case

    goal_s, goals_s = _goals(goals)
    check_folders(report)
    machine = None if price is None else _machine(price)
    source = Source("assumed, the scenario's", "assumed, the scenario's")
    folder = Path()
    if machine is not None:
        source = replace(source, price=f"published, {price} in nearfield's catalogue")
    if scenario is None:
        found = _typed(products, model, precision, machine, replicas)
        source = replace(source, engine="assumed: a roofline, as typed")
    elif products or precision:
        raise BadRequest(
            "--product, --precision: they stand in place of SCENARIO: leave one out",
            param="product",
        )
    else:
        read = read_scenario(scenario)
        if read is None:
            return EXIT_INVALID
        found, folder = read, scenario.parent
    usd_per_hour = None if machine is None else machine.usd_per_hour
    served = model if scenario is not None else None
    case = Case(found, folder, model=served, usd_per_hour=usd_per_hour, seed=seed)
    with progress_bar(found.simulation) as progress:
        comparison = compare(
            case,
            noisy=noisy,
            goal_s=goal_s,
            goals_s=goals_s,
            now=replicas,
            limits=_limits(limited),
            in_turn=in_turn,
            thorough=thorough,
            progress=progress,
        )
    if report is not None:
        from nearfield.simulator.isolation_page import page

        write_file(report, page(plain(comparison, source)))
    if as_json:
        print_json(plain(comparison, source))
    else:
        _show(comparison, source)
        if report is not None:
            click.echo(f"written: {report}")
    return 0 if comparison.choice is not None else EXIT_FAILED


def _goals(given: tuple[str, ...]) -> tuple[float, dict[str, float]]:
    """The goal of every product, and those of some; seconds."""
    goal_ms, goals_s = 700.0, {}
    for text in given:
        name, equals, number = text.rpartition("=")
        try:
            goal = float(number)
        except ValueError:
            goal = math.nan
        if not 0 < goal < math.inf or (equals and not name):
            raise BadRequest(
                f"--slo-p99-ms: {text!r} is no time: write 700, or reports=8000, in milliseconds",
                param="slo_p99_ms",
            )
        if equals:
            goals_s[name] = goal / 1000
        else:
            goal_ms = goal
    return goal_ms / 1000, goals_s


def _limits(given: tuple[str, ...]) -> dict[str, int]:
    """Tokens a minute, by product."""
    limits = {}
    for text in given:
        name, _, number = text.rpartition("=")
        if not name or not number.isdigit() or int(number) == 0:
            raise BadRequest(
                f"--limit: {text!r} is none: write reports=60000, in tokens a minute",
                param="limit",
            )
        limits[name] = int(number)
    return limits


@dataclass(frozen=True, slots=True)
class Source:
    """Where figures are from that are not simulated."""

    price: str
    engine: str


def _machine(given: str) -> Machine:
    """Of the catalogue, on demand."""
    from nearfield.cli.pools_case import Machine
    from nearfield.core.catalog_files import read_catalog
    from nearfield.core.problems import did_you_mean

    parts = given.split("/")
    if len(parts) != 3:
        raise BadRequest(
            f"--price: {given!r} is no machine: write provider/place/machine, as "
            "aws/us-east-1/g6.xlarge",
            param="price",
        )
    prices = read_catalog().prices
    provider, place, name = parts

    def known(what: str, wanted: str, names: Collection[str]) -> None:
        if wanted not in names:
            near = did_you_mean(wanted, list(names))
            few = ", ".join(sorted(names)[:8]) + (", …" if len(names) > 8 else "")
            raise BadRequest(
                f"--price: the catalogue has no {what} {wanted!r}: "
                + (f"did you mean {near}?" if near else f"it has {few}"),
                param="price",
            )

    known("provider", provider, prices)
    file = prices[provider]
    known("place", place, file.offers)
    known("machine", name, file.offers[place])
    usd = file.offers[place][name].on_demand_usd_h
    if usd is None:
        raise BadRequest(f"--price: {given} is sold as spot only: choose another", param="price")
    machine = file.machines[name]
    return Machine(given, float(usd), machine.accelerator, machine.count)


def _typed(
    products: tuple[str, ...], model: str | None, precision: str | None, machine: Machine | None,
    replicas: int | None,
) -> Scenario:  # fmt: skip
    """The case that the options describe."""
    from nearfield.cli.pools_case import case_of
    from nearfield.core.catalog_files import read_catalog

    if not products:
        raise BadRequest(
            "SCENARIO is missing: name a file, or say --product, --model and --price",
            param="scenario",
        )
    if model is None or machine is None:
        raise BadRequest(
            "--product goes with --model llama-3.1-8b and --price aws/us-east-1/g6.xlarge: what "
            "is served, and on which machine",
            param="model",
        )
    return case_of(
        products,
        read_catalog(),
        model=model,
        precision=precision,
        machine=machine,
        replicas=replicas,
    )


# ---- showing it ----------------------------------------------------------------------------------


def plain(comparison: Comparison, source: Source) -> dict[str, Any]:
    """All of it as JSON: what was simulated by itself, apart from what was assumed."""
    case, choice = comparison.case, comparison.choice
    now, hoped_for = comparison.now, comparison.hoped_for
    return {
        "simulation": case.scenario.simulation,
        "model": case.model,
        "seed": case.seed,
        "noisy": comparison.noisy,
        "promised_p99_ms": {name: _ms(s) for name, s in comparison.goals_s.items()},
        "now": _row(comparison, now),
        "choice": None if choice is None else _row(comparison, choice),
        "would_be_cheaper": None if hoped_for is None else _row(comparison, hoped_for),
        "rows": [_row(comparison, row) for row in comparison.rows],
        "simulated": {"runs": comparison.runs, "requests": comparison.requests},
        "figures": {
            "times and shares": "simulated, event by event",
            "usd_per_hour": f"replicas x {case.pool.usd_per_hour:g} USD an hour: {source.price}",
            "engine and traffic": source.engine,
        },
        "needs_turns": sorted({row.layout for row in comparison.rows if row.needs_turns}),
    }


def _row(comparison: Comparison, row: Row) -> dict[str, Any]:
    now = comparison.now
    return {
        "layout": row.layout,
        "pools": row.pools,
        "replicas": row.replicas,
        "usd_per_hour": round(row.usd_per_hour, 4),
        "usd_per_month": round(row.usd_per_hour * HOURS, 2),
        "cost_over_now": round(row.usd_per_hour / now.usd_per_hour - 1, 4),
        "others": _fare(row.others),
        "products": {name: _fare(fare) for name, fare in row.fares.items()},
        "promises_kept": row.kept,
        "needs_turns": row.needs_turns,
        "offered": row.offered,
        "dominated_by": None if row.dominated_by is None else row.dominated_by.pools,
        "dominated_by_layout": None if row.dominated_by is None else row.dominated_by.layout,
        "p99_ms_saved_per_usd_per_hour": None if row.ms_per_usd is None
        else round(row.ms_per_usd, 1),
    }  # fmt: skip


def _fare(fare: Fare) -> dict[str, Any]:
    return {
        "requests": fare.ended,
        "p50_ms": _ms(fare.quantile_s(0.5)),
        "p95_ms": _ms(fare.quantile_s(0.95)),
        "p99_ms": _ms(fare.p99_s),
        "over_2_s": round(fare.over_share, 5),
        "over_2_s_at_peak": round(fare.peak_over_share, 5),
        "failed": round(fare.failed_share, 5),
    }


def _ms(seconds: float) -> float | None:
    """None: so many failed that there is no such time."""
    return round(1000 * seconds, 1) if math.isfinite(seconds) else None


def _show(comparison: Comparison, source: Source) -> None:
    case, now, noisy = comparison.case, comparison.now, comparison.noisy
    choice = comparison.choice
    names = [name for name in case.products if name != noisy] + [noisy]
    promised = ", ".join(f"{n} {1000 * s:,.0f} ms" for n, s in comparison.goals_s.items())
    click.echo(f"{noisy} is noisy. Promised, first token p99: {promised}\n")
    head = ["layout", "pools", "USD/month", "", "others p99", "over 2 s, peak"]
    head += [f"{name} p99" for name in names] + [f"{noisy} failed", "per +1 USD/h", ""]
    rows = []
    for row in comparison.rows:
        more = row.usd_per_hour / now.usd_per_hour - 1
        mark = []
        if row is now:
            mark.append("now")
        if row is choice:
            mark.append(click.style("cheapest that keeps the promises", fg="green"))
        elif row.kept:
            mark.append("keeps the promises")
        if not row.offered and not row.needs_turns:
            mark.append("refuses too many")
        if row.dominated_by is not None:
            better = row.dominated_by
            mark.append(f"dominated by {better.layout}, {better.pools}")
        starred = "*" if row.needs_turns else ""
        rows.append(
            [
                row.layout + starred,
                row.pools,
                f"{row.usd_per_hour * HOURS:,.0f}",
                f"{100 * more:+.0f} %" if more else "",
                _time(row.others.p99_s),
                f"{100 * row.others.peak_over_share:.1f} %",
                *(_time(row.fares[name].p99_s) for name in names),
                f"{100 * row.fares[noisy].failed_share:.1f} %",
                "" if row.ms_per_usd is None else f"-{row.ms_per_usd:,.0f} ms",
                ", ".join(mark),
            ]
        )
    print_table(head, rows)
    click.echo()
    if choice is None:
        click.echo(
            f"No layout up to {comparison.rows[-1].replicas} replicas keeps the promises: "
            "allow more with --slo-p99-ms, or begin with more --replicas."
        )
    else:
        extra = (choice.usd_per_hour - now.usd_per_hour) * HOURS
        click.echo(
            f"{choice.layout} ({choice.pools}): p99 of the others {_time(now.others.p99_s)} → "
            f"{_time(choice.others.p99_s)} for {extra:+,.0f} USD a month "
            f"({100 * (choice.usd_per_hour / now.usd_per_hour - 1):+.0f} %); {noisy} "
            f"{_time(now.fares[noisy].p99_s)} → {_time(choice.fares[noisy].p99_s)}."
        )
    if (hoped_for := comparison.hoped_for) is not None:
        more = 100 * (hoped_for.usd_per_hour / now.usd_per_hour - 1)
        click.echo(
            f"{hoped_for.layout}* would do with {hoped_for.replicas} replicas ({more:+.0f} %): "
            f"{_time(hoped_for.others.p99_s)}; {noisy} {_time(hoped_for.fares[noisy].p99_s)}."
        )
    if any(row.needs_turns for row in comparison.rows):
        click.echo(
            "* with an engine that serves products in turn, as generate does: say --in-turn. vllm "
            "and remote engines take prompts as they come."
        )
    click.echo(
        click.style(
            f"Times and shares are simulated: {comparison.requests:,} requests in "
            f"{comparison.runs} runs, seed {case.seed}. A replica costs "
            f"{case.pool.usd_per_hour:g} USD an hour ({source.price}). Engine and traffic: "
            f"{source.engine}.",
            dim=True,
        )
    )


def _time(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "failed"
    return f"{1000 * seconds:,.0f} ms"
