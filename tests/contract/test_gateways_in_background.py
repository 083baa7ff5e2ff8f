"""Gateways that run in the background of several regions: real processes, started and lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from nearfield.cli import processes
from nearfield.cli.gateways import GatewayProcess
from nearfield.core.errors import Unavailable

from tests.support.processes import until, write_files

pytestmark = pytest.mark.timeout(90)


@pytest.fixture
def gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[GatewayProcess]:
    home = tmp_path / "home"
    monkeypatch.setenv("NEARFIELD_HOME", str(home))
    made = GatewayProcess(
        "eu-west",
        write_files(tmp_path),
        home / "gateways" / "eu-west",
        tmp_path / "log" / "eu-west.log",
        f"gateway-test-{os.getpid()}",
    )
    yield made
    made.end(drain_timeout_s=0)


def test_a_gateway_in_the_background(gateway: GatewayProcess) -> None:
    assert (gateway.told, gateway.died, gateway.processes()) == (None, False, [])
    told = gateway.wait_ready(gateway.start(os.environ, workers=2))
    assert httpx.get(f"{told.url}/healthz").status_code == 200
    pids = {told.pid, *told.workers}
    assert {process.pid for process in gateway.processes()} == pids
    memory = processes.memory_bytes(gateway.processes())
    assert memory is None or memory > 2**20
    assert gateway.end(drain_timeout_s=5.0) == 3
    assert (gateway.told, gateway.died, gateway.processes()) == (None, False, [])


def test_a_gateway_that_was_killed_is_known_to_have_died(gateway: GatewayProcess) -> None:
    gateway.wait_ready(gateway.start(os.environ))
    for process in gateway.processes():
        os.kill(process.pid, 9)
    until(lambda: gateway.told is None)
    assert gateway.died
    again = gateway.wait_ready(gateway.start(os.environ))
    assert httpx.get(f"{again.url}/healthz").status_code == 200


def test_one_that_was_replaced_by_hand_is_ended_too(gateway: GatewayProcess) -> None:
    told = gateway.wait_ready(gateway.start(os.environ))
    command = [sys.executable, "-m", "nearfield.edge", str(gateway.file), "--take-over"]
    by_hand = subprocess.Popen([*command, "--state", str(gateway.state)], stdout=subprocess.PIPE)
    assert by_hand.stdout is not None
    assert b" ready: " in by_hand.stdout.readline()
    now = gateway.told
    assert now is not None
    assert now.pid == by_hand.pid != told.pid
    gateway.end(drain_timeout_s=0)
    assert by_hand.wait(10) != 0
    assert gateway.told is None
    by_hand.stdout.close()


def test_a_gateway_that_cannot_start_says_why(gateway: GatewayProcess) -> None:
    data = yaml.safe_load(gateway.file.read_text())
    gateway.file.write_text(json.dumps({**data, "prot": 1}))
    with pytest.raises(Unavailable, match=r"eu-west did not start(?s:.*)prot unknown key"):
        gateway.wait_ready(gateway.start(os.environ))
