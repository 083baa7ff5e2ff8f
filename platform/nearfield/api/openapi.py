"""The OpenAPI 3.1 document of one model's endpoint: what it takes, and every answer it can give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from nearfield.api import oip
from nearfield.api import openai_types as types
from nearfield.api.load import LOAD_PATH, ReplicaLoad
from nearfield.core.spec import NAME_PATTERN, ModelSpec
from pydantic import TypeAdapter
from pydantic.json_schema import models_json_schema

Json = dict[str, Any]

_BODIES = (types.ChatBody, types.CompletionBody, types.EmbeddingBody)
_PARTS = (types.GenerateParameters,)
_ANSWERS = (
    types.ChatResponse,
    types.CompletionResponse,
    types.EmbeddingResponse,
    types.ModelList,
    types.ModelItem,
    types.ErrorResponse,
)

_EVENTS: Json = {
    "text/event-stream": {
        # one server-sent event; `data` is JSON, or OpenAI's closing [DONE]
        "schema": {
            "type": "object",
            "required": ["data"],
            "properties": {"data": {"type": "string"}},
        }
    }
}
_PUBLIC = ("/healthz", "/livez", "/readyz", "/v2/health/live", "/v2/health/ready")
_PROBLEMS = {
    "400": "The request is wrong; the error names the field and the remedy.",
    "401": "The region is closed, and the request has neither a passport nor a key.",
    "403": "The passport or key is not for this model or this region.",
    "404": "There is no such model here.",
    "408": "The request's deadline passed in front of the replica.",
    "413": "The body is too large.",
    "415": "The body is not of a type that is taken.",
    "429": "The queue is full; Retry-After says when to come back.",
    "500": "The model failed on this request.",
    "502": "The upstream of a remote model failed.",
    "503": "The model is starting, stopping or broken.",
    "504": "The request's deadline passed.",
}


class Abilities(Protocol):
    """What the document needs of an engine's capabilities."""

    @property
    def tasks(self) -> frozenset[Any]: ...
    @property
    def chat(self) -> bool: ...


_LOAD: Json = TypeAdapter(ReplicaLoad).json_schema()


def document(spec: ModelSpec, abilities: Abilities) -> Json:
    """The document for one model: only the routes that its engine can answer.

    Paths are relative to the application's route prefix, which the caller's URL already has.
    """
    paths: Json = {
        "/v1/models": {"get": _get("List the model.", _ref("ModelList"))},
        "/v1/models/{model}": {
            "get": _get("The model.", _ref("ModelItem"), ["400", "404"], [_path("model")])
        },
        "/v2": {"get": _get("The server's name and extensions.", _object("name", "version"))},
        "/v2/health/live": {"get": _health("Whether the replica runs.")},
        "/v2/health/ready": {"get": _health("Whether it answers inference.")},
        "/healthz": {"get": _state("Whether the replica runs.")},
        "/livez": {"get": _state("Whether the replica runs.")},
        "/readyz": {"get": _state("Whether it answers inference.")},
        "/metrics": {
            "get": {
                "summary": "This replica's metrics, for Prometheus.",
                "responses": {"200": {"description": "Text.", "content": {"text/plain": {}}}},
            }
        },
        LOAD_PATH: {"get": _get("How much the replica has to do.", _LOAD)},
        "/openapi.json": {"get": _get("This document.", {"type": "object"})},
    }
    if "generate" in abilities.tasks:
        if abilities.chat:
            paths["/v1/chat/completions"] = {"post": _post("Chat.", "ChatBody", "ChatResponse")}
        paths["/v1/completions"] = {
            "post": _post("Complete a prompt.", "CompletionBody", "CompletionResponse")
        }
    if "embed" in abilities.tasks:
        paths["/v1/embeddings"] = {
            "post": _post("Embed texts.", "EmbeddingBody", "EmbeddingResponse", stream=False)
        }
    paths |= _oip_paths(abilities)
    _close(paths)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"{spec.model} on nearfield",
            "version": spec.version,
            "description": "OpenAI's API under /v1, the Open Inference Protocol under /v2.",
        },
        "paths": paths,
        # {}: nothing is needed where the region is open
        "security": [{}, {"key": []}, {"passport": []}],
        "components": {
            "schemas": _schemas(spec),
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "bearerFormat": "nf_<id>_<secret>"},
                "passport": {"type": "apiKey", "in": "header", "name": "x-nearfield-passport"},
            },
        },
    }


def _close(paths: Json) -> None:
    """Say of every route but those of health that it may refuse a caller."""
    for path, operations in paths.items():
        error = "OipError" if path.startswith("/v2") else "ErrorResponse"
        for operation in operations.values():
            if path in _PUBLIC:
                operation["security"] = []
            else:
                operation["responses"] |= _problems(["401", "403"], error)


