"""The clouds' interruption notices, passed on to Ray: runs beside a raylet on a spot machine.

A cloud tells only the machine itself that it will take it back, at an address that nobody else can
reach. What is found there drains the machine's node in Ray, with the deadline; everything else
follows from that (`serving.departure`, the scaling policy, Serve's own migration).

    GCP     computeMetadata/v1/instance/preempted      TRUE; 30 s are left
    AWS     latest/meta-data/spot/instance-action      says when; two minutes are left. IMDSv2
    Azure   metadata/scheduledevents                   says when, of which machines; 30 s or more
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Final, Literal, NamedTuple, Protocol

import httpx

log = logging.getLogger("nearfield.notices")

ProviderName = Literal["gcp", "aws", "azure"]
TIMEOUT_S = 2.0
SHORTEST_S = 30.0
"""What GCP and Azure promise between a notice and the end."""
AGAIN_S = 0.5
"""Between attempts to tell Ray."""
_TOKEN_S = 21_600


class Notice(NamedTuple):
    """The machine will be gone at `due_s`, Unix time. `words`: what the cloud says."""

    due_s: float
    words: str


class Provider(Protocol):
    """One cloud's way to say it.

    Attributes:
        url: of its metadata server. poll_s: between questions.
    """

    url: str
    poll_s: float

    def look(self, client: httpx.Client) -> Notice | None:
        """The notice, if there is one.

        Raises:
            httpx.HTTPError, ValueError: the server does not answer, or says what nobody expects.
        """


class Gcp:
    """Google Compute Engine, GKE. https://cloud.google.com/compute/docs/instances/spot"""

    url = "http://metadata.google.internal"
    poll_s = 0.25

    def look(self, client: httpx.Client) -> Notice | None:
        path = "/computeMetadata/v1/instance/preempted"
        answer = client.get(path, headers={"Metadata-Flavor": "Google"}).raise_for_status()
        if answer.text.strip() != "TRUE":
            return None
        return Notice(time.time() + SHORTEST_S, "preempted")


class Aws:
    """EC2, EKS. https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html"""

    url = "http://169.254.169.254"
    poll_s = 0.25

    def __init__(self) -> None:
        self._token = ""

    def look(self, client: httpx.Client) -> Notice | None:
        answer = self._ask(client)
        if answer.status_code == 401:  # the token has run out
            self._token = ""
            answer = self._ask(client)
        if answer.status_code == 404:
            return None
        action = answer.raise_for_status().json()
        return Notice(datetime.fromisoformat(action["time"]).timestamp(), str(action["action"]))

    def _ask(self, client: httpx.Client) -> httpx.Response:
        if not self._token:
            headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_S)}
            self._token = client.put("/latest/api/token", headers=headers).raise_for_status().text
        path = "/latest/meta-data/spot/instance-action"
        return client.get(path, headers={"X-aws-ec2-metadata-token": self._token})


class Azure:
    """Azure, AKS. https://learn.microsoft.com/azure/virtual-machines/linux/scheduled-events"""

    url = "http://169.254.169.254"
    poll_s = 1.0  # what its documentation recommends

    def __init__(self) -> None:
        self._name = ""

    def look(self, client: httpx.Client) -> Notice | None:
        headers = {"Metadata": "true"}
        if not self._name:
            path = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
            self._name = client.get(path, headers=headers).raise_for_status().text.strip()
        path = "/metadata/scheduledevents?api-version=2020-07-01"
        for event in client.get(path, headers=headers).raise_for_status().json()["Events"]:
            if event["EventType"] in ("Preempt", "Terminate") and self._name in event["Resources"]:
                before = event.get("NotBefore")
                due_s = parsedate_to_datetime(before).timestamp() if before else 0.0
                return Notice(max(due_s, time.time() + 1.0), str(event["EventType"]).lower())
        return None


PROVIDERS: Final[Mapping[ProviderName, Callable[[], Provider]]] = {
    "gcp": Gcp,
    "aws": Aws,
    "azure": Azure,
}


def watch(
    provider: Provider, drain: Callable[[float, str], None], *, url: str | None = None
) -> Notice:
    """Wait for the machine's notice and have its node drained. Returns when Ray has accepted that.

    Args:
        drain: tells Ray when (Unix time) and what the cloud says; raises RuntimeError if it cannot.
        url: of another metadata server than the provider's.
    """
    with httpx.Client(base_url=url or provider.url, timeout=TIMEOUT_S, trust_env=False) as client:
        notice = _wait(provider, client)
    log.warning("%s: gone in %.0f s. Draining the node", notice.words, notice.due_s - time.time())
    while True:
        try:
            drain(notice.due_s, notice.words)
        except RuntimeError as error:
            log.error("%s; trying again", error)
            time.sleep(AGAIN_S)
        else:
            return notice


def _wait(provider: Provider, client: httpx.Client) -> Notice:
    said = ""
    while True:
        try:
            notice, trouble = provider.look(client), ""
        except (httpx.HTTPError, ValueError, KeyError) as error:
            said_why = str(error).splitlines()[0]
            notice, trouble = None, f"the metadata server does not say: {said_why}"
        if notice is not None:
            return notice
        if trouble and trouble != said:
            log.warning("%s", trouble)  # once, and not every time
        said = trouble
        time.sleep(provider.poll_s)
