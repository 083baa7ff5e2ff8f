"""The load, in a process of its own: so many requests at once, or so many a second.

    python -m benchmarks.load < job.json > result.json

In a closed loop each connection sends its next request when the answer to its last is complete. An
open loop sends at random times, whatever has become of earlier requests, and counts each one's time
from when it was due. Connections are kept alive.

The client is a bare `asyncio.Protocol`: on a machine of two cores everything it does is taken from
the server, so while it measures it only cuts answers out of the byte stream and notes the time.
It is the same for all sides.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

HEADERS = "Host: bench\r\nContent-Type: application/json\r\nAccept: */*\r\n"


class BadAnswer(Exception):
    """The server answered with an error, or not at all."""


@dataclass(frozen=True, slots=True)
class Job:
    """What to send. Bodies are taken in turn by whichever connection is free.

    Attributes:
        connections: how many requests are under way at once.
        warmup_s, seconds: requests that start within `warmup_s` are not counted; after
            `seconds` more no request is started, and those under way are waited for.
        requests: stop after so many requests instead (then nothing is warm-up).
        stream: answers are server-sent events.
        headers: more header lines, each with its end.
        rate_rps: send so many a second on average, at random (Poisson), over as many connections as
            that takes: an open loop.
    """

    port: int
    path: str
    bodies: list[dict[str, Any]]
    connections: int
    warmup_s: float = 0.0
    seconds: float = 0.0
    requests: int | None = None
    stream: bool = False
    timeout_s: float = 180.0
    headers: str = ""
    rate_rps: float | None = None

    @property
    def longest_s(self) -> float:
        """It has failed if it takes longer."""
        return self.warmup_s + self.seconds + self.timeout_s


@dataclass(slots=True)
class Sample:
    """One request. Times are `perf_counter` seconds; `chunks`: an arrival each, streams only."""

    sent_s: float
    done_s: float = 0.0
    status: int = 0
    body: bytearray = field(default_factory=bytearray)
    chunks: list[tuple[float, int]] = field(default_factory=list)  # (when, bytes in body by then)


class Connection(asyncio.Protocol):
    """HTTP/1.1 as far as the sides speak it: Content-Length, chunked, or until the end."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._sample: Sample | None = None
        self._answer: asyncio.Future[Sample] | None = None
        self._in_body = False
        self._left = 0  # bytes of the body, or of the current chunk with its line end
        self._chunked = False
        self._to_the_end = False
        self._stream = False
        self.closed = False
        self.last = False  # the server takes no more requests on it

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        if self._answer is None or self._answer.done():
            return
        if self._in_body and self._to_the_end:
            self._finish()
        else:
            self._answer.set_exception(BadAnswer(f"the connection was closed ({error})"))

    def ask(self, request: bytes, *, stream: bool) -> asyncio.Future[Sample]:
        self._answer = asyncio.get_running_loop().create_future()
        self._in_body, self._stream = False, stream
        self._sample = Sample(time.perf_counter())
        self.transport.write(request)
        return self._answer

    def data_received(self, data: bytes) -> None:
        now_s = time.perf_counter()
        self._buffer += data
        sample = self._sample
        assert sample is not None
        if not self._in_body and not self._head(sample):
            return
        before = len(sample.body)
        complete = self._body(sample)
        if self._stream and len(sample.body) > before:
            sample.chunks.append((now_s, len(sample.body)))
        if complete:
            sample.done_s = now_s
            self._finish()

    def _head(self, sample: Sample) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        head = bytes(self._buffer[:end]).lower()
        del self._buffer[: end + 4]
        sample.status = int(head[9:12])
        self._chunked = b"transfer-encoding: chunked" in head
        at = head.find(b"content-length:")
        self._to_the_end = at < 0 and not self._chunked
        self.last = b"connection: close" in head
        self._left = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
        self._in_body = True
        return True

    def _body(self, sample: Sample) -> bool:
        """Move what has arrived into the sample. True: the answer is complete."""
        buffer = self._buffer
        if not self._chunked:
            sample.body += buffer
            self._left -= len(buffer)
            buffer.clear()
            return self._left <= 0 and not self._to_the_end
        while True:
            line = buffer.find(b"\r\n")
            if line < 0:
                return False
            size = int(bytes(buffer[:line]).split(b";")[0], 16)
            if len(buffer) < line + 2 + size + 2:
                return False
            sample.body += buffer[line + 2 : line + 2 + size]
            del buffer[: line + 2 + size + 2]
            if size == 0:
                return True

    def _finish(self) -> None:
        assert self._sample is not None
        assert self._answer is not None
        self._sample.done_s = self._sample.done_s or time.perf_counter()
        self._answer.set_result(self._sample)


def encode(job: Job) -> list[bytes]:
    """The requests as they go over the wire."""
    requests = []
    for body in job.bodies:
        payload = json.dumps(body).encode()
        head = f"POST {job.path} HTTP/1.1\r\n{HEADERS}{job.headers}"
        head += f"Content-Length: {len(payload)}\r\n\r\n"
        requests.append(head.encode() + payload)
    return requests


async def drive(job: Job) -> list[Sample]:
    """Run the loop; the samples in order of their ends, warm-up included.

    Raises:
        BadAnswer: any request failed; a measurement with failures is none.
    """
    async with asyncio.timeout(job.longest_s):
        return await (_closed(job) if job.rate_rps is None else _open(job, job.rate_rps))


