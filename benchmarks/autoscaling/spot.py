"""Spot capacity that comes and goes, as it was recorded: what it saves, and at what latency.

    python -m benchmarks.autoscaling spot

Zones whose availability was recorded on one clock are the spot pools of one service, with a pool on
demand behind them, at recorded prices; the traffic is ServeGen's m_large. The product's simulator
runs every request, the production policy buys the replicas, and so it does for the baselines,
which only place them otherwise (`spot_baselines`). Targets: 55 % below on demand at less than 20 %
more at p99, and 1 % late at most.

Recorded: availability, prices, traffic. Assumed: the engine, the boot, the notice; that a zone
which could give one machine could have given `times` as many; and that zones of several regions are
one service's, as SkyServe has them: the way between them is told beside the figures, not simulated.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from multiprocessing import Pool as Processes
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from nearfield.policy import scale
from nearfield.simulator.parts import Step
from nearfield.simulator.result import simulate
from nearfield.simulator.scenario import Scenario, Spot
from nearfield.simulator.traces import spot_changes

from benchmarks.autoscaling import traffic
from benchmarks.autoscaling.spot_baselines import Base, SpotHedge, SpotOnly

RESULTS = traffic.ROOT / "benchmarks" / "results" / "autoscaling"
DAY_S = 86_400.0
SAVED, SLOWER, LATE = 0.55, 0.20, 0.01
"""The targets."""
AWS_RTT_MS, GCP_RTT_MS = 73, 146
"""Recorded round trips (`network/aws_region_rtt.csv`): us-east-1 to us-west-2; and for us-central1
to asia-northeast1 that of AWS's regions there, us-east-2 to ap-northeast-1."""
P3 = "p3.2xlarge"


class Zone(NamedTuple):
    zone: str
    trace: str


class Family(NamedTuple):
    """Traces on one clock.

    Attributes:
        machines: of a zone at most, as recorded. times: replicas for each.
        prices: where from. from_day: where in the traces it begins.
    """

    name: str
    zones: tuple[Zone, ...]
    machines: int
    times: int
    prices: str
    days: float
    notice_s: float = 120.0
    from_day: float = 0.0
    rtt_ms: int = AWS_RTT_MS


def _aws(name: str, *zones: str) -> tuple[Zone, ...]:
    return tuple(Zone(zone, f"aws-{name}-{zone}-v100x1") for zone in zones)


FEBRUARY = "02-15-2023-avail"
EAST, WEST = ("us-east-1a", "us-east-1c", "us-east-1f"), ("us-west-2a", "us-west-2c")
FAMILIES = (
    Family(
        "aws-02-15",
        _aws(FEBRUARY, *EAST, "us-east-2a", *WEST),
        1, 16, "advisor", 2.0,
    ),
    Family(
        "aws-02-15-history",
        _aws(FEBRUARY, *EAST[1:], *WEST),
        1, 16, "history", 2.0, from_day=14.0,
    ),
    Family(
        "aws-08-27", _aws("08-27-2023-avail", "us-east-2b", "us-west-2a"), 16, 1, "advisor", 2.0
    ),
    Family(
        "aws-04-22", _aws("04-22-2023-preem", "us-east-1c", "us-west-2b"), 1, 16, "history", 2.0
    ),
    Family(
        "aws-08-03", _aws("08-03-2023-preem", "us-east-1f", "us-east-2a"), 4, 4, "advisor", 2.0
    ),
    Family(
        "gcp1-a100",
        tuple(
            Zone(zone, f"gcp1-{zone}-a100")
            for zone in ("us-central1-a", "us-west1-b", "asia-northeast1-a")
        ),
        4, 4, "gcp", 1.3, notice_s=30.0, rtt_ms=GCP_RTT_MS,
    ),
)  # fmt: skip
STEPS: dict[str, Callable[[], Step]] = {
    "on demand": lambda: scale.step,
    "nearfield": lambda: scale.step,
    "SpotHedge, 1 extra": lambda: SpotHedge(1),
    "SpotHedge, 3 extra": lambda: SpotHedge(3),
    "half on demand": Base,
    "spot, spread": SpotOnly,
    "spot, one zone": lambda: SpotOnly(1),
}


