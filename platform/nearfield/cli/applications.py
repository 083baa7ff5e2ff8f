"""From config files to what is deployed."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from nearfield.cli.config_files import ConfigFile, load_files
from nearfield.cli.engine_source import find_beside
from nearfield.core.errors import BadRequest
from nearfield.core.problems import Problem
from nearfield.core.serve_config import MODEL_BUILDER


class InvalidConfig(BadRequest):
    """Config files that cannot be deployed; `problems` says why."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        errors = [problem for problem in problems if problem.level == "error"]
        plural = "" if len(errors) == 1 else "s"
        super().__init__(f"{len(errors)} problem{plural} in the config; nothing was deployed")
        self.problems = tuple(problems)


def quickstart_files() -> list[Path]:
    """The models `nearfield up` runs when it is given none."""
    directory = Path(str(resources.files("nearfield.cli") / "quickstart"))
    return sorted(directory.glob("*.yaml"))


def load_valid(paths: Sequence[str | Path]) -> tuple[list[ConfigFile], list[Problem]]:
    """The files, and warnings.

    Raises:
        InvalidConfig: something is wrong with one of them.
    """
    files, problems = load_files(paths, ray=False)
    if any(problem.level == "error" for problem in problems):
        raise InvalidConfig(problems)
    return files, problems


def applications(files: Sequence[ConfigFile], pythonpath: str) -> list[dict[str, Any]]:
    """All applications of the files, each able to import what lies beside its file.

    Args:
        pythonpath: the region's own, which an application's would otherwise hide.
    """
    return [
        _with_own_code(app, file.path.resolve().parent, pythonpath)
        for file in files
        for app in file.document.value["applications"]
    ]


def serve_options(files: Sequence[ConfigFile]) -> dict[str, Any]:
    """The top-level keys of the files besides `applications`, for a region that is to start.

    Raises:
        BadRequest: two files disagree.
    """
    options: dict[str, Any] = {}
    source: dict[str, str] = {}
    for file in files:
        for key, value in file.document.value.items():
            if key == "applications":
                continue
            if key in options and options[key] != value:
                raise BadRequest(
                    f"{key} differs between {source[key]} and {file.name}: a region has one; "
                    f"make them equal or leave {key} out of one",
                    param=key,
                )
            options[key], source[key] = value, file.name
    return options


def _with_own_code(app: dict[str, Any], directory: Path, pythonpath: str) -> dict[str, Any]:
    app = copy.deepcopy(app)
    imported = app["import_path"]
    if imported == MODEL_BUILDER:
        imported = _engine_import(app["args"])
    if "runtime_env" in app or imported is None or not find_beside(imported, directory):
        return app
    paths = [str(directory), *([pythonpath] if pythonpath else [])]
    app["runtime_env"] = {"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}}
    return app


def _engine_import(args: Mapping[str, Any]) -> str | None:
    engine = args["engine"]
    if isinstance(engine, str):
        return engine if ":" in engine else None
    imported = engine.get("import_path")
    return str(imported) if imported is not None else None