async def _closed(job: Job) -> list[Sample]:
    loop = asyncio.get_running_loop()
    requests = encode(job)
    samples: list[Sample] = []
    sent = 0
    stop_s = time.perf_counter() + job.warmup_s + job.seconds

    async def one() -> None:
        nonlocal sent
        connection: Connection | None = None
        while sent < job.requests if job.requests is not None else time.perf_counter() < stop_s:
            if connection is None or connection.closed:
                _, connection = await loop.create_connection(Connection, "127.0.0.1", job.port)
            request = requests[sent % len(requests)]
            sent += 1
            samples.append(_good(await connection.ask(request, stream=job.stream)))
            if connection.last:
                connection.transport.close()
                connection = None
        if connection is not None:
            connection.transport.close()

    await asyncio.gather(*(one() for _ in range(job.connections)))
    return samples


async def _open(job: Job, rate_rps: float) -> list[Sample]:
    loop = asyncio.get_running_loop()
    requests = encode(job)
    samples: list[Sample] = []
    idle: list[Connection] = []

    async def one(request: bytes, due_s: float) -> None:
        connection: Connection | None = None
        while idle and connection is None:
            kept = idle.pop()
            connection = None if kept.closed else kept
        if connection is None:
            _, connection = await loop.create_connection(Connection, "127.0.0.1", job.port)
        sample = _good(await connection.ask(request, stream=job.stream))
        sample.sent_s = due_s
        samples.append(sample)
        if connection.last:
            connection.transport.close()
        else:
            idle.append(connection)

    draw = random.Random(5)  # the same times for all sides
    due_s = time.perf_counter()
    stop_s = due_s + job.warmup_s + job.seconds
    under_way: list[asyncio.Task[None]] = []
    while (due_s := due_s + draw.expovariate(rate_rps)) < stop_s:
        if (wait_s := due_s - time.perf_counter()) > 0:
            await asyncio.sleep(wait_s)
        request = requests[len(under_way) % len(requests)]
        under_way.append(asyncio.create_task(one(request, due_s)))
    await asyncio.gather(*under_way)
    for each in idle:
        each.transport.close()
    return samples


def _good(sample: Sample) -> Sample:
    """
    Raises:
        BadAnswer: it is an error.
    """
    if sample.status != 200:
        raise BadAnswer(f"status {sample.status}: {bytes(sample.body[:300])!r}")
    return sample


def quantile(values: Sequence[float], q: float) -> float:
    """Nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def summarise(job: Job, samples: list[Sample]) -> dict[str, float]:
    """Figures of the samples that started after the warm-up; latencies in ms."""
    began_s = min(s.sent_s for s in samples) + (0 if job.requests else job.warmup_s)
    counted = [s for s in samples if s.sent_s >= began_s]
    if not counted:
        raise BadAnswer("no request was both started and answered in the measured time")
    latencies = [1000 * (s.done_s - s.sent_s) for s in counted]
    if job.stream:
        # All of a stream counts, so the time is from the first start to the last end.
        took_s = max(s.done_s for s in counted) - min(s.sent_s for s in counted)
        figures = _streams(counted, took_s)
    else:
        # Answers per second of the window: what ends after it is not in it.
        stop_s = began_s + (job.seconds or max(s.done_s for s in counted) - began_s)
        took_s = stop_s - began_s
        figures = {"rps": sum(began_s <= s.done_s <= stop_s for s in samples) / took_s}
    return {
        "requests": len(counted),
        "p50_ms": quantile(latencies, 0.5),
        "p99_ms": quantile(latencies, 0.99),
        **figures,
    }


def _streams(samples: list[Sample], took_s: float) -> dict[str, float]:
    ttft_ms: list[float] = []
    gaps_ms: list[float] = []
    per_token_ms: list[float] = []
    tokens = 0
    for sample in samples:
        arrivals, made = _arrivals(sample)
        tokens += made
        ttft_ms.append(1000 * (arrivals[0] - sample.sent_s))
        gaps_ms += [1000 * (b - a) for a, b in itertools.pairwise(arrivals)]
        per_token_ms.append(1000 * (arrivals[-1] - arrivals[0]) / max(1, made - 1))
    return {
        "tokens": tokens,
        "tokens_per_s": tokens / took_s,
        "ttft_p50_ms": quantile(ttft_ms, 0.5),
        "ttft_p99_ms": quantile(ttft_ms, 0.99),
        "gap_p50_ms": quantile(gaps_ms, 0.5),
        "gap_p99_ms": quantile(gaps_ms, 0.99),
        "tpot_ms": statistics.median(per_token_ms),
    }


def _arrivals(sample: Sample) -> tuple[list[float], int]:
    """When each piece of text arrived, and how many tokens the stream says it had.

    Raises:
        BadAnswer: it ended without text or usage, or with an error in it.
    """
    arrivals: list[float] = []
    tokens: int | None = None
    chunks = iter(sample.chunks)
    when_s, upto = next(chunks, (0.0, 0))
    at = 0
    for line in bytes(sample.body).splitlines(keepends=True):
        at += len(line)
        while upto < at:
            when_s, upto = next(chunks)
        if not line.startswith(b"data:") or b"[DONE]" in line:
            continue
        event = json.loads(line[5:])
        if "error" in event:
            raise BadAnswer(str(event)[:300])
        if event.get("choices") and (event["choices"][0].get("delta") or {}).get("content"):
            arrivals.append(when_s)
        tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    if not arrivals or tokens is None:
        raise BadAnswer(f"a stream without text or usage: {bytes(sample.body[-300:])!r}")
    return arrivals, tokens


def main() -> None:
    job = Job(**json.load(sys.stdin))
    gc.disable()
    try:
        result = summarise(job, asyncio.run(drive(job)))
    except (BadAnswer, OSError, TimeoutError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
