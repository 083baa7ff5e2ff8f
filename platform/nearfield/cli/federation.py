"""Several regions on this machine: Ray clusters side by side, each with a gateway of its own.

    <home>/regions/NAME/      a region, as `region` keeps it
    <home>/gateways/NAME/     its gateway's state, as the supervisor keeps it
    <home>/federation/        federation.json, passports.json (0600), and what the gateways are
                              started from: regions/NAME.yaml, gateways/NAME.yaml, gateways/NAME.log

    federation = start(home, plans, Options(), print)
    eu = federation["eu-west"]
    eu.gateway_url, eu.region.base_url, eu.gateway.told.workers, eu.gateway.processes()
    end(federation)

Nothing but these files ties them together: any region or gateway may be killed, and the others go
on. A gateway takes everybody unless there is a store; a region takes nobody without a passport.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from nearfield.api.load import AGENT_PREFIX
from nearfield.api.passport import PassportKeys
from nearfield.cli import bring_up, deploy, processes, ray_head
from nearfield.cli import region as regions
from nearfield.cli.members import (
    Federation,
    Member,
    Outcome,
    find,
    folder_of,
    member_of,
    read,
    write,
)
from nearfield.cli.ports import Reservations
from nearfield.cli.probe import ask
from nearfield.cli.region import Region, Report
from nearfield.core.errors import Conflict, NearfieldError, Unavailable
from nearfield.core.federation import RegionFile
from nearfield.core.serve_config import AGENT_BUILDER
from nearfield.core.settings import Settings

__all__ = ["Federation", "Member", "Options", "Outcome", "Plan", "end", "find", "read", "start"]

GATEWAY_PORT, GRPC_PORT = 8080, 9080
AGENT = {"name": "nearfield-agent", "route_prefix": AGENT_PREFIX, "import_path": AGENT_BUILDER}
DRAIN_TIMEOUT_S = regions.DRAIN_TIMEOUT_S
ACQUAINTED_S = 15.0
"""How long gateways may take to hear of all regions that run: two rounds of questions are usual."""
ASK_TIMEOUT_S = 30.0
AT_ONCE = max(1, (os.cpu_count() or 1) // 2)
"""Serves that start at the same time: each keeps more than a core busy."""
_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Plan:
    """A region to be.

    Attributes:
        file: what its region file says.
        applications: those of Serve configs. serve_options: their other top-level keys.
        environ: variables for its processes, besides those that close it.
    """

    file: RegionFile
    applications: Sequence[dict[str, Any]]
    serve_options: Mapping[str, Any] = field(default_factory=dict)
    environ: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Options:
    """How a federation is started.

    Attributes:
        host: where gateways listen; regions listen on this machine only.
        port, grpc_port, serve_port: wishes for the first gateway's and region's; the next free
            ones are taken.
        store: of keys and usage; None: anybody may call.
        workers: processes of each gateway.
        gateway: more keys for every gateway's file.
        num_cpus: what the models of one region may ask for, as in `RegionOptions`.
        detached: nobody owns it; else this process does.
    """

    host: str = "127.0.0.1"
    port: int = GATEWAY_PORT
    grpc_port: int = GRPC_PORT
    serve_port: int = regions.DEFAULT_PORT
    store: str | None = None
    workers: int = 1
    gateway: Mapping[str, Any] = field(default_factory=dict)
    ingress: ray_head.Ingress | None = None
    num_cpus: int | None = None
    detached: bool = False
    timeout_s: float = 600.0


# ---- begun ----------------------------------------------------------------------------------


def start(home: Path, plans: Sequence[Plan], options: Options, report: Report) -> Federation:
    """Start regions and gateways; returns once each has answered, or it is known why it does not.

    A region or gateway that does not start takes no other along: see `Federation.outcomes`.

    Raises:
        Conflict: regions run there already.
    """
    folder = folder_of(home)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with regions.locked(folder / "start.lock", wait=False):
        _make_room(home, report)
        federation = _planned(home, plans, options)
        # Written before anything runs, so that not even a kill -9 during the start leaves orphans.
        write(federation)
        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            return _start(federation, plans, options, report, pool)
        except BaseException:
            end(federation, drain_timeout_s=0)
            raise
        finally:
            pool.shutdown()


def _make_room(home: Path, report: Report) -> None:
    federation = read(home)
    if federation is None:
        return
    owner = federation.owner
    running = [
        member.name
        for member in federation
        if "running" in (member.region_condition(), member.gateway_condition())
    ]
    owned = owner is not None and processes.identify(owner.pid) == owner
    if owned or (owner is None and running):
        raise Conflict(
            f"Regions already run here: {', '.join(running or federation.names)}. See them with: "
            "nearfield status, stop them with: nearfield down",
            code="federation_running",
        )
    if running:
        report(f"cleaning up what was left of {', '.join(running)}")
    end(federation, drain_timeout_s=0)


def _planned(home: Path, plans: Sequence[Plan], options: Options) -> Federation:
    reservations, members = Reservations(), []
    port, grpc_port = options.port, options.grpc_port
    reached = "127.0.0.1" if options.host in ("0.0.0.0", "::") else options.host  # noqa: S104
    for plan in plans:
        port = reservations.next_free(port, options.host)
        grpc_port = reservations.next_free(grpc_port, options.host)
        members.append(
            member_of(
                home,
                name=plan.file.region,
                jurisdiction=plan.file.jurisdiction,
                city=plan.file.city,
                marker=f"gateway-{secrets.token_hex(8)}",
                url=f"http://{reached}:{port}",
                grpc=f"{reached}:{grpc_port}",
            )
        )
        port, grpc_port = port + 1, grpc_port + 1
    owner = None if options.detached else processes.identify(os.getpid())
    return Federation(
        home, tuple(members), options.store, owner, time.time(), reservations=reservations
    )


def _start(
    federation: Federation,
    plans: Sequence[Plan],
    options: Options,
    report: Report,
    pool: ThreadPoolExecutor,
) -> Federation:
    # Kept from one run to the next: gateways elsewhere may have it too.
    if not federation.passport_keys.exists():
        PassportKeys.generate().save(federation.passport_keys)
    _write_region_files(federation, plans)
    outcomes: dict[str, Outcome] = {}
    started: dict[str, Region] = {}
    for number, plan in enumerate(plans):
        name = plan.file.region
        report(f"{name}: starting Ray")
        try:
            region = _start_region(federation, plan, options, options.serve_port + number, report)
        except NearfieldError as error:
            outcomes[name] = Outcome(failure=error.message)
            continue
        started[name] = region
    # Not before every Ray is up: one that starts beside much else gives up after half a minute.
    applied = {
        plan.file.region: pool.submit(deploy.apply, started[plan.file.region], _applications(plan))
        for plan in plans
        if plan.file.region in started
    }
    for plan in plans:
        name = plan.file.region
        if name in applied:
            report(f"{name}: starting Serve")
            outcomes[name] = _bring_up(started[name], applied[name], plan, options, report)
    _open_gateways(federation, started, outcomes, options, report)
    return replace(federation, outcomes=outcomes)


def _applications(plan: Plan) -> list[dict[str, Any]]:
    if any(app["import_path"] == AGENT_BUILDER for app in plan.applications):
        return list(plan.applications)
    return [AGENT, *plan.applications]


def _start_region(
    federation: Federation, plan: Plan, options: Options, port: int, report: Report
) -> Region:
    name = plan.file.region
    closed = {
        "NEARFIELD_PASSPORT_KEYS_FILE": str(federation.passport_keys),
        "NEARFIELD_JURISDICTION": plan.file.jurisdiction,
    }
    wanted = regions.RegionOptions(
        port=port,
        ingress=options.ingress or ray_head.default_ingress(),
        num_cpus=options.num_cpus,
        detached=options.detached,
        serve_options=dict(plan.serve_options),
        environ={**plan.environ, **closed},
        lean=True,
    )
    root = federation[name].root
    try:
        return regions.start(root, wanted, lambda text: report(f"{name}: {text}"))
    except Unavailable:
        report(f"{name}: Ray did not start, which happens on a busy machine: once more")
        return regions.start(root, wanted, lambda text: report(f"{name}: {text}"))


def _bring_up(
    region: Region, applied: Future[None], plan: Plan, options: Options, report: Report
) -> Outcome:
    name, apps = plan.file.region, _applications(plan)
    try:
        applied.result()
        models = bring_up.answers(
            region,
            apps,
            timeout_s=options.timeout_s,
            report=lambda text: report(f"{name}: {text}"),
        )
    except NearfieldError as error:
        return Outcome(failure=error.message)
    agent = [each for each in models if each.name == AGENT["name"] and not each.ready]
    return Outcome(
        tuple(each for each in models if each.name != AGENT["name"]),
        failure=f"its agent: {agent[0].reason}" if agent else None,
    )


# ---- gateways -------------------------------------------------------------------------------


def _write_region_files(federation: Federation, plans: Sequence[Plan]) -> None:
    """What gateways are told of the regions: where each one's gateway is."""
    for plan in plans:
        file = plan.file.model_dump(exclude_none=True, exclude={"models"})
        file["gateway_url"] = federation[plan.file.region].gateway_url
        _write_yaml(_region_file(federation, plan.file.region), file)


