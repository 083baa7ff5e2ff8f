"""A forwarding process with plain ports: `python -m nearfield.edge.proxy --upstream URL`.

Nobody is authenticated and nothing is accounted: for trying out and for measuring.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import signal
from urllib.parse import urlsplit

import uvloop
from nearfield.edge.proxy.listener import Listener, bind
from nearfield.edge.proxy.plain import Careful, OpenGate, Remember, Spread
from nearfield.edge.proxy.ports import Target
from nearfield.edge.proxy.proxy import Proxy


def target_of(url: str) -> Target:
    """`http://host:port/prefix` as a target.

    Raises:
        ValueError: it is not such a URL.
    """
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.hostname is None:
        raise ValueError(f"{url} is not http://host:port")
    return Target(parts.hostname, parts.port or 80, parts.path.rstrip("/").encode("ascii"))


async def serve(host: str, port: int, targets: list[Target], drain_s: float) -> None:
    """Forward until SIGINT or SIGTERM, then drain."""
    proxy = Proxy(OpenGate(), Spread(targets), Careful(), Remember())
    listener = Listener(proxy)
    await listener.open([bind(host, port)])
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        proxy.loop.add_signal_handler(number, stop.set)
    print(f"forwarding http://{host}:{port}", flush=True)
    gc.freeze()
    await stop.wait()
    await listener.drain(drain_s)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m nearfield.edge.proxy", description=__doc__)
    parser.add_argument("--upstream", action="append", required=True, type=target_of)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--drain-s", type=float, default=30.0)
    given = parser.parse_args()
    uvloop.run(serve(given.host, given.port, given.upstream, given.drain_s))


if __name__ == "__main__":
    main()
