"""The config files with stock Ray Serve: `serve run FILE`, and nothing of nearfield's own tools."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from nearfield.cli import processes
from nearfield.cli.ports import Reservations

ROOT = Path(__file__).parents[2]
SERVE = Path(sysconfig.get_path("scripts")) / "serve"
START_TIMEOUT_S = 180.0


@pytest.fixture
def ray_env(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment for a Ray of one's own, all of which is ended afterwards."""
    region_id = secrets.token_hex(8)
    session = tempfile.mkdtemp(prefix="nf-", dir="/tmp")  # socket paths must be short
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    yield {
        **kept,
        processes.MARKER: region_id,
        "SPT_NOENV": "1",
        "HOME": str(tmp_path),
        "RAY_TMPDIR": session,
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    processes.end_region(region_id, grace_s=1.0)
    shutil.rmtree(session, ignore_errors=True)


def wait_ready(process: subprocess.Popen[str], url: str) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        try:
            if httpx.get(url, timeout=5).is_success:
                return
        except httpx.TransportError:
            pass
        if process.poll() is not None:
            break
        time.sleep(0.2)
    process.kill()
    pytest.fail(f"{url} never answered; serve run said:\n{process.communicate()[0]}")


@pytest.mark.parametrize(
    ("directory", "name"),
    [("deployments/models", "chat"), ("examples/custom_engine", "language")],
)
def test_serve_run(tmp_path: Path, ray_env: dict[str, str], directory: str, name: str) -> None:
    """As is, but for the port, which may be somebody else's; from the file's own directory."""
    project = tmp_path / "project"
    shutil.copytree(ROOT / directory, project)
    config = project / f"{name}.yaml"
    reservations = Reservations()
    port = reservations.next_free(8100, "127.0.0.1")
    lines = [line for line in config.read_text().splitlines() if "  port: " not in line]
    lines.insert(lines.index("  host: 127.0.0.1") + 1, f"  port: {port}")
    config.write_text("\n".join(lines))

    process = subprocess.Popen(
        [str(SERVE), "run", config.name],
        cwd=project,
        env=ray_env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{port}/{name}"
    wait_ready(process, f"{url}/v2/models/{name}/ready")
    if name == "chat":
        message = {"role": "user", "content": "What is 47 + 85?"}
        body = {"model": "chat", "messages": [message], "temperature": 0}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30).json()
        assert answer["choices"][0]["message"]["content"] == "132"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    reservations.close()
