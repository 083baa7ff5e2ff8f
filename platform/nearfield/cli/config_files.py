"""Reading config files and checking them, with what only this machine can tell.

A config is checked against the strict schema, then against the project around it (do a custom
engine's module and class exist?), then by Ray's own schema. Nothing of the user's is executed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nearfield.cli.engine_source import check_engine
from nearfield.core.check import check, kind_of, located, model_applications
from nearfield.core.problems import Finding, Problem, dotted, shown
from nearfield.core.yaml_document import Document
from nearfield.core.yaml_file import read_document

if TYPE_CHECKING:
    from nearfield.simulator.scenario import Scenario


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A config file that could be read. `name`: as the user gave it."""

    name: str
    path: Path
    document: Document


def check_files(paths: Sequence[str | Path], *, ray: bool = True) -> list[Problem]:
    """Everything that is wrong with these files, each alone and all together.

    Args:
        paths: config files that are meant for one region.
        ray: also ask Ray's own schema, if nothing else is wrong (takes two seconds to import).
    """
    return load_files(paths, ray=ray)[1]


def load_files(
    paths: Sequence[str | Path], *, ray: bool = True
) -> tuple[list[ConfigFile], list[Problem]]:
    """The files that could be read, and everything that is wrong."""
    files, unread = read_files(paths)
    return files, unread + problems_of(files, ray=ray and not unread)


def read_files(paths: Sequence[str | Path]) -> tuple[list[ConfigFile], list[Problem]]:
    """The files that could be read, and why the others could not."""
    files: list[ConfigFile] = []
    problems: list[Problem] = []
    for path in paths:
        read = read_document(Path(path), str(path))
        if isinstance(read, Problem):
            problems.append(read)
        else:
            files.append(ConfigFile(str(path), Path(path), read))
    return files, problems


def problems_of(files: Sequence[ConfigFile], *, ray: bool) -> list[Problem]:
    """Everything that is wrong with files that could be read."""
    problems = check([(file.name, file.document) for file in files])
    known = {(problem.file, problem.field) for problem in problems}
    for file in files:
        around = _check_surroundings(file)
        problems += [problem for problem in around if (problem.file, problem.field) not in known]
    if ray and not any(problem.level == "error" for problem in problems):
        for file in files:
            if kind_of(file.document) == "serve":
                problems += _check_with_ray(file)
    return problems


def scenario(file: ConfigFile) -> Scenario | list[Problem] | None:
    """What a file for `nearfield simulate` says, or what is wrong with it; None: it is none."""
    value = file.document.value
    if not isinstance(value, dict) or "simulation" not in value:
        return None
    from nearfield.simulator.scenario import read

    return read(file.path, file.name)


def _check_surroundings(file: ConfigFile) -> Iterator[Problem]:
    for index, app in model_applications(file.document):
        args = app.get("args")
        if not isinstance(args, dict):
            continue
        at = ("applications", index, "args")
        for finding, level in (*_check_source(args), *_check_custom(args, app, file.path.parent)):
            problem = located(
                file.name,
                file.document,
                Finding((*at, *finding.path), finding.message, finding.remedy, finding.value),
            )
            yield problem if level == "error" else _as_warning(problem)


def _as_warning(problem: Problem) -> Problem:
    return Problem(
        problem.file,
        problem.field,
        problem.message,
        problem.remedy,
        problem.value,
        problem.line,
        level="warning",
    )


def _check_source(args: Mapping[str, Any]) -> Iterator[tuple[Finding, str]]:
    source = args.get("source")
    if isinstance(source, str) and source.startswith("file:///"):
        path = Path(source.removeprefix("file://"))
        if not path.exists():
            yield (
                Finding(
                    ("source",),
                    "does not exist on this machine",
                    "that is fine if it exists where replicas run; else check the path",
                    source,
                ),
                "warning",
            )


def _check_custom(
    args: Mapping[str, Any], app: Mapping[str, Any], directory: Path
) -> Iterator[tuple[Finding, str]]:
    engine = args.get("engine")
    if isinstance(engine, dict) and engine.get("kind") == "custom":
        value, key = engine.get("import_path"), "import_path"
    elif isinstance(engine, str) and ":" in engine:
        value, key = engine, None
    else:
        return
    if not isinstance(value, str) or value.count(":") != 1:
        return
    path = ("engine", key) if key else ("engine",)
    trouble = check_engine(value, _search_path(app, directory))
    if trouble is not None:
        # An environment made on the nodes may hold what this machine does not.
        level = "warning" if _has_own_code(app) and trouble.is_missing else "error"
        yield Finding(path, trouble.message, trouble.remedy, value), level


def _search_path(app: Mapping[str, Any], directory: Path) -> list[Path]:
    pythonpath = _env(app).get("PYTHONPATH")
    given = [Path(part) for part in pythonpath.split(":")] if isinstance(pythonpath, str) else []
    return [directory.resolve(), *given]


def _has_own_code(app: Mapping[str, Any]) -> bool:
    runtime_env = app.get("runtime_env")
    code = ("working_dir", "py_modules", "pip", "uv", "conda", "container", "image_uri")
    return isinstance(runtime_env, dict) and any(key in runtime_env for key in code)


def _env(app: Mapping[str, Any]) -> Mapping[str, Any]:
    runtime_env = app.get("runtime_env")
    env = runtime_env.get("env_vars") if isinstance(runtime_env, dict) else None
    return env if isinstance(env, dict) else {}


def _check_with_ray(file: ConfigFile) -> Iterator[Problem]:
    """Ray's own opinion, for what the strict schema does not know."""
    from pydantic import ValidationError
    from ray.serve.schema import ServeDeploySchema

    try:
        ServeDeploySchema.model_validate(file.document.value)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            path = tuple(detail["loc"])
            yield Problem(
                file.name,
                dotted(path),
                f"Ray Serve refuses it: {detail['msg']}",
                "see Ray Serve's config reference for this key",
                shown(detail["input"]),
                file.document.line_of(path),
            )