# ---- recorded prices ----------------------------------------------------------------------------


def _rows(path: Path) -> Iterator[dict[str, str]]:
    if not path.is_file():
        raise traffic.TracesMissing(f"{path.name} is not in {path.parent}")
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        yield from csv.DictReader(lines)


def prices(family: Family, data: Path, folder: Path) -> tuple[float, dict[str, Any], str]:
    """On demand, of each zone's spot pool (`usd_per_hour`, and `prices` where they change), and
    where from. Changes are written into the folder."""
    folder_of = data / "prices"
    if family.prices == "gcp":
        return _gcp(family, folder_of)
    on_demand = [
        float(row["on_demand_usd_h"])
        for row in _rows(folder_of / "aws_on_demand_changes.csv")
        if (row["instance_type"], row["region"]) == (P3, "us-east-1")
    ][-1]
    if family.prices == "advisor":
        saved = {
            row["region"]: float(row["spot_saving_pct"]) / 100
            for row in _rows(folder_of / "aws_spot_advisor.csv")
            if row["instance_type"] == P3
        }
        steady = {
            z.zone: {"usd_per_hour": on_demand * (1 - saved[z.zone[:-1]])} for z in family.zones
        }
        return on_demand, steady, "savings of 2025-06-28 (AWS spot advisor) on the us-east-1 price"
    begins = datetime(2020, 1, 1, tzinfo=UTC)
    wanted = {z.zone for z in family.zones}
    found = [
        (row["zone"], (datetime.fromisoformat(row["time_utc"] + "Z") - begins).total_seconds(), usd)
        for row in _rows(folder_of / "aws_spot_price_history_2020.csv.gz")
        if row["instance_type"] == P3 and row["zone"] in wanted
        for usd in [row["spot_usd_h"]]
    ]
    path = folder / f"{family.name}-prices.csv"
    with path.open("w", newline="") as lines:
        csv.writer(lines).writerows([("zone", "t_s", "usd_per_hour"), *found])
    changing = {
        zone: {
            "usd_per_hour": min(float(usd) for z, _, usd in found if z == zone),
            "prices": {"file": str(path), "where": {"zone": zone}},
        }
        for zone in wanted
    }
    return (
        on_demand,
        changing,
        "the zones' own price changes from 2020-01-01 on, the us-east-1 price",
    )


def _gcp(family: Family, folder: Path) -> tuple[float, dict[str, Any], str]:
    rows = [
        row
        for row in _rows(folder / "gcp_gpu_prices_weekly.csv.gz")
        if row["instance_type"] == "a2-highgpu-1g"
    ]
    last = max(row["snapshot_date"] for row in rows)
    by_region = {row["region"]: row for row in rows if row["snapshot_date"] == last}
    here = {z.zone: by_region[z.zone.rsplit("-", 1)[0]] for z in family.zones}
    on_demand = min(float(row["on_demand_usd_h"]) for row in here.values())
    pools = {zone: {"usd_per_hour": float(row["spot_usd_h"])} for zone, row in here.items()}
    return on_demand, pools, f"a2-highgpu-1g, {last}"


def at_most(family: Family, ratios: dict[str, float], data: Path) -> float:
    """What knowing everything would save: every replica in the cheapest zone that has machines, or
    on demand where none has, with no boot, no spare and no loss."""
    file = str(data / "spot" / "spot_traces.csv.gz")
    changes = []
    for zone in family.zones:
        spot = Spot(file=file, trace=zone.trace, offset_s=family.from_day * DAY_S)
        changes += [(at_s, zone.zone, n) for at_s, n in spot_changes(spot, data)]
    end_s = family.days * DAY_S
    there: dict[str, int] = {}
    cost, last_s, price = 0.0, 0.0, 1.0
    for at_s, name, machines in [*sorted(changes), (end_s, "", 0)]:
        cost += price * (min(at_s, end_s) - last_s)
        last_s = min(at_s, end_s)
        there[name] = machines
        price = min([1.0, *(ratios[zone] for zone, count in there.items() if count)])
    return 1 - cost / end_s


