"""`nearfield check`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click
from nearfield.cli.main import EXIT_INVALID
from nearfield.cli.output import json_option, print_json

if TYPE_CHECKING:
    from nearfield.core.problems import Problem


@click.command
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option(
    "--no-ray", is_flag=True, help="Skip Ray's own schema, which takes two seconds to load."
)
@json_option
def check(files: tuple[str, ...], no_ray: bool, as_json: bool) -> int:
    """Check config files before anything is deployed.

    Every problem of every file is named at once, with its line, the value that stands there and
    a remedy. Files given together are also checked against each other: two models of one region
    may not share a name or a route, and with a cluster file (for `ray up`, or KubeRay) every
    replica must fit on one of its node types. Nothing is executed, and no region is needed.

    \b
    nearfield check chat.yaml
    nearfield check deployments/models/*.yaml
    nearfield check pools.yaml cluster_configs/clusters/gcp.yaml
    nearfield check --json chat.yaml | jq '.problems[].field'

    Exit code 2 if a file is invalid; warnings alone leave it 0.
    """
    from nearfield.cli.config_files import problems_of, read_files, scenario
    from nearfield.core.check import title

    read, problems = read_files(files)
    scenarios = {file.name: known for file in read if (known := scenario(file)) is not None}
    read = [file for file in read if file.name not in scenarios]
    problems += problems_of(read, ray=not no_ray and not problems)
    for known in scenarios.values():
        problems += known if isinstance(known, list) else []
    valid = all(problem.level == "warning" for problem in problems)
    if as_json:
        shown = [asdict(problem) for problem in problems]
        print_json({"valid": valid, "files": list(files), "problems": shown})
        return 0 if valid else EXIT_INVALID
    print_problems(problems)
    wrong = {problem.file for problem in problems if problem.level == "error"}
    for name, known in scenarios.items():
        if not isinstance(known, list):
            ok = click.style("ok", fg="green")
            click.echo(f"{name}: {ok} (simulation {known.simulation})")
    for file in read:
        if file.name not in wrong:
            click.echo(f"{file.name}: {click.style('ok', fg='green')} ({title(file.document)})")
    return 0 if valid else EXIT_INVALID


def print_problems(problems: Sequence[Problem]) -> None:
    """Problems for a person, on stderr."""
    for problem in problems:
        place = problem.file if problem.line is None else f"{problem.file}:{problem.line}"
        value = "" if problem.value is None else f" = {problem.value}"
        colour = "red" if problem.level == "error" else "yellow"
        level = click.style(problem.level + ":", fg=colour, bold=True)
        field = f" {problem.field}{value}:" if problem.field else ""
        click.echo(f"{level} {click.style(place, bold=True)}:{field} {problem.message}", err=True)
        click.echo(f"       {problem.remedy}", err=True)
