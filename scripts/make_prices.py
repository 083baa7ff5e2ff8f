#!/usr/bin/env python3
"""The price files of the catalogue, from tables of published prices.

    scripts/make_prices.py TABLES

TABLES is a folder with `gcp_gpu_prices_weekly.csv.gz`, `gcp_tpu_prices.csv`,
`azure_gpu_on_demand.csv`, `aws_on_demand_changes.csv`, `aws_spot_advisor.csv` and
`gpu_cloud_offerings.csv`, one row a price (columns: region, instance_type, accelerator,
accelerator_count, on_demand_usd_h, spot_usd_h; a date in each). They were taken from the
repositories that the files written here name, with their licences.

Of each region the latest price is taken, and of machines with the same accelerators the cheapest.
Machines with a part of an accelerator, and accelerators that the catalogue does not describe, are
left out, and told; so are spot prices above the on-demand one.
"""

from __future__ import annotations

import csv
import gzip
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from nearfield.core.catalog_files import packaged, read_catalog

ROOT = Path(__file__).resolve().parents[1]

# Where regions are: city and whose law holds there, as nearfield calls it. Coordinates of a city
# are the gateway's own, or stand here.
PLACES = {
    "gcp": {
        "asia-east1": "Taipei tw", "asia-northeast1": "Tokyo jp", "asia-northeast3": "Seoul kr",
        "asia-south1": "Mumbai in", "asia-south2": "New Delhi in",
        "asia-southeast1": "Singapore sg", "asia-southeast2": "Jakarta id",
        "australia-southeast1": "Sydney au",
        "europe-north1": "Helsinki eu", "europe-west1": "Brussels eu", "europe-west2": "London gb",
        "europe-west3": "Frankfurt eu", "europe-west4": "Amsterdam eu", "europe-west6": "Zurich ch",
        "europe-west8": "Milan eu", "europe-west9": "Paris eu", "me-central2": "Riyadh sa",
        "me-west1": "Tel Aviv il", "northamerica-northeast1": "Montreal ca",
        "northamerica-northeast2": "Toronto ca", "us-central1": "Des Moines us",
        "us-central2": "Oklahoma City us", "us-east1": "Charlotte us", "us-east4": "Ashburn us",
        "us-east5": "Columbus us", "us-south1": "Dallas us", "us-west1": "Portland us",
        "us-west3": "Salt Lake City us", "us-west4": "Las Vegas us",
    },
    "azure": {
        "australiacentral": "Canberra au", "australiacentral2": "Canberra au",
        "australiaeast": "Sydney au", "australiasoutheast": "Melbourne au",
        "brazilsouth": "Sao Paulo br", "canadacentral": "Toronto ca", "canadaeast": "Montreal ca",
        "centralindia": "Pune in", "centralus": "Des Moines us", "eastasia": "Hong Kong hk",
        "eastus": "Ashburn us", "eastus2": "Ashburn us", "francecentral": "Paris eu",
        "francesouth": "Marseille eu", "germanynorth": "Berlin eu",
        "germanywestcentral": "Frankfurt eu", "indonesiacentral": "Jakarta id",
        "israelcentral": "Tel Aviv il", "italynorth": "Milan eu", "japaneast": "Tokyo jp",
        "japanwest": "Osaka jp", "jioindiacentral": "Nagpur in", "jioindiawest": "Ahmedabad in",
        "koreacentral": "Seoul kr", "koreasouth": "Busan kr", "malaysiawest": "Kuala Lumpur my",
        "mexicocentral": "Queretaro mx", "northcentralus": "Chicago us", "northeurope": "Dublin eu",
        "norwayeast": "Oslo no", "polandcentral": "Warsaw eu", "qatarcentral": "Doha qa",
        "southafricanorth": "Johannesburg za", "southafricawest": "Cape Town za",
        "southcentralus": "Dallas us", "southeastasia": "Singapore sg", "southindia": "Chennai in",
        "spaincentral": "Madrid eu", "swedencentral": "Gavle eu", "switzerlandnorth": "Zurich ch",
        "switzerlandwest": "Geneva ch", "uaecentral": "Abu Dhabi ae", "uaenorth": "Dubai ae",
        "uksouth": "London gb", "ukwest": "Cardiff gb", "westcentralus": "Denver us",
        "westeurope": "Amsterdam eu", "westus": "San Francisco us", "westus2": "Seattle us",
        "westus3": "Phoenix us",
    },
    "aws": {"us-east-1": "Ashburn us"},
}  # fmt: skip
MORE_CITIES = {
    "Nagpur": (21.15, 79.09), "Busan": (35.18, 129.08), "Queretaro": (20.59, -100.39),
    "Gavle": (60.67, 17.14),
}  # fmt: skip

