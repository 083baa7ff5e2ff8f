"""A replica inside Ray Serve: through HAProxy straight into the replica, and through Serve's own
Python proxy. Engines are those of `tests.support.programs`."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from nearfield.cli import region as regions
from prometheus_client.parser import text_string_to_metric_families

from tests.integration.conftest import TestRegion
from tests.support.hosting import alive, until
from tests.support.otlp import attributes, receiver

ROOT = Path(__file__).parents[2]
PROGRAMS = {"kind": "custom", "import_path": "tests.support.programs:Programs"}
TICKER = {"kind": "custom", "import_path": "tests.support.programs:Ticker"}
LIMITS = {"max_running": 6, "max_queued": 3, "max_body_bytes": 65536}
CHAT = "/v1/chat/completions"
TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture(scope="module")
def behind_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestRegion]:
    """A region with Serve's default proxy."""
    root = tmp_path_factory.mktemp("python") / "regions" / "local"
    running = regions.start(root, regions.RegionOptions(num_cpus=16, ingress="python"), print)
    try:
        yield TestRegion(running)
    finally:
        running.api.close()
        regions.end(running, drain_timeout_s=0)


@pytest.fixture(scope="module", params=["haproxy", "python"])
def programs(request: pytest.FixtureRequest) -> str:
    """The URL of a model that does what it is told, behind each kind of ingress."""
    name = {"haproxy": "region", "python": "behind_python"}[request.param]
    region: TestRegion = request.getfixturevalue(name)
    region.deploy_model("ra-programs", engine=PROGRAMS, limits=LIMITS, pythonpath=ROOT)
    return region.url("ra-programs")


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=60, limits=limits) as made:
        yield made


