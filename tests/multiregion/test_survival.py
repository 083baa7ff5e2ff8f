"""What is replaced while clients ask, which they do not notice."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import signal
import threading
import time
from collections import Counter
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import httpx
import pytest
from nearfield.cli import deploy, processes
from nearfield.cli.members import Member
from nearfield.cli.region import Region

from tests.multiregion.conftest import MODEL, REGIONS, Fleet, config
from tests.support.processes import until
from tests.support.terminal import Terminal, run, run_json


class Load:
    """Clients that ask without pause, on a new connection every time and with a key of its own.

    Attributes:
        regions: how many answers came from each. failed: everything but a good answer.
    """

    def __init__(self, fleet: Fleet, *members: Member, key: str = "free", clients: int = 2) -> None:
        self._headers = {**fleet.headers(key), "content-type": "application/json"}
        self._numbers = itertools.count()
        self._stop = threading.Event()
        self.regions: Counter[str] = Counter()
        self.failed: list[str] = []
        self.slowest_s = 0.0
        self._threads = [
            threading.Thread(target=self._ask, args=[member.gateway_url], daemon=True)
            for member in members
            for _ in range(clients)
        ]

    @property
    def answered(self) -> int:
        return self.regions.total()

    def more(self, count: int = 20) -> None:
        """Wait for so many more answers."""
        wanted = self.answered + count
        until(lambda: self.answered >= wanted or self.failed)

    def __enter__(self) -> Self:
        for each in self._threads:
            each.start()
        self.more()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        for each in self._threads:
            each.join(30)

    def _ask(self, url: str) -> None:
        at = urlsplit(url)
        while not self._stop.is_set():
            connection = http.client.HTTPConnection(at.hostname or "", at.port, timeout=30)
            began_s = time.monotonic()
            try:
                key = f"load-{id(self)}-{next(self._numbers)}"
                headers = {**self._headers, "idempotency-key": key}
                # A body of its own: those that are inside a replica that dies come under suspicion.
                body = json.dumps({"model": MODEL, "prompt": f"say:{key}"})
                connection.request("POST", "/v1/completions", body, headers)
                answer = connection.getresponse()
                said = answer.read()
                if answer.status != 200 or key not in said.decode():
                    self.failed.append(f"{answer.status}: {said.decode()[:300]}")
                else:
                    self.regions[answer.headers["x-nearfield-region"]] += 1
            except (OSError, http.client.HTTPException) as error:
                self.failed.append(repr(error))
            finally:
                connection.close()
            self.slowest_s = max(self.slowest_s, time.monotonic() - began_s)


@pytest.fixture
def eu(fleet: Fleet) -> Member:
    return _known(fleet, "eu-west")


@pytest.fixture
def us(fleet: Fleet) -> Member:
    return _known(fleet, "us-east")


def _known(fleet: Fleet, name: str) -> Member:
    """A region whose gateway could send to both: what happened to it before is over."""
    member = fleet.federation[name]
    until(lambda: _open(fleet, member) == set(REGIONS), 30.0)
    return member


def _open(fleet: Fleet, member: Member) -> set[str]:
    """The regions that its gateway would send to."""
    url = f"{member.gateway_url}/-/nearfield/status"
    answer = httpx.get(url, headers=fleet.headers("platform"))
    if answer.status_code == 401:  # the key is a second old
        return set()
    told = answer.raise_for_status().json()
    return {
        region["name"]
        for region in told["regions"]
        for endpoint in region["endpoints"]
        if region["health"] == endpoint["health"] == "up"
        and not region["draining"]
        and not endpoint["draining"]
        and endpoint["replicas"]
    }


def running(member: Member) -> Region:
    region = member.region
    assert region is not None
    return region


def replicas(fleet: Fleet, member: Member) -> int:
    """How many its gateway would send to."""
    url = f"{member.gateway_url}/-/nearfield/status"
    told = httpx.get(url, headers=fleet.headers("platform")).raise_for_status().json()
    (home,) = [each for each in told["regions"] if each["name"] == member.name]
    (endpoint,) = [each for each in home["endpoints"] if each["model"] == MODEL]
    return int(endpoint["replicas"])


def ready(member: Member) -> int:
    """How many Serve says are running."""
    app = running(member).api.details()["applications"][MODEL]
    (deployment,) = app["deployments"].values()
    return sum(each["state"] == "RUNNING" for each in deployment["replicas"])


def test_replicas_that_come_and_go_are_known_within_a_second(fleet: Fleet, eu: Member) -> None:
    region = running(eu)
    with Load(fleet, eu) as load:
        deploy.apply(region, config(replicas=2)["applications"])
        until(lambda: ready(eu) == 2)
        seen_s = time.monotonic()
        until(lambda: replicas(fleet, eu) == 2)
        assert time.monotonic() - seen_s < 1.0
        load.more()
        deploy.apply(region, config(replicas=1)["applications"])
        until(lambda: ready(eu) == 1)
        seen_s = time.monotonic()
        until(lambda: replicas(fleet, eu) == 1)
        assert time.monotonic() - seen_s < 1.0
        load.more()
    assert load.failed == []


def test_a_restart_refuses_nobody(fleet: Fleet, eu: Member) -> None:
    before = eu.gateway.told
    assert before is not None
    with Load(fleet, eu) as load:
        told = run_json(fleet.home, "gateway", str(eu.gateway.file), "--restart")
        load.more()
    assert load.failed == []
    assert told["generation"] == before.generation + 1
    assert set(told["workers"]).isdisjoint(before.workers)
    file = eu.gateway.file.read_text()
    eu.gateway.file.write_text(file.replace("listen:", "listn:"))
    try:
        refused = run(fleet.home, "gateway", str(eu.gateway.file), "--restart")
    finally:
        eu.gateway.file.write_text(file)
    assert refused.returncode == 2
    assert "did you mean listen?" in refused.stderr


def test_another_process_takes_over_and_refuses_nobody(fleet: Fleet, us: Member) -> None:
    before = us.gateway.told
    assert before is not None
    with Load(fleet, us) as load:
        new = Terminal(fleet.home, "gateway", str(us.gateway.file), "--take-over")
        new.wait_for(" ready: ", 30.0)
        until(lambda: processes.identify(before.pid) is None)
        load.more()
    assert load.failed == []
    after = us.gateway.told
    assert after is not None
    assert (after.pid, after.url) == (new.process.pid, before.url)


def test_a_region_that_is_killed_fails_nobody_who_may_go_elsewhere(
    fleet: Fleet, eu: Member, us: Member
) -> None:
    """Its gateway lives; its only replica and everything else go. The last test: it stays so."""
    cluster = processes.of_region(running(eu).state.region_id)
    with Load(fleet, eu, us, clients=4) as load:
        for process in cluster:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        load.more(100)
    assert load.failed == []
    for member in (eu, us):
        refused = httpx.post(
            f"{member.gateway_url}/v1/completions",
            json={"model": MODEL, "prompt": "say:nowhere"},
            headers=fleet.headers("eu"),
        )
        assert refused.status_code == 503, refused.text
        assert int(refused.headers["retry-after"]) >= 1
