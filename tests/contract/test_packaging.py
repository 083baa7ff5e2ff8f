"""Four source roots make one package: the wheel, the checks and the reports leave nothing out."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from nearfield.core.catalog_files import FOLDERS
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPO = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())
ROOTS = [REPO / name for name in ("platform", "autoscaling", "deployments", "edge")]
PORTIONS = [root / "nearfield" for root in ROOTS]

# Importing these must load nothing that takes seconds: the command line answers at once, and the
# host of a gateway may have no Ray and no torch.
LIGHT = ["core", "policy", "api", "store", "metering", "telemetry", "simulator", "edge", "cli"]
HEAVY = ["ray", "torch", "transformers", "vllm", "onnxruntime"]


def package_files(pattern: str = "*") -> list[Path]:
    """Every file of the package, whatever any tool thinks of it."""
    return sorted(
        path
        for portion in PORTIONS
        for path in portion.rglob(pattern)
        if path.is_file() and "__pycache__" not in path.parts
    )


def module_name(path: Path) -> str:
    root = next(root for root in ROOTS if path.is_relative_to(root))
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in package_files("*.py")}


def python(
    *arguments: str, cwd: Path = REPO, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


def checked(*arguments: str) -> str:
    result = python(*arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


class TestNamespace:
    def test_no_portion_claims_the_namespace(self) -> None:
        assert [path for path in ROOTS + PORTIONS if (path / "__init__.py").exists()] == []

    def test_every_folder_with_code_is_a_package(self) -> None:
        """A folder without __init__.py works by luck of the path and is skipped by many tools."""
        folders = {path.parent for path in MODULES.values()}
        assert sorted(folder for folder in folders if not (folder / "__init__.py").exists()) == []

    def test_platform_is_the_standard_librarys_in_the_repository_root(self) -> None:
        """`serve run` puts the working folder on the path."""
        found = checked("-c", "import platform; platform.system(); print(platform.__file__)")
        assert Path(found.strip()).parent == Path(sysconfig.get_path("stdlib"))

    def test_the_install_is_editable_and_finds_every_portion(self, tmp_path: Path) -> None:
        result = python(
            "-c", "import nearfield; print(*nearfield.__path__, sep='\\n')", cwd=tmp_path
        )
        assert set(result.stdout.split()) == {str(portion) for portion in PORTIONS}, result.stderr

    def test_no_two_roots_hold_the_same_module(self) -> None:
        assert len(MODULES) == len(package_files("*.py"))


class TestChecksSeeEveryFile:
    def test_mypy(self) -> None:
        """By its own reading of the configuration: every file, under the name it is imported by."""
        seen = json.loads(
            checked(
                "-c",
                "import json; from mypy.main import process_options\n"
                "sources, options = process_options([])\n"
                "exceptions = options.per_module_options.items()\n"
                "ignored = [name for name, its in exceptions if its.get('ignore_errors')]\n"
                "files = {source.module: source.path for source in sources}\n"
                "print(json.dumps([files, options.disallow_any_generics, ignored]))",
            )
        )
        files, strict, ignored = seen
        ours = {n: REPO / path for n, path in files.items() if not n.startswith("benchmarks")}
        assert ours == MODULES
        assert strict
        assert ignored == []

    def test_coverage(self, tmp_path: Path) -> None:
        report = tmp_path / "coverage.json"
        checked(
            "-c",
            "import coverage\n"
            "measured = coverage.Coverage(config_file='pyproject.toml', data_file=None)\n"
            "measured.start(); measured.stop()\n"
            f"measured.json_report(outfile={str(report)!r})",
        )
        counted = json.loads(report.read_text())["files"]
        assert {REPO / path for path in counted} == set(MODULES.values())

    def test_import_rules(self) -> None:
        listed = checked(
            "-c",
            "import grimp\n"
            "print(*grimp.build_graph('nearfield', cache_dir=None).modules, sep='\\n')",
        )
        assert set(MODULES) <= set(listed.split())


class TestImportRules:
    @staticmethod
    def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
        return python(
            "-c",
            "from importlinter.cli import lint_imports_command as run; run(['--no-cache'])",
            cwd=root,
            PYTHONPATH=os.pathsep.join(str(root / path.name) for path in ROOTS),
        )

    def test_they_are_kept(self) -> None:
        result = self.lint_imports(REPO)
        assert result.returncode == 0, result.stdout + result.stderr

    def test_each_catches_what_it_forbids(self, tmp_path: Path) -> None:
        planted = {
            "Imports point one way": (
                "platform/nearfield/core",
                "import nearfield.policy",
            ),
            "Ray appears only in adapters": (
                "edge/nearfield/edge",
                "def late():\n    import ray.serve",
            ),
            "torch and vLLM appear only where tensors are": (
                "platform/nearfield/api",
                "import torch",
            ),
            "SQL appears only in the store": ("edge/nearfield/edge", "import sqlalchemy"),
            "Policy and core are pure": ("autoscaling/nearfield/policy", "from httpx import get"),
            "Policy is given the time": ("autoscaling/nearfield/policy", "import time"),
        }
        assert set(planted) == {
            rule["name"] for rule in PYPROJECT["tool"]["importlinter"]["contracts"]
        }
        for path in [REPO / "pyproject.toml", *MODULES.values()]:
            copy = tmp_path / path.relative_to(REPO)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
        for number, (folder, code) in enumerate(planted.values()):
            (tmp_path / folder / f"planted_{number}.py").write_text(code + "\n")
        result = self.lint_imports(tmp_path)
        assert set(re.findall(r"^(.+?) BROKEN", result.stdout, re.MULTILINE)) == set(planted), (
            result.stdout
        )
        assert result.returncode == 1

    def test_light_packages_load_nothing_heavy(self) -> None:
        light = [
            name
            for name in MODULES
            if name.split(".")[1] in LIGHT and not name.endswith("__main__")
        ]
        loaded = checked(
            "-c",
            f"import importlib, sys\nfor name in {light}: importlib.import_module(name)\n"
            f"print(*[name for name in {HEAVY} if name in sys.modules])",
        )
        assert loaded.split() == []


class TestWheel:
    def test_it_holds_every_file_of_the_package_and_nothing_else(self, tmp_path: Path) -> None:
        checked("-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path))
        (wheel,) = tmp_path.glob("nearfield-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
            assert b"nearfield = nearfield.cli.main:main" in archive.read(entry_points)
        packed = sorted(name for name in names if ".dist-info/" not in name)
        catalogue = [REPO / "cluster_configs" / kind for kind in (*FOLDERS, "NOTICE.md")]
        assert packed == sorted(
            [
                path.relative_to(portion.parent).as_posix()
                for portion in PORTIONS
                for path in package_files()
                if path.is_relative_to(portion)
            ]
            + [
                f"nearfield_catalog/{path.relative_to(REPO / 'cluster_configs').as_posix()}"
                for root in catalogue
                for path in ([root] if root.is_file() else root.rglob("*"))
                if path.is_file()
            ]
        )

    def test_what_is_installed_from_it_finds_its_catalogue(self, tmp_path: Path) -> None:
        checked("-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path))
        (wheel,) = tmp_path.glob("nearfield-*.whl")
        installed = tmp_path / "lib" / "site-packages"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(installed)
        code = (
            f"import sys; sys.path.insert(0, {str(installed)!r})\n"
            f"import nearfield; nearfield.__path__ = [{str(installed / 'nearfield')!r}]\n"
            "from nearfield.core.catalog_files import packaged, read_catalog\n"
            "print(packaged(), len(read_catalog().accelerators))"
        )
        told = python("-c", code, cwd=tmp_path)
        folder, _, count = told.stdout.strip().rpartition(" ")
        assert Path(folder) == installed / "nearfield_catalog", told.stderr
        assert int(count) > 20


class TestLocks:
    @staticmethod
    def locked(name: str) -> dict[str, list[str]]:
        versions: dict[str, list[str]] = {}
        for package, version in re.findall(
            r"^([a-z0-9-]+)==(\S+)", (REPO / name).read_text(), re.MULTILINE
        ):
            versions.setdefault(package, []).append(version)
        return versions

    @pytest.mark.parametrize(
        ("table", "locks"),
        [
            ("edge", ["requirements.lock"]),
            ("region", ["requirements.lock"]),
            ("test", ["requirements.lock", "requirements-test.lock"]),
        ],
    )
    def test_they_hold_what_pyproject_asks_for(self, table: str, locks: list[str]) -> None:
        project = PYPROJECT["project"]
        wanted = {*project["dependencies"], *project["optional-dependencies"][table]}
        locked = {name: versions for lock in locks for name, versions in self.locked(lock).items()}
        locked["torch"] = [
            tomllib.loads((REPO / "scripts/lock.toml").read_text())["dependency-metadata"][0][
                "version"
            ]
        ]
        outdated = [
            str(requirement)
            for requirement in map(Requirement, sorted(wanted))
            if requirement.name != "nearfield"
            and (
                not (versions := locked.get(canonicalize_name(requirement.name)))
                or not all(requirement.specifier.contains(version) for version in versions)
            )
        ]
        assert outdated == [], "run `make lock`"

    def test_nothing_that_depends_on_the_machine_is_locked(self) -> None:
        names = set(self.locked("requirements.lock")) | set(self.locked("requirements-test.lock"))
        assert (
            sorted(name for name in names if re.match(r"torch$|triton$|nvidia-|cuda-", name)) == []
        )

    def test_every_package_is_locked_once_and_no_index_is_named(self) -> None:
        assert set(self.locked("requirements.lock")).isdisjoint(
            self.locked("requirements-test.lock")
        )
        for lock in REPO.glob("requirements*.lock"):
            lines = [line for line in lock.read_text().splitlines() if not line.startswith("#")]
            odd = [
                line
                for line in lines
                if not re.match(r"    --hash=sha256:[0-9a-f]{64}|[a-z0-9-]+==", line)
            ]
            assert odd == [], lock.name

    def test_the_previous_openai_is_the_major_before_the_tested_one(self) -> None:
        (current,), (previous,) = (
            self.locked(f"requirements-{lock}.lock")["openai"]
            for lock in ("test", "openai-previous")
        )
        assert int(previous.split(".")[0]) == int(current.split(".")[0]) - 1


class TestBootstrap:
    def test_without_a_python_it_says_what_to_do(self, tmp_path: Path) -> None:
        result = subprocess.run(
            [REPO / "scripts/bootstrap.sh"],
            env={
                **os.environ,
                "VENV": str(tmp_path / "venv"),
                "PYTHON": "python-that-is-not-there",
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 1
        assert "no Python 3.11 or newer" in result.stderr
        assert "fix: install one" in result.stderr


def test_no_file_names_a_path_of_somebodys_machine() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPO,
        capture_output=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    machine = re.compile(rb"(?<![\w.])/(?:work|farm|root|Users)/")
    files = [REPO / os.fsdecode(name) for name in listed.stdout.split(b"\0") if name]
    found = [
        f"{path.relative_to(REPO)}:{number}"
        for path in files
        if path.is_file() and path.suffix != ".safetensors"
        for number, line in enumerate(path.read_bytes().splitlines(), 1)
        if machine.search(line)
    ]
    assert found == []
