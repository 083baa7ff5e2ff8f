"""Ray Serve with `@serve.batch`, through whichever ingress the environment has chosen.

The replica computes in a thread, so that it goes on reading requests while it does.
"""

from __future__ import annotations

import asyncio
import os

import local
import orjson
from encoder import MAX_BATCH, Encoder
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

BATCH_WAIT_S = float(os.environ.get("BENCH_BATCH_WAIT_S", "0.002"))
FORWARDED = ("BENCH_", "OMP_", "PYTHONPATH", "RAY_SERVE_", "HF_", "TOKENIZERS_")


@serve.deployment(max_ongoing_requests=256)
class Embed:
    def __init__(self) -> None:
        self.encoder = Encoder()

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=BATCH_WAIT_S)
    async def encode(self, texts: list[str]) -> list:
        return list(await asyncio.to_thread(self.encoder.encode, texts))

    async def __call__(self, request: Request) -> Response:
        vector = await self.encode((await request.json())["text"])
        body = orjson.dumps({"embedding": vector}, option=orjson.OPT_SERIALIZE_NUMPY)
        return Response(body, media_type="application/json")


def main() -> None:
    local.run(lambda: serve.run(Embed.bind(), route_prefix="/embed"), FORWARDED)


if __name__ == "__main__":
    main()
