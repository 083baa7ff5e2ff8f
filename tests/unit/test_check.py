"""Checking configs: each broken file of the corpus is named, line, field, value and remedy."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from nearfield.cli.config_files import check_files
from nearfield.core.problems import Problem
from nearfield.core.spec import BUILTIN_MODELS
from nearfield.weights.resolve import BUILTIN

HERE = Path(__file__).parent
CORPUS = sorted((HERE / "broken_configs").glob("*.yaml"))
SHIPPED = sorted(
    [
        *(HERE.parents[1] / "deployments" / "models").glob("*.yaml"),
        *(HERE.parents[1] / "cluster_configs" / "regions").glob("*.yaml"),
    ]
)

VALID = """\
applications:
  - name: chat
    route_prefix: /chat
    import_path: nearfield.serving:app
    args:
      model: chat
      engine: generate
      source: builtin://abacus
"""


class Expected(NamedTuple):
    field: str
    value: str | None
    says: str


def expectations(path: Path) -> list[Expected]:
    """The `# expect:` lines at the top of a corpus file; `-` stands for nothing."""
    found = re.findall(
        r"^# expect: field=(.*?), value=(.*?), says=(.*)$", path.read_text(), re.MULTILINE
    )
    return [
        Expected("" if field == "-" else field, None if value == "-" else value, says)
        for field, value, says in found
    ]


def write(directory: Path, text: str, name: str = "model.yaml") -> Path:
    path = directory / name
    path.write_text(text)
    return path


def check(*paths: Path) -> list[Problem]:
    return check_files(paths, ray=False)


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_corpus(path: Path) -> None:
    expected = expectations(path)
    problems = check(path)
    assert expected
    for field, value, says in expected:
        matching = [p for p in problems if p.field == field and says in p.message]
        assert matching, f"{field}: {says!r} is not among {problems}"
        problem = matching[0]
        assert problem.value == value
        assert len(problem.remedy) > 3
        assert problem.file == str(path)
        assert problem.level == "error"
    # Nothing else is reported: one mistake is not told in three ways.
    assert {(p.field) for p in problems} == {field for field, _, _ in expected}
    assert len(problems) == len(expected)


def test_the_corpus_is_large_enough() -> None:
    assert len(CORPUS) >= 36


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_models_are_valid(path: Path) -> None:
    assert [p for p in check(path) if p.level == "error"] == []


def test_built_in_models_are_those_that_can_be_resolved() -> None:
    assert set(BUILTIN_MODELS) == set(BUILTIN)


def test_shipped_models_fit_into_one_region() -> None:
    assert [p for p in check(*SHIPPED) if p.level == "error"] == []


@pytest.mark.parametrize(
    ("extra", "field", "remedy"),
    [
        ("      max_btch: 4\n", "max_btch", "known here"),
        ("      verion: 4\n", "verion", "did you mean version?"),
        ("      model_path: /x\n", "model_path", "did you mean source?"),
        ("      max_batch: 4\n", "max_batch", "max_batch belongs under engine"),
        ("      batch_size: 4\n", "batch_size", "max_batch belongs under engine"),
        ("      timeout: 4\n", "timeout", "timeout_s belongs under limits"),
        ("      num_gpus: 4\n", "num_gpus", "belongs under deployments.ray_actor_options"),
        ("      replicas: 4\n", "replicas", "num_replicas belongs under deployments"),
        ("      port: 4\n", "port", "port belongs under http_options"),
        ("      limits: {timeout_s: 1.5h}\n", "limits.timeout_s", "timeout_s: 5400"),
        ("      limits: {timeout_s: '30'}\n", "limits.timeout_s", "without quotes: timeout_s: 30"),
        ("      version: 1.0\n", "version", 'put it in quotes: version: "1.0"'),
        ("      dtype: bfloat\n", "dtype", "did you mean bfloat16?"),
    ],
)
def test_remedies(tmp_path: Path, extra: str, field: str, remedy: str) -> None:
    (problem,) = check(write(tmp_path, VALID + extra))
    assert problem.field == f"applications[0].args.{field}"
    assert remedy in problem.remedy


def test_the_line_is_that_of_the_value(tmp_path: Path) -> None:
    (problem,) = check(write(tmp_path, VALID + "      limits:\n        max_running: 0\n"))
    assert problem.line == 10


def test_files_are_checked_together(tmp_path: Path) -> None:
    first, second = write(tmp_path, VALID, "a.yaml"), write(tmp_path, VALID, "b.yaml")
    assert check(first) == check(second) == []
    problems = check(first, second)
    assert [(p.file, p.field) for p in problems] == [
        (str(second), "applications[0].name"),
        (str(second), "applications[0].route_prefix"),
    ]
    assert "a.yaml, line 2" in problems[0].message


def test_other_serve_applications_may_stand_beside_models(tmp_path: Path) -> None:
    text = VALID + (
        "  - name: own\n    route_prefix: /own/api\n    import_path: my_app.main:app\n"
        "    args: {anything: [goes]}\n    deployments:\n      - name: Ingress\n"
        "      - name: Model\n        num_replicas: auto\n"
    )
    assert check(write(tmp_path, text)) == []


def test_merge_keys_and_anchors_are_plain_yaml(tmp_path: Path) -> None:
    text = VALID + (
        "    deployments:\n      - &replica\n        name: replica\n        num_replicas: 1\n"
        "  - name: embed\n    route_prefix: /embed\n    import_path: nearfield.serving:app\n"
        "    args: {model: embed, engine: embed, source: 'builtin://minilm'}\n"
        "    deployments:\n      - <<: *replica\n        num_replicas: 2\n"
    )
    assert check(write(tmp_path, text)) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # Ten lines of merges that would be ten to the ninth entries.
        (
            "m0: &m0 {a: 1}\n"
            + "".join(
                f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 10)}]}}\n" for n in range(1, 10)
            ),
            "aliases included",
        ),
        ("a: &a {<<: *a}\n", "is nested too deeply"),
        ("a: {<<: [1]}\n", "merges something other than a section"),
        ("\n".join(f"k{n}: 1" for n in range(30_000)), "more than 20000 values"),
    ],
)
def test_expansion_is_bounded(tmp_path: Path, text: str, message: str) -> None:
    (problem,) = check(write(tmp_path, text))
    assert message in problem.message


def _missing(directory: Path) -> Path:
    write(directory, VALID, "model.yaml")
    return directory / "modle.yaml"


def _latin_1(directory: Path) -> Path:
    path = directory / "latin.yaml"
    path.write_bytes(b"# caf\xe9\n")
    return path


def _huge(directory: Path) -> Path:
    return write(directory, VALID + "#" * 2**20)


def _deep(directory: Path) -> Path:
    return write(directory, "[" * 5000)


def _control(directory: Path) -> Path:
    return write(directory, "a: \x00\n")


@pytest.mark.parametrize(
    ("make", "message", "remedy"),
    [
        (_missing, "does not exist", "did you mean model.yaml?"),
        (lambda directory: directory, "is a directory", "*.yaml"),
        (_latin_1, "is not UTF-8 text", "UTF-8"),
        (_huge, "at most 1 MiB", "right file"),
        (_deep, "nested too deeply", "flatten"),
        (_control, "characters that YAML forbids", "UTF-8"),
    ],
)
def test_files_that_cannot_be_read(
    tmp_path: Path, make: Callable[[Path], Path], message: str, remedy: str
) -> None:
    (problem,) = check(make(tmp_path))
    assert message in problem.message
    assert remedy in problem.remedy
    assert problem.field == ""


CUSTOM = VALID.replace("engine: generate", "engine: {engine}").replace(
    "      source: builtin://abacus\n", ""
)


@pytest.mark.parametrize(
    ("engine", "source", "message", "remedy"),
    [
        ("shout:Shout", "class Shout: ...", None, None),
        (
            "shout:Shout",
            "try:\n    from fast import Shout\nexcept ImportError:\n    pass",
            None,
            None,
        ),
        ("shout:Shout", "Shout = type('Shout', (), {})", None, None),
        ("shout:Shot", "class Shout: ...", "shout.py defines no Shot", "did you mean shout:Shout?"),
        ("shut:Shout", "class Shout: ...", "there is no module shut", "did you mean shout:Shout?"),
        ("shout:Shout", "class Shout:", "shout.py is not valid Python on line 1", "mend shout.py"),
        ("json:JSONDecoder", "", None, None),
        ("email.message:Nope", "", "defines no Nope", "define class Nope"),
    ],
)
def test_custom_engines_are_looked_for(
    tmp_path: Path, engine: str, source: str, message: str | None, remedy: str | None
) -> None:
    write(tmp_path, source, "shout.py")
    problems = check(write(tmp_path, CUSTOM.replace("{engine}", engine)))
    if message is None:
        assert problems == []
        return
    (problem,) = problems
    assert message in problem.message
    assert remedy is not None
    assert remedy in problem.remedy


def test_custom_engines_are_not_executed(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    boom = "raise SystemExit('executed')\n"
    write(package, boom, "__init__.py")
    write(package, boom + "class Engine: ...", "engine.py")
    assert check(write(tmp_path, CUSTOM.replace("{engine}", "package.engine:Engine"))) == []
    assert "package" not in sys.modules


def test_custom_engines_may_lie_in_folders_without_init(tmp_path: Path) -> None:
    folder = tmp_path / "outer" / "inner"
    folder.mkdir(parents=True)
    write(folder, "class Engine: ...", "engine.py")
    assert check(write(tmp_path, CUSTOM.replace("{engine}", "outer.inner.engine:Engine"))) == []


def test_a_module_that_only_the_nodes_have_is_a_warning(tmp_path: Path) -> None:
    text = CUSTOM.replace("{engine}", "elsewhere:Engine") + "    runtime_env: {pip: [elsewhere]}\n"
    (problem,) = check(write(tmp_path, text))
    assert problem.level == "warning"


def test_weights_that_are_not_on_this_machine_are_a_warning(tmp_path: Path) -> None:
    text = VALID.replace("builtin://abacus", f"file://{tmp_path}/weights")
    path = write(tmp_path, text)
    assert [p.level for p in check(path)] == ["warning"]
    (tmp_path / "weights").mkdir()
    assert check(path) == []
