"""What a request of the replicas suite is, and how long replicas take: the same on every side.

Two replicas compute three times as fast as the other two, each two requests at once, first come
first served. Lengths are log-normal, as in `tests/simulation/replica_world.py`; that of a prompt
can be seen beforehand, that of its answer cannot.
"""

from __future__ import annotations

import json
import random
import statistics
from typing import Any

SLOTS = 2
TOKEN_S = (0.0003, 0.0003, 0.0009, 0.0009)
"""Of each replica: about 60 ms for a mean request, or 180. So slow that a proxy in Python is not
what is measured."""
MEAN_PROMPT, MEAN_ANSWER = 100.0, 100.0
SPREAD = 1.0
"""Standard deviation of the logarithm of both lengths."""
MOST_PROMPT, MOST_ANSWER = 4096, 512
BYTES_PER_TOKEN = 4


def bodies(count: int = 2048, seed: int = 3) -> list[dict[str, Any]]:
    """Requests. Each has a number, by which a replica knows how long its answer is."""
    draw = random.Random(seed)
    return [
        {
            "model": "chat",
            "messages": [{"role": "user", "content": "x" * (BYTES_PER_TOKEN * _prompt(draw))}],
            "max_tokens": MOST_ANSWER,
            "seed": number,
        }
        for number in range(count)
    ]


def tokens(body: dict[str, Any]) -> tuple[int, int]:
    """Of a request: its prompt's, and its answer's."""
    prompt = len(body["messages"][0]["content"]) // BYTES_PER_TOKEN
    answer = _length(random.Random(body["seed"]), MEAN_ANSWER)
    return prompt, min(MOST_ANSWER, answer)


def capacity_rps() -> float:
    """Requests a second that all replicas compute together, at the most."""
    mean = statistics.fmean(sum(tokens(body)) for body in bodies())
    return sum(SLOTS / (mean * token_s) for token_s in TOKEN_S)


def completion_body(prompt: int, completion: int) -> bytes:
    """A replica's answer."""
    usage = {"prompt_tokens": prompt, "completion_tokens": completion}
    usage["total_tokens"] = prompt + completion
    message = {"role": "assistant", "content": "hi"}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    told = {"id": "x", "object": "chat.completion", "created": 1, "model": "chat"}
    return json.dumps({**told, "choices": [choice], "usage": usage}, separators=(",", ":")).encode()


def _prompt(draw: random.Random) -> int:
    return min(MOST_PROMPT, _length(draw, MEAN_PROMPT))


def _length(draw: random.Random, mean: float) -> int:
    return max(1, round(mean * draw.lognormvariate(-(SPREAD**2) / 2, SPREAD)))
