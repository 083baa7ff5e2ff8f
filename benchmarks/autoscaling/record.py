"""A real model's answers, one row a request: what `nearfield simulate --calibrate` reads.

    python -m benchmarks.autoscaling record http://127.0.0.1:8000/chat chat run.csv --rates 1,5,9

An open loop of streamed chats at these rates, one after the other, each for `--seconds`; prompts
and answers of random lengths. Ask the replica's own URL: a gateway's part would be taken for the
engine's. It needs a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from nearfield.simulator.calibrate import COLUMNS

PROMPT_LETTERS = (10, 160)
ANSWER_TOKENS = (20, 120)
WARM_UP_S = 3.0
TIMEOUT_S = 60.0

Row = tuple[float, int, int, float, float]
"""As `COLUMNS` names them."""


async def record(
    url: str,
    model: str,
    seconds: float,
    rates_rps: Sequence[float],
    *,
    seed: int,
    answer_tokens: tuple[int, int] = ANSWER_TOKENS,
) -> list[Row]:
    """Ask, `seconds` at each rate.

    Args:
        answer_tokens: the shortest answer and the longest.

    Raises:
        httpx.HTTPError: a request failed.
    """
    rng = random.Random(seed)
    due_s, at_s = [], 0.0
    for part, rate_rps in enumerate(rates_rps, start=1):
        while at_s < seconds * part:
            at_s += rng.expovariate(rate_rps)
            due_s.append(at_s)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=TIMEOUT_S, limits=limits, trust_env=False) as client:
        begun_s = time.perf_counter() + 0.2
        asked = []
        for due in due_s:
            body = _body(model, rng.randint(*PROMPT_LETTERS), rng.randint(*answer_tokens))
            asked.append(_ask(client, url, body, begun_s, due))
        return sorted(await asyncio.gather(*asked))


def _body(model: str, letters: int, tokens: int) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": "7" * letters}],
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def _ask(
    client: httpx.AsyncClient, url: str, body: dict[str, Any], begun_s: float, due_s: float
) -> Row:
    await asyncio.sleep(max(0.0, begun_s + due_s - time.perf_counter()))
    sent_s = time.perf_counter()
    first_s = 0.0
    usage: dict[str, Any] = {}
    async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            usage = event.get("usage") or usage
            if not first_s and any(c["delta"].get("content") for c in event["choices"]):
                first_s = time.perf_counter() - sent_s
    total_s = time.perf_counter() - sent_s
    counts = usage["prompt_tokens"], usage["completion_tokens"]
    return sent_s - begun_s, *counts, first_s or total_s, total_s


def write(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for arrival_s, tokens_in, tokens_out, first_s, total_s in rows:
            times = f"{first_s:.6f}", f"{total_s:.6f}"
            writer.writerow((f"{arrival_s:.6f}", tokens_in, tokens_out, *times))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.autoscaling record")
    parser.add_argument("url", help="the model's base URL, without /v1")
    parser.add_argument("model")
    parser.add_argument("file", type=Path)
    parser.add_argument("--rates", default="1,5,9", help="requests a second, one after the other")
    parser.add_argument("--seconds", type=float, default=10.0, help="at each of them")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args(arguments)
    rates_rps = [float(rate) for rate in given.rates.split(",")]

    async def run() -> list[Row]:
        await record(given.url, given.model, WARM_UP_S, [4.0], seed=0)
        return await record(given.url, given.model, given.seconds, rates_rps, seed=given.seed)

    try:
        rows = asyncio.run(run())
    except httpx.HTTPError as error:
        parser.error(f"{given.url} does not answer: {error}")
    write(given.file, rows)
    print(f"{len(rows)} requests in {given.file}")
    return 0
