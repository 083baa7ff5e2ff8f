"""Where a gateway stands, and the regions it may send to: what its files say."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from nearfield.api.passport import PassportKeys
from nearfield.core.errors import BadRequest
from nearfield.core.federation import GatewayFile, RegionFile
from nearfield.edge.proxy.ports import Target


@dataclass(frozen=True, slots=True)
class Site:
    """Where a gateway stands, and the regions it may send to.

    Attributes:
        gateway: its name. home: the region it stands in; None: an edge site.
        serve: home's own ingress. regions: all of them, home included.
        passports: what signs its questions and grants; None: nobody asks for passports.
        last_good: a file for what is known, so that it can start while others are silent.
        tls: how gateways with https are trusted; None: as this machine trusts.
    """

    gateway: str
    jurisdiction: str
    home: str | None
    serve: str | None
    regions: tuple[RegionFile, ...]
    passports: PassportKeys | None = None
    last_good: Path | None = None
    tls: ssl.SSLContext | None = None

    @classmethod
    def of(
        cls,
        gateway: GatewayFile,
        regions: Sequence[RegionFile],
        *,
        passports: PassportKeys | None = None,
        last_good: Path | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> Self:
        """From a gateway file and the region files it names.

        Raises:
            BadRequest: a region is there twice, or home is not among them.
        """
        names = [each.region for each in regions]
        if twice := {name for name in names if names.count(name) > 1}:
            raise BadRequest(f"The region {min(twice)!r} is listed twice.", param="regions")
        home = gateway.home
        if home is not None and home.region not in names:
            raise BadRequest(
                f"The home region {home.region!r} is not among the regions: add its file.",
                param="home.region",
            )
        by_name = dict(zip(names, regions, strict=True))
        own = None if home is None else by_name[home.region].jurisdiction
        return cls(
            gateway.gateway,
            gateway.jurisdiction or own or "",
            None if home is None else home.region,
            None if home is None else home.serve,
            tuple(regions),
            passports,
            last_good,
            tls,
        )


def target_of(url: str, tls: ssl.SSLContext | None = None) -> Target:
    """Where `http://host:port` or `https://host` is.

    Raises:
        BadRequest: it is no such URL.
    """
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = 0
    if parts.scheme not in ("http", "https") or parts.hostname is None or port == 0:
        raise BadRequest(f"{url} is not http://host:port or https://host:port.")
    if parts.scheme == "http":
        return Target(parts.hostname, port or 80)
    return Target(parts.hostname, port or 443, tls=tls or ssl.create_default_context())
