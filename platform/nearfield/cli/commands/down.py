"""`nearfield down`."""

from __future__ import annotations

from pathlib import Path

import click
from nearfield.cli.output import (
    Progress,
    home,
    json_option,
    names_one,
    print_json,
    region_named,
    region_option,
)


@click.command
@click.option("--force", is_flag=True, help="Do not let requests in progress finish.")
@region_option
@json_option
def down(force: bool, root: Path, as_json: bool) -> int:
    """Stop what `nearfield up` runs and everything in it, from any terminal.

    Only processes of its regions and gateways are ended, never another Ray on this machine. That
    includes what was left behind by a region that was killed. With nothing to stop, this succeeds.

    \b
    nearfield down                     all regions, and their gateways
    nearfield down --region us-east    one of several, with its gateway: requests go elsewhere
    """
    from nearfield.cli import federation as federations
    from nearfield.cli import region

    progress = Progress(as_json=as_json)
    drain_s = 0.0 if force else region.DRAIN_TIMEOUT_S
    name = region_named()
    several = None if names_one() and name is None else federations.read(home())
    if several is not None and name is not None and name not in several.names:
        several = None
    alone = None if several is not None and name is not None else region.read(root)
    if several is None and alone is None:
        if as_json:
            print_json({"stopped": False, "processes": 0})
        else:
            click.echo("No region runs here.")
        return 0
    progress("stopping" if force else "stopping: replicas finish what they have accepted")
    count = 0
    if several is not None:
        count += federations.end(
            several, only=None if name is None else [name], drain_timeout_s=drain_s
        )
    if alone is not None:
        count += region.end(alone, drain_timeout_s=drain_s)
    if as_json:
        print_json({"stopped": True, "processes": count})
    progress(
        f"stopped {count} processes; nothing is left" + ("" if name is None else f" of {name}")
    )
    return 0
