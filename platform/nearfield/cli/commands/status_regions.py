"""What `nearfield status` shows of several regions."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click
from nearfield.cli import models as listing
from nearfield.cli import processes
from nearfield.cli.main import EXIT_FAILED
from nearfield.cli.output import duration, failed, print_json, print_table
from nearfield.core.errors import Unavailable

if TYPE_CHECKING:
    from nearfield.cli.federation import Federation, Member

_MIB = 2**20


def show(federation: Federation, *, as_json: bool) -> int:
    """Exit code 1 if a region or gateway is not there, or a model has failed."""
    found = [about(member) for member in federation]
    if as_json:
        print_json(
            {
                "federation": {
                    "directory": str(federation.folder),
                    "passport_keys": str(federation.passport_keys),
                    "store": federation.store,
                    "owner_pid": federation.owner.pid if federation.owner else None,
                    "uptime_s": round(time.time() - federation.started_unix_s, 1),
                    "memory_bytes": _sum(found),
                    "regions": found,
                }
            }
        )
    else:
        _print(federation, found)
    troubles = [sentence for each in found for sentence in _troubles(each)]
    for sentence in troubles:
        failed(sentence)
    return EXIT_FAILED if troubles else 0


def about(member: Member) -> dict[str, Any]:
    """A region and its gateway, as JSON."""
    region = member.region
    condition = member.region_condition()
    members = [] if region is None else processes.of_region(region.state.region_id)
    models, reason = [], None
    if region is not None and condition == "running":
        try:
            models = [model.to_json() for model in listing.listed(region)]
        except Unavailable as error:
            reason = error.message
    return {
        "name": member.name,
        "jurisdiction": member.jurisdiction,
        "city": member.city,
        "state": condition,
        "reason": reason,
        "endpoint": None if region is None else region.base_url,
        "directory": str(member.root),
        "processes": len(members),
        "memory_bytes": processes.memory_bytes(members),
        "models": models,
        "gateway": about_gateway(member),
    }


def about_gateway(member: Member) -> dict[str, Any]:
    """A region's gateway, as JSON."""
    told, found = member.gateway.told, member.gateway.processes()
    return {
        "endpoint": member.gateway_url,
        "grpc": member.grpc,
        "console": f"{member.gateway_url}/console",
        "state": member.gateway_condition(),
        "file": str(member.gateway.file),
        "log": str(member.gateway.log),
        "pid": told.pid if told else None,
        "workers": list(told.workers) if told else [],
        "generation": told.generation if told else None,
        "trouble": told.trouble if told else None,
        "processes": len(found),
        "memory_bytes": processes.memory_bytes(found),
    }


def _print(federation: Federation, found: list[dict[str, Any]]) -> None:
    total = _sum(found)
    memory = "" if total is None else f", {total / _MIB:.0f} MiB"
    uptime = duration(time.time() - federation.started_unix_s)
    click.echo(f"{len(found)} regions, up {uptime}{memory}")
    click.echo(f"Files and logs of the gateways: {federation.folder / 'gateways'}")
    click.echo()
    headers = ("REGION", "LAW", "STATE", "MODELS", "MEMORY", "GATEWAY", "gRPC", "STATE", "MEMORY")
    print_table(headers, [_cells(each) for each in found])
    click.echo("\nMore of one: nearfield status --region " + federation.names[0])


def _cells(each: dict[str, Any]) -> tuple[str, ...]:
    models, gateway = each["models"], each["gateway"]
    known = [model for model in models if model["model"] is not None]
    running = sum(model["state"] == "running" for model in known)
    return (
        each["name"],
        each["jurisdiction"],
        each["state"],
        f"{running}/{len(known)}",
        _mib(each["memory_bytes"]),
        gateway["endpoint"],
        gateway["grpc"],
        gateway["state"],
        _mib(gateway["memory_bytes"]),
    )


def _troubles(each: dict[str, Any]) -> list[str]:
    name, gateway = each["name"], each["gateway"]
    found = []
    if each["state"] == "died":
        found.append(f"{name}: Ray has died; the other regions go on without it")
    if each["reason"] is not None:
        found.append(f"{name}: {each['reason']}")
    if gateway["state"] == "died" or (gateway["state"] == "ended" and each["state"] != "ended"):
        found.append(
            f"{name}: its gateway has {gateway['state']}. Start it again with: nearfield gateway "
            f"{gateway['file']}"
        )
    if gateway["trouble"] is not None:
        found.append(f"{name}: its gateway was not restarted: {gateway['trouble']}")
    found += [
        f"{name}/{model['application']}: {model['reason']}"
        for model in each["models"]
        if model["reason"]
    ]
    return found


def _sum(found: list[dict[str, Any]]) -> int | None:
    parts = [part for each in found for part in (each, each["gateway"])]
    sizes = [part["memory_bytes"] for part in parts]
    return None if None in sizes else sum(sizes)


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / _MIB:.0f} MiB"
