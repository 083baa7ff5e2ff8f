"""`nearfield keys`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
from nearfield.cli.commands.store import (
    as_seconds,
    limit_options,
    limits,
    listed,
    opened,
    store_option,
    when,
)
from nearfield.cli.output import json_option, print_json, print_table
from nearfield.core.errors import BadRequest, Conflict, NotFound


@click.group(invoke_without_command=True)
@click.pass_context
def keys(ctx: click.Context) -> None:
    """API keys: who may call a gateway, and for what.

    \b
    nearfield tenants create acme
    nearfield keys create --tenant acme > acme.key
    nearfield keys create --tenant ops --scope platform    to administer all tenants
    nearfield keys rotate KEY_ID --grace 7d
    nearfield keys revoke KEY_ID

    They work on the store itself: the first key needs no gateway. What changes counts at every
    gateway a second later. Every one of these takes --json.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@keys.command
@click.option("--tenant", required=True, help="Whose it is.")
@click.option("--product", help="The tenant's product that it is for.")
@click.option("--label", default="", help="What it is used for, in your words.")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(["inference", "admin", "platform"]),
    help="To ask models; to administer its own tenant; to administer all. May be repeated.  "
    "[default: inference]",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    help="A model it may ask for; may be repeated.  [default: any]",
)
@click.option(
    "--expires-in", metavar="TIME", callback=as_seconds, help="As 90d or 12h.  [default: never]"
)
@limit_options
@store_option
@json_option
def create(
    tenant: str,
    product: str | None,
    label: str,
    scopes: tuple[str, ...],
    models: tuple[str, ...],
    expires_in: float | None,
    url: str | None,
    as_json: bool,
    **given: Any,
) -> int:
    """Create a key, and print it once: the store keeps only a digest of it.

    \b
    export OPENAI_API_KEY=$(nearfield keys create --tenant acme)
    nearfield keys create --tenant acme --model chat --expires-in 90d --requests-per-minute 60

    The key alone goes to stdout, what is said about it to stderr.
    """
    form = {
        "tenant": tenant,
        "product": product,
        "label": label,
        "scopes": list(scopes) or ["inference"],
        "models": list(models) or None,
        "expires_in_s": expires_in,
        "limits": limits(**given),
    }
    with opened(url) as store:
        from nearfield.store.documents import key_document
        from nearfield.store.forms import NewKey, parse

        try:
            key, presented = store.create_key(parse(NewKey, form))
        except NotFound as missing:
            command = f"add-product {tenant} {product}" if "product" in str(missing.code) else ""
            remedy = f"nearfield tenants {command or f'create {tenant}'}"
            raise NotFound(f"{missing.message} Create it: {remedy}", code=missing.code) from None
        document = key_document(key, time.time(), presented=presented)
    return _show_secret(document, as_json=as_json)


@keys.command("list")
@click.option("--tenant", help="Only this tenant's.")
@store_option
@json_option
def list_(tenant: str | None, url: str | None, as_json: bool) -> int:
    """List keys, the oldest first. No secret is shown: none is known.

    \b
    nearfield keys list --tenant acme
    nearfield keys list --json | jq -r '.keys[] | select(.state == "active") | .id'
    """
    with opened(url) as store:
        from nearfield.store.documents import key_document

        if tenant is not None:
            store.tenant(tenant)
        now_s = time.time()
        found = [key_document(key, now_s) for key in store.keys(tenant)]
    if as_json:
        print_json({"keys": found})
    elif not found:
        click.echo("No keys yet. Create one with: nearfield keys create --tenant NAME")
    else:
        rows = [
            (
                one["id"],
                one["tenant"] + (f"/{one['product']}" if one["product"] else ""),
                ", ".join(one["scopes"]),
                listed(one["models"], "any"),
                one["state"],
                when(one["created_s"]),
                when(one["expires_s"]),
                one["label"],
            )
            for one in found
        ]
        headers = ("KEY", "OF", "SCOPES", "MODELS", "STATE", "CREATED (UTC)", "EXPIRES", "LABEL")
        print_table(headers, rows)
    return 0


@keys.command
@click.argument("key_id")
@store_option
@json_option
def revoke(key_id: str, url: str | None, as_json: bool) -> int:
    """Revoke a key for good: gateways refuse it a second or two later.

    \b
    nearfield keys revoke 3kq7…
    """
    with opened(url) as store:
        from nearfield.store.documents import key_document

        document = key_document(store.revoke_key(_id_of(key_id)), time.time())
    if as_json:
        print_json(document)
    else:
        click.echo(f"Key {document['id']} of {document['tenant']} is revoked.")
    return 0


