"""Reading a gateway's file and those of its regions: everything that is wrong, named at once.

    files = read(Path("eu-west.yaml"))
    files.gateway.listen.port, [region.region for region in files.regions]

Paths in a file are relative to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from nearfield.core.check import check, kind_of, located
from nearfield.core.errors import BadRequest
from nearfield.core.federation import GatewayFile, RegionFile
from nearfield.core.problems import Finding, Problem, did_you_mean
from nearfield.core.settings import Settings
from nearfield.core.yaml_document import Document
from nearfield.core.yaml_file import read_document

SHOWN = 3
"""Problems that an error's message spells out; `nearfield check` names all."""
Model = TypeVar("Model", GatewayFile, RegionFile)


class InvalidFiles(BadRequest):
    """Files that no gateway can be started from; `problems` says why."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        said = [_sentence(problem) for problem in problems[:SHOWN]]
        if len(problems) > SHOWN:
            said.append(f"and {len(problems) - SHOWN} more: nearfield check {problems[0].file}")
        super().__init__("\n".join(said))
        self.problems = tuple(problems)


@dataclass(frozen=True, slots=True)
class Files:
    """What the files say.

    Attributes:
        path: of the gateway's file. regions: in its order.
    """

    path: Path
    gateway: GatewayFile
    regions: tuple[RegionFile, ...]

    def beside(self, name: str) -> Path:
        """A path that stands in the gateway's file."""
        return (self.path.parent / Path(name).expanduser()).absolute()


def read(path: Path) -> Files:
    """The files of one gateway.

    Raises:
        InvalidFiles: something is wrong with one of them; the message says what, and what to do.
    """
    document, problems = _read(path, "gateway")
    if document is None or problems:
        raise InvalidFiles(problems)
    gateway = _parsed(GatewayFile, document)
    regions: list[RegionFile] = []
    for name in gateway.regions:
        found, wrong = _read(path.parent / Path(name).expanduser(), "region")
        problems += wrong
        if found is not None and not wrong:
            regions.append(_parsed(RegionFile, found))
    problems += [located(str(path), document, each) for each in _together(gateway, regions)]
    if problems:
        raise InvalidFiles(problems)
    return Files(path, gateway, tuple(regions))


def read_region(path: Path) -> RegionFile:
    """One region's file.

    Raises:
        InvalidFiles: something is wrong with it.
    """
    document, problems = _read(path, "region")
    if document is None or problems:
        raise InvalidFiles(problems)
    return _parsed(RegionFile, document)


def default_state(settings: Settings, gateway: str) -> Path:
    """Where a gateway of that name keeps its state."""
    return settings.home / "gateways" / gateway


def problems_of(path: Path) -> tuple[Problem, ...]:
    """Everything that is wrong with a gateway's file and those that it names."""
    try:
        read(path)
    except InvalidFiles as error:
        return error.problems
    return ()


def _read(path: Path, kind: str) -> tuple[Document | None, list[Problem]]:
    document = read_document(path, str(path))
    if isinstance(document, Problem):
        return None, [document]
    if not isinstance(document.value, dict) or kind_of(document) != kind:
        problem = Problem(str(path), "", f"is no {kind} file", f"begin it with {kind}: and a name")
        return None, [problem]
    return document, [each for each in check([(str(path), document)]) if each.level == "error"]


def _parsed(kind: type[Model], document: Document) -> Model:
    return kind.model_validate(document.value, strict=True)


def _together(gateway: GatewayFile, regions: Sequence[RegionFile]) -> Iterator[Finding]:
    seen: dict[str, Any] = {}
    for each in regions:
        if each.region in seen:
            yield Finding(
                ("regions",),
                f"names the region {each.region} twice",
                "remove one of its files",
                gateway.regions,
            )
        seen[each.region] = each
    home = gateway.home
    if home is not None and len(regions) == len(gateway.regions) and home.region not in seen:
        near = did_you_mean(home.region, seen)
        yield Finding(
            ("home", "region"),
            "is none of the regions",
            f"did you mean {near}?" if near else "add its file to regions",
            home.region,
        )


def _sentence(problem: Problem) -> str:
    """File, line, field, value and remedy in one line."""
    where = problem.file if problem.line is None else f"{problem.file}, line {problem.line}"
    field = f"{problem.field} " if problem.field else ""
    value = "" if problem.value is None else f" (it is {problem.value})"
    return f"{where}: {field}{problem.message}{value}: {problem.remedy}"
