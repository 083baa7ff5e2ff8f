"""`nearfield status` and `nearfield models`."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from nearfield.cli.main import EXIT_FAILED
from nearfield.cli.output import (
    duration,
    failed,
    home,
    json_option,
    names_one,
    print_json,
    print_table,
    region_named,
    region_option,
)

if TYPE_CHECKING:
    from nearfield.api.scaling import ModelScaling
    from nearfield.cli.members import Member
    from nearfield.cli.models import Model
    from nearfield.cli.region import Region


@click.command
@region_option
@json_option
def models(root: Path, as_json: bool) -> int:
    """List the models of the region.

    \b
    nearfield models
    nearfield models --region us-east      of one of several
    nearfield models --json | jq -r '.models[] | select(.state == "running") | .endpoint'
    """
    from nearfield.cli import models as listing
    from nearfield.cli import region

    found = listing.listed(region.find(root))
    if as_json:
        print_json({"models": [model.to_json() for model in found]})
    else:
        _print_models(found)
    return 0


@click.command
@region_option
@json_option
def status(root: Path, as_json: bool) -> int:
    """Show the region: where it answers, its models, why one is not ready, why it scaled so.

    Where several run, all of them with their gateways; or one.

    \b
    nearfield status
    nearfield status --region us-east
    nearfield status --json | jq .region.endpoint
    nearfield status --json | jq -r '.federation.regions[].gateway.endpoint'

    Exit code 1 if no region runs, or one has died, or its gateway has, or a model has failed.
    """
    from nearfield.cli import federation as federations
    from nearfield.cli import region

    several = federations.read(home())
    if several is not None and not names_one() and region.read(root) is None:
        from nearfield.cli.commands.status_regions import show

        return show(several, as_json=as_json)
    name = region_named()
    member = several[name] if several is not None and name in several.names else None
    gateway = None if member is None else _gateway(member)
    return _show_one(root, as_json=as_json, gateway=gateway)


def _gateway(member: Member) -> dict[str, Any]:
    from nearfield.cli.commands.status_regions import about_gateway

    return about_gateway(member)


def _show_one(root: Path, *, as_json: bool, gateway: dict[str, Any] | None) -> int:
    from nearfield.cli import models as listing
    from nearfield.cli import processes, region

    running = region.find(root)
    found = listing.listed(running)
    scaling = _scaling(running, [model.application for model in found if model.scaled])
    members = processes.of_region(running.state.region_id)
    memory_bytes = processes.memory_bytes(members)
    uptime_s = time.time() - running.state.started_unix_s
    if as_json:
        about: dict[str, Any] = {
            "endpoint": running.base_url,
            "dashboard": running.dashboard_url,
            "ingress": running.state.ingress,
            "directory": str(running.root),
            "token_file": str(running.token_file),
            "logs": str(running.logs_dir),
            "owner_pid": running.state.owner.pid if running.state.owner else None,
            "uptime_s": round(uptime_s, 1),
            "processes": len(members),
            "memory_bytes": memory_bytes,
        }
        document = {
            "region": about,
            "models": [model.to_json() for model in found],
            "scaling": [model.shown() for model in scaling],
        }
        print_json(document if gateway is None else {**document, "gateway": gateway})
    else:
        memory = "" if memory_bytes is None else f", {memory_bytes / 2**20:.0f} MiB"
        click.echo(
            f"Region at {click.style(running.base_url, bold=True)} ({running.state.ingress} "
            f"ingress), up {duration(uptime_s)}, {len(members)} processes{memory}"
        )
        if gateway is not None:
            click.echo(
                f"Gateway at {click.style(gateway['endpoint'], bold=True)}, gRPC "
                f"{gateway['grpc']}: {gateway['state']}. Console: {gateway['console']}"
            )
        click.echo(f"Logs: {running.logs_dir}")
        click.echo(
            f"Serve's own view: RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={running.token_file} "
            f"serve status -a {running.dashboard_url}"
        )
        click.echo()
        _print_models(found)
        _print_scaling(scaling)
    for model in found:
        if model.reason:
            failed(f"{model.application}: {model.reason}")
    return EXIT_FAILED if any(model.state == "failed" for model in found) else 0


def _print_models(found: Sequence[Model]) -> None:
    if not found:
        click.echo("No models yet. Add one with: nearfield serve FILE")
        return
    headers = ("MODEL", "VERSION", "ENGINE", "SOURCE", "REPLICAS", "STATE", "ENDPOINT")
    print_table(headers, [model.cells() for model in found])


def _scaling(running: Region, applications: Sequence[str]) -> Sequence[ModelScaling]:
    """The last decisions for these applications; none where the head does not answer."""
    if not applications:
        return ()
    # Ray is told with whom it talks by its environment.
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(running.token_file)}
    from nearfield.control.scaling import Decisions

    try:
        return Decisions(running.gcs_address).read(applications)
    except RuntimeError as error:
        failed(f"how the models were scaled is not known: {error}")
        return ()


def _print_scaling(scaling: Sequence[ModelScaling]) -> None:
    if not scaling:
        return
    now_s = time.time()
    rows = [
        (model.model, pool.pool, str(pool.replicas), duration(now_s - pool.since_s), pool.reason)
        for model in scaling
        for pool in model.pools
    ]
    click.echo()
    print_table(("SCALED", "POOL", "TO", "SINCE", "WHY"), rows)