def _region_file(federation: Federation, name: str) -> Path:
    return federation.folder / "regions" / f"{name}.yaml"


def _write_gateway_file(
    federation: Federation, member: Member, region: Region, options: Options
) -> None:
    file: dict[str, Any] = {
        "gateway": member.name,
        "home": {"region": member.name, "serve": region.base_url},
        "regions": [f"../regions/{name}.yaml" for name in federation.names],
        "listen": {
            "host": options.host,
            "port": int(member.gateway_url.rpartition(":")[2]),
            "grpc_port": int(member.grpc.rpartition(":")[2]),
        },
        "passport_keys": "../passports.json",
    }
    if federation.store is not None:
        file["store"] = federation.store
    _write_yaml(member.gateway.file, {**file, **options.gateway})


def _write_yaml(path: Path, data: Mapping[str, Any]) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True))


def _open_gateways(
    federation: Federation,
    started: Mapping[str, Region],
    outcomes: dict[str, Outcome],
    options: Options,
    report: Report,
) -> None:
    """Start the gateways of all regions that run, and ask each gateway for each model."""
    from nearfield.edge.gateway import WORLD_FILE  # brings the forwarding path

    environ = {**os.environ, "NEARFIELD_HOME": str(federation.home)}
    begun: dict[str, subprocess.Popen[bytes]] = {}
    for name, region in started.items():
        member = federation[name]
        _write_gateway_file(federation, member, region, options)
        (member.gateway.state / WORLD_FILE).unlink(missing_ok=True)  # of another run's ports
        begun[name] = member.gateway.start(environ, workers=options.workers)
    for name, process in begun.items():
        try:
            federation[name].gateway.wait_ready(process)
        except NearfieldError as error:
            outcomes[name] = replace(outcomes[name], failure=error.message)
        else:
            report(f"{name}: gateway at {federation[name].gateway_url}")
    if federation.store is None:
        _wait_acquainted(federation, outcomes, report)
        for name in begun:
            if outcomes[name].failure is None:
                outcomes[name] = _ask_through(federation[name], outcomes[name])


