"""Reading the catalogue: what ships with nearfield, and a folder of one's own beside it.

    catalog = read_catalog()                    cluster_configs/ of the checkout, or the package's
    catalog = read_catalog([Path("ours")])      what stands there too wins

A folder has the same shape: hardware/*.yaml, prices/*.yaml, models/*.yaml, published/*.yaml.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import yaml
from nearfield.core.architecture import UnknownArchitecture, architecture_of
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
from nearfield.core.problems import Finding, did_you_mean
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
    named: list[_Named] = []
    for folder in (packaged(), *others):
        if not any((folder / kind).is_dir() for kind in FOLDERS):
            raise BadRequest(
                f"{folder} is no catalogue: it has none of the folders {', '.join(FOLDERS)}",
                param="catalog",
            )
        for _, hardware in _files(folder, "hardware", HardwareFile):
            catalog.accelerators.update({each.name: each for each in hardware.accelerators})
        for path, prices in _files(folder, "prices", PriceFile):
            catalog.prices[prices.prices] = prices
            for machine, what in prices.machines.items():
                field_ = f"machines.{machine}.accelerator"
                named.append(_Named(path, field_, "hardware", what.accelerator))
        for path, models in _files(folder, "models", ModelsFile):
            for finding in check_models(models):
                where = ".".join(str(part) for part in finding.path)
                raise _wrong(path, where, finding.message)
            for name, known in models.known.items():
                catalog.models.update({name: known, **known.others()})
        for path, published in _files(folder, "published", PublishedFile):
            for index, figure in enumerate(published.figures):
                at = f"figures.{index}"
                named.append(_Named(path, f"{at}.accelerator", "hardware", figure.accelerator))
                named.append(_Named(path, f"{at}.model", "models", figure.model))
            catalog.figures.extend(published.figures)
            catalog.sources.update(published.sources)
        for _, efficiency in _files(folder, "efficiency", EfficiencyFile):
            catalog.shares.update(efficiency.families)
    _check_names(named, {"hardware": catalog.accelerators, "models": catalog.models})
    return catalog


def check_models(file: ModelsFile) -> Iterator[Finding]:
    """The shapes of which no model can be counted."""
    for name, known in file.known.items():
        try:
            architecture_of(name, known.config)
        except UnknownArchitecture as error:
            at = ("known", name, "config")
            remedy = "write the fields of its config.json as they stand there"
            yield Finding(at, f"describes no model: {error}", remedy, has_value=False)


def _files(folder: Path, kind: str, schema: type[File]) -> Iterator[tuple[Path, File]]:
    for path in sorted((folder / kind).glob("*.yaml")):
        try:
            loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
            data = yaml.load(path.read_bytes(), Loader=loader)  # noqa: S506, both are safe
        except (OSError, yaml.YAMLError) as error:
            first = str(error).splitlines()[0]
            raise BadRequest(f"{path} cannot be read: {first}", param="catalog") from None
        try:
            yield path, schema.model_validate(data, strict=True)
        except ValidationError as error:
            detail = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in detail["loc"]) or "the file"
            raise _wrong(path, where, detail["msg"]) from None


def _wrong(path: Path, where: str, message: str) -> BadRequest:
    return BadRequest(
        f"{path}: {where}: {message} (nearfield check {path} names the line)", param="catalog"
    )


class _Named(NamedTuple):
    """Where a file names what another folder's files describe."""

    path: Path
    field: str
    folder: str
    name: str


def _check_names(named: Sequence[_Named], known: Mapping[str, Collection[str]]) -> None:
    for path, field_, folder, name in named:
        if name not in known[folder]:
            likely = did_you_mean(name, known[folder])
            meant = f"did you mean {likely}? Else " if likely else ""
            raise BadRequest(
                f"{path}: {field_} is {name!r}, which no file in {folder}/ describes: {meant}add "
                "it there, or remove the entry",
                param="catalog",
            )
