"""Reading config files and checking them, with what only this machine can tell.

A config is checked against the strict schema, then against the project around it (do a custom
engine's module and class exist?), then by Ray's own schema. Nothing of the user's is executed.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nearfield.cli.engine_source import check_engine
from nearfield.core.check import Kind, check, kind_of, located, model_applications
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
            problems += _WITH_RAY.get(kind_of(file.document), _nothing)(file)
    return problems


def scenario(file: ConfigFile) -> Scenario | list[Problem] | None:
    """What a file for `nearfield simulate` says, or what is wrong with it; None: it is none."""
    value = file.document.value
    if not isinstance(value, dict) or "simulation" not in value:
        return None
    from nearfield.simulator.scenario import of

    return of(file.document, file.path, file.name)


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
        for finding in _check_selectors(app):
            whole = dataclasses.replace(finding, path=("applications", index, *finding.path))
            yield _as_warning(located(file.name, file.document, whole))


def _check_selectors(app: Mapping[str, Any]) -> Iterator[Finding]:
    """Ray builds an application on a node that its only selector selects, if there is one. A model
    at zero would so start a node, and stay away while there is none."""
    deployments = app.get("deployments")
    for index, deployment in enumerate(deployments if isinstance(deployments, list) else []):
        options = deployment.get("ray_actor_options") if isinstance(deployment, dict) else None
        selector = options.get("label_selector") if isinstance(options, dict) else None
        if selector and isinstance(options, dict) and not options.get("fallback_strategy"):
            yield Finding(
                ("deployments", index, "ray_actor_options", "label_selector"),
                "is also where Ray builds the application: it starts such a node for that, and "
                "waits while there is none",
                "add fallback_strategy: [{label_selector: …}] with the same labels",
                selector,
            )


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


def _check_cluster_with_ray(file: ConfigFile) -> Iterator[Problem]:
    """Ray's cluster launcher's own opinion; the operator of KubeRay has none before it runs."""
    if "available_node_types" not in file.document.value:
        return
    from jsonschema import ValidationError  # type: ignore[import-untyped]
    from nearfield.cli.ray_nodes import LAUNCHER
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = copy.deepcopy(file.document.value)
    external = config["provider"]["type"] == "external"  # Ray has defaults for its own ones only
    try:
        validate_config({**LAUNCHER, **config} if external else prepare_config(config))
    except ValidationError as error:
        path = tuple(error.absolute_path)
        yield Problem(
            file.name,
            dotted(path),
            f"Ray refuses it: {error.message}",
            "see Ray's cluster YAML reference for this key",
            line=file.document.line_of(path),
        )
    except (ValueError, RuntimeError) as error:
        yield Problem(file.name, "", f"Ray refuses it: {error}", "see Ray's cluster YAML reference")


def _nothing(file: ConfigFile) -> Iterator[Problem]:
    return iter(())


_WITH_RAY: dict[Kind, Callable[[ConfigFile], Iterator[Problem]]] = {
    "serve": _check_with_ray,
    "cluster": _check_cluster_with_ray,
}
