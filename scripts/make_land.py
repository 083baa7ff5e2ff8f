#!/usr/bin/env python3
"""The land of the console's map, from Natural Earth (public domain), small enough to ship.

    npm pack world-atlas@2.0.2 && tar xf world-atlas-2.0.2.tgz package/land-110m.json
    scripts/make_land.py package/land-110m.json > edge/nearfield/edge/console/static/land.json

It is drawn as dots a degree or two apart, so a fifth of a degree is precise enough. Rings are flat
lists of tenths of degrees (longitude, latitude), each point as its distance from the one before.
"""

import json
import math
import sys
from itertools import pairwise

TOLERANCE = 0.2
"""Degrees that a simplified shore may be off."""
SMALLEST = 1.0
"""Square degrees of an island that still shows."""
SOUTHMOST = -58.0
"""The map ends there: Antarctica answers no requests."""

Point = tuple[float, float]


def decode(topology: dict) -> list[list[Point]]:
    """The rings of a TopoJSON file's land, in degrees."""
    scale, shift = topology["transform"]["scale"], topology["transform"]["translate"]
    arcs: list[list[Point]] = []
    for packed in topology["arcs"]:
        x = y = 0
        arc = []
        for dx, dy in packed:
            x, y = x + dx, y + dy
            arc.append((x * scale[0] + shift[0], y * scale[1] + shift[1]))
        arcs.append(arc)
    rings = []
    for geometry in topology["objects"]["land"]["geometries"]:
        polygons = geometry["arcs"]
        if geometry["type"] == "Polygon":
            polygons = [polygons]
        for polygon in polygons:
            for numbers in polygon:
                ring: list[Point] = []
                for number in numbers:
                    arc = arcs[number] if number >= 0 else arcs[~number][::-1]
                    ring += arc if not ring else arc[1:]
                rings.append(ring)
    return rings


def simplify(line: list[Point]) -> list[Point]:
    """Without the points that lie within the tolerance (Ramer, Douglas and Peucker)."""
    (x0, y0), (x1, y1) = line[0], line[-1]
    along = math.hypot(x1 - x0, y1 - y0)
    far, at = 0.0, 0
    for i, (x, y) in enumerate(line[1:-1], 1):
        if along:
            off = abs((x1 - x0) * (y0 - y) - (x0 - x) * (y1 - y0)) / along
        else:
            off = math.hypot(x - x0, y - y0)
        if off > far:
            far, at = off, i
    if far <= TOLERANCE:
        return [line[0], line[-1]]
    return simplify(line[: at + 1])[:-1] + simplify(line[at:])


def area(ring: list[Point]) -> float:
    """Square degrees."""
    pairs = zip(ring, ring[1:] + ring[:1], strict=True)
    return abs(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in pairs)) / 2


def whole(ring: list[Point]) -> list[Point]:
    """In one piece: what lies beyond 180 degrees goes on there (Chukotka, Fiji)."""
    found, turns = [ring[0]], 0
    for (before, _), (longitude, latitude) in pairwise(ring):
        if abs(longitude - before) > 180:
            turns += 1 if longitude < before else -1
        found.append((longitude + 360 * turns, latitude))
    return found


def pack(ring: list[Point]) -> list[int]:
    """Tenths of degrees, each point as its distance from the one before."""
    flat, x, y = [], 0, 0
    for longitude, latitude in ring:
        dx, dy = round(longitude * 10) - x, round(latitude * 10) - y
        if flat and dx == dy == 0:
            continue
        x, y = x + dx, y + dy
        flat += [dx, dy]
    return flat


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        rings = decode(json.load(file))
    kept = [
        pack(simplify(ring)[:-1])
        for ring in map(whole, rings)
        if area(ring) >= SMALLEST and max(y for _, y in ring) > SOUTHMOST
    ]
    about = "Land of Natural Earth 1:110m (public domain), by way of world-atlas 2.0.2, simplified"
    json.dump({"about": about, "rings": kept}, sys.stdout, separators=(",", ":"))
    print()


if __name__ == "__main__":
    main()
