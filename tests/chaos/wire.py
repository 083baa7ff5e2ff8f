"""Long distance, in a process of its own: TCP relays that take as long as they are told.

    python -m tests.chaos.wire eu-west=18081 us-east=18082

prints the ports that it listens on as one JSON object, then takes one order a line:

    {"wire": "eu-west", "delay_s": 0.25, "hold": "to"}

`delay_s` is for each direction. `hold` keeps what goes `to` the region, what comes `from` it, or
`both`, until it is told otherwise: a partition as TCP sees one, which sends again what was lost.
Connections are made in no time, and those to a region that is held are made too: where that matters
there is `faults.Partition`, of the kernel's own packet filter.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import deque
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Literal, cast

import uvloop

Hold = Literal["none", "to", "from", "both"]
LOOK_S = 0.02
"""How often to look whether there is somebody again."""


@dataclass
class Wire:
    """One region's, and how it is now."""

    port: int
    delay_s: float = 0.0
    hold: Hold = "none"

    def holds(self, way: Hold) -> bool:
        return self.hold in (way, "both")


class End(asyncio.Protocol):
    """One end of one connection: what it gets leaves by the other, in order, later.

    Attributes:
        way: of what it gets. other: the other end.
    """

    other: End

    def __init__(self, wire: Wire, way: Hold, lines: set[End]) -> None:
        self._wire = wire
        self.way = way
        self._lines = lines
        self._transport: asyncio.Transport | None = None
        self._due: deque[tuple[float, bytes | None]] = deque()  # None: it has ended
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        self._lines.add(self)
        self.other.go_on()

    def data_received(self, data: bytes) -> None:
        self._put(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._put(None)

    def _put(self, data: bytes | None) -> None:
        now_s = asyncio.get_running_loop().time()
        self._due.append((now_s + self._wire.delay_s, data))
        self.go_on()

    def go_on(self) -> None:
        """Pass on what is due; come back for the rest."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        there = self.other._transport
        if there is None or self._wire.holds(self.way):
            return
        loop = asyncio.get_running_loop()
        while self._due:
            due_s, data = self._due[0]
            if due_s > loop.time():
                self._timer = loop.call_at(due_s, self.go_on)
                return
            self._due.popleft()
            if data is None:
                self._lines.discard(self)
                there.close()
            elif not there.is_closing():
                there.write(data)

    def give_up(self) -> None:
        """Nobody is at the other end."""
        if self._transport is not None:
            self._transport.abort()


class Relay:
    """Listens for a wire, as long as there is somebody at its end: else it refuses, as they do."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.port = 0
        self._lines: set[End] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def listen(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    def changed(self) -> None:
        """The wire is another one: what waits may go on."""
        for end in tuple(self._lines):
            end.go_on()

    def _accept(self) -> End:
        near, far = End(self.wire, "to", self._lines), End(self.wire, "from", self._lines)
        near.other, far.other = far, near
        self._spawn(self._connect(near, far))
        return near

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, near: End, far: End) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.create_connection(lambda: far, "127.0.0.1", self.wire.port)
        except OSError:
            near.give_up()
            if self._server is not None:
                self._server.close()
                self._server = None
                self._spawn(self._come_back())

    async def _come_back(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", self.wire.port)
            except OSError:
                continue
            writer.close()
            await self.listen()
            return


async def serve(wires: dict[str, Wire]) -> None:
    """Until standard input ends."""
    relays = {name: Relay(wire) for name, wire in wires.items()}
    for relay in relays.values():
        await relay.listen()
    print(json.dumps({name: relay.port for name, relay in relays.items()}), flush=True)
    orders = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(orders), sys.stdin
    )
    while line := await orders.readline():
        order = json.loads(line)
        relay = relays[order["wire"]]
        relay.wire.delay_s = order.get("delay_s", relay.wire.delay_s)
        relay.wire.hold = order.get("hold", relay.wire.hold)
        relay.changed()
        print("done", flush=True)


if __name__ == "__main__":
    asked = dict(argument.split("=") for argument in sys.argv[1:])
    uvloop.run(serve({name: Wire(int(port)) for name, port in asked.items()}))
