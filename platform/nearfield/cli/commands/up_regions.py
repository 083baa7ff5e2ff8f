"""What `nearfield up --regions` does: several regions and gateways, from nothing to answers."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from nearfield.cli import federation as federations
from nearfield.cli import region_files
from nearfield.cli.applications import applications, serve_options
from nearfield.cli.commands.common import answered, checked, show_examples, stop
from nearfield.cli.federation import Federation, Member, Options, Plan
from nearfield.cli.main import EXIT_FAILED, EXIT_INTERRUPTED
from nearfield.cli.output import Progress, failed, print_json
from nearfield.cli.snippets import examples
from nearfield.core.errors import BadRequest

if TYPE_CHECKING:
    from nearfield.cli.config_files import ConfigFile

_WATCH_S = 2.0


def plans(names: Sequence[str], files: Sequence[str]) -> list[Plan]:
    """What to start, from the command line; prints what is wrong with model files.

    Args:
        names: of packaged region files, or paths. files: models for every region instead of those
            that the region files name.

    Raises:
        BadRequest: something is wrong with a file, or a region is named twice.
    """
    read: dict[tuple[str, ...], list[ConfigFile]] = {}
    found: list[Plan] = []
    for given in names:
        path, region = region_files.read(given)
        if region.region in {plan.file.region for plan in found}:
            raise BadRequest(f"--regions names the region {region.region} twice.", param="regions")
        models = tuple(files or map(str, region_files.models_of(path, region)))
        if not models:
            raise BadRequest(
                f"{path} names no models: add models: [mine.yaml] to it, or give files for all "
                "regions: nearfield up --regions … mine.yaml",
                param="models",
            )
        if models not in read:
            read[models] = checked(models)
        apps = applications(read[models], os.environ.get("PYTHONPATH", ""))
        found.append(Plan(region, apps, serve_options(read[models])))
    return found


def run(
    home: Path, wanted: Sequence[Plan], options: Options, progress: Progress, *, as_json: bool
) -> int:
    """Start them, show what came of it, and stay until they end; returns the exit code."""
    if options.store is not None:
        _prepare_store(options.store)
    federation = federations.start(home, wanted, options, progress)
    ours_to_end = True
    code = EXIT_INTERRUPTED
    try:
        outcomes = federation.outcomes
        code = 0 if all(each.ready for each in outcomes.values()) else EXIT_FAILED
        _show(federation, progress, as_json=as_json)
        if all(each.failure is not None for each in outcomes.values()):
            progress("no region is ready, so there is nothing to stay for")
        elif options.detached:
            ours_to_end = False
        else:
            if not as_json:
                click.echo("\nCtrl-C ends all regions and gateways.")
            if _watch(federation):
                progress("ended by nearfield down")
                ours_to_end = False
            else:
                failed("no region is left")
                code = EXIT_FAILED
    except KeyboardInterrupt:
        click.echo(err=as_json)
    finally:
        if ours_to_end:
            end = partial(federations.end, federation)
            stop(end, progress, "what was accepted is finished")
    return code


def _prepare_store(url: str) -> None:
    """So that gateways find tables and pepper there, and do not all make them at once."""
    from nearfield.cli.commands.store import opened

    with opened(url) as store:
        store.tenants()


def _show(federation: Federation, progress: Progress, *, as_json: bool) -> None:
    for name, outcome in federation.outcomes.items():
        if outcome.failure is not None:
            failed(f"{name}: {outcome.failure}")
        for model in outcome.models:
            if model.reason is not None:
                failed(f"{name}/{model.name}: {model.reason}")
        for answer in outcome.answers:
            if answer.error is None:
                progress(f"{name}: {answered(answer)}")
    if as_json:
        print_json(_document(federation, progress))
        return
    there = [each for each in federation if federation.outcomes[each.name].failure is None]
    if there:
        _show_endpoints(federation, there)


def _show_endpoints(federation: Federation, there: Sequence[Member]) -> None:
    click.echo("\nEach gateway serves all models of all regions; the nearest answers:")
    for member in there:
        url = click.style(f"{member.gateway_url}/v1", bold=True)
        click.echo(f"  {url}  {member.name} ({member.jurisdiction}), gRPC {member.grpc}")
    click.echo("\nConsoles:")
    for member in there:
        click.echo(f"  {member.gateway_url}/console")
    if federation.store is not None:
        click.echo(_KEYS.format(store=federation.store))
    outcome = federation.outcomes[there[0].name]
    specs = [each.spec for each in outcome.models if each.ready and each.spec is not None]
    url, keyed = there[0].gateway_url, federation.store is not None
    shown = examples([(url, spec) for spec in specs], keyed=keyed)
    if specs and not keyed:
        why = f"nearfield route {specs[0].model} --from Nairobi --explain --gateway {url}"
        shown.append(("where a request would go, and why", why))
    show_examples(shown)


_KEYS = """
The gateways take nobody without a key. Make a tenant and a key:
  nearfield tenants create acme --jurisdiction eu --store {store}
  export OPENAI_API_KEY=$(nearfield keys create --tenant acme --store {store})"""


def _document(federation: Federation, progress: Progress) -> dict[str, Any]:
    return {
        "seconds": round(progress.elapsed_s, 1),
        "passport_keys": str(federation.passport_keys),
        "store": federation.store,
        "regions": [
            {
                "name": member.name,
                "jurisdiction": member.jurisdiction,
                "endpoint": member.gateway_url,
                "grpc": member.grpc,
                "console": f"{member.gateway_url}/console",
                "directory": str(member.root),
                "gateway_file": str(member.gateway.file),
                "ready": federation.outcomes[member.name].ready,
                "reason": federation.outcomes[member.name].failure,
                "models": [each.to_json() for each in federation.outcomes[member.name].models],
                "answers": {
                    each.model: each.text for each in federation.outcomes[member.name].answers
                },
            }
            for member in federation
        ],
    }


def _watch(federation: Federation) -> bool:
    """Stay as long as a region does, and say what happens to each.

    Returns:
        True: `nearfield down` ended them. False: they died.
    """
    never = threading.Event()
    gone = {name for name, each in federation.outcomes.items() if each.failure is not None}
    silent = set(gone)
    while True:
        never.wait(_WATCH_S)
        current = federations.read(federation.home)
        if current is None:
            return True
        if current.ending:
            continue
        for member in federation:
            if member.name not in gone and member.region_condition() != "running":
                never.wait(_WATCH_S)  # `nearfield down` ends the processes first, forgets it then
                gone.add(member.name)
                _tell_region(member)
            if member.name not in silent and member.gateway_condition() != "running":
                silent.add(member.name)
                if member.name not in gone:
                    _tell_gateway(member)
            elif member.gateway_condition() == "running":
                silent.discard(member.name)  # somebody has started it again
        if gone >= set(federation.names):
            return False


def _tell_region(member: Member) -> None:
    if member.region_condition() == "ended":
        failed(f"{member.name}: ended by nearfield down; the other regions go on")
        return
    region = member.region
    logs = "" if region is None else f" Its logs: {region.logs_dir}"
    failed(
        f"{member.name}: Ray has died, all processes of the region are gone; the gateways send its "
        f"requests elsewhere.{logs}"
    )


def _tell_gateway(member: Member) -> None:
    failed(
        f"{member.name}: its gateway has {member.gateway_condition()}; the others go on. "
        f"Start it again with: nearfield gateway {member.gateway.file}"
    )