def elsewhere(data: Path) -> str:
    """Where the recorded prices of GCP would allow the target: what `nearfield plan` chooses by."""
    rows = list(_rows(data / "prices" / "gcp_gpu_prices_weekly.csv.gz"))
    last = max(row["snapshot_date"] for row in rows)
    regions: dict[str, dict[str, bool]] = {}
    for row in rows:
        if row["snapshot_date"] == last and float(row["accelerator_count"]) == 1:
            enough = float(row["spot_usd_h"]) <= (1 - SAVED) * float(row["on_demand_usd_h"])
            regions.setdefault(row["accelerator"], {})[row["region"]] = enough
    found = ", ".join(
        f"{name} in {sum(of.values())} of {len(of)} regions" for name, of in sorted(regions.items())
    )
    return f"On {last} spot cost {1 - SAVED:.0%} of on demand or less with {found} of GCP."


# ---- runs ---------------------------------------------------------------------------------------


def scenario(family: Family, policy: str, data: Path, folder: Path, boot_s: float) -> Scenario:
    on_demand, spot, _ = prices(family, data, folder)
    most = family.times * family.machines
    shared = {"model": "chat", "engine": "v100", "boot": boot_s, "drain_s": 120.0}
    pools = [
        shared
        | spot[z.zone]
        | {
            "pool": f"spot-{z.zone}",
            "zone": z.zone,
            "capacity": "spot",
            "max_replicas": most,
            "spot": {
                "file": str(data / "spot" / "spot_traces.csv.gz"),
                "trace": z.trace,
                "times": family.times,
                "offset_s": family.from_day * DAY_S,
                "notice_s": family.notice_s,
            },
        }
        for z in family.zones
        if policy != "on demand"
    ]
    pools.append(
        shared
        | {
            "pool": "on-demand",
            "usd_per_hour": on_demand,
            "max_replicas": 60,
            "initial_replicas": 12,
        }
    )
    traces = data / "traces"
    return Scenario.model_validate(
        {
            "simulation": family.name,
            "duration_s": family.days * DAY_S,
            "window_s": 3600.0,
            "regions": [{"region": "everywhere", "jurisdiction": "us"}],
            "engines": [
                {
                    "engine": "v100",
                    "prefill_tokens_per_s": 8000,
                    "step_ms": 90,
                    "step_ms_per_sequence": 2,
                    "max_running": 16,
                }
            ],
            "models": [{"model": "chat", "slo": {"ttft_s": 3}, "scaling": {"interval_s": 10}}],
            "pools": pools,
            "traffic": [
                {
                    "traffic": "m_large",
                    "model": "chat",
                    "arrivals": {
                        "kind": "clients",
                        "file": str(traces / "servegen_m_large_clients_week1.csv.gz"),
                        "tokens": str(traces / "servegen_m_large_tokens_week1.csv.gz"),
                        "times": 0.008,
                    },
                }
            ],
        }
    )


class Cell(NamedTuple):
    family: Family
    policy: str
    boot_s: float
    data: Path


def run(cell: Cell) -> dict[str, Any]:
    """One policy on one family."""
    begun_s = time.process_time()
    with TemporaryDirectory() as folder:
        world = scenario(cell.family, cell.policy, cell.data, Path(folder), cell.boot_s)
        found = simulate(world, cell.data, step=STEPS[cell.policy]())
    model, cost = found["models"][0], found["cost"]
    hours = [p99_s for p99_s in found["windows"]["latency"][0]["ttft_p99_s"] if p99_s is not None]
    replicas = [
        sum(pool["ready"][i] for pool in found["windows"]["replicas"])
        for i in range(found["windows"]["count"])
    ]
    shown = {
        "usd_per_hour": cost["usd_per_hour"],
        "spot_share_of_cost": cost["usd_by_capacity"]["spot"] / max(1e-9, cost["usd"]),
        "requests": model["arrived"],
        "late": model["late_fraction"],
        "failed": (model["refused"] + model["expired"]) / model["arrived"],
        "lost": model["lost"],
        "sent_again": model["replayed"],
        "ttft_p50_s": model["ttft_s"]["p50"],
        "ttft_p99_s": model["ttft_s"]["p99"],
        "ttft_p99_s_of_the_worst_hour": max(hours),
        "total_p50_s": model["total_s"]["p50"],
        "total_p99_s": model["total_s"]["p99"],
        "replicas_taken_back": sum(change["kind"] == "notice" for change in found["history"]),
        "reasons": found["traffic"][0]["reasons"],
        "late_by_hour": found["windows"]["latency"][0]["late_fraction"],
        "replicas": [min(replicas), sum(replicas) / len(replicas), max(replicas)],
        "cpu_s": round(time.process_time() - begun_s, 1),
    }
    print(f"{cell.family.name}: {cell.policy}: {shown['cpu_s']:.0f} s", file=sys.stderr)
    return shown


