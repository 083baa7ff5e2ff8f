"""The edge suite: what a proxy costs in front of an upstream that costs next to nothing.

The proxy has one core (the last), the client and the upstream have the others, so that requests
a second are the proxy's; its CPU time a request is measured beside them and says the same where
the client is the limit. JSON is asked by wrk, streams by `load`.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.load import Job
from benchmarks.server import Running, SideFailed, load, running
from benchmarks.sides import UPSTREAM, Side, tick
from benchmarks.workload import KEY

PATH = "/v1/chat/completions"
AUTHORIZATION = f"Authorization: Bearer {KEY}\r\n"
STREAMS = 64
FROZEN = 500
FROZEN_S = 3.0
MANY_REQUESTS = 200_000
READ_S = 10.0
LET_IN = b"HTTP/1.1 200"
LET_IN_S, RETRY_S = 60.0, 0.1
TICKS_PER_S = os.sysconf("SC_CLK_TCK")

Figures = dict[str, float]

# What the openai client sends, and a question of usual length.
_SCRIPT = """\
wrk.method = "POST"
wrk.body = [[{"messages":[{"role":"user","content":"What is 47 + 85? Answer with the number."}],\
"model":"chat","temperature":0}]]
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Accept"] = "application/json"
wrk.headers["User-Agent"] = "OpenAI/Python 3.1.0"
wrk.headers["X-Stainless-Lang"] = "python"
wrk.headers["X-Stainless-Package-Version"] = "3.1.0"
wrk.headers["X-Stainless-Runtime"] = "CPython"
wrk.headers["X-Stainless-Runtime-Version"] = "3.11.7"
wrk.headers["Authorization"] = "Bearer KEY"
done = function(summary, latency, requests)
  io.stderr:write(string.format("%d %d %d %d %d",
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
    summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.status
    + summary.errors.timeout))
