"""YAML read for people: values with the line each of them stands on, and what is wrong.

Beyond what a YAML loader finds, this refuses what is legal and almost never meant: a key given
twice (the first is silently lost), keys that are not text (`on:` is true), several documents,
and nesting or aliases that expand beyond all bounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

MAX_VALUES = 20_000
MAX_DEPTH = 40
_PLAIN_TAGS = ("null", "bool", "int", "float", "str", "timestamp")

Path = tuple[str | int, ...]
_Entries = list[tuple[yaml.Node, yaml.Node]]


class YamlError(Exception):
    """The text is no usable YAML. `line` counts from 1."""

    def __init__(self, message: str, remedy: str, line: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self.line = line


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A key that stands twice in one section: the later value, and both lines."""

    path: Path
    value: Any
    line: int
    first_line: int


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed file. `lines`: where each path begins, counted from 1."""

    value: Any
    lines: dict[Path, int]
    duplicates: tuple[Duplicate, ...]

    def line_of(self, path: Path) -> int | None:
        """The line of a path, or of the innermost section around it that exists."""
        for length in range(len(path), -1, -1):
            if (line := self.lines.get(path[:length])) is not None:
                return line
        return None


def parse(text: str) -> Document:
    """Parse one YAML document.

    Raises:
        YamlError: the text is not YAML, is empty, or is more than one document; or it is too
            large when its aliases are followed.
    """
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = _single(loader)
        reader = _Reader(loader)
        value = reader.read(node, ())
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, text) from None
    except yaml.YAMLError as error:
        raise YamlError(
            f"holds characters that YAML forbids ({str(error).splitlines()[0]})",
            "save the file as plain UTF-8 text",
        ) from None
    except RecursionError:
        raise YamlError("is nested too deeply", "flatten it") from None
    finally:
        if loader is not None:
            loader.dispose()
    return Document(value, reader.lines, tuple(reader.duplicates))


def _single(loader: yaml.SafeLoader) -> yaml.Node:
    node: yaml.Node | None = None
    while loader.check_node():
        if node is not None:
            raise YamlError(
                "holds more than one YAML document",
                "keep one and remove the `---` line; several models go under applications",
                loader.line + 1,
            )
        node = loader.get_node()
    if node is None or (node.tag == "tag:yaml.org,2002:null" and not node.value):
        raise YamlError("is empty", "start one with: nearfield new NAME")
    return node


class _Reader:
    def __init__(self, loader: yaml.SafeLoader) -> None:
        self._loader = loader
        self._values = 0
        self.lines: dict[Path, int] = {}
        self.duplicates: list[Duplicate] = []

    def read(self, node: yaml.Node, path: Path) -> Any:
        """The value of a node, every alias in it followed."""
        self.lines.setdefault(path, _line(node))
        # Of a collection, the entries are counted: together, everything is, once per use.
        self._count(node, 1, len(path))
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.read(item, (*path, index)) for index, item in enumerate(node.value)]
        return self._scalar(node)

    def _count(self, node: yaml.Node, values: int, depth: int) -> None:
        self._values += values
        if self._values > MAX_VALUES or depth > MAX_DEPTH:
            # An alias is read again at every use: that is how a few lines become gigabytes.
            raise YamlError(
                f"holds more than {MAX_VALUES} values or {MAX_DEPTH} levels, aliases included",
                "write it without so many aliases",
                _line(node),
            )

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        merged, own = self._entries(node, len(path))
        result: dict[str, Any] = {}
        for key_node, value_node in merged:
            key = self._key(key_node)
            result[key] = self.read(value_node, (*path, key))
        first_lines: dict[str, int] = {}
        for key_node, value_node in own:
            key = self._key(key_node)
            inner, line = (*path, key), _line(key_node)
            self.lines[inner] = line
            result[key] = self.read(value_node, inner)
            if key in first_lines:
                self.duplicates.append(Duplicate(inner, result[key], line, first_lines[key]))
            first_lines.setdefault(key, line)
        return result

    def _entries(self, node: yaml.MappingNode, depth: int) -> tuple[_Entries, _Entries]:
        """A section's entries: those merged in by `<<` (weakest first), and its own."""
        merged: _Entries = []
        own: _Entries = []
        for key, value in node.value:
            if key.tag != "tag:yaml.org,2002:merge":
                own.append((key, value))
                continue
            for source in reversed(list(_merge_sources(value))):
                inner, outer = self._entries(source, depth + 1)
                self._count(key, len(inner) + len(outer), depth)
                merged += [*inner, *outer]
        return merged, own

    def _key(self, node: yaml.Node) -> str:
        value = self._scalar(node) if isinstance(node, yaml.ScalarNode) else None
        if isinstance(value, str):
            return value
        shown = getattr(node, "value", "") if isinstance(node, yaml.ScalarNode) else "a section"
        raise YamlError(
            f"has the key {shown}, which YAML reads as {_kind(value)}, not as text",
            f'put it in quotes: "{shown}"' if isinstance(node, yaml.ScalarNode) else "use a name",
            _line(node),
        )

    def _scalar(self, node: yaml.Node) -> Any:
        if node.tag.removeprefix("tag:yaml.org,2002:") not in _PLAIN_TAGS:
            raise YamlError(
                f"has the tag {node.tag}, which is not allowed here",
                "write the value without a tag",
                _line(node),
            )
        try:
            return self._loader.construct_object(node)
        except ValueError:
            raise YamlError(
                f"has the value {node.value!r}, which looks like a date but is none",
                "put it in quotes",
                _line(node),
            ) from None


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _merge_sources(node: yaml.Node) -> Iterator[yaml.MappingNode]:
    sources = node.value if isinstance(node, yaml.SequenceNode) else [node]
    for source in sources:
        if not isinstance(source, yaml.MappingNode):
            raise YamlError(
                "has a `<<` that merges something other than a section",
                "merge an anchored section: <<: *name",
                _line(source),
            )
        yield source


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    return "nothing" if value is None else f"a {type(value).__name__}"


def _syntax_error(error: yaml.MarkedYAMLError, text: str) -> YamlError:
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else None
    lines = text.splitlines()
    shown = lines[mark.line] if mark and mark.line < len(lines) else ""
    if "\t" in shown[: len(shown) - len(shown.lstrip())] or "'\\t'" in str(error.problem):
        return YamlError("is indented with a tab", "indent with spaces", line)
    if "found undefined alias" in str(error.problem):
        return YamlError(f"is not YAML: {error.problem}", "define the anchor above its use", line)
    remedy = "look at this line and the one above: indentation, colons, quotes and brackets"
    return YamlError(f"is not YAML: {error.problem or error.context}", remedy, line)
