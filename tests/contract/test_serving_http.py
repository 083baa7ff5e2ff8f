"""The HTTP surface of a replica over a real engine process and real sockets, without Ray."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from nearfield.api.load import LOAD_PATH, parse_load
from nearfield.core.standstill import LATE_S, TICK_S
from nearfield.serving.departure import LAST_WORD_S, Departure, follow
from starlette.types import Message

from tests.support.hosting import PROGRAMS, until
from tests.support.serving import Served, served, spec_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def api() -> AsyncIterator[Served]:
    limits = {"max_running": 4, "max_queued": 2, "max_body_bytes": 4096}
    async with served(spec_of(PROGRAMS, limits=limits)) as running:
        yield running


def chat(program: str, **fields: Any) -> dict[str, Any]:
    return {"model": "test", "messages": [{"role": "user", "content": program}], **fields}


def events_of(text: str) -> list[Any]:
    """The `data:` of server-sent events, parsed where they are JSON."""
    blocks = [block for block in text.split("\n\n") if block]
    assert all(block.startswith("data: ") for block in blocks), text
    data = [block.removeprefix("data: ") for block in blocks]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


# ---- OpenAI -----------------------------------------------------------------------------------


async def test_chat(api: Served) -> None:
    answer = await api.client.post(CHAT, json=chat("say:hello say:!"))
    assert answer.status_code == 200
    body = answer.json()
    assert body["choices"][0]["message"]["content"] == "hello!"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == 2
    assert answer.headers["content-type"] == "application/json"


async def test_chat_streamed(api: Served) -> None:
    request = chat("say:a say:b", stream=True, stream_options={"include_usage": True})
    answer = await api.client.post(CHAT, json=request)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-accel-buffering"] == "no"
    *chunks, usage, done = events_of(answer.text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == "ab"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert usage["usage"]["completion_tokens"] == 2
    assert done == "[DONE]"


async def test_tokens_are_sent_as_they_come(api: Served) -> None:
    request = chat("say:first sleep:0.3 say:last", stream=True)
    async with api.client.stream("POST", CHAT, json=request) as answer:
        async for line in answer.aiter_lines():
            if "first" in line:
                assert api.service.gate.running == 1  # the rest is not there yet


@pytest.mark.parametrize("stream", [False, True])
async def test_several_prompts_in_one_completion(api: Served, stream: bool) -> None:
    prompts = ["sleep:0.1 say:one", "say:two", "say:three say:!"]
    request = {"model": "test", "prompt": prompts, "stream": stream}
    answer = await api.client.post("/v1/completions", json=request)
    texts = ["", "", ""]
    bodies = events_of(answer.text)[:-1] if stream else [answer.json()]
    for body in bodies:
        for choice in body["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == ["one", "two", "three!"]
    assert (api.service.gate.running, api.service.gate.waiting) == (0, 0)


async def test_more_prompts_than_places(api: Served) -> None:
    request = {"model": "test", "prompt": ["say:x"] * 7}
    answer = await api.client.post("/v1/completions", json=request)
    assert answer.status_code == 429
    assert (api.service.gate.running, api.service.gate.waiting) == (0, 0)


async def test_one_failing_prompt_fails_the_call(api: Served) -> None:
    request = {"model": "test", "prompt": ["sleep:30", "raise"]}
    answer = await api.client.post("/v1/completions", json=request)
    assert answer.status_code == 500
    await until(lambda: api.service.host.stats.running == 0)
    assert (api.service.gate.running, api.service.gate.waiting) == (0, 0)


@pytest.mark.parametrize("encoding", ["float", "base64"])
async def test_embeddings(api: Served, encoding: str) -> None:
    request = {"model": "test", "input": ["four", "sixsix"], "encoding_format": encoding}
    body = (await api.client.post("/v1/embeddings", json=request)).json()
    vectors = [item["embedding"] for item in body["data"]]
    if encoding == "base64":
        vectors = [np.frombuffer(base64.b64decode(v), "<f4").tolist() for v in vectors]
    assert vectors == [[4, 1, 2], [6, 1, 2]]


async def test_models(api: Served) -> None:
    listed = (await api.client.get("/v1/models")).json()
    assert [model["id"] for model in listed["data"]] == ["test"]
    assert (await api.client.get("/v1/models/test")).json() == listed["data"][0]


# ---- Open Inference ---------------------------------------------------------------------------


async def test_oip_metadata_and_health(api: Served) -> None:
    get = api.client.get
    assert (await get("/v2")).json()["name"] == "nearfield"
    assert (await get("/v2/health/live")).json() == {"live": True}
    assert (await get("/v2/health/ready")).json() == {"ready": True}
    assert (await get("/v2/models/test/ready")).json() == {"ready": True}
    metadata = (await get("/v2/models/test/versions/1")).json()
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}]


async def test_oip_infer_json_and_binary(api: Served) -> None:
    tensor = {"name": "x", "shape": [2, 2], "datatype": "FP32"}
    request = {"id": "7", "inputs": [{**tensor, "data": [1, 2, 3, 4]}]}
    body = (await api.client.post("/v2/models/test/infer", json=request)).json()
    assert (body["id"], body["outputs"][0]["data"]) == ("7", [3, 7])

    raw = np.array([1, 2, 3, 4], "<f4").tobytes()
    head = json.dumps(
        {
            "inputs": [{**tensor, "parameters": {"binary_data_size": len(raw)}}],
            "outputs": [{"name": "sum", "parameters": {"binary_data": True}}],
        }
    ).encode()
    answer = await api.client.post(
        "/v2/models/test/infer",
        content=head + raw,
        headers={"inference-header-content-length": str(len(head))},
    )
    length = int(answer.headers["inference-header-content-length"])
    assert np.frombuffer(answer.content[length:], "<f4").tolist() == [3, 7]


async def test_oip_generate_and_its_stream(api: Served) -> None:
    request = {"text_input": "say:a say:b", "id": "7"}
    whole = (await api.client.post("/v2/models/test/generate", json=request)).json()
    assert (whole["id"], whole["text_output"]) == ("7", "ab")
    stream = await api.client.post("/v2/models/test/generate_stream", json=request)
    said = [(event["id"], event["text_output"]) for event in events_of(stream.text)]
    assert said == [("7", "a"), ("7", "b")]


# ---- what is refused --------------------------------------------------------------------------

BAD = [
    ("POST", CHAT, {"content": b"{", "headers": JSON}, 400, "invalid_json"),
    ("POST", CHAT, {"content": b"\xff", "headers": JSON}, 400, "invalid_json"),
    ("POST", CHAT, {"json": chat("x") | {"model": "other"}}, 404, "model_not_found"),
    ("POST", CHAT, {"json": chat("x", temperatur=1)}, 400, "unknown_parameter"),
    ("POST", CHAT, {"json": chat("x", tools=[{"type": "function", "function": {"name": "f"}}])},
     400, "unsupported_parameter"),
    ("POST", CHAT, {"content": b"{}"}, 415, "unsupported_media_type"),
    ("POST", CHAT, {"content": b"{}", "headers": {"content-type": "text/plain"}}, 415,
     "unsupported_media_type"),
    ("POST", CHAT, {"content": b"{}", "headers": {"content-type": "application/json; charset=x"}},
     415, "unsupported_media_type"),
    ("POST", CHAT, {"content": b"{}", "headers": JSON | {"content-encoding": "gzip"}}, 415,
     "unsupported_media_type"),
    ("POST", CHAT, {"json": chat("x" * 5000)}, 413, "payload_too_large"),
    ("POST", CHAT, {"json": chat("x"), "headers": {"x-request-timeout-ms": "soon"}}, 400, None),
    ("POST", CHAT, {"json": chat("x"), "headers": {"x-request-timeout-ms": "0"}}, 400, None),
    ("POST", CHAT, {"json": chat("x"), "headers": {"x-request-timeout-ms": "9" * 5000}}, 400, None),
    ("POST", CHAT, {"json": chat("raise")}, 500, "engine_failed"),
    ("GET", CHAT, {}, 405, "method_not_allowed"),
    ("DELETE", "/v1/models", {}, 405, "method_not_allowed"),
    ("GET", "/v1/models/other", {}, 404, "model_not_found"),
    ("GET", "/v1/models/org/name", {}, 404, "model_not_found"),
    ("GET", "/v1/nothing", {}, 404, "path_not_found"),
    ("GET", "/", {}, 404, "path_not_found"),
    ("GET", "/v1/models/", {}, 404, None),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "request_", "status", "code"), BAD)
async def test_refusals_speak_openai(
    api: Served, method: str, path: str, request_: dict[str, Any], status: int, code: str | None
) -> None:
    answer = await api.client.request(method, path, **request_)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    if code is not None:
        assert error["code"] == code
    assert "Traceback" not in answer.text
    assert answer.headers["x-request-id"]
    if status == 405:
        assert answer.headers["allow"] in ("POST", "GET, HEAD")


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v2/models/test/infer", b"{", 400),
        ("POST", "/v2/models/test/infer", b"{}", 400),
        ("POST", "/v2/models/test/infer", b"x" * 5000, 413),
        ("POST", "/v2/models/other/infer", b"{}", 404),
        ("POST", "/v2/models/test/versions/9/infer", b"{}", 404),
        ("GET", "/v2/models/other/ready", None, 404),
        ("GET", "/v2/models/test/infer", None, 405),
        ("POST", "/v2/models/test/generate", b'{"text_input": "raise"}', 500),
        ("GET", "/v2/nothing", None, 404),
    ],
)
async def test_refusals_speak_oip(
    api: Served, method: str, path: str, body: bytes | None, status: int
) -> None:
    answer = await api.client.request(method, path, content=body)
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    assert isinstance(answer.json()["error"], str)


async def test_head_is_answered_as_get(api: Served) -> None:
    answer = await api.client.head("/v1/models")
    assert (answer.status_code, answer.content) == (200, b"")


async def test_a_body_that_says_it_is_too_long_is_not_read(api: Served) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    reader, writer = await api.raw(f"{head}content-length: 99999999\r\n\r\n".encode())
    assert b" 413 " in await asyncio.wait_for(reader.readline(), 5)
    writer.close()


async def test_a_chunked_body_is_bounded(api: Served) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    reader, writer = await api.raw(f"{head}transfer-encoding: chunked\r\n\r\n".encode())
    for _ in range(5):
        writer.write(b"400\r\n" + b" " * 1024 + b"\r\n")
    assert b" 413 " in await asyncio.wait_for(reader.readline(), 5)
    writer.close()


async def test_a_slow_body_ends_with_the_deadline(api: Served) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    timeout = "x-request-timeout-ms: 200\r\ncontent-length: 100\r\n\r\n{"
    reader, writer = await api.raw((head + timeout).encode())
    assert b" 504 " in await asyncio.wait_for(reader.readline(), 5)
    writer.close()
    assert api.service.gate.waiting == 0


# ---- bounds in time and number ----------------------------------------------------------------


async def test_a_full_queue_is_a_429_at_once(api: Served) -> None:
    async with asyncio.TaskGroup() as group:
        held = [group.create_task(api.client.post(CHAT, json=chat("sleep:0.5"))) for _ in range(6)]
        await until(lambda: api.service.gate.waiting == 2)
        answer = await api.client.post(CHAT, json=chat("say:a"))
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert not any(task.done() for task in held)
    assert [task.result().status_code for task in held] == [200] * 6
    assert (await api.client.post(CHAT, json=chat("say:a"))).status_code == 200


async def test_the_deadline_cancels_in_the_engine(api: Served) -> None:
    headers = {"x-request-timeout-ms": "150"}
    answer = await api.client.post(CHAT, json=chat("sleep:30"), headers=headers)
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    await until(lambda: api.service.host.stats.running == 0)


async def test_the_deadline_also_counts_in_the_queue(api: Served) -> None:
    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(api.client.post(CHAT, json=chat("sleep:0.6")))
        await until(lambda: api.service.gate.running == 4)
        headers = {"x-request-timeout-ms": "100"}
        answer = await api.client.post(CHAT, json=chat("say:a"), headers=headers)
        assert answer.status_code == 504
        assert api.service.gate.waiting == 0


@pytest.mark.parametrize(
    ("program", "headers", "code"),
    [
        ("say:a sleep:30", {"x-request-timeout-ms": "200"}, "deadline_exceeded"),
        ("say:a raise", {}, "engine_failed"),
    ],
)
async def test_what_fails_in_a_stream_ends_it_with_an_error_event(
    api: Served, program: str, headers: dict[str, str], code: str
) -> None:
    answer = await api.client.post(CHAT, json=chat(program, stream=True), headers=headers)
    assert answer.status_code == 200
    *chunks, last = events_of(answer.text)
    assert last["error"]["code"] == code
    assert chunks[-1]["choices"][0]["delta"]["content"] == "a"


async def test_an_error_before_the_first_token_has_its_own_status(api: Served) -> None:
    answer = await api.client.post(CHAT, json=chat("raise", stream=True))
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_failed")


# ---- ids, traces, logs ------------------------------------------------------------------------


async def test_request_ids(api: Served) -> None:
    given = await api.client.get("/v1/models", headers={"x-request-id": "a.b-C_9"})
    assert given.headers.get_list("x-request-id") == ["a.b-C_9"]
    for bad in ("no spaces", "x" * 129, "semi;colon"):
        made = await api.client.get("/v1/models", headers={"x-request-id": bad})
        assert made.headers["x-request-id"] != bad
        assert made.headers["x-request-id"].startswith("req-")


async def test_the_trace_context_comes_back(api: Served) -> None:
    parent = f"00-{TRACE}-b7ad6b7169203331-01"
    answer = await api.client.get("/v1/models", headers={"traceparent": parent})
    version, trace, span, flags = answer.headers["traceparent"].split("-")
    assert (version, trace, flags) == ("00", TRACE, "01")
    assert span != "b7ad6b7169203331"


async def test_a_mistake_of_ours_is_a_500_with_an_id(
    api: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("internal detail")

    monkeypatch.setattr(api.service, "require_model", broken)
    answer = await api.client.post(CHAT, json=chat("say:a"), headers={"x-request-id": "find-me"})
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "find-me" in answer.json()["error"]["message"]
    assert "internal detail" not in answer.text
    assert "ZeroDivisionError: internal detail" in caplog.text


async def test_prompts_are_never_logged(api: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "nearfield")
    for program in ("say:topsecret", "say:topsecret raise"):
        for stream in (False, True):
            await api.client.post(CHAT, json=chat(program, stream=stream))
    await api.client.post(CHAT, json=chat("topsecret", topsecret=1))
    # What a developer's own engine raises is the developer's to keep clean.
    ours = [r for r in caplog.records if r.name == "nearfield.http"]
    assert len(ours) >= 5
    assert not any("topsecret" in json.dumps(vars(r), default=str) for r in ours)


# ---- leaving ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_a_cancelled_exchange_cancels_in_the_engine(api: Served, stream: bool) -> None:
    """Serve cancels the task of a request whose client has left."""
    body = json.dumps(chat("say:a sleep:30", stream=stream)).encode()
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": body}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": CHAT, "root_path": "", "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }  # fmt: skip
    task = asyncio.create_task(api.router(scope, receive, send))
    await until(lambda: api.service.host.stats.running == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: api.service.host.stats.running == 0)
    assert (api.service.gate.running, api.service.gate.waiting) == (0, 0)
    assert bool(sent) == stream


async def test_who_left_while_the_process_stood_still_is_not_served(
    api: Served, tmp_path: Path
) -> None:
    """Its time to live would begin only now: it is short, and began long ago."""
    body = json.dumps(chat(f"touch:{tmp_path / 'begun'}")).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
    whole = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
    with socket.create_connection(api.address) as left:
        left.sendall(whole)
    stays = asyncio.create_task(api.client.post(CHAT, json=chat("say:a")))
    await asyncio.sleep(0)  # the other one's is sent meanwhile
    time.sleep(TICK_S + LATE_S + 0.1)  # noqa: ASYNC251 (everything stands still)
    assert (await stays).status_code == 200
    assert (await api.client.post(CHAT, json=chat("say:a"))).status_code == 200
    assert not (tmp_path / "begun").exists()


# ---- the rest ---------------------------------------------------------------------------------


async def test_health(api: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("/healthz", "/livez", "/readyz"):
        assert (await api.client.get(path)).status_code == 200
    monkeypatch.setattr(api.service.host, "healthy", False)
    for path in ("/healthz", "/livez", "/readyz", "/v2/health/live", "/v2/models/test/ready"):
        assert (await api.client.get(path)).status_code == 503
    answer = await api.client.post(CHAT, json=chat("say:a"))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")


async def test_metrics(api: Served) -> None:
    await api.client.post(CHAT, json=chat("say:a say:b"))
    page = await api.client.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    for name in (
        "gen_ai_server_request_duration_seconds_count",
        "gen_ai_server_time_to_first_token_seconds_bucket",
        "nearfield_tokens_total",
        "vllm:num_requests_running",
    ):
        assert name in page.text


async def test_the_openapi_document_lists_our_routes(api: Served) -> None:
    document = (await api.client.get("/openapi.json")).json()
    served_paths = {route.path.replace(":path", "") for route in api.router.routes}  # type: ignore[attr-defined]
    assert set(document["paths"]) == served_paths


async def test_a_model_that_only_embeds_says_what_to_use() -> None:
    async with served(spec_of("tests.support.programs:Lengths")) as api:
        answer = await api.client.post(CHAT, json=chat("x"))
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "unsupported_task"
        assert "/v1/embeddings" in answer.json()["error"]["message"]
        tensor = {"name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["four"]}
        infer = await api.client.post("/v2/models/test/infer", json={"inputs": [tensor]})
        assert infer.json()["outputs"][0]["data"] == [4]


# ---- a machine that is taken away ---------------------------------------------------------------


async def test_a_leaving_replica_refuses_at_once_and_ends_what_it_has() -> None:
    """Nothing new from the notice on; what is short ends as ever, what is long in so many words."""
    async with served(spec_of(PROGRAMS, limits={"drain_s": 0.5})) as running:
        departure = running.service.departure
        whole = asyncio.create_task(running.client.post(CHAT, json=chat("sleep:20 say:late")))
        short = asyncio.create_task(running.client.post(CHAT, json=chat("sleep:0.2 say:done")))
        request = chat("say:a sleep:20 say:b", stream=True)
        async with running.client.stream("POST", CHAT, json=request) as stream:
            lines = stream.aiter_lines()
            while "content" not in await anext(lines):
                pass
            await until(lambda: running.service.gate.running == 3)
            departure.announce(time.time() + 60)
            refused = await running.client.post(CHAT, json=chat("say:new"))
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "draining"
            assert refused.headers["retry-after"] == "1"
            assert (await running.client.get("/readyz")).status_code == 503
            assert (await running.client.get("/livez")).status_code == 200
            load = parse_load((await running.client.get(LOAD_PATH)).content)
            assert load.leaving
            rest = [line async for line in lines if line.startswith("data: ")]
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "interrupted"
        assert (await short).json()["choices"][0]["message"]["content"] == "done"
        assert (await whole).json()["error"]["code"] == "interrupted"
        departure.withdraw()
        again = await running.client.post(CHAT, json=chat("say:stayed"))
        assert again.status_code == 200


async def test_what_runs_ends_before_the_machine_does() -> None:
    async with served(spec_of(PROGRAMS, limits={"drain_s": 60})) as running:
        late = asyncio.create_task(running.client.post(CHAT, json=chat("sleep:20 say:late")))
        await until(lambda: running.service.gate.running == 1)
        due_s = time.time() + LAST_WORD_S + 0.3
        running.service.departure.announce(due_s)
        assert (await late).status_code == 503
        assert time.time() < due_s - LAST_WORD_S + 1.0


async def test_the_drain_of_its_node_reaches_a_replica_and_its_end_too() -> None:
    departure, drained, asked = Departure(30.0), dict[str, float](), list[float]()

    def leaving() -> dict[str, float]:
        asked.append(time.time())
        if len(asked) == 2:
            raise RuntimeError("the head is being replaced")
        return drained

    following = asyncio.create_task(follow(departure, "this", leaving))
    drained["another"] = time.time() + 30
    await until(lambda: len(asked) == 1)
    assert departure.due_s is None
    drained["this"] = due_s = time.time() + 30
    await until(lambda: departure.due_s == due_s)
    del drained["this"]
    await until(lambda: departure.due_s is None)
    following.cancel()
