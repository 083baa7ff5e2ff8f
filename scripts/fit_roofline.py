#!/usr/bin/env python3
"""Fits the shares that chips reach of their data sheets; writes cluster_configs/efficiency/.

    scripts/fit_roofline.py               prints what it found, and how far off it is
    scripts/fit_roofline.py --write

For each family of chips, the seven numbers of `nearfield.policy.roofline.Efficiency` that lessen
the mean error, in logarithms, over those published figures of the catalogue that say `use: fit`.
A weak pull towards common values decides what the figures leave open. Figures that say
`use: check` are not looked at until it has ended. The search is coordinate descent from the common
values, over steps that shrink: no randomness, and what the figures leave open stays there.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict

from nearfield.core.catalog import Family, Figure, Shares
from nearfield.core.catalog_files import Catalog, packaged, read_catalog
from nearfield.policy.validate import architectures, like, summary, validate

# name → (common value, least, most)
BOUNDS = {
    "compute_16": (0.6, 0.1, 0.95),
    "compute_8": (0.5, 0.1, 0.95),
    "bandwidth": (0.8, 0.15, 0.92),
    "layer_us": (40.0, 2.0, 1500.0),
    "prompt_layer_us": (100.0, 2.0, 1500.0),
    "activations": (16.0, 2.0, 400.0),
    "reduce_us": (12.0, 2.0, 300.0),
}
PULL = 0.02
"""Weight of the common values: a factor e away costs as much as 2 % of error."""


def fitted(catalog: Catalog, family: Family) -> Shares | None:
    """The best shares; None if there is nothing to fit them to."""
    figures = [
        figure
        for figure in catalog.figures
        if figure.use == "fit" and catalog.accelerators[figure.accelerator].family == family
    ]
    if not figures:
        return None
    models = architectures(catalog.models)

    def cost(values: dict[str, float]) -> float:
        shares = Shares(**values, basis="fitted")  # type: ignore[arg-type]
        off = validate(figures, catalog.accelerators, models, {family: shares})
        pull = sum(abs(math.log(values[name] / BOUNDS[name][0])) for name in values)
        # Each source and accelerator counts once, however many figures it has.
        return _balanced(figures, [abs(math.log(each.ratio)) for each in off]) + PULL * pull

    values = {name: bound[0] for name, bound in BOUNDS.items()}
    best, step = cost(values), 0.7
    while step > 0.01:
        improved = False
        for name, (_, least, most) in BOUNDS.items():
            for factor in (math.exp(step), math.exp(-step)):
                tried = {**values, name: min(most, max(least, values[name] * factor))}
                if (found := cost(tried)) < best - 1e-6:
                    values, best, improved = tried, found, True
        if not improved:
            step /= 2.0
    kept = {name: float(f"{value:.3g}") for name, value in values.items()}
    return Shares(**kept, basis="fitted")  # type: ignore[arg-type]


def _balanced(figures: list[Figure], errors: list[float]) -> float:
    groups: dict[tuple[str, str, str, str], list[float]] = defaultdict(list)
    for figure, error in zip(figures, errors, strict=True):
        groups[figure.source, figure.accelerator, figure.model, figure.metric].append(error)
    return sum(sum(each) / len(each) for each in groups.values()) / len(groups)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    catalog = read_catalog()
    families = sorted({each.family for each in catalog.accelerators.values()})
    shares = {f: found for f in families if (found := fitted(catalog, f)) is not None}
    models = architectures(catalog.models)
    language = like(catalog.figures, models, "generate")
    off = validate(language, catalog.accelerators, models, shares)
    for family, found in shares.items():
        print(family, found.model_dump(exclude={"note", "basis", "link"}))
        for use in ("fit", "check"):
            of = [
                each
                for each in off
                if each.figure.use == use
                and catalog.accelerators[each.figure.accelerator].family == family
            ]
            told = summary(of)
            if told.worst_of is not None:
                print(f"  {use}: {told.count}, median {told.median:.0%}, worst {told.worst:.0%}")
    for use in ("fit", "check"):
        told = summary(each for each in off if each.figure.use == use)
        print(f"{use}: {told.count} figures, median {told.median:.0%}, worst {told.worst:.0%}")
    encoders = [f for f in like(catalog.figures, models, "embed") if f.use == "check"]
    told = summary(validate(encoders, catalog.accelerators, models, shares))
    print(f"encoders: {told.count} figures, median {told.median:.0%}, worst {told.worst:.0%}")
    if write:
        path = packaged() / "efficiency" / "fitted.yaml"
        path.write_text(_text(shares), encoding="utf-8")
        print(f"wrote {path}")
    return 0


def _text(shares: dict[Family, Shares]) -> str:
    lines = [
        "# Written by scripts/fit_roofline.py: what families of chips reach of their data sheets,",
        "# fitted to the figures in ../published that say `use: fit`. See docs/adr/0014.",
        "",
        "efficiency: fitted",
        "",
        "families:",
    ]
    for family, found in shares.items():
        values = ", ".join(f"{name}: {getattr(found, name):g}" for name in BOUNDS)
        lines.append(f"  {family}: {{{values}, basis: fitted}}")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
