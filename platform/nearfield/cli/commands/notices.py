"""`nearfield notices`."""

from __future__ import annotations

import os
import time

import click
from nearfield.cli.output import json_option, print_json
from nearfield.core.errors import BadRequest, Unavailable


@click.command
@click.argument("provider", type=click.Choice(["gcp", "aws", "azure"]))
@click.option("--address", help="Ray's head, host:port.  [default: RAY_ADDRESS, or found here]")
@click.option("--node-id", help="The node to drain.  [default: the one at this machine's address]")
@click.option("--url", help="Another metadata server than the cloud's own.")
@json_option
def notices(
    provider: str, address: str | None, node_id: str | None, url: str | None, as_json: bool
) -> int:
    """Pass this spot machine's interruption notice on to Ray, when it comes.

    \b
    ray start --address "$HEAD" … && nearfield notices gcp

    Runs beside Ray on every machine that its cloud may take back. On a notice the machine's node is
    drained: its replicas take nothing new and end what they have, and others start elsewhere.
    """
    import logging

    from nearfield.serving.cluster import Cluster
    from nearfield.serving.notices import PROVIDERS, watch

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    try:
        cluster = Cluster(_head(address))
        node = node_id or _only(cluster)
    except RuntimeError as error:
        raise Unavailable(f"Ray's head does not answer: {error}") from None
    if not as_json:
        click.echo(f"waiting for {provider}'s notice, for the node {node}")
    found = watch(
        PROVIDERS[provider](),  # type: ignore[index]
        lambda due_s, words: cluster.drain(node, due_s, words),
        url=url,
    )
    if as_json:
        print_json({"node_id": node, "due_unix_s": found.due_s, "notice": found.words})
    else:
        click.echo(f"{found.words}: {node} is drained, due in {found.due_s - time.time():.0f} s")
    return 0


def _head(given: str | None) -> str:
    from ray._private.services import canonicalize_bootstrap_address

    address: str | None = canonicalize_bootstrap_address(given or os.environ.get("RAY_ADDRESS"))  # type: ignore[arg-type]
    if address is None:
        raise BadRequest("No Ray runs on this machine. Name its head: --address HOST:PORT")
    return address


def _only(cluster: object) -> str:
    import ray
    from nearfield.serving.cluster import Cluster

    assert isinstance(cluster, Cluster)
    ip = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    found = cluster.nodes_at(ip)
    if len(found) != 1:
        raise BadRequest(
            f"{len(found)} nodes of this cluster are at {ip}. Name the one to drain: --node-id ID"
        )
    return found[0]