end
"""


def cpus() -> dict[str, str]:
    """Where the proxy runs, and where the rest does."""
    allowed = sorted(os.sched_getaffinity(0))
    rest = allowed[:-1] or allowed
    return {"cpu": str(allowed[-1]), "client_cpus": ",".join(map(str, rest))}


def measure(side: Side | None, data: Path, *, seconds: float, quick: bool) -> Figures:
    """One round of a side; None: the client straight at the upstream.

    Raises:
        SideFailed: it does not start, or answers with errors, or a tool is missing.
    """
    if shutil.which("wrk") is None:
        raise SideFailed("wrk is not installed: apt-get install wrk")
    places = cpus()
    with running(UPSTREAM, data, data, places) as upstream:
        if side is None:
            return _figures(upstream, seconds, quick)
        places["upstream"] = str(upstream.port)
        with running(side, data, data, places) as proxy:
            figures = {"ready_s": proxy.started_s, **_figures(proxy, seconds, quick)}
            if side.name != "litellm":  # it would take an hour over as many requests
                figures |= _memory(proxy, quick)
            return figures


def _figures(server: Running, seconds: float, quick: bool) -> Figures:
    _wrk(server, 32, 0.5 if quick else 2.0, warmup=True)
    figures: Figures = {}
    for connections in (1, 32):
        before_s = _cpu_s(server)
        found = _wrk(server, connections, seconds)
        used_s = _cpu_s(server) - before_s
        found["cpu_us"] = 1e6 * used_s / found.pop("requests")
        figures |= {f"c{connections}_{key}": value for key, value in found.items()}
    return figures | _streams(server, seconds)


def _wrk(server: Running, connections: int, seconds: float, *, warmup: bool = False) -> Figures:
    """Ask as fast as it answers. In a warm-up some may be told to come later: a gateway has to ask
    its store for shares of the caller's limits, and a busy machine lets it wait.

    Raises:
        SideFailed: a request failed.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(_SCRIPT.replace("KEY", KEY))
        script.flush()
        command = [
            *("taskset", "-c", cpus()["client_cpus"], "wrk", "--threads", "1", "--latency"),
            *("--connections", str(connections), "--duration", f"{max(1, round(seconds))}s"),
            *("--timeout", "10s", "--script", script.name),
            f"http://127.0.0.1:{server.port}{PATH}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60)
    try:
        requests, took_us, p50_us, p99_us, errors = map(int, done.stderr.split())
    except ValueError:
        raise SideFailed(done.stderr[-300:] + done.stdout[-300:]) from None
    if (errors and not warmup) or not requests:
        raise SideFailed(f"{errors} of {requests} requests failed")
    return {
        "requests": requests,
        "rps": requests / (took_us / 1e6),
        "p50_ms": p50_us / 1000,
        "p99_ms": p99_us / 1000,
    }


def _streams(server: Running, seconds: float) -> Figures:
    job = Job(
        server.port, PATH, [tick("Hello", "") | {"model": "chat"}], STREAMS,
        seconds=seconds, stream=True, headers=AUTHORIZATION,
    )  # fmt: skip
    client = cpus()["client_cpus"]
    load(dataclasses.replace(job, seconds=0, requests=STREAMS), cpus=client)
    alone = load(dataclasses.replace(job, connections=1, seconds=min(2, seconds)), cpus=client)
    before_s = _cpu_s(server)
    found = load(job, cpus=client)
    found["cpu_us_per_token"] = 1e6 * (_cpu_s(server) - before_s) / found["tokens"]
    return {f"sse1_{k}": v for k, v in alone.items()} | {f"sse_{k}": v for k, v in found.items()}


def _memory(server: Running, quick: bool) -> Figures:
    """What stays after many requests, and what a crowd of readers that do not read takes."""
    before_mb = _resident_mb(server)
    sent = 0.0
    while sent < MANY_REQUESTS / (20 if quick else 1):
        sent += _wrk(server, 32, 1.0 if quick else 5.0)["requests"]
    after_mb = _resident_mb(server)
    frozen = _connect(server.port, FROZEN, _flood())
    time.sleep(FROZEN_S)
    first_mb = _resident_mb(server)
    time.sleep(FROZEN_S)
    second_mb = _resident_mb(server)
    for each in frozen:
        each.close()
    return {
        "rss_mb": before_mb,
        "many_grown_mb": after_mb - before_mb,
        "frozen_mb": first_mb - after_mb,
        "frozen_grown_mb": second_mb - first_mb,
    }


def _flood() -> bytes:
    """A request for a stream without an end."""
    body = b'{"model":"chat","messages":[],"stream":true,"user":"flood"}'
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{AUTHORIZATION}"
    return b"%bContent-Length: %d\r\n\r\n%b" % (head.encode(), len(body), body)


def _connect(port: int, count: int, request: bytes) -> Sequence[socket.socket]:
    """Clients that ask, and read no more than that they were let in; their own buffers are as small
    as they can be.

    Raises:
        SideFailed: one was not let in.
    """
    made: list[socket.socket] = []
    until_s = time.monotonic() + LET_IN_S
    try:
        while len(made) < count:
            client = socket.socket()
            made.append(client)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.settimeout(READ_S)
            client.connect(("127.0.0.1", port))
            client.sendall(request)
            line = client.recv(len(LET_IN))
            if line != LET_IN:  # a gateway may say "later": it is asked again, as clients do
                made.pop().close()
                if time.monotonic() > until_s:
                    raise SideFailed(f"a reader got {line!r}")
                time.sleep(RETRY_S)
    except (OSError, SideFailed) as error:
        for client in made:
            client.close()
        raise SideFailed(f"not every reader was let in: {error}") from None
    return made


def _cpu_s(server: Running) -> float:
    """CPU time of all its processes since their starts."""
    ticks = 0
    for pid in server.processes():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS_PER_S


def _resident_mb(server: Running) -> float:
    pages = 0
    for pid in server.processes():
        pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
