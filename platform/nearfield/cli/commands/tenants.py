"""`nearfield tenants`."""

from __future__ import annotations

from typing import Any

import click
from nearfield.cli.commands.store import (
    bounds,
    limit_options,
    limits,
    listed,
    opened,
    store_option,
    when,
)
from nearfield.cli.output import json_option, print_json, print_table


@click.group(invoke_without_command=True)
@click.pass_context
def tenants(ctx: click.Context) -> None:
    """Tenants: who calls, who is billed, where their data may be. And their products.

    \b
    nearfield tenants create acme --jurisdiction eu --tokens-per-minute 100000
    nearfield tenants change acme --requests-per-minute 600
    nearfield tenants add-product acme search --concurrent-streams 20
    nearfield tenants suspend acme

    A limit holds for all of a tenant's keys together, right across all gateways. What changes
    here counts at every gateway a second later. Every one of these takes --json.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@tenants.command
@click.argument("name")
@click.option(
    "--jurisdiction", "jurisdictions", multiple=True, help="Where its data may be; may be repeated."
)
@limit_options
@store_option
@json_option
def create(
    name: str, jurisdictions: tuple[str, ...], url: str | None, as_json: bool, **given: Any
) -> int:
    """Create a tenant. Without --jurisdiction its data may be anywhere.

    \b
    nearfield tenants create acme
    nearfield tenants create acme --jurisdiction eu --jurisdiction ch
    """
    with opened(url) as store:
        from nearfield.store.documents import tenant_document
        from nearfield.store.forms import NewTenant, parse

        form = {
            "name": name,
            "jurisdictions": list(jurisdictions) or None,
            "limits": limits(**given),
        }
        _show(tenant_document(store.create_tenant(parse(NewTenant, form))), as_json=as_json)
    return 0


@tenants.command("list")
@store_option
@json_option
def list_(url: str | None, as_json: bool) -> int:
    """List all tenants.

    \b
    nearfield tenants list --json | jq -r '.tenants[] | select(.suspended) | .name'
    """
    with opened(url) as store:
        from nearfield.store.documents import tenant_document

        found = [tenant_document(tenant) for tenant in store.tenants()]
    if as_json:
        print_json({"tenants": found})
    elif not found:
        click.echo("No tenants yet. Create one with: nearfield tenants create NAME")
    else:
        rows = [
            (
                one["name"],
                listed(one["jurisdictions"], "anywhere"),
                "suspended" if one["suspended"] else "active",
                bounds(one["limits"]),
                when(one["created_s"]),
            )
            for one in found
        ]
        print_table(("TENANT", "DATA IN", "STATE", "LIMITS", "CREATED (UTC)"), rows)
    return 0


@tenants.command
@click.argument("name")
@click.option(
    "--jurisdiction", "jurisdictions", multiple=True, help="Where its data may be from now on."
)
@click.option("--anywhere", is_flag=True, help="Its data may be anywhere.")
@limit_options
@store_option
@json_option
def change(
    name: str,
    jurisdictions: tuple[str, ...],
    anywhere: bool,
    url: str | None,
    as_json: bool,
    **given: Any,
) -> int:
    """Change where a tenant's data may be, or its limits. What is not named stays as it is.

    \b
    nearfield tenants change acme --tokens-per-minute 200000
    nearfield tenants change acme --requests-per-minute none
    """
    if jurisdictions and anywhere:
        raise click.UsageError("--jurisdiction and --anywhere do not go together.")
    form: dict[str, Any] = {"limits": limits(**given)}
    if jurisdictions or anywhere:
        form["jurisdictions"] = None if anywhere else list(jurisdictions)
    return _change(name, form, url, as_json=as_json)


@tenants.command
@click.argument("name")
@store_option
@json_option
def suspend(name: str, url: str | None, as_json: bool) -> int:
    """Refuse all of a tenant's keys, within a second or two at every gateway.

    \b
    nearfield tenants suspend acme
    """
    return _change(name, {"suspended": True}, url, as_json=as_json)


@tenants.command
@click.argument("name")
@store_option
@json_option
def resume(name: str, url: str | None, as_json: bool) -> int:
    """Let a suspended tenant call again.

    \b
    nearfield tenants resume acme
    """
    return _change(name, {"suspended": False}, url, as_json=as_json)


@tenants.command("add-product")
@click.argument("tenant")
@click.argument("name")
@limit_options
@store_option
@json_option
def add_product(tenant: str, name: str, url: str | None, as_json: bool, **given: Any) -> int:
    """Add a product: a part of a tenant's traffic with limits, a bill and perhaps pools of its own.

    \b
    nearfield tenants add-product acme search --requests-per-minute 300
    nearfield keys create --tenant acme --product search
    """
    with opened(url) as store:
        from nearfield.store.documents import product_document
        from nearfield.store.forms import NewProduct, parse

        form = parse(NewProduct, {"name": name, "limits": limits(**given)})
        _show(product_document(store.create_product(tenant, form)), as_json=as_json)
    return 0


@tenants.command("change-product")
@click.argument("tenant")
@click.argument("name")
@limit_options
@store_option
@json_option
def change_product(tenant: str, name: str, url: str | None, as_json: bool, **given: Any) -> int:
    """Change a product's limits. What is not named stays as it is.

    \b
    nearfield tenants change-product acme search --requests-per-minute none
    """
    with opened(url) as store:
        from nearfield.store.documents import product_document
        from nearfield.store.forms import ProductChange, parse

        form = parse(ProductChange, {"limits": limits(**given)})
        _show(product_document(store.change_product(tenant, name, form)), as_json=as_json)
    return 0


@tenants.command
@click.argument("tenant", required=False)
@store_option
@json_option
def products(tenant: str | None, url: str | None, as_json: bool) -> int:
    """List products, of one tenant or of all.

    \b
    nearfield tenants products acme
    """
    with opened(url) as store:
        from nearfield.store.documents import product_document

        if tenant is not None:
            store.tenant(tenant)
        found = [product_document(product) for product in store.products(tenant)]
    if as_json:
        print_json({"products": found})
    elif not found:
        click.echo("No products. Add one with: nearfield tenants add-product TENANT NAME")
    else:
        rows = [
            (one["tenant"], one["name"], bounds(one["limits"]), when(one["created_s"]))
            for one in found
        ]
        print_table(("TENANT", "PRODUCT", "LIMITS", "CREATED (UTC)"), rows)
    return 0


def _change(name: str, form: dict[str, Any], url: str | None, *, as_json: bool) -> int:
    with opened(url) as store:
        from nearfield.store.documents import tenant_document
        from nearfield.store.forms import TenantChange, parse

        changed = store.change_tenant(name, parse(TenantChange, form))
        _show(tenant_document(changed), as_json=as_json)
    return 0


def _show(document: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(document)
        return
    name = document["name"]
    if "tenant" in document:
        click.echo(f"Product {document['tenant']}/{name}: limits {bounds(document['limits'])}")
        return
    where = listed(document["jurisdictions"], "anywhere")
    state = ", suspended" if document["suspended"] else ""
    click.echo(f"Tenant {name}: data in {where}, limits {bounds(document['limits'])}{state}")