@keys.command
@click.argument("key_id")
@click.option(
    "--grace",
    metavar="TIME",
    callback=as_seconds,
    default="1d",
    show_default=True,
    help="How long the former secret stays good.",
)
@store_option
@json_option
def rotate(key_id: str, grace: float, url: str | None, as_json: bool) -> int:
    """Give a key another secret, and print it once. Id, limits and scopes stay.

    \b
    nearfield keys rotate 3kq7… --grace 7d     the former secret is good for a week
    nearfield keys rotate 3kq7… --grace 0      it leaked
    """
    with opened(url) as store:
        from nearfield.store.documents import key_document
        from nearfield.store.forms import Rotation, parse

        key, presented = store.rotate_key(_id_of(key_id), parse(Rotation, {"grace_s": grace}))
        document = key_document(key, time.time(), presented=presented)
    return _show_secret(document, as_json=as_json)


@keys.command
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@store_option
@json_option
def export(file: Path, url: str | None, as_json: bool) -> int:
    """Write all usable keys to FILE, for a region that is called without a gateway.

    \b
    nearfield keys export /etc/nearfield/keys.json
    NEARFIELD_KEYS_FILE=/etc/nearfield/keys.json nearfield up

    The file holds what keys are checked with, mode 0600: guard it as you guard the store. Regions
    read it again when it changes.
    """
    with opened(url) as store:
        count = store.export_keys(file.absolute())
    if as_json:
        print_json({"file": str(file), "keys": count})
    else:
        click.echo(f"Wrote {count} keys to {file}")
    return 0


@keys.command
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--next", "step", flag_value="next", help="1. Add a second secret, to verify with.")
@click.option("--promote", "step", flag_value="promote", help="2. Sign with the second one.")
@click.option("--retire", "step", flag_value="retire", help="3. Forget the first one.")
@json_option
def passports(file: Path, step: str | None, as_json: bool) -> int:
    """Make or rotate the secrets in FILE that gateways sign passports with, and regions verify.

    \b
    nearfield keys passports passports.json              a new one; the same file everywhere
    nearfield keys passports passports.json --next       put it everywhere, then
    nearfield keys passports passports.json --promote    put it everywhere, wait two minutes, then
    nearfield keys passports passports.json --retire     put it everywhere

    Gateways name it as passport_keys in their file, regions as NEARFIELD_PASSPORT_KEYS_FILE. In
    these steps no request is refused on the way.
    """
    from nearfield.api.passport import PassportKeys

    path = file.absolute()
    if step is None:
        if path.exists():
            raise Conflict(f"{file} exists, and nothing is overwritten: rotate it with --next.")
        made = PassportKeys.generate()
    else:
        made = PassportKeys.load(path)
        pending = len(made.kids) == 2
        if pending == (step == "next"):
            doing = "under way: --promote, then --retire" if pending else "not begun: --next"
            raise Conflict(f"A rotation of {file} is {doing}.")
        if step == "retire" and made.signing != made.kids[-1]:
            raise Conflict(f"The second secret of {file} does not sign yet: --promote first.")
        steps = {
            "next": made.with_next,
            "promote": made.promoted,
            "retire": made.without_previous,
        }
        made = steps[step]()
    try:
        made.save(path)
    except OSError as error:
        raise BadRequest(f"The passport keys cannot be written: {error}") from None
    if as_json:
        print_json({"file": str(file), "keys": list(made.kids), "signing": made.signing})
    else:
        click.echo(f"{file}: {', '.join(made.kids)}; {made.signing} signs")
    return 0


def _show_secret(document: dict[str, Any], *, as_json: bool) -> int:
    if as_json:
        print_json(document)
        return 0
    whose = document["tenant"] + (f"/{document['product']}" if document["product"] else "")
    click.echo(document["key"])
    ends = when(document["expires_s"])
    click.echo(
        f"Key {document['id']} of {whose} for {', '.join(document['scopes'])}"
        f"{f', until {ends} UTC' if ends else ''}. Keep it: it is not shown again.",
        err=True,
    )
    until = when(document["former_secret_until_s"])
    if until:
        click.echo(f"The former secret is good until {until} UTC.", err=True)
    return 0


def _id_of(given: str) -> str:
    """A key's id, also where the whole key was pasted: errors must not repeat a secret."""
    from nearfield.api.keys import ID_LENGTH, PREFIX

    return given[len(PREFIX) :][:ID_LENGTH] if given.startswith(PREFIX) else given
