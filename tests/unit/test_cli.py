"""The command line without a region: quick, helpful, and exact about what went wrong."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from nearfield.cli import applications
from nearfield.cli.main import COMMANDS, main
from nearfield.cli.templates import project
from nearfield.core.errors import BadRequest

ROOT = Path(__file__).parents[2]
HEAVY = ("ray", "torch", "transformers", "numpy", "pydantic", "httpx", "rich", "yaml")

ENGINES = ("generate", "embed", "tensor", "remote", "custom")


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEARFIELD_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def test_importing_it_imports_nothing_heavy() -> None:
    done = run_python(
        "import sys, nearfield.cli.main\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    assert done.stdout.strip() == "[]"


def test_importing_it_is_quick() -> None:
    code = (
        "import time; started = time.process_time(); import nearfield.cli.main\n"
        "print(time.process_time() - started)"
    )
    # The best of three, in CPU time: a busy machine is not a slow import.
    assert min(float(run_python(code).stdout) for _ in range(3)) < 0.3


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.count(f"nearfield {command}") >= 2, "usage, and at least one example"
    assert "--json" in text


def test_help_imports_nothing_heavy() -> None:
    """All commands in one process, and which one loaded what."""
    done = run_python(
        "import sys; from nearfield.cli.main import main\n"
        "loaded = set()\n"
        f"for command in {list(COMMANDS)!r}:\n"
        "    main([command, '--help'])\n"
        "    for name in ('ray', 'torch', 'numpy', 'httpx'):\n"
        "        if name in sys.modules and name not in loaded:\n"
        "            loaded.add(name); print('loads', command, name, file=sys.stderr)\n"
    )
    assert done.stderr == ""


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(f"  {command} " in text for command in COMMANDS)


def test_a_mistyped_command_is_recognised(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["statu"]) == 2
    assert "Did you mean status? See: nearfield --help" in capsys.readouterr().err


def test_errors_have_one_style(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check"]) == 2
    assert main(["status"]) == 1
    assert main(["rm", "chat"]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 3
    assert all(line.startswith("error: ") for line in lines)
    assert lines[1] == "error: No region runs here. Start one with: nearfield up"


def test_errors_are_json_where_json_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error == {
        "code": "region_not_running",
        "message": "No region runs here. Start one with: nearfield up",
    }


def test_down_without_a_region_is_fine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["down"]) == 0
    assert main(["down", "--json"]) == 0
    assert '"stopped": false' in capsys.readouterr().out


def test_a_relative_home_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NEARFIELD_HOME", "here")
    assert main(["status"]) == 2
    assert "NEARFIELD_HOME is 'here': it must be an absolute path" in capsys.readouterr().err


def test_check_says_ok(capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(path) for path in (ROOT / "deployments" / "models").glob("*.yaml")]
    assert main(["check", "--no-ray", *files]) == 0
    assert "chat.yaml: ok (chat)" in capsys.readouterr().out


def test_check_names_every_problem(capsys: pytest.CaptureFixture[str]) -> None:
    file = str(ROOT / "tests" / "unit" / "broken_configs" / "many_at_once.yaml")
    assert main(["check", file]) == 2
    text = capsys.readouterr().err
    assert f"error: {file}:6: proxy_location = 'Everywhere': must be one of" in text
    assert 'put it in quotes: version: "3"' in text
    assert text.count("error: ") == 5


def test_check_json_is_stable(capsys: pytest.CaptureFixture[str]) -> None:
    file = str(ROOT / "tests" / "unit" / "broken_configs" / "dtype.yaml")
    assert main(["check", "--json", file]) == 2
    assert json.loads(capsys.readouterr().out) == {
        "valid": False,
        "files": [file],
        "problems": [
            {
                "file": file,
                "line": 10,
                "field": "applications[0].args.dtype",
                "value": "'fp16'",
                "message": "must be one of auto, float32, bfloat16, float16",
                "remedy": "did you mean float16?",
                "level": "error",
            }
        ],
    }


def test_up_and_serve_start_nothing_with_an_invalid_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(ROOT / "tests" / "unit" / "broken_configs" / "dtype.yaml")
    for command in ("up", "serve"):
        assert main([command, file]) == 2
        text = capsys.readouterr().err
        assert "did you mean float16?" in text
        assert "1 problem in the config; nothing was deployed" in text
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("engine", ENGINES)
def test_new_writes_a_valid_project(engine: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", "my-model", "--engine", engine]) == 0
    assert "Next: nearfield check my-model/my-model.yaml" in capsys.readouterr().out
    assert main(["check", "--no-ray", "my-model/my-model.yaml"]) == 0
    assert (Path("my-model") / "my_model.py").exists() == (engine == "custom")


def test_new_overwrites_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine").mkdir()
    Path("mine/README.md").write_text("keep me")
    assert main(["new", "mine"]) == 1
    assert "mine/README.md exists, and nothing is overwritten" in capsys.readouterr().err
    assert [path.name for path in Path("mine").iterdir()] == ["README.md"]


@pytest.mark.parametrize("name", ["a b", "..", "-x", "a/../..", "é", "a..b"])
def test_new_takes_names_that_models_can_have(name: str) -> None:
    with pytest.raises(BadRequest, match="must begin with a letter or digit"):
        project(Path(name).name, "generate", Path.cwd())


def test_new_makes_identifiers_of_any_name() -> None:
    files = project("3d-points.v2", "custom", Path.cwd())
    assert "class Model3dPointsV2(FunctionEngine)" in files["model_3d_points_v2.py"]


def test_the_quickstart_is_what_deployments_models_shows() -> None:
    """An installed wheel has its own copy; there is one truth."""
    for file in applications.quickstart_files():
        assert file.read_bytes() == (ROOT / "deployments" / "models" / file.name).read_bytes()
    assert [file.name for file in applications.quickstart_files()] == ["chat.yaml", "embed.yaml"]


def test_an_interrupted_command_says_so(tmp_path: Path) -> None:
    """Ctrl-C before anything runs: no traceback, and the exit code that shells expect."""
    fifo = tmp_path / "fifo.yaml"
    os.mkfifo(fifo)
    code = (
        # Whatever started the tests may have had it ignored, as a shell does in the background.
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"from nearfield.cli.main import main; sys.exit(main(['check', {str(fifo)!r}]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL
    )
    with fifo.open("w"):  # returns once the command has opened it, and waits for more
        for _ in range(4):  # one that comes just before the read does not end it
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
                break
        _, error = process.communicate(timeout=5)
    assert process.returncode == 130
    assert error.strip() == "error: interrupted"