KARPENTER = "the provider's own price list, as {} records it"
SOURCES = {
    "gcp": (
        "Google Cloud machine prices, " + KARPENTER.format("karpenter-provider-gcp"),
        "https://github.com/cloudpilot-ai/karpenter-provider-gcp/blob/417f047b1175/pkg/providers/pricing/initial-prices.json",
        "Apache-2.0",
    ),
    "gcp-tpu": (
        "Google Cloud TPU prices, as gpuhunt records them",
        "https://github.com/dstackai/gpuhunt/blob/35841515de37/resources/tpu_pricing.json",
        "MPL-2.0",
    ),
    "azure": (
        "Azure machine prices, " + KARPENTER.format("karpenter-provider-azure"),
        "https://github.com/Azure/karpenter-provider-azure/blob/352646f59929/pkg/providers/pricing/zz_generated.pricing.go",
        "Apache-2.0",
    ),
    "aws": (
        "AWS machine prices, " + KARPENTER.format("karpenter-provider-aws"),
        "https://github.com/aws/karpenter-provider-aws/tree/1d927085dd81/pkg/providers/pricing",
        "Apache-2.0",
    ),
    "aws-spot": (
        "AWS spot advisor, as spotinfo records it: savings on the on-demand price",
        "https://github.com/alexei-led/spotinfo/tree/5eedf20",
        "Apache-2.0",
    ),
    "small-clouds": (
        "List prices of smaller GPU clouds, collected by hand",
        "https://github.com/tardellirs/gpu-pricing/tree/8f09a6803096",
        "MIT",
    ),
}
# What smaller clouds call the accelerators of the catalogue.
MODELS = {
    "H100 SXM": "H100-80GB", "H200": "H200", "B200": "B200", "MI300X": "MI300X", "L40S": "L40S",
    "L4": "L4", "A10": "A10", "T4": "T4",
}  # fmt: skip


def main() -> int:
    tables, known = Path(sys.argv[1]), set(read_catalog().accelerators)
    left: Counter[str] = Counter()
    for name, rows in (
        ("gcp", _gcp(tables)),
        ("gcp-tpu", _tpu(tables)),
        ("azure", _azure(tables)),
        ("aws", _aws(tables)),
        ("small-clouds", _small(tables)),
    ):
        kept: dict[tuple[str, str, int], tuple[str, float | None, float | None]] = {}
        latest = ""
        for region, machine, accelerator, count, on_demand, spot, date in rows:
            latest = max(latest, date)
            if accelerator not in known or count < 1 or count != int(count):
                left[f"{name}: {accelerator} x{count:g}"] += 1
                continue
            if spot is not None and on_demand is not None and spot > on_demand:
                left[f"{name}: spot of {accelerator} above on demand"] += 1
                spot = None
            here = kept.get((region, accelerator, int(count)))
            if here is None or (on_demand or 1e9) < (here[1] or 1e9):
                kept[region, accelerator, int(count)] = (machine, on_demand, spot)
        path = packaged() / "prices" / f"{name}.yaml"
        path.write_text(_text(name, kept, latest), encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}: {len(kept)} offers")
    for what, count in sorted(left.items()):
        print(f"left out: {what}, {count} rows")
    return 0


Row = tuple[str, str, str, float, float | None, float | None, str]


def _gcp(tables: Path) -> Iterator[Row]:
    with gzip.open(tables / "gcp_gpu_prices_weekly.csv.gz", "rt") as file:
        rows = list(csv.DictReader(file))
    last = max(row["snapshot_date"] for row in rows)
    yield from _plain([row for row in rows if row["snapshot_date"] == last])


def _azure(tables: Path) -> Iterator[Row]:
    yield from _plain(_read(tables / "azure_gpu_on_demand.csv"))


def _plain(rows: list[dict[str, str]]) -> Iterator[Row]:
    for row in rows:
        yield (
            row["region"], row["instance_type"], row["accelerator"],
            float(row["accelerator_count"]), _number(row["on_demand_usd_h"]),
            _number(row.get("spot_usd_h")), row["snapshot_date"],
        )  # fmt: skip


def _tpu(tables: Path) -> Iterator[Row]:
    for row in _read(tables / "gcp_tpu_prices.csv"):
        name = row["accelerator"].replace(" pod", "").replace(" ", "-")
        yield (
            row["region"], f"{name.lower()}, a chip", name, 1.0,
            _number(row["on_demand_usd_h"]), _number(row["spot_usd_h"]), row["snapshot_date"],
        )  # fmt: skip


