"""What a plan may choose from: the catalogue, narrowed to regions and providers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from nearfield.core.catalog import Accelerator, PriceFile
from nearfield.core.catalog_files import Catalog
from nearfield.core.errors import BadRequest
from nearfield.core.problems import did_you_mean
from nearfield.policy.plan import Kind, Machine, Market
from nearfield.policy.validate import chip_of, efficiency_of

ANYWHERE = "anywhere"
"""The region of a plan that names none."""

BIG_CLOUDS = ("aws", "azure", "gcp")
"""Providers by default: those whose prices say where. Their files that are called after them with a
dash, `gcp-tpu`, are theirs too."""
_EMBEDS_IN_16_BITS = ("nvidia", "amd")
"""Families on which our embedding engine finds a device of torch's; elsewhere it would take the
processor, in float32."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A region that was asked for: the cloud regions that may serve it."""

    name: str
    rps: float | None
    places: tuple[tuple[str, str], ...]


def kinds_of(catalog: Catalog) -> dict[str, Kind]:
    """The catalogue's accelerators as a plan knows them."""
    kinds = {}
    for name, accelerator in catalog.accelerators.items():
        dense = accelerator.dense
        native = next((dtype for dtype in ("bf16", "fp16") if dtype in dense), None)
        kinds[name] = Kind(
            chip_of(accelerator, efficiency_of(accelerator.family, catalog.shares)),
            accelerator.engine,
            native,
            not accelerator.unconfirmed and accelerator.evidence != "not-rechecked",
            native if accelerator.family in _EMBEDS_IN_16_BITS else _on_processor(accelerator),
        )
    return kinds


def _on_processor(accelerator: Accelerator) -> str | None:
    return "fp32" if accelerator.family == "cpu" and "fp32" in accelerator.dense else None


def market_of(catalog: Catalog, wanted: Sequence[Wanted], providers: Sequence[str]) -> Market:
    """Accelerators, and the machines that each region may have."""
    everything = list(_machines(catalog.prices, providers))
    machines = {
        region.name: [
            machine
            for machine in everything
            if region.name == ANYWHERE or (machine.provider, machine.place) in region.places
        ]
        for region in wanted
    }
    return Market(kinds_of(catalog), machines)


def _machines(prices: Mapping[str, PriceFile], providers: Sequence[str]) -> Iterator[Machine]:
    for provider in providers:
        file = prices[provider]
        for place, offers in file.offers.items():
            for name, offer in offers.items():
                what = file.machines[name]
                yield Machine(
                    provider,
                    place,
                    name,
                    what.accelerator,
                    what.count,
                    offer.on_demand_usd_h,
                    offer.spot_usd_h,
                    file.chips,
                )


def providers_of(given: str | None, catalog: Catalog) -> list[str]:
    """Those that were asked for.

    Raises:
        BadRequest: there are no prices of one.
    """
    if given is None:
        return _with_theirs(BIG_CLOUDS, catalog)
    if given == "all":
        return list(catalog.prices)
    names = [name.strip() for name in given.split(",") if name.strip()]
    for name in names:
        if name not in catalog.prices:
            near = did_you_mean(name, catalog.prices)
            raise BadRequest(
                f"--providers: there are no prices of {name!r}: "
                + (f"did you mean {near}? " if near else "")
                + f"There are {', '.join(catalog.prices)}, and all; add a file to --catalog",
                param="providers",
            )
    return _with_theirs(names, catalog)


def _with_theirs(names: Sequence[str], catalog: Catalog) -> list[str]:
    theirs = {
        each: None
        for name in names
        for each in sorted(catalog.prices)
        if each == name or each.startswith(f"{name}-")
    }
    return list(theirs)


def wanted_regions(
    given: str | None, catalog: Catalog, providers: Sequence[str], within_km: float
) -> list[Wanted]:
    """`eu-west,us-east=30` or `gcp/europe-west4`: nearfield's regions, files, or a cloud's own.

    A region of nearfield's has a place and a law; cloud regions under the same law within so many
    kilometres may serve it.

    Raises:
        BadRequest: one is unknown, named twice, or has no prices near it.
    """
    if given is None:
        return [Wanted(ANYWHERE, None, ())]
    found: list[Wanted] = []
    for part in given.split(","):
        name, equals, rate = part.strip().partition("=")
        rps = None
        if equals:
            try:
                rps = float(rate)
            except ValueError:
                rps = -1.0
            if not 0 < rps < float("inf"):
                raise BadRequest(
                    f"--regions: {part.strip()}: what stands after = is the region's requests/s, "
                    f"a number above 0: {name}=20",
                    param="regions",
                )
        region = _region(name, rps, catalog, providers, within_km)
        if any(other.name == region.name for other in found):
            raise BadRequest(f"--regions names {region.name} twice", param="regions")
        found.append(region)
    return found


def _region(
    name: str, rps: float | None, catalog: Catalog, providers: Sequence[str], within_km: float
) -> Wanted:
    clouds = {
        (provider, place) for provider in providers for place in catalog.prices[provider].offers
    }
    provider, slash, place = name.partition("/")
    if slash and provider in catalog.prices:
        theirs = _with_theirs([provider], catalog)
        places = [each for each in sorted(clouds) if each[0] in theirs and each[1] == place]
        if not places:
            near = did_you_mean(place, [place for _, place in clouds])
            raise BadRequest(
                f"--regions: {provider} has no prices in {place!r}"
                + (f": did you mean {provider}/{near}?" if near else ""),
                param="regions",
            )
        return Wanted(name, rps, tuple(places))
    named = tuple(each for each in sorted(clouds) if each[1] == name)
    if named:
        return Wanted(name, rps, named)
    return _ours(name, rps, catalog, providers, within_km)


def _ours(
    given: str, rps: float | None, catalog: Catalog, providers: Sequence[str], within_km: float
) -> Wanted:
    from nearfield.cli.region_files import packaged, path_of
    from nearfield.edge.distance import Place, apart_km
    from nearfield.edge.files import read_region

    try:
        path = path_of(given)
    except BadRequest:
        near = did_you_mean(given, [*packaged(), *_places(catalog, providers)])
        raise BadRequest(
            f"--regions: there is no region {given!r}: "
            + (f"did you mean {near}? " if near else "")
            + f"Name one of {', '.join(packaged())}, a region's file, or a cloud's region as "
            "gcp/europe-west4",
            param="regions",
        ) from None
    file = read_region(path)
    here = Place(file.location.latitude, file.location.longitude)
    near_by = []
    for provider in providers:
        for name, place in catalog.prices[provider].places.items():
            apart = apart_km(here, Place(place.latitude, place.longitude))
            if place.jurisdiction == file.jurisdiction and apart <= within_km:
                near_by.append((provider, name))
    if not near_by:
        raise BadRequest(
            f"--regions: no cloud region with prices is under the law of {file.region} "
            f"({file.jurisdiction}) within {within_km:,.0f} km: raise --within-km, or name one: "
            "gcp/europe-west4",
            param="regions",
        )
    return Wanted(file.region, rps, tuple(near_by))


def _places(catalog: Catalog, providers: Sequence[str]) -> list[str]:
    return [place for provider in providers for place in catalog.prices[provider].offers]
