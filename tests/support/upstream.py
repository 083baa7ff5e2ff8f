"""A small real upstream for engine remote: OpenAI and Open Inference over HTTP, and its bad days.

What goes wrong is chosen by the prompt: "fail 503", "break" (a stream cut off), "error event",
"slow" (never answers), anything else is echoed in capitals.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import uvicorn
from nearfield.api import oip
from nearfield.api.events import Inferred, Timings
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

DIMENSIONS = 4
INPUTS = (oip.Declared("x", "FP32", (-1, 2)),)
OUTPUTS = (oip.Declared("y", "FP32", (-1, 2)),)
KEY = "upstream-key"


class Upstream:
    """The application, and what it saw."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.gone = threading.Event()  # a client left before its answer was complete
        self.app = Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/v1/chat/completions", self.generate, methods=["POST"]),
                Route("/v1/completions", self.generate, methods=["POST"]),
                Route("/v1/embeddings", self.embed, methods=["POST"]),
                Route("/v2/models/tensors", self.metadata),
                Route("/v2/models/tensors/infer", self.infer, methods=["POST"]),
            ]
        )

    async def models(self, request: Request) -> Response:
        self.keys.add(request.headers.get("authorization"))
        return JSONResponse({"object": "list", "data": []})

    async def generate(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        prompt = body.get("prompt") or body["messages"][-1]["content"]
        if prompt.startswith("fail"):
            status = int(prompt.split()[1])
            error = {"message": "no", "type": "t", "param": "prompt", "code": "c"}
            return JSONResponse({"error": error}, status, headers={"retry-after": "7"})
        return StreamingResponse(self._stream(body, prompt), media_type="text/event-stream")

    async def _stream(self, body: dict[str, Any], prompt: str) -> AsyncIterator[str]:
        def event(value: Any) -> str:
            return f"data: {json.dumps(value)}\n\n"

        def choice(text: str, reason: str | None = None) -> dict[str, Any]:
            inner = {"delta": {"content": text}} if "messages" in body else {"text": text}
            return {"choices": [{"index": 0, "finish_reason": reason, **inner}]}

        try:
            for word in prompt.upper().split():
                yield event(choice(word + " "))
            if prompt == "break":
                return
            if prompt == "error event":
                yield event({"error": {"message": "upstream is unwell"}})
                return
            if prompt == "slow":
                await asyncio.sleep(30)
            yield event(choice("", "stop"))
            yield event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}})
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.gone.set()
            raise

    async def embed(self, request: Request) -> Response:
        body = await request.json()
        data = [
            {"index": i, "object": "embedding", "embedding": [float(len(text))] * DIMENSIONS}
            for i, text in enumerate(body["input"])
        ]
        return JSONResponse({"data": data, "usage": {"prompt_tokens": len(data)}})

    async def metadata(self, request: Request) -> Response:
        return JSONResponse(oip.model_metadata("tensors", "1", "test", INPUTS, OUTPUTS))

    async def infer(self, request: Request) -> Response:
        length = request.headers.get("inference-header-content-length")
        call = oip.parse_infer(
            await request.body(), int(length) if length else None, INPUTS, OUTPUTS
        )
        if np.isnan(call.inputs["x"]).any():
            return JSONResponse({"error": "x holds NaN"}, 400)
        answer = Inferred({"y": call.inputs["x"] * 2}, Timings(0.0))
        body, head = oip.render_infer(call, "tensors", "1", OUTPUTS, answer)
        headers = {} if head is None else {"inference-header-content-length": f"{head}"}
        return Response(body, headers=headers, media_type="application/octet-stream")


@contextmanager
def running_upstream() -> Iterator[tuple[Upstream, str]]:
    """(the upstream, its base URL without a path) while the block lasts."""
    upstream = Upstream()
    config = uvicorn.Config(upstream.app, port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    ready = threading.Event()
    while not server.started and thread.is_alive():
        ready.wait(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield upstream, f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join(timeout=10)
