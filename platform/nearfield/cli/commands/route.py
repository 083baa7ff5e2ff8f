"""`nearfield route`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from nearfield.cli.main import EXIT_FAILED
from nearfield.cli.output import json_option, print_json
from nearfield.core.errors import BadRequest, Unavailable
from nearfield.core.federation import Listen

ROUTE_PATH = "/-/nearfield/route"
TIMEOUT_S = 10.0
_LOCAL = f"http://{Listen().host}:{Listen().port}"


@click.command
@click.argument("model")
@click.option(
    "--from", "place", metavar="CITY", help="As for a client there; or LATITUDE,LONGITUDE."
)
@click.option(
    "--jurisdiction", metavar="NAME[,NAME]", help="Where its data may go; absent: anywhere."
)
@click.option("--product", help="Whose pools it may use besides the shared ones.")
@click.option("--version", "model_version", help="The model's; absent: the current one.")
@click.option(
    "--mode", type=click.Choice(["nearest", "economy"]), help="What counts: time, or cost."
)
@click.option(
    "--criticality",
    type=click.Choice(["critical", "default", "sheddable"]),
    help="What overload drops last, and first.",
)
@click.option(
    "--explain", is_flag=True, help="Show every endpoint: its times, or what rules it out."
)
@click.option("--gateway", default=_LOCAL, show_default=True, metavar="URL", help="Which to ask.")
@click.option(
    "--key-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file with a platform key, where the gateway asks for one.",
)
@json_option
def route(
    model: str, place: str | None, jurisdiction: str | None, product: str | None,
    model_version: str | None, mode: str | None, criticality: str | None, explain: bool,
    gateway: str, key_file: Path | None, as_json: bool,
) -> int:  # fmt: skip
    """Show where a request would go now, and why. Nothing is sent to the model.

    \b
    nearfield route chat                          from the gateway itself, by measured distances
    nearfield route chat --from Nairobi           for a client there, by assumed distances
    nearfield route chat --from Paris --jurisdiction eu --explain

    Exit code 1 if no endpoint would take it.
    """
    asked = {
        "model": model,
        "from": place,
        "jurisdiction": jurisdiction,
        "product": product,
        "version": model_version,
        "mode": mode,
        "criticality": criticality,
    }
    told = _ask(gateway, {k: v for k, v in asked.items() if v is not None}, key_file)
    if as_json:
        print_json(told)
    elif explain:
        click.echo(told["table"])
    else:
        click.echo(told["outcome"])
    if place is not None and not as_json:
        click.echo(click.style(f"Distances from {place} are {told['distances']}.", dim=True))
    return 0 if told["endpoint"] is not None else EXIT_FAILED


def _ask(gateway: str, asked: dict[str, str], key_file: Path | None) -> dict[str, Any]:
    """
    Raises:
        BadRequest: the gateway cannot answer this. Unavailable: it does not answer.
    """
    import httpx

    headers = {}
    if key_file is not None:
        headers["authorization"] = f"Bearer {key_file.read_text().strip()}"
    url = gateway.rstrip("/") + ROUTE_PATH
    try:
        with httpx.Client(timeout=TIMEOUT_S, trust_env=False) as client:
            response = client.get(url, params=asked, headers=headers)
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        raise Unavailable(
            f"The gateway at {gateway} does not answer ({type(error).__name__}): start one, or "
            "name another with --gateway."
        ) from None
    try:
        told = response.json()
    except ValueError:
        told = None
    if isinstance(told, dict) and "outcome" in told:
        return told
    refused = told.get("error") if isinstance(told, dict) else None
    if not isinstance(refused, dict) or "message" not in refused:
        raise Unavailable(f"What answers at {gateway} is no gateway: name another with --gateway.")
    message = str(refused["message"])
    if response.status_code == 401:
        message += " Give a platform key with --key-file."
    raise BadRequest(message, code=refused.get("code"))
