"""`nearfield down`."""

from __future__ import annotations

from pathlib import Path

import click
from nearfield.cli.output import Progress, dir_option, json_option, print_json


@click.command
@click.option("--force", is_flag=True, help="Do not let requests in progress finish.")
@dir_option
@json_option
def down(force: bool, root: Path, as_json: bool) -> int:
    """Stop the region and everything in it, from any terminal.

    Only this region's processes are ended, never another Ray on this machine. That includes what
    was left behind by a region that was killed. With nothing to stop, this succeeds.

    \b
    nearfield down
    """
    from nearfield.cli import region

    progress = Progress(as_json=as_json)
    found = region.read(root)
    if found is None:
        if as_json:
            print_json({"stopped": False, "processes": 0})
        else:
            click.echo("No region runs here.")
        return 0
    progress("stopping" if force else "stopping: replicas finish what they have accepted")
    count = region.end(found, drain_timeout_s=0.0 if force else region.DRAIN_TIMEOUT_S)
    if as_json:
        print_json({"stopped": True, "processes": count})
    progress(f"stopped {count} processes; nothing is left")
    return 0
