"""The peers' virtual environments, each made from its requirements.txt when missing."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
TORCH = "torch==2.13.0"
WITHOUT_TORCH = frozenset({"proxies", "litellm"})


def python(name: str) -> Path:
    """The interpreter of a peer's environment, or of ours for "nearfield"."""
    if name == "nearfield":
        return Path(sys.executable)
    return HERE / ".venvs" / name / "bin" / "python"


def prepare(names: Iterable[str]) -> None:
    """Make what is missing or was made from other requirements.

    pip reads the user's own configuration; where its index has more than one build of torch, that
    is also where the CPU build is chosen (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS).

    Raises:
        subprocess.CalledProcessError: pip could not do it; its own words are on the terminal.
    """
    for name in sorted(set(names) - {"nearfield"}):
        requirements = HERE / "peers" / name / "requirements.txt"
        torch = [] if name in WITHOUT_TORCH else [TORCH]
        wanted = hashlib.sha256(f"{torch}\n{requirements.read_text()}".encode()).hexdigest()
        stamp = HERE / ".venvs" / name / "made-from"
        if stamp.is_file() and stamp.read_text() == wanted:
            continue
        print(f"installing {name} (some minutes)", flush=True)
        if not python(name).exists():
            subprocess.run([sys.executable, "-m", "venv", python(name).parent.parent], check=True)
        pip = [str(python(name)), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        subprocess.run([*pip, *torch, "-r", str(requirements)], check=True)
        stamp.write_text(wanted)


def versions(name: str) -> dict[str, str]:
    """What a peer's requirements.txt pins."""
    lines = (HERE / "peers" / name / "requirements.txt").read_text().splitlines()
    pins = [line.split("#")[0].strip() for line in lines]
    return dict(pin.split("==", 1) for pin in pins if "==" in pin)
