"""The load: open loop, each request at its own moment, whatever became of those before.

Latency counts from the moment at which a request was due, so that a client which falls behind
cannot hide it. What is answered is compared with what must be: an answer of another request, or
half of one, is not good.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import aiohttp

from tests.chaos.ledger import BOUND, Answer, Kind
from tests.chaos.stub import TOKENS, text_of

MODEL = "stub"
ANYBODY = "any"
"""The tenant whose data may be anywhere."""
GRACE_S = 3.0
"""How much longer than a request's deadline its client waits for the answer that says so: a machine
that is busy with all of this delivers late."""
Again = Literal["never", "refused", "broken"]


@dataclass(frozen=True, slots=True)
class Planned:
    """A request to be sent.

    Attributes:
        after_s: from the beginning. words: for the engine, besides its id.
        keyed: it carries an Idempotency-Key.
        again: when its client sends it again: after a refusal, once the time is over that it was
            told; or at the next door, after a connection broke.
    """

    id: str
    after_s: float
    tenant: str
    stream: bool = False
    words: str = ""
    deadline_s: float = 10.0
    keyed: bool = False
    again: Again = "never"


def planned(
    count: int,
    rate: float,
    *,
    name: str,
    seed: int,
    hold_s: float = 0.15,
    streams: float = 0.2,
    tenants: Sequence[str] = (BOUND, ANYBODY),
) -> list[Planned]:
    """So many requests, on average `rate` a second, at random (Poisson).

    Args:
        name: begins all ids. streams: share of them.
    """
    draw = random.Random(seed)
    after_s = 0.0
    found = []
    for number in range(count):
        after_s += draw.expovariate(rate)
        stream = draw.random() < streams
        words = f"hold:{hold_s:g}"
        found.append(Planned(f"{name}-{number}", after_s, draw.choice(tenants), stream, words))
    return found


def with_all(requests: Sequence[Planned], **fields: object) -> list[Planned]:
    """The same requests, but for these fields."""
    return [replace(request, **fields) for request in requests]  # type: ignore[arg-type]


@dataclass
class Load:
    """Sends requests and notes what they got.

    Attributes:
        doors: base URLs of gateways, the first one first. keys: of each tenant.
        answers: so far. sent: how many have been sent. late_s: the latest, after it was due.
    """

    doors: Sequence[str]
    keys: Mapping[str, str]
    answers: list[Answer] = field(default_factory=list)
    sent: int = 0
    late_s: float = 0.0

    def __post_init__(self) -> None:
        self._changed = asyncio.Event()
        # A client whose pool searches all its connections for each request (httpx) measures itself:
        # with two hundred of them it needs a core, and what it sends is seconds late.
        self._client = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
            auto_decompress=False,
        )

    @property
    def in_flight(self) -> int:
        return self.sent - len(self.answers)

    async def run(self, requests: Sequence[Planned]) -> list[Answer]:
        """Send them all, each in its turn; the answers once the last one has come."""
        began_s = time.monotonic()
        tasks = []
        for request in requests:
            due_s = began_s + request.after_s
            wait_s = due_s - time.monotonic()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            self.sent += 1
            self._note()
            tasks.append(asyncio.create_task(self._see_to(request, due_s)))
        await asyncio.gather(*tasks)
        return self.answers

    async def close(self) -> None:
        await self._client.close()

    async def reached(self, sent: int) -> None:
        """Until so many have been sent."""
        while self.sent < sent:
            await self._changed.wait()

    def _note(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _see_to(self, request: Planned, due_s: float) -> None:
        self.answers.append(await self.ask(request, due_s))
        self._note()

    async def ask(self, request: Planned, due_s: float) -> Answer:
        """Send it, and again as far as its client does, until its deadline."""
        began_s = time.monotonic()
        self.late_s = max(self.late_s, began_s - due_s)
        until_s = began_s + request.deadline_s
        sendings, door = 0, 0
        while True:
            sendings += 1
            try:
                async with asyncio.timeout_at(until_s + GRACE_S):
                    answer = await self._send(request, self.doors[door], due_s, until_s)
            except TimeoutError:
                answer = _answer(request, due_s, "lost")
            answer = replace(answer, sendings=sendings)
            if request.again == "refused" and answer.retry_after_s is not None:
                wait_s = answer.retry_after_s
            elif request.again == "broken" and answer.kind == "error" and answer.status == 0:
                door = (door + 1) % len(self.doors)
                wait_s = 0.05
            else:
                return answer
            if time.monotonic() + wait_s >= until_s:
                return answer
            await asyncio.sleep(wait_s)

    async def _send(self, request: Planned, door: str, due_s: float, until_s: float) -> Answer:
        left_ms = max(1, math.ceil(1000 * (until_s - time.monotonic())))
        headers = {
            "authorization": f"Bearer {self.keys[request.tenant]}",
            "x-request-timeout-ms": str(left_ms),
            "x-request-id": request.id,
        }
        if request.keyed:
            headers["idempotency-key"] = request.id
        body = {"model": MODEL, "prompt": f"id:{request.id} {request.words}", "max_tokens": 16}
        if request.stream:
            body["stream"] = True
        url = f"{door}/v1/completions"
        try:
            async with self._client.post(url, json=body, headers=headers) as response:
                begun = False
                received = b""
                try:
                    async for data in response.content.iter_any():
                        begun = True
                        received += data
                except aiohttp.ClientError:
                    if request.stream and response.status == 200 and begun:
                        return _answer(request, due_s, "cut", response)
                    raise
                return _judge(request, due_s, response, received)
        except aiohttp.ClientError as error:
            return replace(_answer(request, due_s, "error"), code=type(error).__name__)


def _judge(
    request: Planned, due_s: float, response: aiohttp.ClientResponse, received: bytes
) -> Answer:
    if response.status != 200:
        code = _code(received)
        after = response.headers.get("retry-after")
        kind: Kind = "refused" if response.status in (422, 429, 503) else "error"
        answer = _answer(request, due_s, kind, response)
        return replace(answer, code=code, retry_after_s=None if after is None else float(after))
    wanted = text_of(request.id, TOKENS)
    if not request.stream:
        return _answer(request, due_s, "ok" if _text(received) == wanted else "cut", response)
    text, end, code = read_stream(received)
    if end == "told":
        return replace(_answer(request, due_s, "told", response), code=code)
    whole = end == "done" and text == wanted
    return _answer(request, due_s, "ok" if whole else "cut", response)


def read_stream(received: bytes) -> tuple[str, Literal["done", "told", "cut"], str]:
    """The text of a stream, how it ended, and the code of the error that ended it."""
    text = ""
    for event in received.decode().split("\n\n"):
        if not event.startswith("data:"):
            continue
        data = event[5:].strip()
        if data == "[DONE]":
            return text, "done", ""
        said = json.loads(data)
        if "error" in said:
            return text, "told", str(said["error"].get("code"))
        text += "".join(choice["text"] for choice in said["choices"])
    return text, "cut", ""


def _text(received: bytes) -> str | None:
    try:
        return str(json.loads(received)["choices"][0]["text"])
    except (ValueError, KeyError, IndexError, TypeError):
        return None


def _code(received: bytes) -> str:
    try:
        return str(json.loads(received)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return ""


def _answer(
    request: Planned, due_s: float, kind: Kind, response: aiohttp.ClientResponse | None = None
) -> Answer:
    return Answer(
        request.id,
        request.tenant,
        request.stream,
        due_s,
        time.monotonic(),
        kind,
        0 if response is None else response.status,
        region="" if response is None else response.headers.get("x-nearfield-region", ""),
    )
