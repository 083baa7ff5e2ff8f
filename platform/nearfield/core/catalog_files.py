"""Reading the catalogue: what ships with nearfield, and a folder of one's own beside it.

    catalog = read_catalog()                    cluster_configs/ of the checkout, or the package's
    catalog = read_catalog([Path("ours")])      what stands there too wins

A folder has the same shape: hardware/*.yaml, prices/*.yaml, models/*.yaml, published/*.yaml.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import yaml
from nearfield.core.catalog import (
    Accelerator,
    EfficiencyFile,
    Family,
    Figure,
    HardwareFile,
    KnownModel,
    ModelsFile,
    PriceFile,
    PublishedFile,
    Shares,
    Source,
)
from nearfield.core.errors import BadRequest
from pydantic import BaseModel, ValidationError

FOLDERS = ("hardware", "prices", "models", "published", "efficiency")
File = TypeVar("File", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Catalog:
    """Everything in it, by name."""

    accelerators: dict[str, Accelerator] = field(default_factory=dict)
    prices: dict[str, PriceFile] = field(default_factory=dict)
    models: dict[str, KnownModel] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    sources: dict[str, Source] = field(default_factory=dict)
    shares: dict[Family, Shares] = field(default_factory=dict)


def packaged() -> Path:
    """The folder that comes with nearfield: the checkout's, so that there is one; else the wheel's.

    A wheel puts it beside the package: `nearfield_catalog` (pyproject.toml).
    """
    package = Path(__file__).resolve().parents[1]
    checkout = package.parents[1] / "cluster_configs"
    return checkout if checkout.is_dir() else package.parent / "nearfield_catalog"


def read_catalog(others: Sequence[Path] = ()) -> Catalog:
    """The packaged catalogue, and what stands in other folders, which wins.

    Raises:
        BadRequest: a file is none of these, or says something that cannot be.
    """
    catalog = Catalog()
    for folder in (packaged(), *others):
        if not any((folder / kind).is_dir() for kind in FOLDERS):
            raise BadRequest(
                f"{folder} is no catalogue: it has none of the folders {', '.join(FOLDERS)}",
                param="catalog",
            )
        for hardware in _files(folder, "hardware", HardwareFile):
            catalog.accelerators.update({each.name: each for each in hardware.accelerators})
        for prices in _files(folder, "prices", PriceFile):
            catalog.prices[prices.prices] = prices
        for models in _files(folder, "models", ModelsFile):
            for name, known in models.known.items():
                catalog.models.update({name: known, **known.others()})
        for published in _files(folder, "published", PublishedFile):
            catalog.figures.extend(published.figures)
            catalog.sources.update(published.sources)
        for efficiency in _files(folder, "efficiency", EfficiencyFile):
            catalog.shares.update(efficiency.families)
    _check_names(catalog)
    return catalog


def _files(folder: Path, kind: str, schema: type[File]) -> Iterator[File]:
    for path in sorted((folder / kind).glob("*.yaml")):
        try:
            loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
            data = yaml.load(path.read_bytes(), Loader=loader)  # noqa: S506, both are safe
        except (OSError, yaml.YAMLError) as error:
            first = str(error).splitlines()[0]
            raise BadRequest(f"{path} cannot be read: {first}", param="catalog") from None
        try:
            yield schema.model_validate(data, strict=True)
        except ValidationError as error:
            detail = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in detail["loc"]) or "the file"
            raise BadRequest(
                f"{path}: {where}: {detail['msg']} (nearfield check {path} names the line)",
                param="catalog",
            ) from None


def _check_names(catalog: Catalog) -> None:
    for provider, prices in catalog.prices.items():
        for machine, what in prices.machines.items():
            if what.accelerator not in catalog.accelerators:
                raise BadRequest(
                    f"prices {provider}: {machine} has {what.accelerator}, which no hardware file "
                    "describes: add it to hardware/, or remove the machine",
                    param="catalog",
                )
