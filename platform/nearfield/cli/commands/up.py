"""`nearfield up`: a region in the foreground, from nothing to answers, and away again."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from nearfield.cli.main import EXIT_FAILED, EXIT_INTERRUPTED
from nearfield.cli.output import (
    Progress,
    dir_option,
    failed,
    home,
    json_option,
    names_one,
    print_json,
)
from nearfield.core.settings import Settings

if TYPE_CHECKING:
    from nearfield.cli.bring_up import Started
    from nearfield.cli.config_files import ConfigFile
    from nearfield.cli.ray_head import Ingress
    from nearfield.cli.region import Region

_WATCH_S = 2.0


@click.command
@click.argument("files", nargs=-1, metavar="[FILE...]")
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen.")
@click.option("--port", type=click.IntRange(1, 65535), help="[default: the files' own, else 8000]")
@click.option(
    "--regions",
    metavar="NAME,NAME",
    help="Several regions, each with a gateway: names of the package's region files, or paths.",
)
@click.option(
    "--keys", is_flag=True, help="With --regions: take nobody without a key from the usual store."
)
@click.option("--store", metavar="URL", help="With --regions: likewise, from this store.")
@click.option(
    "--ingress",
    type=click.Choice(["haproxy", "python"]),
    help="Serve's HAProxy mode, or its Python proxy.  [default: haproxy on Linux]",
)
@click.option(
    "--cpus", type=click.IntRange(1), help="What models may ask for in all.  [default: at least 4]"
)
@click.option(
    "--cluster",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="A cluster file of fake nodes, which Ray's node autoscaler starts and stops.",
)
@click.option("--detach", is_flag=True, help="Return when the models answer; the region goes on.")
@click.option(
    "--timeout", "timeout_s", type=float, default=600.0, show_default=True, help="Seconds to wait."
)
@dir_option
@json_option
def up(
    files: tuple[str, ...],
    host: str,
    port: int | None,
    regions: str | None,
    keys: bool,
    store: str | None,
    ingress: Ingress | None,
    cpus: int | None,
    cluster: str | None,
    detach: bool,
    timeout_s: float,
    root: Path,
    as_json: bool,
) -> int:
    """Run a region on this machine, with models in it, until Ctrl-C.

    Without FILE, the two quickstart models: a small language model and sentence embeddings, both
    on the CPU, with no download. Each model is asked one real question before you are told that
    it is there, and copy-paste examples are printed.

    \b
    nearfield up
    nearfield up chat.yaml embed.yaml --port 9000
    nearfield up --detach && nearfield status && nearfield down
    nearfield up --regions eu-west,us-east,asia-south
    nearfield up --cluster local-fake.yaml pools.yaml

    The region has its own ports, directory and token: it does not mix with another Ray on this
    machine. Ctrl-C ends it and everything in it; twice, without waiting.

    With --regions, each region is a Ray cluster of its own and gets a gateway, which clients of
    all regions can call (ports 8080, 8081, …; --host and --port are the gateways'). Without FILE
    each region runs the models that its file names, with FILE those. See: nearfield status.

    With --cluster, replicas run on nodes that are processes of this machine and come and go as on
    a cloud: cluster_configs/clusters/local-fake.yaml.
    """
    from nearfield.cli.ray_head import default_ingress

    if regions is None and (keys or store is not None):
        raise click.UsageError("--keys and --store go with --regions: gateways ask for keys.")
    ingress = ingress or default_ingress()
    how = {"host": host, "ingress": ingress, "num_cpus": cpus, "detached": detach}
    if regions is not None:
        if cluster is not None:
            raise click.UsageError("--cluster is for one region, without --regions.")
        if names_one():
            raise click.UsageError("--dir is one region's; several live in NEARFIELD_HOME.")
        return _several(
            [each.strip() for each in regions.split(",") if each.strip()],
            files,
            port,
            as_json=as_json,
            store=store or (Settings.from_env(os.environ).database_url if keys else None),
            timeout_s=timeout_s,
            **how,
        )
    return _one(files, port, root, timeout_s, as_json=as_json, cluster=cluster, **how)


def _several(
    names: Sequence[str],
    files: Sequence[str],
    port: int | None,
    *,
    as_json: bool,
    **how: Any,
) -> int:
    from nearfield.cli.commands import up_regions
    from nearfield.cli.federation import GATEWAY_PORT, Options

    progress = Progress(as_json=as_json)
    wanted = up_regions.plans(names, files)
    if not wanted:
        raise click.UsageError("--regions names no region: eu-west,us-east, for instance.")
    options = Options(port=port or GATEWAY_PORT, **how)
    with _interruptible():
        return up_regions.run(home(), wanted, options, progress, as_json=as_json)


def _one(
    files: Sequence[str],
    port: int | None,
    root: Path,
    timeout_s: float,
    *,
    as_json: bool,
    cluster: str | None,
    **how: Any,
) -> int:
    from nearfield.cli import region as regions
    from nearfield.cli.applications import applications, quickstart_files, serve_options
    from nearfield.cli.bring_up import bring_up
    from nearfield.cli.commands.common import stop

    progress = Progress(as_json=as_json)
    read, nodes = _with_nodes(files or quickstart_files(), cluster)
    options = serve_options(read)
    wanted_port = port or options.get("http_options", {}).get("port", regions.DEFAULT_PORT)
    with _interruptible():
        progress("starting Ray")
        region = regions.start(
            root,
            regions.RegionOptions(port=wanted_port, serve_options=options, cluster=nodes, **how),
            progress,
        )
        ours_to_end = True
        code = EXIT_INTERRUPTED
        try:
            progress("starting Serve")
            apps = applications(read, region.state.pythonpath)
            started = bring_up(region, apps, timeout_s=timeout_s, report=progress)
            code = 0 if all(each.ready for each in started) else EXIT_FAILED
            _show(region, started, progress, as_json=as_json)
            if not any(each.ready for each in started):
                progress("no model is ready, so there is nothing to stay for")
            elif how["detached"]:
                ours_to_end = False
            else:
                if not as_json:
                    click.echo("\nCtrl-C ends the region and everything in it.")
                if _ended_elsewhere(region):
                    progress("ended by nearfield down")
                    ours_to_end = False
                else:
                    failed("Ray has died: all processes of the region are gone")
                    code = EXIT_FAILED
        except KeyboardInterrupt:
            click.echo(err=as_json)
        finally:
            if ours_to_end:
                end = partial(regions.end, region)
                stop(end, progress, "replicas finish what they have accepted")
        return code


def _with_nodes(
    files: Sequence[str | Path], cluster: str | None
) -> tuple[list[ConfigFile], dict[str, Any] | None]:
    """The models' files, and what the cluster file says, checked against each other.

    Raises:
        InvalidConfig: something is wrong with one of them.
        UsageError: the cluster file's nodes are not on this machine.
    """
    from nearfield.cli.commands.common import checked

    if cluster is None:
        return checked(files), None
    from nearfield.cli.ray_nodes import is_local

    *read, nodes = checked([*files, cluster])
    if not is_local(nodes.document.value):
        raise click.UsageError(
            f"--cluster {cluster}: its nodes are not on this machine. A cloud's are started by "
            "Ray: ray up FILE (docs/clusters.md)."
        )
    return read, nodes.document.value


def _show(region: Region, started: Sequence[Started], progress: Progress, *, as_json: bool) -> None:
    """What came of each application, and how to use those that are ready."""
    from nearfield.cli.commands.common import answered, show_examples
    from nearfield.cli.snippets import examples

    for each in started:
        if each.reason is not None:
            failed(f"{each.name}: {each.reason}")
        elif each.answer is not None:
            progress(answered(each.answer))
    if as_json:
        models = [each.to_json() for each in started]
        seconds = round(progress.elapsed_s, 1)
        print_json({"endpoint": region.base_url, "seconds": seconds, "models": models})
        return
    usable = [(each.url, each.spec) for each in started if each.ready and each.url and each.spec]
    if usable:
        click.echo("\nEach of these is a complete base URL:")
    for url, spec in usable:
        click.echo(f"  {click.style(f'{url}/v1', bold=True)}  {spec.model} ({spec.engine.kind})")
    show_examples(examples(usable))


def _ended_elsewhere(region: Region) -> bool:
    """Stay as long as the region does. True: `nearfield down` ended it; False: it died."""
    from nearfield.cli import processes
    from nearfield.cli import region as regions

    never = threading.Event()
    while True:
        never.wait(_WATCH_S)
        current = regions.read(region.root)
        if current is None or current.state.region_id != region.state.region_id:
            return True
        if not processes.of_region(region.state.region_id):
            # `nearfield down` ends the processes first and forgets the region then.
            never.wait(_WATCH_S)
            return regions.read(region.root) is None


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM and a closed terminal end the region as Ctrl-C does, unless nohup says otherwise."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    kinds = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        kinds.append(signal.SIGHUP)
    before = [(kind, signal.signal(kind, interrupt)) for kind in kinds]
    try:
        yield
    finally:
        for kind, handler in before:
            signal.signal(kind, handler)
