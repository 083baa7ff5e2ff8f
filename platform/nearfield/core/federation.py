"""Region and gateway files: where regions are, whose law holds there, and how gateways find them.

    region: eu-west                       gateway: eu-west
    jurisdiction: eu                      home: {region: eu-west, serve: http://127.0.0.1:8000}
    city: Dublin                          regions: [../regions/eu-west.yaml]
    location: {latitude: 53.3, ...}       listen: {port: 8080}

Both are strict: a key they do not know is an error.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from nearfield.core.spec import Name, Strict
from pydantic import Field, model_validator

HTTP_URL = r"^https?://[^\s@#?/]+(?::\d{1,5})?$"
"""Scheme, host and perhaps a port: no path, no user, no query."""

Port = Annotated[int, Field(ge=0, le=65535)]
Url = Annotated[str, Field(pattern=HTTP_URL)]


class Location(Strict):
    """A place on earth, degrees."""

    latitude: float = Field(ge=-90, le=90)
    longitude: float = Field(ge=-180, le=180)


class RegionFile(Strict):
    """One region: a Ray cluster with Serve.

    `jurisdiction` is where its data stays; callers that are bound to one never leave it.
    """

    region: Name
    jurisdiction: Name
    city: str = Field(min_length=1, max_length=100)
    location: Location
    gateway_url: Url | None = Field(None, description="where other gateways find this region's")
    models: list[str] = Field(
        [], description="model files that `nearfield up` runs there; relative to this file"
    )


class Tls(Strict):
    """PEM files; read again when they change."""

    certificate: str = Field(min_length=1)
    key: str = Field(min_length=1)


class Listen(Strict):
    """Where a gateway listens. Port 0: any free one."""

    host: str = "127.0.0.1"
    port: Port = 8080
    grpc_port: Port | None = Field(None, description="Open Inference over gRPC; absent: none")
    tls: Tls | None = None


class Home(Strict):
    """The region a gateway stands in: it sends to that region's replicas directly."""

    region: Name
    serve: Url = Field(description="the region's own ingress, where its agent answers")


class GatewayFile(Strict):
    """One gateway. Without `home` it is an edge site: no replicas of its own, only ways."""

    gateway: Name
    jurisdiction: Name | None = Field(None, description="of an edge site; else its region's")
    city: str | None = Field(
        None, min_length=1, max_length=100, description="of an edge site, for the console's map"
    )
    location: Location | None = Field(None, description="likewise; else its region's")
    home: Home | None = None
    regions: list[str] = Field(min_length=1, description="region files, relative to this one")
    listen: Listen = Listen()
    store: str | None = Field(
        None, description="URL of the database of keys and usage; absent: anybody may call"
    )
    passport_keys: str | None = Field(None, description="file of the keys that sign passports")
    console: Literal["local", "anybody"] = Field(
        "local",
        description="who sees the console's data where there is no store: this machine's own users",
    )

    @model_validator(mode="after")
    def _edge_has_a_jurisdiction(self) -> Self:
        if self.home is None and self.jurisdiction is None:
            raise ValueError(
                "jurisdiction is missing: an edge site, which has no home, names its own"
            )
        if self.store is not None and self.passport_keys is None:
            raise ValueError("passport_keys is missing: regions trust no gateway without them")
        return self
