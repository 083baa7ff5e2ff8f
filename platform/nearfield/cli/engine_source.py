"""Does a custom engine exist? Found and read like Python would, without running any of it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from nearfield.core.problems import did_you_mean


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why an engine cannot be imported. `is_missing`: its module was not found here."""

    message: str
    remedy: str
    is_missing: bool = False


def check_engine(import_path: str, directories: Sequence[Path]) -> Trouble | None:
    """Look for `module:Class` in the directories and in this Python's own path."""
    module, _, name = import_path.partition(":")
    spec = _find(module, [*map(str, directories), *sys.path])
    if spec is None:
        where = directories[0]
        close = did_you_mean(module, [path.stem for path in where.glob("*.py")])
        remedy = f"did you mean {close}:{name}?" if close else f"write {module}.py in {where}"
        return Trouble(f"there is no module {module}", remedy, is_missing=True)
    if spec.origin is None or not spec.origin.endswith(".py"):
        return None  # compiled: cannot be read, and need not be
    file = Path(spec.origin)
    try:
        tree = ast.parse(file.read_bytes(), filename=file.name)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        return Trouble(
            f"{file.name} is not valid Python{f' on line {line}' if line else ''}: "
            f"{getattr(error, 'msg', error)}",
            f"mend {file.name}",
        )
    names = _names(tree)
    if name in names or "*" in names:
        return None
    classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    close = did_you_mean(name, classes) or (classes[0] if len(classes) == 1 else None)
    remedy = f"did you mean {module}:{close}?" if close else f"define class {name} in {file.name}"
    return Trouble(f"{file.name} defines no {name}", remedy)


def find_beside(import_path: str, directory: Path) -> bool:
    """Whether the module of `module:name` lies in this directory, rather than being installed."""
    separator = ":" if ":" in import_path else "."  # Serve takes module.name too
    return _find(import_path.rpartition(separator)[0], [str(directory)]) is not None


def _find(module: str, path: Sequence[str] | None) -> ModuleSpec | None:
    spec: ModuleSpec | None = None
    for part in module.split("."):
        # PathFinder, unlike importlib.util.find_spec, never imports the parent package. By the last
        # part: of a dotted name a namespace would look for the parent among what is imported.
        spec = PathFinder.find_spec(part, path)
        if spec is None:
            return None
        locations = spec.submodule_search_locations
        path = list(locations) if locations is not None else []
    return spec


def _names(tree: ast.Module) -> set[str]:
    """What a module defines at its top level, branches (`if`, `try`) included."""
    names: set[str] = set()
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.If | ast.Try | ast.With):
            pending += [
                child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)
            ]
            handlers = getattr(node, "handlers", [])
            pending += [stmt for handler in handlers for stmt in handler.body]
    return names