def _wait_acquainted(
    federation: Federation, outcomes: Mapping[str, Outcome], report: Report
) -> None:
    there = [name for name in federation.names if outcomes[name].failure is None]
    deadline_s = time.monotonic() + ACQUAINTED_S
    for name in there:
        while not federation[name].knows(there):
            if time.monotonic() > deadline_s:
                report(f"{name}: its gateway has not heard of all regions yet")
                break
            time.sleep(_POLL_S)


def _ask_through(member: Member, outcome: Outcome) -> Outcome:
    nobody = replace(Settings.from_env({}), passport_keys_file=None, keys_file=None)
    specs = [each.spec for each in outcome.models if each.ready and each.spec is not None]
    answers = tuple(
        ask(member.gateway_url, spec, timeout_s=ASK_TIMEOUT_S, settings=nobody) for spec in specs
    )
    failures = [
        f"its gateway does not answer for {each.model}: {each.error}"
        for each in answers
        if each.error is not None
    ]
    return replace(outcome, answers=answers, failure=failures[0] if failures else None)


# ---- ended ----------------------------------------------------------------------------------


def end(
    federation: Federation,
    *,
    only: Sequence[str] | None = None,
    drain_timeout_s: float = DRAIN_TIMEOUT_S,
) -> int:
    """End gateways, then regions; returns how many processes there were.

    Args:
        only: these regions, with their gateways; None: all, and the federation is forgotten.
        drain_timeout_s: how long they may finish what they accepted; 0: not at all.

    Raises:
        TimeoutError: some would not end; the state is kept for the next try.
    """
    members = federation.members if only is None else [federation[name] for name in only]
    if only is None:
        write(replace(federation, ending=True))
    count = 0
    if drain_timeout_s > 0:
        for member in members:
            member.gateway.leave()
    for member in members:
        count += member.gateway.end(drain_timeout_s=drain_timeout_s)
    there = [region for member in members if (region := member.region) is not None]
    if drain_timeout_s > 0:
        _each(lambda region: regions.drain(region, drain_timeout_s), there)
    for region in there:
        count += regions.end_drained(region) if drain_timeout_s > 0 else _kill(region)
    if only is None or all(_is_gone(member) for member in federation):
        (federation.folder / "federation.json").unlink(missing_ok=True)
        federation.reservations.close()
    return count


def _is_gone(member: Member) -> bool:
    return member.region_condition() == member.gateway_condition() == "ended"


def _kill(region: Region) -> int:
    return regions.end(region, drain_timeout_s=0)


def _each(act: Callable[[Region], None], there: Sequence[Region]) -> None:
    """All at once; a second Ctrl-C comes through, and what it ends lets these threads end."""
    if not there:
        return
    pool = ThreadPoolExecutor(len(there))
    try:
        for each in [pool.submit(act, region) for region in there]:
            each.result()
    finally:
        pool.shutdown(wait=False)