def _schemas(spec: ModelSpec) -> Json:
    _, defined = models_json_schema(
        [(body, "validation") for body in _BODIES + _PARTS]
        + [(body, "serialization") for body in _ANSWERS],
        ref_template="#/components/schemas/{model}",
        by_alias=True,
    )
    schemas: Json = defined["$defs"]
    for body in _BODIES:
        schemas[body.__name__]["properties"]["model"] = {"const": spec.model}
    schemas["OipError"] = _object("error")
    tensor = _object("name", "datatype") | {}
    tensor["properties"] |= {
        "datatype": {"enum": sorted(oip.DTYPES)},
        "shape": {"type": "array", "items": {"type": "integer"}},
        "parameters": {"type": "object"},
    }
    schemas["TensorMetadata"] = tensor
    schemas["InferInput"] = {
        **tensor,
        "required": ["name", "datatype", "shape"],
        "properties": tensor["properties"] | {"data": {"type": "array"}},
        "additionalProperties": False,
    }
    schemas["InferOutput"] = {
        "type": "object",
        "required": ["name"],
        "properties": {"name": {"type": "string"}, "parameters": {"type": "object"}},
        "additionalProperties": False,
    }
    schemas["InferBody"] = {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": {"type": "string"},
            "parameters": {"type": "object"},
            "inputs": _many("InferInput"),
            "outputs": _many("InferOutput"),
        },
        "additionalProperties": False,
    }
    answer = _object("model_name", "model_version")
    answer["required"].append("outputs")
    answer["properties"] |= {"id": {"type": "string"}, "outputs": _many("InferInput")}
    schemas["InferResponse"] = answer
    metadata = _object("name", "platform")
    metadata["properties"] |= {
        "versions": {"type": "array", "items": {"type": "string"}},
        "inputs": _many("TensorMetadata"),
        "outputs": _many("TensorMetadata"),
    }
    schemas["ModelMetadata"] = metadata
    schemas["GenerateBody"] = {
        "type": "object",
        "required": ["text_input"],
        "properties": {
            "text_input": {"type": "string"},
            "parameters": _ref("GenerateParameters"),
            "id": {"type": "string"},
        },
        "additionalProperties": False,
    }
    generated = _object("text_output", "model_name", "model_version")
    generated["properties"]["id"] = {"type": "string"}
    schemas["GenerateResponse"] = generated
    return schemas


def _oip_paths(abilities: Abilities) -> Json:
    paths: Json = {}
    for base, parameters in (
        ("/v2/models/{model}", [_path("model")]),
        ("/v2/models/{model}/versions/{version}", [_path("model"), _path("version")]),
    ):
        missing = ["400", "404", "503"]
        paths[base] = {
            "get": _get("Metadata.", _ref("ModelMetadata"), missing, parameters, oip_errors=True)
        }
        paths[f"{base}/ready"] = {"get": _health("Whether the model answers.", missing, parameters)}
        infer = _oip_post("Infer.", "InferBody", "InferResponse", parameters)
        octets: Json = {"application/octet-stream": {"schema": {}}}
        infer["requestBody"]["content"] |= octets
        infer["responses"]["200"]["content"] |= octets
        paths[f"{base}/infer"] = {"post": infer}
        if "generate" in abilities.tasks:
            generate = _oip_post("Generate.", "GenerateBody", "GenerateResponse", parameters)
            paths[f"{base}/generate"] = {"post": generate}
            stream = _oip_post("Generate, streamed.", "GenerateBody", None, parameters)
            paths[f"{base}/generate_stream"] = {"post": stream}
    return paths


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _many(name: str) -> Json:
    return {"type": "array", "items": _ref(name), "maxItems": oip.MAX_TENSORS}


def _object(*strings: str) -> Json:
    """An object with these required strings, and perhaps more."""
    properties: Json = {name: {"type": "string"} for name in strings}
    return {"type": "object", "required": list(strings), "properties": properties}


def _path(name: str) -> Json:
    schema = {"type": "string", "pattern": NAME_PATTERN}
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _json(schema: Json) -> Json:
    return {"application/json": {"schema": schema}}


def _problems(statuses: Sequence[str], error: str) -> Json:
    problems: Json = {}
    for status in statuses:
        problems[status] = {"description": _PROBLEMS[status], "content": _json(_ref(error))}
        if status in ("429", "503"):
            problems[status]["headers"] = {
                "Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}
            }
    return problems


def _get(
    summary: str,
    schema: Json,
    statuses: Sequence[str] = (),
    parameters: Sequence[Json] = (),
    *,
    oip_errors: bool = False,
) -> Json:
    answer = {"description": summary, "content": _json(schema)}
    problems = _problems(statuses, "OipError" if oip_errors else "ErrorResponse")
    return {
        "summary": summary,
        "parameters": list(parameters),
        "responses": {"200": answer, **problems},
    }


def _state(summary: str) -> Json:
    body = _object("status")
    answers = {"200": "Yes.", "503": "No."}
    return {
        "summary": summary,
        "responses": {
            status: {"description": said, "content": _json(body)}
            for status, said in answers.items()
        },
    }


def _health(summary: str, statuses: Sequence[str] = (), parameters: Sequence[Json] = ()) -> Json:
    body = _json({"type": "object"})
    answers: Json = {
        "200": {"description": "Yes.", "content": body},
        "503": {"description": "No.", "content": body},
    }
    problems = {k: v for k, v in _problems(statuses, "OipError").items() if k not in answers}
    return {
        "summary": summary,
        "parameters": list(parameters),
        "responses": answers | problems,
    }


def _post(summary: str, body: str, answer: str, *, stream: bool = True) -> Json:
    content = _json(_ref(answer))
    if stream:
        content |= _EVENTS
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": _json(_ref(body))},
        "responses": {
            "200": {"description": summary, "content": content},
            **_problems(list(_PROBLEMS), "ErrorResponse"),
        },
    }


def _oip_post(summary: str, body: str, answer: str | None, parameters: Sequence[Json]) -> Json:
    return {
        "summary": summary,
        "parameters": list(parameters),
        "requestBody": {"required": True, "content": _json(_ref(body))},
        "responses": {
            "200": {
                "description": summary,
                "content": _EVENTS if answer is None else _json(_ref(answer)),
            },
            **_problems(list(_PROBLEMS), "OipError"),
        },
    }
