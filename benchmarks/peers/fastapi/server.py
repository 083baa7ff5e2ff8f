"""FastAPI + uvicorn: one model call per request, as most people's first endpoint is.

There is no batching to tune. An `async def` that computes in the event loop is the faster of the
two usual forms here: a `def` would run 40 threads that wait for one another.
"""

from __future__ import annotations

import os

import orjson
import uvicorn
from encoder import Encoder
from fastapi import FastAPI, Response
from pydantic import BaseModel

encoder = Encoder()
app = FastAPI()


class Sentence(BaseModel):
    text: str


@app.post("/embed")
async def embed(sentence: Sentence) -> Response:
    vector = encoder.encode([sentence.text])[0]
    body = orjson.dumps({"embedding": vector}, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(body, media_type="application/json")


@app.get("/health")
async def health() -> str:
    return "ok"


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ["BENCH_PORT"]), log_level="warning")
