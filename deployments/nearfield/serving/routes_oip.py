"""The Open Inference Protocol v2: health, metadata, infer, and the generate extension."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version as installed_version

from nearfield.api import oip, openai
from nearfield.api.events import Completed, Embedded, GenerateRequest, Inferred, Request, Task, Text
from nearfield.core.errors import BadRequest, NearfieldError
from nearfield.serving.access import Door
from nearfield.serving.http import JSON, OCTETS, Endpoint, Exchange, Frontend, Handler
from nearfield.serving.service import Answer, Service
from nearfield.telemetry import names
from starlette.routing import Route

HEADER_LENGTH = b"inference-header-content-length"


def render_error(error: NearfieldError) -> bytes:
    """An error's body in this protocol's dialect."""
    return openai.dump(oip.error_body(error))


class OIPRoutes:
    """The handlers, over one service."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._server = openai.dump(oip.server_metadata(installed_version("nearfield")))

    def routes(self, frontend: Frontend) -> list[Route]:
        """The routes, the busiest first: they are tried in order."""
        of_model: list[tuple[str, str, Handler]] = [
            ("POST", "/infer", self.infer),
            ("POST", "/generate", self.generate),
            ("POST", "/generate_stream", self.generate_stream),
            ("GET", "/ready", self.model_ready),
            ("GET", "", self.model),
        ]
        prefixes = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")
        table: list[tuple[str, str, Handler, Door | None]] = [
            (method, prefix + path, handler, "inference")
            for prefix in prefixes
            for method, path, handler in of_model
        ]
        table += [
            ("GET", "/v2", self.server, "inference"),
            ("GET", "/v2/health/live", self.live, None),
            ("GET", "/v2/health/ready", self.ready, None),
        ]
        return [
            Route(path, Endpoint(path, {method: handler}, render_error, frontend, door=door))
            for method, path, handler, door in table
        ]

    # ---- health and metadata ----------------------------------------------------------------

    async def server(self, exchange: Exchange) -> None:
        await exchange.answer(self._server)

    async def live(self, exchange: Exchange) -> None:
        await _state(exchange, "live", good=self._service.host.healthy)

    async def ready(self, exchange: Exchange) -> None:
        await _state(exchange, "ready", good=self._service.ready)

    async def model_ready(self, exchange: Exchange) -> None:
        self._require_model(exchange)
        await _state(exchange, "ready", good=self._service.ready)

    async def model(self, exchange: Exchange) -> None:
        self._require_model(exchange)
        inputs, outputs = self._tensors()
        spec, platform = self._service.spec, self._service.capabilities.platform
        body = oip.model_metadata(spec.model, spec.version, platform, inputs, outputs)
        await exchange.answer(openai.dump(body))

    # ---- infer ------------------------------------------------------------------------------

    async def infer(self, exchange: Exchange) -> None:
        service = self._service
        exchange.record.operation = names.INFER
        self._require_model(exchange)
        exchange.require_content_type((JSON, OCTETS), optional=True)
        header_length = _header_length(exchange)
        inputs, outputs = self._tensors()
        with service.gate.place(exchange.queue_share) as place:
            body = await exchange.body(service.spec.limits.max_body_bytes)
            call = oip.parse_infer(body, header_length, inputs, outputs)
            requests = self._requests(call)
            with service.answer(exchange, place, requests, whole=True) as answer:
                inferred = await _collect(answer, len(requests))
        spec = service.spec
        rendered, json_length = oip.render_infer(call, spec.model, spec.version, outputs, inferred)
        if json_length is None:
            await exchange.answer(rendered)
        else:
            length = (HEADER_LENGTH, b"%d" % json_length)
            await exchange.answer(rendered, content_type=OCTETS, headers=[length])

    def _task(self) -> Task:
        """What `infer` means for this model."""
        tasks = self._service.capabilities.tasks
        return "tensor" if "tensor" in tasks else "embed" if "embed" in tasks else "generate"

    def _tensors(self) -> tuple[Sequence[oip.Metadata], Sequence[oip.Metadata]]:
        """The model's inputs and outputs; a text model's are made of its text."""
        capabilities = self._service.capabilities
        task = self._task()
        if task == "tensor":
            return capabilities.inputs, capabilities.outputs
        if task == "embed":
            return oip.TEXT_INPUTS, oip.embedding_outputs(capabilities.dimensions or -1)
        return oip.TEXT_INPUTS, oip.TEXT_OUTPUTS

    def _requests(self, call: oip.InferCall) -> Sequence[Request]:
        task = self._task()
        if task == "tensor":
            return (call.request(),)
        return oip.to_text_requests(call, task, chat=self._service.capabilities.chat)

    # ---- generate ---------------------------------------------------------------------------

    async def generate(self, exchange: Exchange) -> None:
        service = self._service
        exchange.record.operation = names.TEXT_COMPLETION
        with service.gate.place(exchange.queue_share) as place:
            request, identity = await self._generate_request(exchange)
            with service.answer(exchange, place, (request,), whole=True) as answer:
                text = "".join(
                    [
                        event.text
                        async for events in answer
                        for _, event in events
                        if isinstance(event, Text)
                    ]
                )
        await exchange.answer(self._generated(text, identity))

    async def generate_stream(self, exchange: Exchange) -> None:
        service = self._service
        exchange.record.operation = names.TEXT_COMPLETION
        with service.gate.place(exchange.queue_share) as place:
            request, identity = await self._generate_request(exchange)
            with service.answer(exchange, place, (request,), whole=False) as answer:
                opened = False
                async for events in answer:
                    if not opened:
                        opened = True
                        await exchange.open_stream(_last_event)
                    texts = [e.text for _, e in events if isinstance(e, Text) and e.text]
                    if texts:
                        said = (self._generated(text, identity) for text in texts)
                        await exchange.write(b"".join(_event(data) for data in said))
        await exchange.end_stream()

    async def _generate_request(self, exchange: Exchange) -> tuple[GenerateRequest, str | None]:
        service = self._service
        self._require_model(exchange)
        service.require_task("generate")
        exchange.require_content_type((JSON,), optional=True)
        body = await exchange.body(service.spec.limits.max_body_bytes)
        return oip.parse_generate(body, chat=service.capabilities.chat)

    def _generated(self, text: str, identity: str | None) -> bytes:
        spec = self._service.spec
        document = {"model_name": spec.model, "model_version": spec.version}
        if identity is not None:
            document["id"] = identity
        return openai.dump({**document, oip.TEXT_OUTPUT: text})

    def _require_model(self, exchange: Exchange) -> None:
        parameters = exchange.path_params
        self._service.require_model(parameters["model"], parameters.get("version"))


