"""OpenAI's API: models, chat completions, completions, embeddings."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

from nearfield.api import openai
from nearfield.api.events import Completed, Embedded, GenerateRequest, Text
from nearfield.api.json_body import load_json
from nearfield.core.errors import BadRequest, NearfieldError
from nearfield.core.ids import new_id
from nearfield.serving.http import JSON, Endpoint, Exchange, Frontend, Handler
from nearfield.serving.service import Answer, Service
from nearfield.telemetry import names
from nearfield.telemetry.requests import RequestRecord
from starlette.routing import Route

Parse = Callable[[Any], openai.Call]

OPERATIONS: Final[dict[openai.Kind, str]] = {
    "chat": names.CHAT,
    "completion": names.TEXT_COMPLETION,
    "embedding": names.EMBEDDINGS,
}


def render_error(error: NearfieldError) -> bytes:
    """An error's body in OpenAI's dialect."""
    return openai.dump(openai.error_body(error))


class OpenAIRoutes:
    """The handlers, over one service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def routes(self, frontend: Frontend) -> list[Route]:
        """The routes, the busiest first: they are tried in order."""
        table: list[tuple[str, str, Handler]] = [
            ("POST", "/v1/chat/completions", self.chat),
            ("POST", "/v1/completions", self.complete),
            ("POST", "/v1/embeddings", self.embed),
            ("GET", "/v1/models", self.models),
            ("GET", "/v1/models/{model:path}", self.model),
        ]
        return [
            Route(path, Endpoint(path, {method: handler}, render_error, frontend))
            for method, path, handler in table
        ]

    # ---- handlers ---------------------------------------------------------------------------

    async def chat(self, exchange: Exchange) -> None:
        await self._generate(exchange, "chat", openai.parse_chat)

    async def complete(self, exchange: Exchange) -> None:
        await self._generate(exchange, "completion", openai.parse_completion)

    async def embed(self, exchange: Exchange) -> None:
        service = self._service
        exchange.record.operation = OPERATIONS["embedding"]
        exchange.require_content_type((JSON,))
        with service.gate.place(exchange.queue_share) as place:
            call = await self._call(exchange, openai.parse_embeddings)
            service.require_task("embed")
            embedded: list[Embedded] = []
            with service.answer(exchange, place, call.requests, whole=True) as answer:
                async for events in answer:
                    embedded += [event for _, event in events if isinstance(event, Embedded)]
            await exchange.answer(openai.embeddings_body(call, embedded))

    async def models(self, exchange: Exchange) -> None:
        service = self._service
        await exchange.answer(openai.dump(openai.models_body(service.model, service.created_s)))

    async def model(self, exchange: Exchange) -> None:
        service = self._service
        service.require_model(exchange.path_params["model"])
        await exchange.answer(openai.dump(openai.model_body(service.model, service.created_s)))

    # ---- generation -------------------------------------------------------------------------

    async def _generate(self, exchange: Exchange, kind: openai.Kind, parse: Parse) -> None:
        service = self._service
        exchange.record.operation = OPERATIONS[kind]
        exchange.require_content_type((JSON,))
        with service.gate.place(exchange.queue_share) as place:
            call = await self._call(exchange, parse)
            self._require_abilities(call)
            _describe(exchange.record, call)
            answer_id = new_id("chatcmpl" if kind == "chat" else "cmpl")
            exchange.record.attributes[names.RESPONSE_ID] = answer_id
            tool_format = service.capabilities.tool_format
            renderer = openai.Renderer(call, answer_id, int(time.time()), tool_format)
            send = _stream if call.stream else _send_whole
            with service.answer(exchange, place, call.requests, whole=not call.stream) as answer:
                await send(exchange, answer, renderer)

    async def _call(self, exchange: Exchange, parse: Parse) -> openai.Call:
        body = await exchange.body(self._service.spec.limits.max_body_bytes)
        call = parse(load_json(body))
        self._service.require_model(call.model)
        return call

    def _require_abilities(self, call: openai.Call) -> None:
        """Refuse what this model cannot do.

        Raises:
            BadRequest: it generates no text, has no chat template, or takes no tools.
        """
        self._service.require_task("generate")
        capabilities = self._service.capabilities
        if call.kind == "chat" and not capabilities.chat:
            raise BadRequest(
                f"Model {call.model!r} has no chat template: use POST /v1/completions, or set "
                "engine.chat_template in its config.",
                param="messages",
                code="unsupported_task",
            )
        if call.reads_tool_calls and capabilities.tool_format is None:
            raise BadRequest(
                f"Model {call.model!r} takes no tools. Leave tools out.",
                param="tools",
                code="unsupported_parameter",
            )


async def _stream(exchange: Exchange, answer: Answer, renderer: openai.Renderer) -> None:
    """Server-sent events: one write for all that one step of the engine brought."""
    completed: list[Completed] = []
    opened = False
    async for events in answer:
        chunks: list[bytes] = []
        for prompt, event in events:
            if type(event) is Text:
                chunks += renderer.chunk(event, prompt)
            elif isinstance(event, Completed):
                completed.append(event)
        if not opened:
            # Only now: what fails before the first token still gets a status of its own.
            opened = True
            await exchange.open_stream(lambda error: b"".join(renderer.error(error)))
            chunks = renderer.first_chunks() + chunks
        if chunks:
            await exchange.write(b"".join(chunks))
    await exchange.end_stream(b"".join(renderer.finish(completed)))


async def _send_whole(exchange: Exchange, answer: Answer, renderer: openai.Renderer) -> None:
    completed: list[Completed] = []
    async for events in answer:
        for prompt, event in events:
            if type(event) is Text:
                renderer.add(event, prompt)
            elif isinstance(event, Completed):
                completed.append(event)
    await exchange.answer(renderer.full(completed))


def _describe(record: RequestRecord, call: openai.Call) -> None:
    """What telemetry says of the request: its settings, never its text."""
    request = call.requests[0]
    assert isinstance(request, GenerateRequest)
    sampling = request.sampling
    record.attributes |= {
        names.REQUEST_CHOICES: call.choices,
        names.REQUEST_STREAM: call.stream,
        names.REQUEST_TEMPERATURE: sampling.temperature,
        names.REQUEST_TOP_P: sampling.top_p,
    }
    if sampling.max_tokens is not None:
        record.attributes[names.REQUEST_MAX_TOKENS] = sampling.max_tokens
