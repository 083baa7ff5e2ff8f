"""One gateway process: `python -m nearfield.edge.worker`, started by the supervisor.

It gets its listening sockets over a channel, says `ready` there once it accepts, and is told there
when to go (`drain SECONDS`). When the channel ends the supervisor is gone, and so is it, after a
drain: whatever kills the supervisor, no worker outlives it for long.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import signal
import socket
import sys
from pathlib import Path

import uvloop
from nearfield.core.errors import BadRequest, NearfieldError
from nearfield.core.settings import Settings
from nearfield.edge import channel, files
from nearfield.edge.gateway import Gateway, Place
from nearfield.telemetry import logs

EXIT_FAILED, EXIT_INVALID = 1, 2
YOUNG = 10_000
"""Objects between two collections of garbage. A request makes some hundred and leaves no cycles: at
Python's own 700, collections took 7 % of the time, in pauses of up to 60 ms."""


class Orders:
    """Orders to leave, from the supervisor or by signal: seconds for the drain. The last counts."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._queue: asyncio.Queue[float] = asyncio.Queue()

    async def next(self) -> float:
        return await self._queue.get()

    def give(self, drain_s: float) -> None:
        self._queue.put_nowait(drain_s)

    async def listen(self) -> None:
        """Until the supervisor is gone."""
        async for order in channel.lines(self._line):
            self.give(float(order.partition(" ")[2]))
        self.give(channel.DRAIN_S)


async def serve(given: argparse.Namespace, line: socket.socket) -> int:
    """Run until told to go; returns how many requests were cut off."""
    loop = asyncio.get_running_loop()
    orders = Orders(line)
    loop.add_signal_handler(signal.SIGTERM, orders.give, channel.DRAIN_S)
    sockets = await channel.receive_sockets(line)
    if not sockets:
        return 0
    read, settings = files.read(given.file), Settings.from_env(os.environ)
    state = given.state or files.default_state(settings, read.gateway.gateway)
    async with Gateway(read, Place(state, settings, os.environ, given.workers)) as gateway:
        await gateway.listen(sockets)
        gc.collect()
        gc.freeze()  # what lives as long as the process need not be looked at again
        gc.set_threshold(YOUNG, 20, 100)
        await channel.say(line, channel.READY)
        listening = asyncio.create_task(orders.listen())
        cut = await _leave(gateway, orders)
        listening.cancel()
    return cut


async def _leave(gateway: Gateway, orders: Orders) -> int:
    """Wait for the order to go, and go; a later order may leave less time."""
    within_s = await orders.next()
    while True:
        draining = asyncio.create_task(gateway.drain(within_s))
        sooner = asyncio.create_task(orders.next())
        await asyncio.wait((draining, sooner), return_when=asyncio.FIRST_COMPLETED)
        if draining.done():
            sooner.cancel()
            return draining.result()
        draining.cancel()
        await asyncio.wait((draining,))
        within_s = sooner.result()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m nearfield.edge.worker", description=__doc__)
    parser.add_argument("--channel", type=int, required=True, help="an inherited socket")
    parser.add_argument("--state", type=Path, help="the gateway's folder; absent: by its name")
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("file", type=Path)
    given = parser.parse_args()
    logs.configure()
    line = socket.socket(fileno=given.channel)
    line.setblocking(False)
    try:
        uvloop.run(serve(given, line))
    except NearfieldError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return EXIT_INVALID if isinstance(error, BadRequest) else EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