def compared(family: Family, data: Path, runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A family's runs against its run on demand."""
    with TemporaryDirectory() as folder:
        on_demand, spot, source = prices(family, data, Path(folder))
    ratios = {zone: pool["usd_per_hour"] / on_demand for zone, pool in spot.items()}
    most = at_most(family, ratios, data)
    steady = runs["on demand"]
    for shown in runs.values():
        shown["saved"] = 1 - shown["usd_per_hour"] / steady["usd_per_hour"]
        for name in ("ttft_p99_s", "total_p99_s"):
            shown[f"{name}_more"] = shown[name] / steady[name] - 1
        shown["kept"] = (
            shown["saved"] >= SAVED and shown["ttft_p99_s_more"] < SLOWER and shown["late"] <= LATE
        )
    return {
        "days": family.days,
        "from_day": family.from_day,
        "prices": source,
        "on_demand_usd_per_hour": on_demand,
        "spot_over_on_demand": {zone: round(ratio, 3) for zone, ratio in sorted(ratios.items())},
        "most_that_can_be_saved": most,
        "elsewhere": elsewhere(data) if family.prices == "gcp" and most < SAVED else "",
        "rtt_ms_between_zones_at_most": family.rtt_ms,
        "runs": runs,
    }


# ---- the report ---------------------------------------------------------------------------------


def _text(data: dict[str, Any]) -> str:
    lines = [
        "# Spot capacity, as it was recorded",
        "",
        "Latencies, lateness and costs are simulated, every request by itself, with the production",
        "policy. Availability, prices and traffic are recorded. Assumed are the engine (0.7",
        f"requests a second), a boot of {data['boot_s']:g} s, the notice, and",
        "several replicas where one machine was recorded. Written by",
        "`python -m benchmarks.autoscaling spot`.",
        "",
        f"Targets: {SAVED:.0%} below on demand, less than {SLOWER:.0%} more at p99 of the first",
        f"token, {LATE:.0%} late at most.",
    ]
    for name, family in data["families"].items():
        ratios, most = family["spot_over_on_demand"], family["most_that_can_be_saved"]
        lines += [
            "",
            f"## {name}",
            "",
            f"{family['days']:g} days from day {family['from_day']:g}. Prices (recorded): "
            f"{family['prices']}; on demand {family['on_demand_usd_per_hour']:.2f} USD an hour, "
            f"spot {', '.join(f'{zone} {ratio:.2f}' for zone, ratio in ratios.items())} of it: "
            f"{most:.1%} could be saved by who knew everything. Between the zones are up to "
            f"{family['rtt_ms_between_zones_at_most']} ms (recorded), in no figure here."
            + (" Nobody can keep the target." if most < SAVED else "")
            + (f" {text}" if (text := family["elsewhere"]) else ""),
            "",
            "| policy | below on demand | cost, spot | late | failed | lost | p50, first token | "
            "p99 | p99 more | worst hour | p99, whole | more | taken back | target |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for policy, run_ in family["runs"].items():
            lines.append(
                f"| {policy} | {run_['saved']:.1%} | {run_['spot_share_of_cost']:.0%} | "
                f"{run_['late']:.2%} | {run_['failed']:.2%} | {run_['lost']} | "
                f"{run_['ttft_p50_s']:.2f} s | {run_['ttft_p99_s']:.2f} s | "
                f"{run_['ttft_p99_s_more']:+.0%} | {run_['ttft_p99_s_of_the_worst_hour']:.1f} s | "
                f"{run_['total_p99_s']:.0f} s | {run_['total_p99_s_more']:+.0%} | "
                f"{run_['replicas_taken_back']} | "
                f"{'' if policy == 'on demand' else 'kept' if run_['kept'] else 'missed'} |"
            )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    known = {family.name: family for family in FAMILIES}

    def chosen(among: list[str]) -> Callable[[str], list[str]]:
        def names(text: str) -> list[str]:
            found = text.split(";")
            if unknown := set(found) - set(among):
                raise argparse.ArgumentTypeError(
                    f"no {sorted(unknown)[0]!r}; there are {'; '.join(among)}"
                )
            return found

        return names

    parser = argparse.ArgumentParser(prog="python -m benchmarks.autoscaling spot")
    parser.add_argument(
        "--families", type=chosen(list(known)), default=list(known), help="some of them, by ;"
    )
    parser.add_argument(
        "--policies", type=chosen(list(STEPS)), default=list(STEPS), help="some of them, by ;"
    )
    parser.add_argument("--boot", type=float, default=183.0, help="seconds; SkyServe's launches")
    parser.add_argument("--days", type=float, help="of each family at most")
    parser.add_argument("--data", type=Path, help=f"shared data; else {traffic.VARIABLE}")
    parser.add_argument("--processes", type=int, default=1, help="at once")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where to write")
    given = parser.parse_args(arguments)
    try:
        data = traffic.folder(given.data)
        families = [known[name] for name in given.families]
        if given.days is not None:
            families = [f._replace(days=min(f.days, given.days)) for f in families]
        with Processes(given.processes) as processes:
            report = _report(families, given, data, processes.map)
    except traffic.TracesMissing as error:
        print(f"spot: {error}", file=sys.stderr)
        return 2
    print(_text(report))
    shown = [
        f["runs"]["nearfield"] for f in report["families"].values() if "nearfield" in f["runs"]
    ]
    return 0 if all(run_["kept"] for run_ in shown) else 1


def _report(
    families: list[Family],
    given: argparse.Namespace,
    data: Path,
    run_all: Callable[..., list[dict[str, Any]]],
) -> dict[str, Any]:
    """Run them, and write the results after each family. What is there of the same kind stays."""
    path: Path = given.results / "spot.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if report.get("boot_s") != given.boot:
        report = {"families": {}}
    report |= {
        "figures": "simulated; availability, prices and traffic recorded",
        "boot_s": given.boot,
    }
    steady: dict[tuple[float, str], dict[str, Any]] = {}
    for family in families:
        before = report["families"].get(family.name, {})
        alike = (before.get("days"), before.get("from_day")) == (family.days, family.from_day)
        runs: dict[str, dict[str, Any]] = before["runs"] if alike else {}
        key = (family.days, "gcp" if family.prices == "gcp" else "aws")  # one price on demand each
        wanted = [policy for policy in given.policies if policy != "on demand" or key not in steady]
        if key in steady:
            runs["on demand"] = dict(steady[key])
        elif "on demand" not in {*runs, *wanted}:
            wanted.insert(0, "on demand")
        cells = [Cell(family, policy, given.boot, data) for policy in wanted]
        runs |= {c.policy: shown for c, shown in zip(cells, run_all(run, cells, 1), strict=True)}
        steady[key] = runs["on demand"]
        runs = {policy: runs[policy] for policy in STEPS if policy in runs}
        report["families"][family.name] = compared(family, data, runs)
        order = [f.name for f in FAMILIES if f.name in report["families"]]
        report["families"] = {name: report["families"][name] for name in order}
        path.write_text(json.dumps(report, indent=2) + "\n")
        path.with_suffix(".md").write_text(_text(report))
    return report


if __name__ == "__main__":
    raise SystemExit(main())
