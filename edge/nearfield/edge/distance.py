"""Where cities are, and how far a round trip between two places is likely to be.

Assumed, not measured: for questions about clients whose way nobody has probed (`nearfield route
--from CITY`). Requests are routed by probes only. Cables are longer than the great circle, and
routers take their time: `WAY_MS_PER_KM` and `LEAST_MS` are fitted to the measured round trips of
`tests/simulation/data`; `tests/unit/test_distance.py` says how well they fit.
"""

from __future__ import annotations

import csv
import math
import unicodedata
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from nearfield.core.errors import BadRequest

EARTH_KM = 6371.0
WAY_MS_PER_KM = 0.017
LEAST_MS = 5.0


class Place(NamedTuple):
    """Degrees."""

    latitude: float
    longitude: float


def place_of(text: str) -> Place:
    """A city's name, or `latitude,longitude`.

    Raises:
        BadRequest: it is neither, or not a city that is known here.
    """
    latitude, comma, longitude = text.partition(",")
    if comma:
        try:
            place = Place(float(latitude), float(longitude))
        except ValueError:
            place = Place(math.nan, math.nan)
        if not (-90 <= place.latitude <= 90 and -180 <= place.longitude <= 180):
            raise BadRequest(f"{text[:64]!r} is not latitude,longitude in degrees.", param="from")
        return place
    found = _cities().get(_plain(text))
    if found is None:
        raise BadRequest(
            f"The city {text[:64]!r} is not known here: give a larger one near it, or "
            "latitude,longitude in degrees.",
            param="from",
            code="unknown_city",
        )
    return found


def apart_km(one: Place, other: Place) -> float:
    """Along the great circle."""
    phi, psi = math.radians(one.latitude), math.radians(other.latitude)
    across = math.radians(other.longitude - one.longitude)
    half = (
        math.sin((psi - phi) / 2) ** 2 + math.cos(phi) * math.cos(psi) * math.sin(across / 2) ** 2
    )
    return 2 * EARTH_KM * math.asin(min(1.0, math.sqrt(half)))


def likely_rtt_s(one: Place, other: Place) -> float:
    """The round trip between two places, assumed."""
    return (LEAST_MS + WAY_MS_PER_KM * apart_km(one, other)) / 1000


@cache
def _cities() -> dict[str, Place]:
    with (files("nearfield.edge") / "cities.csv").open(encoding="utf-8") as file:
        return {
            _plain(row["city"]): Place(float(row["latitude"]), float(row["longitude"]))
            for row in csv.DictReader(file)
        }


def _plain(name: str) -> str:
    """Without case, blanks and accents: `São Paulo` is `saopaulo`."""
    letters = unicodedata.normalize("NFKD", name.casefold())
    return "".join(letter for letter in letters if letter.isalnum() and letter.isascii())
