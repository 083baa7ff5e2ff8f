"""A region of replicas that are not alike: what stands behind the gateways of the replicas suite.

    python -m benchmarks.replica_upstream PORT

At PORT its agent names the replicas, each at a port of its own. They compute nothing, but take the
time that `replica_work` says, keep others waiting meanwhile, and tell of it as replicas do.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from collections import deque
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import uvloop
from nearfield.api.load import LOAD_PATH, ReplicaLoad

from benchmarks.edge_upstream import MODEL, OneByOne, answer, load, targets
from benchmarks.replica_work import SLOTS, TOKEN_S, completion_body, tokens

MAX_QUEUED = 256


class Asked(NamedTuple):
    """A request, and who waits for it."""

    connection: Connection
    came_s: float
    prompt: int
    completion: int


class Replica:
    """One replica: so many slots, and a queue before them."""

    def __init__(self, token_s: float) -> None:
        self._token_s = token_s
        self._queue: deque[Asked] = deque()
        self._running = 0
        self._at_s = time.monotonic()
        self._told = ReplicaLoad(MODEL, "1", 0, 0, MAX_QUEUED, 0.0, 0.0, 0, 0, slots=SLOTS)

    def ask(self, asked: Asked) -> None:
        self._queue.append(asked)
        self._fill()

    def tell(self) -> ReplicaLoad:
        """What it has to do, and what it has done."""
        now_s = self._account()
        return replace(
            self._told,
            running=self._running,
            waiting=len(self._queue),
            room=SLOTS - self._running + MAX_QUEUED - len(self._queue),
            queue_age_s=now_s - self._queue[0].came_s if self._queue else 0.0,
        )

    def _fill(self) -> None:
        self._account()
        while self._queue and self._running < SLOTS:
            asked = self._queue.popleft()
            self._running += 1
            took_s = (asked.prompt + asked.completion) * self._token_s
            asyncio.get_running_loop().call_later(took_s, self._done, asked, took_s)

    def _done(self, asked: Asked, took_s: float) -> None:
        self._account()
        self._running -= 1
        told, used = self._told, asked.prompt + asked.completion
        self._told = replace(
            told,
            tokens=told.tokens + used,
            answered=told.answered + 1,
            answered_tokens=told.answered_tokens + used,
            prompt_tokens=told.prompt_tokens + asked.prompt,
            first_byte_s=told.first_byte_s + took_s,
        )
        asked.connection.reply(asked)
        self._fill()

    def _account(self) -> float:
        """Add the time since the last change to what was spent."""
        now_s = time.monotonic()
        spent_s, self._at_s = now_s - self._at_s, now_s
        if self._running:
            told = self._told
            self._told = replace(
                told,
                busy_s=told.busy_s + spent_s,
                request_s=told.request_s + spent_s * self._running,
            )
        return now_s


class Connection(OneByOne):
    """To one replica."""

    def __init__(self, replica: Replica) -> None:
        super().__init__()
        self._replica = replica

    def asked(self, request: bytes, end: int) -> None:
        if LOAD_PATH.encode() in request[:end]:
            self.transport.write(load(self._replica.tell()))
        elif request.startswith(b"GET"):
            self.transport.write(answer(b"{}"))
        else:
            prompt, completion = tokens(json.loads(request[end:]))
            self._replica.ask(Asked(self, time.monotonic(), prompt, completion))

    def reply(self, asked: Asked) -> None:
        if not self.transport.is_closing():
            self.transport.write(answer(completion_body(asked.prompt, asked.completion)))


class Agent(OneByOne):
    """Names the replicas, whatever it is asked."""

    def __init__(self, told: bytes) -> None:
        super().__init__()
        self._told = told

    def asked(self, request: bytes, end: int) -> None:
        self.transport.write(self._told)


async def serve(port: int) -> None:
    loop = asyncio.get_running_loop()
    ports = []
    for token_s in TOKEN_S:
        make = partial(Connection, Replica(token_s))
        server = await loop.create_server(make, "127.0.0.1", 0, backlog=2048)
        ports.append(server.sockets[0].getsockname()[1])
    agent = await loop.create_server(partial(Agent, targets(ports)), "127.0.0.1", port)
    print("bench: ready", flush=True)
    gc.freeze()
    await agent.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
