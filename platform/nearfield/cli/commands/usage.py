"""`nearfield usage`."""

from __future__ import annotations

import click
from nearfield.cli.commands.store import opened, store_option
from nearfield.cli.output import json_option, print_json, print_table


@click.command
@click.option(
    "--by",
    default="tenant,model",
    show_default=True,
    help="Of tenant, product, key, model, region, endpoint, outcome, day; several with commas.",
)
@click.option("--tenant", help="Only this tenant's.")
@click.option("--since", help="From then on: 2026-11-01, 2026-11-01T08:00:00Z or Unix seconds.")
@click.option("--until", help="Until before then.")
@store_option
@json_option
def usage(
    by: str,
    tenant: str | None,
    since: str | None,
    until: str | None,
    url: str | None,
    as_json: bool,
) -> int:
    """Sum what was used: requests, tokens, seconds. Days and dates are in UTC.

    \b
    nearfield usage
    nearfield usage --by day,model --tenant acme --since 2026-11-01
    nearfield usage --by tenant --json | jq '.usage[] | {tenant, output_tokens}'

    A request counts with the moment it arrived. What was cut short is in it; what was refused
    before it reached a model is not. --json tells also of how many requests the answer did not
    tell its tokens, so that they are estimated.
    """
    with opened(url) as store:
        from nearfield.store.documents import usage_document
        from nearfield.store.forms import groups, moment_s

        summed_by = groups(by.split(","), "--by")
        since_s = None if since is None else moment_s(since, "--since")
        until_s = None if until is None else moment_s(until, "--until")
        if tenant is not None:
            store.tenant(tenant)
        totals = store.usage(summed_by, tenant=tenant, since_s=since_s, until_s=until_s)
        found = [usage_document(total, summed_by) for total in totals]
    if as_json:
        print_json({"by": summed_by, "usage": found})
        return 0
    if not found:
        click.echo("Nothing was used.")
        return 0
    numbers = ("requests", "input_tokens", "cached_tokens", "output_tokens")
    rows = [
        (
            *(one[group] or "-" for group in summed_by),
            *(str(one[number]) for number in numbers),
            f"{one['duration_s']:.1f}",
        )
        for one in found
    ]
    headers = [*summed_by, "requests", "input", "cached", "output", "seconds"]
    print_table([header.upper() for header in headers], rows)
    return 0