def chat(program: str, *, model: str = "ra-programs", **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": program}], **fields}


def content(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


async def gauge(client: httpx.AsyncClient, url: str, name: str) -> float:
    """A metric of the (only) replica; summed over its labels."""
    page = (await client.get(f"{url}/metrics")).text
    families = text_string_to_metric_families(page)
    return sum(s.value for family in families for s in family.samples if s.name == name)


async def idle(client: httpx.AsyncClient, url: str) -> None:
    """Wait until nothing is inside the engine and nothing waits, by its own account."""
    deadline_s = time.monotonic() + 20
    names = (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "nearfield_engine_batch_size",
    )
    while sum([await gauge(client, url, name) for name in names]):
        assert time.monotonic() < deadline_s, "the replica is still busy"
        await asyncio.sleep(0.05)


def log_lines(region: TestRegion) -> list[dict[str, Any]]:
    """The JSON lines in the logs of all processes of the region."""
    texts = [path.read_text() for path in region.region.logs_dir.glob("worker-*.err")]
    lines = [line for text in texts for line in text.splitlines() if line.startswith("{")]
    return [json.loads(line) for line in lines]


# ---- both kinds of ingress --------------------------------------------------------------------


async def test_answers(programs: str, client: httpx.AsyncClient) -> None:
    assert content(await client.post(programs + CHAT, json=chat("say:hello say:!"))) == "hello!"
    infer = {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}
    answer = await client.post(f"{programs}/v2/models/ra-programs/infer", json=infer)
    assert answer.json()["outputs"][0]["data"] == [3]
    assert (await client.get(f"{programs}/v2/health/ready")).json() == {"ready": True}


async def test_streams_are_not_held_back(programs: str, client: httpx.AsyncClient) -> None:
    program = " ".join(f"say:{n} sleep:0.2" for n in range(5))
    arrivals_s: list[float] = []
    async with client.stream("POST", programs + CHAT, json=chat(program, stream=True)) as answer:
        async for line in answer.aiter_lines():
            if '"content"' in line and '"role"' not in line:
                arrivals_s.append(time.monotonic())
    gaps_s = [b - a for a, b in pairwise(arrivals_s)]
    assert len(gaps_s) == 4
    assert min(gaps_s) > 0.1


@pytest.mark.parametrize(
    ("method", "path", "request_", "status", "code"),
    [
        ("POST", CHAT, {"json": chat("x", model="other")}, 404, "model_not_found"),
        ("POST", CHAT, {"json": chat("x", nonsense=1)}, 400, "unknown_parameter"),
        ("POST", CHAT, {"json": chat("x" * 70_000)}, 413, "payload_too_large"),
        ("POST", CHAT, {"content": b"{}"}, 415, "unsupported_media_type"),
        ("POST", CHAT, {"json": chat("raise")}, 500, "engine_failed"),
        ("GET", CHAT, {}, 405, "method_not_allowed"),
        ("GET", "/v1/nothing", {}, 404, "path_not_found"),
    ],
)
async def test_errors_speak_openai(
    programs: str,
    client: httpx.AsyncClient,
    method: str,
    path: str,
    request_: dict[str, Any],
    status: int,
    code: str,
) -> None:
    answer = await client.request(method, programs + path, **request_)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


async def test_errors_speak_oip(programs: str, client: httpx.AsyncClient) -> None:
    for path, status in (("models/other/ready", 404), ("nothing", 404)):
        answer = await client.get(f"{programs}/v2/{path}")
        assert (answer.status_code, list(answer.json())) == (status, ["error"])


async def test_a_chunked_body_is_bounded(programs: str, client: httpx.AsyncClient) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 8192

    headers = {"content-type": "application/json"}
    answer = await client.post(programs + CHAT, content=chunks(), headers=headers)
    assert answer.status_code == 413


async def test_ids_and_traces_come_back_once(programs: str, client: httpx.AsyncClient) -> None:
    headers = {"x-request-id": "my-id.1", "traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
    answer = await client.post(programs + CHAT, json=chat("say:a"), headers=headers)
    assert answer.headers.get_list("x-request-id") == ["my-id.1"]
    assert answer.headers["traceparent"].startswith(f"00-{TRACE}-")
    answer = await client.post(programs + CHAT, json=chat("say:a"))
    (made,) = answer.headers.get_list("x-request-id")
    assert made


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels_in_the_engine(
    programs: str, client: httpx.AsyncClient, stream: bool, tmp_path: Path
) -> None:
    started, ended = tmp_path / "started", tmp_path / "ended"
    program = f"say:a touch:{started} sleep:3 touch:{ended}"
    task = asyncio.create_task(client.post(programs + CHAT, json=chat(program, stream=stream)))
    await until(started.exists)
    assert await gauge(client, programs, "vllm:num_requests_running") == 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    left_s = time.monotonic()
    await idle(client, programs)
    assert time.monotonic() - left_s < 2.5
    await asyncio.sleep(3.2 - (time.monotonic() - left_s))
    assert not ended.exists()


async def test_a_full_queue_is_a_429_at_once(programs: str, client: httpx.AsyncClient) -> None:
    async def timed(program: str) -> tuple[int, float, httpx.Headers]:
        begun_s = time.monotonic()
        answer = await client.post(programs + CHAT, json=chat(program))
        return answer.status_code, time.monotonic() - begun_s, answer.headers

    answers = await asyncio.gather(*(timed("sleep:1.5") for _ in range(16)))
    refused = [answer for answer in answers if answer[0] == 429]
    assert sorted(status for status, _, _ in answers) == [200] * 9 + [429] * 7
    assert all(took_s < 1.0 for _, took_s, _ in refused)
    assert all(int(headers["retry-after"]) >= 1 for _, _, headers in refused)
    await idle(client, programs)


async def test_deadlines(programs: str, client: httpx.AsyncClient) -> None:
    headers = {"x-request-timeout-ms": "300"}
    answer = await client.post(programs + CHAT, json=chat("sleep:20"), headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
    request = chat("say:a sleep:20", stream=True)
    streamed = await client.post(programs + CHAT, json=request, headers=headers)
    assert '"deadline_exceeded"' in streamed.text.rstrip().rpartition("\n\n")[2]
    await idle(client, programs)


async def test_a_crash_takes_nobody_along(
    programs: str, client: httpx.AsyncClient, tmp_path: Path
) -> None:
    async def ask(program: str) -> httpx.Response:
        return await client.post(programs + CHAT, json=chat(program))

    waits = [ask(f"touch:{tmp_path / str(n)} sleep:0.3 say:{n}") for n in range(4)]
    *good, bad = await asyncio.gather(*waits, ask("sleep:0.1 segv"))
    assert (bad.status_code, bad.json()["error"]["code"]) == (500, "engine_crashed")
    assert [content(answer) for answer in good] == ["0", "1", "2", "3"]


# ---- HAProxy only: the default ----------------------------------------------------------------


async def test_sixty_four_streams_are_not_held_back(
    region: TestRegion, client: httpx.AsyncClient, tmp_path: Path
) -> None:
    """In step: no stream makes its next token until every client has read the last one."""
    region.deploy_model("ra-paced", engine=PROGRAMS, pythonpath=ROOT)
    url = region.url("ra-paced") + CHAT
    steps = 5
    program = " ".join(f"say:tok{n} wait:{tmp_path / str(n)}" for n in range(steps))
    seen = [0] * steps

    async def read() -> None:
        step = 0
        request = chat(program, model="ra-paced", stream=True)
        async with client.stream("POST", url, json=request) as answer:
            async for line in answer.aiter_lines():
                if f'"tok{step}"' in line:
                    seen[step] += 1
                    if seen[step] == 64:
                        (tmp_path / str(step)).touch()
                    step += 1

    async with asyncio.timeout(60):
        await asyncio.gather(*(read() for _ in range(64)))
    assert seen == [64] * steps


async def test_killing_the_engine_under_load(
    region: TestRegion, client: httpx.AsyncClient, tmp_path: Path
) -> None:
    """Answers in one piece are made again; streams that had begun end with an error event."""
    region.deploy_model("ra-killed", engine=PROGRAMS, pythonpath=ROOT)
    url = region.url("ra-killed") + CHAT
    pids, begun = tmp_path / "pids", tmp_path / "begun"

    def lines(path: Path) -> list[str]:
        return path.read_text().split() if path.exists() else []

    async def ask(program: str, *, stream: bool = False) -> httpx.Response:
        return await client.post(url, json=chat(program, model="ra-killed", stream=stream))

    async with asyncio.TaskGroup() as group:
        whole = [group.create_task(ask(f"touch:{pids} sleep:0.6 say:{n}")) for n in range(10)]
        streaming = f"say:a touch:{begun} sleep:1 say:b"
        streams = [group.create_task(ask(streaming, stream=True)) for _ in range(4)]
        await until(lambda: (len(lines(pids)), len(lines(begun))) == (10, 4))
        os.kill(int(lines(pids)[0]), signal.SIGKILL)
        late = [group.create_task(ask(f"say:late{n}")) for n in range(5)]
    assert [content(task.result()) for task in whole] == [str(n) for n in range(10)]
    assert [content(task.result()) for task in late] == [f"late{n}" for n in range(5)]
    for task in streams:
        assert '"engine_crashed"' in task.result().text
        assert "[DONE]" not in task.result().text
    assert await gauge(client, region.url("ra-killed"), "nearfield_engine_crashes_total") == 1


async def test_an_upgrade_loses_nothing(
    region: TestRegion, client: httpx.AsyncClient, tmp_path: Path
) -> None:
    """Requests in flight and requests that arrive while replicas are replaced."""
    pids = tmp_path / "pids"

    def deploy(version: str) -> None:
        region.deploy_model("ra-drained", engine=PROGRAMS, version=version, pythonpath=ROOT)

    deploy("1")
    url = region.url("ra-drained")
    done = asyncio.Event()
    statuses: list[int] = []

    async def user(stream: bool) -> None:
        while not done.is_set():
            program = f"say:a touch:{pids} sleep:0.7 say:b"
            request = chat(program, model="ra-drained", stream=stream)
            answer = await client.post(url + CHAT, json=request)
            statuses.append(answer.status_code)
            assert answer.status_code == 200, answer.text
            if stream:
                assert answer.text.endswith("data: [DONE]\n\n")
            else:
                assert content(answer) == "ab"

    async def version() -> str:
        metadata = (await client.get(f"{url}/v2/models/ra-drained")).json()
        (only,) = metadata["versions"]
        return str(only)

    async with asyncio.TaskGroup() as group:
        for number in range(6):
            group.create_task(user(stream=number % 2 == 0))
        await until(lambda: len(statuses) >= 6)
        old_engine = int(pids.read_text().split()[0])
        await asyncio.to_thread(deploy, "2")
        assert await version() == "2"
        await until(lambda: not alive(old_engine), timeout_s=60)  # the old one has drained
        done.set()
    assert len(statuses) >= 12


async def test_a_replica_whose_engine_is_beyond_repair_is_replaced(
    region: TestRegion, client: httpx.AsyncClient, tmp_path: Path
) -> None:
    """The engine loads once and not again while the file is there: Serve starts a new replica."""
    loaded = tmp_path / "loaded"
    options = {"exit": 1, "exit_after": str(loaded)}
    replica = {"health_check_period_s": 1, "health_check_timeout_s": 5}
    engine = {**PROGRAMS, "options": options}
    region.deploy_model("ra-broken", engine=engine, replica=replica, pythonpath=ROOT)
    url = region.url("ra-broken")
    answer = await client.post(url + CHAT, json=chat("exit:1", model="ra-broken"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_down")
    assert "retry-after" in answer.headers
    loaded.unlink()
    deadline_s = time.monotonic() + 60
    while True:
        answer = await client.post(url + CHAT, json=chat("say:back", model="ra-broken"))
        if answer.status_code == 200:
            break
        assert time.monotonic() < deadline_s, answer.text
        await asyncio.sleep(0.2)
    assert content(answer) == "back"


async def test_a_model_that_cannot_load_says_why(region: TestRegion) -> None:
    engine = {**PROGRAMS, "options": {"refuse": "there is no such thing here"}}
    with pytest.raises(AssertionError, match="there is no such thing here"):
        region.deploy_model("ra-refused", engine=engine, pythonpath=ROOT)
    region.remove("ra-refused")


async def test_traces_reach_a_receiver(region: TestRegion, client: httpx.AsyncClient) -> None:
    with receiver() as collector:
        environment = {
            "PYTHONPATH": f"{ROOT}{os.pathsep}{region.region.state.pythonpath}",
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
            "OTEL_BSP_SCHEDULE_DELAY": "100",
            "OTEL_METRIC_EXPORT_INTERVAL": "500",
        }
        region.deploy(
            {
                "name": "ra-traced",
                "route_prefix": "/ra-traced",
                "import_path": "nearfield.serving:app",
                "args": {"model": "ra-traced", "engine": TICKER},
                "deployments": [{"name": "replica", "ray_actor_options": {"num_cpus": 0.1}}],
                "runtime_env": {"env_vars": environment},
            }
        )
        headers = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01", "x-request-id": "traced-1"}
        request = chat("a prompt nobody may see", model="ra-traced", max_tokens=8)
        answer = await client.post(region.url("ra-traced") + CHAT, json=request, headers=headers)
        assert answer.status_code == 200
        await until(lambda: len(collector.spans) >= 4)
        await until(lambda: "gen_ai.server.request.duration" in collector.metrics)
        (line,) = [line for line in log_lines(region) if line.get("request_id") == "traced-1"]
        region.remove("ra-traced")
    server = collector.span(f"POST {CHAT}")
    assert server.trace_id.hex() == TRACE
    assert {span.name for span in collector.spans} >= {"queue", "prefill", "decode"}
    assert all(span.trace_id == server.trace_id for span in collector.spans)
    told = attributes(server.attributes)
    assert told["nearfield.request.id"] == "traced-1"
    assert told["gen_ai.usage.output_tokens"] == "8"
    assert told["gen_ai.response.finish_reasons"] == "length"
    assert "nobody may see" not in str(collector.spans)
    assert (line["model"], line["route"], line["status"]) == ("ra-traced", CHAT, 200)
    assert (line["trace_id"], line["output_tokens"]) == (TRACE, 8)
    assert "nobody may see" not in str(log_lines(region))


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")
async def test_a_real_prometheus_reads_our_metrics(
    region: TestRegion, client: httpx.AsyncClient, tmp_path: Path, unused_tcp_port: int
) -> None:
    region.deploy_model("ra-scraped", engine=TICKER, pythonpath=ROOT)
    url = httpx.URL(region.url("ra-scraped"))
    request = chat("x", model="ra-scraped", max_tokens=8)
    assert (await client.post(f"{url}{CHAT}", json=request)).status_code == 200
    job = {
        "job_name": "nearfield",
        "scrape_interval": "200ms",
        "metrics_path": f"{url.path}/metrics",
        "static_configs": [{"targets": [f"{url.host}:{url.port}"]}],
    }
    config = tmp_path / "prometheus.yml"
    config.write_text(json.dumps({"scrape_configs": [job]}))  # YAML holds JSON
    prometheus = subprocess.Popen(  # noqa: ASYNC220
        [
            "prometheus",
            f"--config.file={config}",
            f"--storage.tsdb.path={tmp_path / 'tsdb'}",
            f"--web.listen-address=127.0.0.1:{unused_tcp_port}",
        ],
        stderr=subprocess.DEVNULL,
    )
    try:
        for query in (
            'gen_ai_server_request_duration_seconds_count{gen_ai_operation_name="chat"}',
            "gen_ai_server_time_to_first_token_seconds_count",
            'nearfield_tokens_total{gen_ai_token_type="output"} / 8',
            '{__name__="vllm:num_requests_running"} + 1',
        ):
            await _until_prometheus_says(client, unused_tcp_port, query, "1")
    finally:
        prometheus.kill()
        prometheus.wait()


async def _until_prometheus_says(
    client: httpx.AsyncClient, port: int, query: str, value: str
) -> None:
    deadline_s = time.monotonic() + 30
    said: Any = None
    while time.monotonic() < deadline_s:
        try:
            url = f"http://127.0.0.1:{port}/api/v1/query"
            said = (await client.get(url, params={"query": query})).json()["data"]["result"]
        except httpx.TransportError as error:
            said = error
        else:
            if [series["value"][1] for series in said] == [value]:
                return
        await asyncio.sleep(0.1)
    raise AssertionError(f"{query} is {said}, not {value}")
