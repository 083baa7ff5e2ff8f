"""Ray Serve over replicas that are not alike: its own proxy, and its power of two choices.

    python replicas.py [sized]

`sized`: a replica is given no more than it computes at once, and the rest waits at the proxy; else
Serve's own default.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import local
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from benchmarks.replica_work import SLOTS, TOKEN_S, completion_body, tokens

FORWARDED = ("BENCH_", "PYTHONPATH", "RAY_SERVE_")


@serve.deployment(num_replicas=len(TOKEN_S), ray_actor_options={"num_cpus": 0})
class Replica:
    def __init__(self) -> None:
        self.token_s = TOKEN_S[_number()]
        self.slots = asyncio.Semaphore(SLOTS)  # whoever waits is let in in turn

    async def __call__(self, request: Request) -> Response:
        if request.method == "GET":
            return Response(b"{}", media_type="application/json")
        prompt, completion = tokens(await request.json())
        async with self.slots:
            await asyncio.sleep((prompt + completion) * self.token_s)
        return Response(completion_body(prompt, completion), media_type="application/json")


def _number() -> int:
    """Each replica takes one that no other has."""
    folder = Path(os.environ["BENCH_DIR"])
    for number in range(len(TOKEN_S)):
        try:
            (folder / f"replica-{number}").touch(exist_ok=False)
        except FileExistsError:
            continue
        return number
    raise RuntimeError("a replica was started anew")


def main() -> None:
    sized = {"max_ongoing_requests": SLOTS} if "sized" in sys.argv else {}
    local.run(lambda: serve.run(Replica.options(**sized).bind(), route_prefix="/"), FORWARDED)


if __name__ == "__main__":
    main()
