"""The proxy that everyone writes first: aiohttp on both sides, streaming, on uvloop."""

from __future__ import annotations

import os

import uvloop
from aiohttp import ClientSession, ClientTimeout, TCPConnector, web

UPSTREAM = f"http://127.0.0.1:{os.environ['BENCH_UPSTREAM']}"
DROPPED = {"host", "connection", "transfer-encoding", "content-length"}


async def forward(request: web.Request) -> web.StreamResponse:
    session = request.app["session"]
    headers = {n: v for n, v in request.headers.items() if n.lower() not in DROPPED}
    async with session.request(
        request.method, UPSTREAM + request.path_qs, headers=headers, data=await request.read()
    ) as answer:
        kept = {n: v for n, v in answer.headers.items() if n.lower() not in DROPPED}
        if "content-length" in answer.headers:
            return web.Response(status=answer.status, headers=kept, body=await answer.read())
        response = web.StreamResponse(status=answer.status, headers=kept)
        await response.prepare(request)
        async for data in answer.content.iter_any():
            await response.write(data)
        await response.write_eof()
        return response


async def sessions(app: web.Application):
    connector = TCPConnector(limit=0, keepalive_timeout=60)
    timeout = ClientTimeout(total=600)
    async with ClientSession(connector=connector, timeout=timeout) as session:
        app["session"] = session
        yield


def main() -> None:
    uvloop.install()
    app = web.Application(client_max_size=2**24)
    app.cleanup_ctx.append(sessions)
    app.router.add_route("*", "/{path:.*}", forward)
    port = int(os.environ["BENCH_PORT"])
    web.run_app(app, host="127.0.0.1", port=port, access_log=None, print=None)


if __name__ == "__main__":
    main()
