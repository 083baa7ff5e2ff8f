"""Listening sockets, and leaving without losing what was accepted."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Sequence

from nearfield.edge.proxy.h1 import Connection
from nearfield.edge.proxy.proxy import Proxy

BACKLOG = 2048
CUT_S = 1.0
"""How long connections that were cut may take to be gone."""


def bind(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """A listening socket; `shared` lets other processes bind the same address (SO_REUSEPORT).

    Raises:
        OSError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.bind((host, port))
        listening.listen(BACKLOG)
        listening.setblocking(False)
    except OSError:
        listening.close()
        raise
    return listening


class Listener:
    """Accepts clients for a proxy."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._servers: list[asyncio.Server] = []

    async def open(
        self, sockets: Sequence[socket.socket], tls: ssl.SSLContext | None = None
    ) -> None:
        """Accept on these sockets from now on. May be called again for others."""
        # A handshake that is not finished is no connection yet, and on nobody's clock but this.
        limits = self._proxy.limits
        handshake_s = None if tls is None else limits.head_s
        shutdown_s = None if tls is None else limits.linger_s
        for each in sockets:
            server = await self._proxy.loop.create_server(
                lambda: Connection(self._proxy),
                sock=each,
                ssl=tls,
                backlog=BACKLOG,
                ssl_handshake_timeout=handshake_s,
                ssl_shutdown_timeout=shutdown_s,
            )
            self._servers.append(server)

    async def drain(self, within_s: float) -> int:
        """Stop accepting, finish what was accepted, close; how many exchanges had to be cut off.

        Connections that were taken over by another process (`handover`) are not ours any more;
        those in the accept queue go to it, or are refused if there is none.
        """
        proxy = self._proxy
        proxy.draining = True
        for server in self._servers:
            server.close()
        for client in tuple(proxy.clients):
            client.drain()
        await proxy.deserted(within_s)
        cut = len(proxy.live)
        for client in tuple(proxy.clients):
            client.cut()
        for exchange in tuple(proxy.live):  # whose client has left
            exchange.cut()
        await proxy.deserted(CUT_S)
        proxy.close()
        return cut