def _aws(tables: Path) -> Iterator[Row]:
    """The last on-demand price, and spot from the saving that the advisor tells."""
    savings = {
        (row["region"], row["instance_type"]): float(row["spot_saving_pct"])
        for row in _read(tables / "aws_spot_advisor.csv")
    }
    last: dict[tuple[str, str], dict[str, str]] = {}
    for row in sorted(
        _read(tables / "aws_on_demand_changes.csv"), key=lambda row: row["effective_from"]
    ):
        last[row["region"], row["instance_type"]] = row
    for key, row in last.items():
        on_demand = float(row["on_demand_usd_h"])
        saving = savings.get(key)
        spot = None if saving is None else round(on_demand * (1 - saving / 100), 5)
        yield (
            *key, row["accelerator"], float(row["accelerator_count"]),
            on_demand, spot, row["effective_from"],
        )  # fmt: skip


def _small(tables: Path) -> Iterator[Row]:
    """One accelerator each; markets where strangers offer theirs are left out."""
    found: dict[tuple[str, str], dict[bool, float]] = defaultdict(dict)
    date = ""
    for row in _read(tables / "gpu_cloud_offerings.csv"):
        model = row["gpu_model"].removeprefix("NVIDIA ").removeprefix("AMD ").removeprefix("HGX ")
        model = model.replace("SXM5", "SXM").replace("SXM6", "").strip()
        name = MODELS.get(model) or MODELS.get(model.removesuffix(" SXM"))
        if "A100" in model and row["interconnect"] in ("SXM", "NVLink"):
            name = f"A100-{row['vram_gb']}GB"
        if model == "H100" and row["interconnect"] == "SXM":
            name = "H100-80GB"
        if name is None or row["tier"] == "marketplace":
            continue
        date = max(date, row["collected_at"])
        spot, price = row["is_spot"] == "True", float(row["price_usd_hour"])
        here = found[row["provider_id"], name]
        here[spot] = min(price, here.get(spot, price))
    for (provider, name), prices in found.items():
        yield provider, f"one {name}", name, 1.0, prices.get(False), prices.get(True), date


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _number(text: str | None) -> float | None:
    return float(text) if text else None


def _text(
    name: str,
    kept: dict[tuple[str, str, int], tuple[str, float | None, float | None]],
    date: str,
) -> str:
    lines = [
        "# Written by scripts/make_prices.py. US dollars an hour and machine.",
        "",
        f"prices: {name}",
        f"spot: {_spot(name)}",
        *_source("source", name, date),
    ]
    if name == "aws":
        lines += _source("spot_source", "aws-spot", "2025-06-28")
    if name == "gcp-tpu":
        lines.append("chips: true")
    machines = {machine: (acc, count) for (_, acc, count), (machine, *_rest) in kept.items()}
    lines += ["", "machines:"]
    lines += [
        f"  {_quoted(m)}: {{accelerator: {a}, count: {n}}}"
        for m, (a, n) in sorted(machines.items())
    ]
    regions = sorted({region for region, *_rest in kept})
    if name != "small-clouds":
        lines += ["", "places:", *(_place(name, region) for region in regions)]
    lines += ["", "offers:"]
    for region in regions:
        lines.append(f"  {region}:")
        for (_, _a, _n), (machine, on_demand, spot) in sorted(
            ((key, value) for key, value in kept.items() if key[0] == region),
            key=lambda item: item[0],
        ):
            both = [("on_demand_usd_h", on_demand), ("spot_usd_h", spot)]
            prices = ", ".join(f"{key}: {value:g}" for key, value in both if value is not None)
            lines.append(f"    {_quoted(machine)}: {{{prices}}}")
    return "\n".join([*lines, ""])


def _spot(name: str) -> str:
    return {"aws": "derived", "azure": "absent"}.get(name, "published")


def _source(key: str, name: str, date: str) -> list[str]:
    title, url, licence = SOURCES[name]
    told = [f"  title: {_quoted(title)}", f"  url: {url}", f"  licence: {licence}"]
    return [f"{key}:", *told, f'  date: "{date}"']


def _place(name: str, region: str) -> str:
    city, _, jurisdiction = PLACES[name.removesuffix("-tpu")][region].rpartition(" ")
    latitude, longitude = MORE_CITIES.get(city) or _cities()[city]
    return (
        f"  {region}: {{city: {city}, jurisdiction: {_quoted(jurisdiction)}, "
        f"latitude: {latitude:g}, longitude: {longitude:g}}}"
    )


def _cities() -> dict[str, tuple[float, float]]:
    path = ROOT / "edge" / "nearfield" / "edge" / "cities.csv"
    return {row["city"]: (float(row["latitude"]), float(row["longitude"])) for row in _read(path)}


def _quoted(text: str) -> str:
    return f'"{text}"' if any(mark in text for mark in ",:# ") or text == "no" else text


if __name__ == "__main__":
    sys.exit(main())