async def _collect(answer: Answer, requests: int) -> Inferred:
    """The whole answer as tensors: the model's own, its vectors, or its texts in order."""
    texts = [""] * requests
    inferred: Inferred | None = None
    async for events in answer:
        for index, event in events:
            if isinstance(event, Text):
                texts[index] += event.text
            elif isinstance(event, Inferred):
                inferred = event
            elif isinstance(event, Embedded):
                inferred = oip.embedded_to_inferred(event)
            elif isinstance(event, Completed):
                inferred = Inferred({oip.TEXT_OUTPUT: oip.text_tensor(texts)}, event.timings)
    assert inferred is not None, "an answer ends with a terminal event"
    return inferred


def _header_length(exchange: Exchange) -> int | None:
    given = exchange.headers.get(HEADER_LENGTH)
    if given is None:
        return None
    if not given.isdigit() or len(given) > 18:
        raise BadRequest(
            "Inference-Header-Content-Length must be the length of the JSON part in bytes.",
            param=HEADER_LENGTH.decode(),
        )
    return int(given)


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def _last_event(error: NearfieldError) -> bytes:
    return _event(openai.dump(oip.error_event(error)))


async def _state(exchange: Exchange, name: str, *, good: bool) -> None:
    await exchange.answer(openai.dump({name: good}), status=200 if good else 503)
