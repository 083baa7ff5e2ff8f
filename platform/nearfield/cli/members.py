"""Regions that were started together and their gateways: what is known of them, from any process.

See `federation`, which starts and ends them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import httpx
from nearfield.api.signing import write_private
from nearfield.cli import processes
from nearfield.cli import region as regions
from nearfield.cli.bring_up import Started
from nearfield.cli.gateways import GatewayProcess
from nearfield.cli.ports import Reservations
from nearfield.cli.probe import Answer
from nearfield.cli.processes import Process
from nearfield.cli.region import Region
from nearfield.core.errors import Conflict, NotFound

_STATE_VERSION = 1
_STATUS_TIMEOUT_S = 5.0

Condition = Literal["running", "ended", "died"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a member's start.

    Attributes:
        models: its applications, without the agent.
        answers: what its gateway answered, one for each model that is ready.
        failure: why the region or its gateway is not there; None if both are.
    """

    models: tuple[Started, ...] = ()
    answers: tuple[Answer, ...] = ()
    failure: str | None = None

    @property
    def ready(self) -> bool:
        return self.failure is None and all(each.ready for each in self.models)


@dataclass(frozen=True, slots=True)
class Member:
    """A region of a federation, and its gateway.

    Attributes:
        root: the region's directory. grpc: host:port of the gateway.
    """

    name: str
    jurisdiction: str
    city: str
    root: Path
    gateway: GatewayProcess
    gateway_url: str
    grpc: str

    @property
    def region(self) -> Region | None:
        """Its cluster; None if it has been ended, or never was."""
        return regions.read(self.root)

    def region_condition(self) -> Condition:
        region = self.region
        if region is None:
            return "ended"
        return "running" if processes.of_region(region.state.region_id) else "died"

    def gateway_condition(self) -> Condition:
        if self.gateway.told is not None:
            return "running"
        return "died" if self.gateway.died else "ended"

    def knows(self, names: Sequence[str], *, key: str | None = None) -> bool:
        """Whether its gateway believes that these regions are up, and their gateways there to stay.

        Args:
            key: of scope platform, where there is a store.
        """
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        try:
            with httpx.Client(trust_env=False, timeout=_STATUS_TIMEOUT_S) as client:
                told = client.get(f"{self.gateway_url}/-/nearfield/status", headers=headers)
        except httpx.TransportError:
            return False
        if not told.is_success:
            return False
        believed = told.json()["regions"]
        up = {e["name"] for e in believed if e["health"] == "up" and not e["draining"]}
        return up >= set(names)


@dataclass(frozen=True, slots=True)
class Federation:
    """Regions that were started together.

    Attributes:
        owner: the process that will end it; None if detached. ending: it is being ended.
        outcomes: by region, where this process has started it.
        reservations: the gateways' ports, held by the process that starts it.
    """

    home: Path
    members: tuple[Member, ...]
    store: str | None
    owner: Process | None
    started_unix_s: float
    ending: bool = False
    outcomes: Mapping[str, Outcome] = field(default_factory=dict, compare=False)
    reservations: Reservations = field(default_factory=Reservations, compare=False)

    def __getitem__(self, name: str) -> Member:
        """
        Raises:
            NotFound: it has no such region.
        """
        for member in self.members:
            if member.name == name:
                return member
        raise NotFound(f"There is no region {name!r} here: {', '.join(self.names)}.")

    def __iter__(self) -> Iterator[Member]:
        return iter(self.members)

    @property
    def names(self) -> list[str]:
        return [member.name for member in self.members]

    @property
    def folder(self) -> Path:
        return folder_of(self.home)

    @property
    def passport_keys(self) -> Path:
        """The secrets that all regions and gateways share."""
        return self.folder / "passports.json"


def folder_of(home: Path) -> Path:
    return home / "federation"


def read(home: Path) -> Federation | None:
    """The federation that `home` tells of, running or not."""
    path = folder_of(home) / "federation.json"
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    if data.get("version") != _STATE_VERSION:
        raise Conflict(
            f"{path} was written by another version of nearfield; stop those regions with the "
            "version that started them"
        )
    owner = Process(**data["owner"]) if data["owner"] else None
    members = tuple(member_of(home, **each) for each in data["members"])
    started_unix_s, ending = data["started_unix_s"], data["ending"]
    return Federation(home, members, data["store"], owner, started_unix_s, ending)


def find(home: Path) -> Federation:
    """The federation that runs.

    Raises:
        NotFound: none does.
    """
    federation = read(home)
    if federation is None:
        raise NotFound(
            "No regions run here. Start some with: nearfield up --regions eu-west,us-east",
            code="federation_not_running",
        )
    return federation


def member_of(
    home: Path, *, name: str, jurisdiction: str, city: str, marker: str, url: str, grpc: str
) -> Member:
    files = folder_of(home) / "gateways"
    gateway = GatewayProcess(
        name, files / f"{name}.yaml", home / "gateways" / name, files / f"{name}.log", marker
    )
    return Member(name, jurisdiction, city, home / "regions" / name, gateway, url, grpc)


def write(federation: Federation) -> None:
    members = [
        {
            "name": member.name,
            "jurisdiction": member.jurisdiction,
            "city": member.city,
            "marker": member.gateway.marker,
            "url": member.gateway_url,
            "grpc": member.grpc,
        }
        for member in federation
    ]
    owner = None if federation.owner is None else asdict(federation.owner)
    data = {
        "version": _STATE_VERSION,
        "store": federation.store,
        "owner": owner,
        "started_unix_s": federation.started_unix_s,
        "ending": federation.ending,
        "members": members,
    }
    write_private(federation.folder / "federation.json", json.dumps(data, indent=2).encode())
