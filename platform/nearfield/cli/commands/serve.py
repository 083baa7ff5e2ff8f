"""`nearfield serve` and `nearfield rm`: changing what the running region serves."""

from __future__ import annotations

from pathlib import Path

import click
from nearfield.cli.main import EXIT_FAILED
from nearfield.cli.output import Progress, failed, json_option, print_json, region_option


@click.command
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option(
    "--wait/--no-wait", default=True, help="Wait until the models answer.  [default: wait]"
)
@click.option(
    "--timeout", "timeout_s", type=float, default=600.0, show_default=True, help="Seconds to wait."
)
@region_option
@json_option
def serve(files: tuple[str, ...], wait: bool, timeout_s: float, root: Path, as_json: bool) -> int:
    """Add models to the running region, or upgrade them.

    What already runs there and does not change is not disturbed. An application of the same name
    is replaced, replica by replica. Files are checked first; if one is invalid, nothing happens.

    \b
    nearfield up                        in one terminal
    nearfield serve mine.yaml           in another
    nearfield serve --no-wait big.yaml

    Exit code 1 if a model does not start: the reason is printed, the others keep running.
    """
    from nearfield.cli import deploy, region
    from nearfield.cli.applications import applications, serve_options
    from nearfield.cli.bring_up import bring_up
    from nearfield.cli.commands.common import checked

    progress = Progress(as_json=as_json)
    read = checked(files)
    running = region.find(root)
    if ignored := sorted(serve_options(read)):
        progress(f"{', '.join(ignored)}: fixed while the region runs, ignored")
    apps = applications(read, running.state.pythonpath)
    if not wait:
        deploy.apply(running, apps)
        if as_json:
            print_json({"deployed": [app["name"] for app in apps]})
        return 0
    started = bring_up(running, apps, timeout_s=timeout_s, report=progress)
    for each in started:
        if each.ready:
            progress(f"{each.name} answers at {each.url}")
        else:
            failed(f"{each.name}: {each.reason}")
    if as_json:
        print_json({"models": [each.to_json() for each in started]})
    return 0 if all(each.ready for each in started) else EXIT_FAILED


@click.command
@click.argument("names", nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "--wait/--no-wait", default=True, help="Wait until they have drained. [default: wait]"
)
@region_option
@json_option
def rm(names: tuple[str, ...], wait: bool, root: Path, as_json: bool) -> int:
    """Remove models from the running region, by the name of their application.

    Their replicas finish what they have accepted; the other models are not disturbed.

    \b
    nearfield rm embed
    """
    from nearfield.cli import deploy, region

    progress = Progress(as_json=as_json)
    running = region.find(root)
    deploy.apply(running, [], remove=names)
    gone = deploy.wait_until_gone(running, names, timeout_s=120.0) if wait else None
    if as_json:
        print_json({"removed": list(names), "drained": gone})
    if gone is False:
        failed(f"{', '.join(names)}: still draining after 120 s. See: nearfield status")
        return EXIT_FAILED
    progress(f"removed {', '.join(names)}")
    return 0
