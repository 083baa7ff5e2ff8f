"""Distances that are assumed, against those that were measured."""

from __future__ import annotations

import csv
import statistics
from pathlib import Path

import pytest
from nearfield.core.errors import BadRequest
from nearfield.edge.distance import Place, apart_km, likely_rtt_s, place_of

TABLE = Path(__file__).parents[1] / "simulation" / "data" / "edge_to_region_rtt_ms.csv"
REGIONS = {
    "af-south-1": "Cape Town", "ap-east-1": "Hong Kong", "ap-northeast-1": "Tokyo",
    "ap-northeast-2": "Seoul", "ap-northeast-3": "Osaka", "ap-south-1": "Pune",
    "ap-southeast-1": "Singapore", "ap-southeast-2": "Sydney", "ca-central-1": "Montreal",
    "eu-central-1": "Frankfurt", "eu-north-1": "Stockholm", "eu-south-1": "Milan",
    "eu-west-1": "Dublin", "eu-west-2": "London", "eu-west-3": "Paris", "me-central-1": "Dubai",
    "sa-east-1": "Sao Paulo", "us-east-1": "Washington", "us-east-2": "Columbus",
    "us-west-1": "San Jose", "us-west-2": "Portland",
}  # fmt: skip
UNKNOWN = ("Brunswick", "Toledo")
"""Names of several cities: which one was measured is not said."""
IMPOSSIBLE = {("Dagupan", "ap-southeast-2"), ("Fremont", "us-west-1"), ("Rome", "eu-south-1")}
"""Measured nearer than light allows: somebody else answered."""


def measured() -> list[tuple[str, str, float]]:
    with TABLE.open() as file:
        return [
            (row["city"], region, float(text))
            for row in csv.DictReader(file)
            for region, text in row.items()
            if region != "city"
            and text
            and row["city"] not in UNKNOWN
            and (row["city"], region) not in IMPOSSIBLE
        ]


def test_every_measured_city_is_known_and_none_is_nearer_than_light_allows() -> None:
    """A wrong coordinate would show."""
    too_near = []
    for city, region, rtt_ms in measured():
        km = apart_km(place_of(city), place_of(REGIONS[region]))
        if rtt_ms < 2 * km / 200 * 0.95:  # 200 km a millisecond in glass
            too_near.append((city, region, rtt_ms, round(km)))
    assert too_near == []


def test_half_of_what_is_assumed_is_within_a_sixth_of_what_was_measured() -> None:
    errors = sorted(
        abs(likely_rtt_s(place_of(city), place_of(REGIONS[region])) * 1000 / rtt_ms - 1)
        for city, region, rtt_ms in measured()
    )
    assert len(errors) > 3400
    assert statistics.median(errors) < 0.17
    assert errors[int(0.9 * len(errors))] < 0.5


def test_the_nearest_region_is_seldom_assumed_far_away() -> None:
    """Sent to the region assumed nearest, a client loses little against the nearest measured."""
    by_city: dict[str, dict[str, float]] = {}
    for city, region, rtt_ms in measured():
        by_city.setdefault(city, {})[region] = rtt_ms
    lost_ms = []
    for city, rtts in by_city.items():
        place = place_of(city)
        guess = min(rtts, key=lambda r: likely_rtt_s(place, place_of(REGIONS[r])))
        lost_ms.append(rtts[guess] - min(rtts.values()))
    assert statistics.median(lost_ms) < 2
    assert statistics.mean(lost_ms) < 15


def test_places() -> None:
    assert place_of("são paulo") == place_of("SaoPaulo") == place_of("Sao Paulo")
    assert place_of("53.3, -6.2") == Place(53.3, -6.2)
    assert apart_km(place_of("London"), place_of("New York")) == pytest.approx(5570, rel=0.01)
    for wrong in ("Atlantis", "", "91,0", "0,181", "a,b", "nan,0", "1,2,3"):
        with pytest.raises(BadRequest):
            place_of(wrong)
