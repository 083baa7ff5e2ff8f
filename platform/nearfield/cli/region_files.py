"""Region files: by a path, or by the name of one that is part of the package."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from nearfield.core.errors import BadRequest
from nearfield.core.federation import RegionFile
from nearfield.core.problems import did_you_mean
from nearfield.edge.files import read_region


def packaged() -> dict[str, Path]:
    """Region files that come with nearfield, by region."""
    folder = Path(str(resources.files("nearfield.cli") / "quickstart" / "regions"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def path_of(given: str) -> Path:
    """The file that is meant by `eu-west` or `./mine.yaml`.

    Raises:
        BadRequest: there is no region of that name.
    """
    if "/" in given or given.endswith((".yaml", ".yml")):
        return Path(given)
    known = packaged()
    if given not in known:
        near = did_you_mean(given, known)
        raise BadRequest(
            f"There is no region {given!r} in the package: "
            + (f"did you mean {near}? " if near else "")
            + f"It has {', '.join(known)}; give others as a path: ./{given}.yaml",
            param="regions",
        )
    return known[given]


def read(given: str) -> tuple[Path, RegionFile]:
    """A region's file and what it says.

    Raises:
        BadRequest: there is none, or something is wrong with it.
    """
    path = path_of(given)
    return path, read_region(path)


def models_of(path: Path, file: RegionFile) -> list[Path]:
    """The model files that a region file names."""
    return [path.parent / Path(name).expanduser() for name in file.models]
