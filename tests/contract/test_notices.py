"""Interruption notices of the clouds, against a local server that plays their metadata servers."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from nearfield.serving.notices import PROVIDERS, Notice, ProviderName, watch

from tests.support.metadata import AWS, AZURE_EVENTS, AZURE_NAME, GCP, Metadata, metadata_server
from tests.support.processes import until


@pytest.fixture
def server() -> Iterator[str]:
    with metadata_server() as url:
        yield url


def look(cloud: ProviderName, server: str) -> Notice | None:
    with httpx.Client(base_url=server) as client:
        return PROVIDERS[cloud]().look(client)


def test_gcp(server: str) -> None:
    Metadata.answers[GCP] = "FALSE"
    assert look("gcp", server) is None
    Metadata.answers[GCP] = "TRUE"
    notice = look("gcp", server)
    assert notice is not None
    assert 29 < notice.due_s - time.time() <= 30


def test_aws_and_a_token_that_runs_out(server: str) -> None:
    provider = PROVIDERS["aws"]()
    with httpx.Client(base_url=server) as client:
        assert provider.look(client) is None
        Metadata.token = "two"
        Metadata.answers[AWS] = json.dumps({"action": "terminate", "time": "2030-09-18T08:22:00Z"})
        assert provider.look(client) == Notice(1915950120.0, "terminate")


def test_azure_tells_of_all_machines_of_a_set(server: str) -> None:
    Metadata.answers[AZURE_NAME] = "mine"

    def events(*resources: str, kind: str = "Preempt") -> str:
        event = {"EventType": kind, "Resources": resources, "EventStatus": "Scheduled"}
        return json.dumps({"Events": [{**event, "NotBefore": "Wed, 18 Sep 2030 08:22:00 GMT"}]})

    Metadata.answers[AZURE_EVENTS] = events("other")
    assert look("azure", server) is None
    Metadata.answers[AZURE_EVENTS] = events("other", "mine", kind="Reboot")
    assert look("azure", server) is None
    Metadata.answers[AZURE_EVENTS] = events("other", "mine")
    assert look("azure", server) == Notice(1915950120.0, "preempt")


def test_watching_outlives_a_silent_server_and_a_silent_head(
    server: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The node is drained once the head takes it; trouble is told once."""
    drained = list[tuple[float, str]]()
    tries = list[float]()

    def drain(due_s: float, words: str) -> None:
        tries.append(due_s)
        if len(tries) == 1:
            raise RuntimeError("the head does not answer")
        drained.append((due_s, words))

    watching = threading.Thread(
        target=watch, args=(PROVIDERS["gcp"](), drain), kwargs={"url": server}
    )
    watching.start()
    until(lambda: len(Metadata.asked) >= 3)
    assert sum("does not say" in line for line in caplog.messages) == 1
    assert not drained
    Metadata.answers[GCP] = "TRUE"
    watching.join(timeout=10)
    assert drained == [(tries[0], "preempted")]
