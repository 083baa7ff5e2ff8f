"""Reading a YAML file that somebody has written; where it cannot be read, what is wrong with it."""

from __future__ import annotations

from pathlib import Path

from nearfield.core.problems import Problem, did_you_mean
from nearfield.core.yaml_document import Document, YamlError, parse

MAX_BYTES = 2**20
"""Some hundred lines are usual."""


def read_document(path: Path, name: str) -> Document | Problem:
    """What the file says. `name`: as it is called in messages."""

    def problem(message: str, remedy: str, line: int | None = None) -> Problem:
        return Problem(name, "", message, remedy, line=line)

    try:
        if path.is_dir():
            return problem("is a directory", f"name the files in it: {name.rstrip('/')}/*.yaml")
        if path.stat().st_size > MAX_BYTES:
            size = f"{path.stat().st_size / 2**20:.1f} MiB"
            return problem(f"is {size} long, a config has at most 1 MiB", "is it the right file?")
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        close = did_you_mean(path.name, [p.name for p in path.parent.glob("*.y*ml")])
        return problem("does not exist", f"did you mean {close}?" if close else "check the path")
    except PermissionError:
        return problem("cannot be read: permission denied", f"chmod u+r {name}")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        return problem("is not UTF-8 text", "save it as UTF-8", line)
    except OSError as error:
        return problem(f"cannot be read: {error.strerror}", "check the file")
    try:
        return parse(text)
    except YamlError as error:
        return problem(error.message, error.remedy, error.line)
