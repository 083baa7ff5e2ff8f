"""Every server that is measured, as data: how it starts, when it is ready, how it is asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.workload import KEY, MAX_TOKENS

Body = Callable[[str, str], dict[str, Any]]  # of a text and the directory of the run's data

COMMON = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
    "BENTOML_DO_NOT_TRACK": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray starts workers at niceness 15: on a full machine the client would go before them.
    "RAY_worker_niceness": "0",
    "SPT_NOENV": "1",  # Ray would write over the marker by which the process is found again
}
"""One compute thread everywhere, and nothing looks for the network."""

HAPROXY = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_HAPROXY_NBTHREAD": "1",  # as nearfield sets it on two cores
    # Only so that it stops in a second, not in half a minute; nearfield sets the same.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "{scratch}/h/haproxy.cfg",
    "RAY_SERVE_HAPROXY_SOCKET_PATH": "{scratch}/h/admin.sock",
    "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "{scratch}/h/metrics.sock",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "{scratch}/h",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "{scratch}/h/server-state",
}


@dataclass(frozen=True, slots=True)
class Side:
    """One server.

    `prepare`, `command` and `environment` may hold {python}, {here}, {repo}, {data}, {scratch},
    {port} and {port_2}.

    Attributes:
        title: what tables call it. venv: whose interpreter {python} is.
        path: where requests go. body: a request of a text.
        ready: a path that answers 200, or the text that it prints, when it can be asked.
        ours: nearfield; the others are peers.
        prepare: run to its end before the start, and not timed.
    """

    name: str
    title: str
    venv: str
    command: tuple[str, ...]
    path: str
    body: Body
    ready: str
    environment: Mapping[str, str] = field(default_factory=dict)
    ours: bool = False
    prepare: tuple[str, ...] = ()


def _openai_input(text: str, _: str) -> dict[str, Any]:
    return {"model": "embed", "input": text}


def _text(text: str, _: str) -> dict[str, Any]:
    return {"text": text}


def _texts(text: str, _: str) -> dict[str, Any]:
    return {"texts": [text]}


def _oip(text: str, _: str) -> dict[str, Any]:
    tensor = {"name": "text", "datatype": "BYTES", "shape": [1], "data": [text]}
    return {"inputs": [tensor]}


def _chat(model: str) -> Body:
    def body(text: str, data: str) -> dict[str, Any]:
        return {
            "model": model.format(data=data),
            "messages": [{"role": "user", "content": text}],
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    return body


def tick(text: str, data: str) -> dict[str, Any]:
    """A request to the ingress suite's ticker."""
    return _chat("ticker")(text, data)


def _nearfield(ingress: str, title: str, files: tuple[str, ...], path: str, body: Body) -> Side:
    return Side(
        name=f"nearfield-{ingress}",
        title=title,
        venv="nearfield",
        command=(
            *("{python}", "-m", "nearfield.cli.main", "up", *files),
            *("--port", "{port}", "--ingress", ingress, "--dir", "{scratch}/r"),
        ),
        path=path,
        body=body,
        ready="Ctrl-C ends",
        ours=True,
    )


def _both(files: tuple[str, ...], path: str, body: Body) -> tuple[Side, ...]:
    return (
        _nearfield("haproxy", "nearfield", files, path, body),
        _nearfield("python", "nearfield, Serve's Python proxy", files, path, body),
    )


ENCODER = {
    "PYTHONPATH": "{here}/peers/common",
    "BENCH_WEIGHTS": "{weights}",
    "BENCH_GRAPH": "{data}/minilm.onnx",
    "BENCH_PORT": "{port}",
    "BENCH_PORT_2": "{port_2}",
    "BENCH_DIR": "{scratch}",
    "BENCH_RAY_DIR": "{scratch}/r",
}
ORT = {"BENCH_RUNTIME": "ort"}


def _ray(name: str, title: str, more: Mapping[str, str]) -> Side:
    return Side(
        name, title, "ray_serve", ("{python}", "{here}/peers/ray_serve/server.py"),
        "/embed", _text, "bench: ready", {**ENCODER, **more},
    )  # fmt: skip


def _litserve(name: str, title: str, more: Mapping[str, str]) -> Side:
    return Side(
        name, title, "litserve", ("{python}", "{here}/peers/litserve/server.py"),
        "/predict", _text, "/health", {**ENCODER, **more},
    )  # fmt: skip


EMBED = (
    *_both(("{repo}/deployments/models/embed.yaml",), "/embed/v1/embeddings", _openai_input),
    _ray("ray-default", "Ray Serve @serve.batch, default proxy", {}),
    _ray("ray-haproxy", "Ray Serve @serve.batch, HAProxy + throughput", HAPROXY),
    _ray("ray-haproxy-ort", "Ray Serve, HAProxy + throughput, + ORT", {**HAPROXY, **ORT}),
    _litserve("litserve", "LitServe", {}),
    _litserve("litserve-ort", "LitServe + ORT", ORT),
    Side(
        name="bentoml",
        title="BentoML",
        venv="bentoml",
        command=(
            *("{python}", "-m", "bentoml", "serve", "service:Embed"),
            *("--working-dir", "{here}/peers/bentoml", "--host", "127.0.0.1"),
            *("--port", "{port}"),
        ),
        path="/embed",
        body=_texts,
        ready="/readyz",
        environment={**ENCODER, "BENTOML_HOME": "{scratch}"},
    ),
    Side(
        name="mlserver",
        title="MLServer",
        venv="mlserver",
        command=("{python}", "{here}/peers/mlserver/server.py"),
        path="/v2/models/embed/infer",
        body=_oip,
        ready="/v2/models/embed/ready",
        environment=ENCODER,
    ),
    Side(
        name="fastapi",
        title="FastAPI + uvicorn",
        venv="fastapi",
        command=("{python}", "{here}/peers/fastapi/server.py"),
        path="/embed",
        body=_text,
        ready="/health",
        environment=ENCODER,
    ),
)


def _transformers(name: str, title: str, *options: str) -> Side:
    return Side(
        name=name,
        title=title,
        venv="transformers",
        command=(
            *("{python}", "-m", "transformers.cli.transformers", "serve", "{data}/lm"),
            *("--host", "127.0.0.1", "--port", "{port}", "--device", "cpu", *options),
        ),
        path="/v1/chat/completions",
        body=_chat("{data}/lm"),
        ready="/health",
    )


GENERATE = (
    *_both(("{data}/lm.yaml",), "/lm/v1/chat/completions", _chat("lm")),
    _transformers("transformers", "transformers serve"),
    _transformers(
        "transformers-cb",
        "transformers serve --continuous-batching, sized",
        # Its automatic cache takes most of the memory there is, and every step pays for it.
        *("--continuous-batching", "--cb-num-blocks", "64", "--cb-max-batch-tokens", "64"),
    ),
    _transformers(
        "transformers-cb-auto",
        "transformers serve --continuous-batching, its own sizes",
        "--continuous-batching",
    ),
)

INGRESS = _both(
    ("{repo}/deployments/models/embed.yaml", "{here}/models/ticker.yaml"),
    "/embed/v1/embeddings",
    _openai_input,
)

PROXY = {
    "BENCH_PORT": "{port}",
    "BENCH_UPSTREAM": "{upstream}",
    "BENCH_DIR": "{scratch}",
    "BENCH_KEY": KEY,
}
CHAT = "/v1/chat/completions"
PINNED = ("taskset", "-c", "{cpu}")
"""A proxy has a core to itself; the client and the upstream share another."""
GATEWAY = {
    "NEARFIELD_HOME": "{scratch}",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:{upstream}/v1/traces",
    "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
    "OTEL_TRACES_SAMPLER_ARG": "0.01",
}
LAUNCH = "{here}/peers/proxies/launch.py"


def _gateway(title: str, *before: str) -> Side:
    """As its user runs it: one worker, a store, and one trace in a hundred sent to a collector."""
    return Side(
        name="nearfield",
        title=title,
        venv="nearfield",
        command=(*before, "{python}", "-m", "nearfield.edge", "{scratch}/gateway.yaml"),
        path=CHAT,
        body=_chat("chat"),
        ready="/readyz",
        environment=GATEWAY,
        ours=True,
        prepare=("{python}", "-m", "benchmarks.gateway", "{scratch}", "{port}", "{upstream}"),
    )


def _proxy(
    name: str, title: str, *command: str, venv: str = "proxies", ready: str = "/v1/models"
) -> Side:
    command = (*PINNED, "{python}", *command)
    return Side(name, title, venv, command, CHAT, _chat("chat"), ready, PROXY)


def _upstream(module: str, *before: str) -> Side:
    return Side(
        name="upstream",
        title="the upstream itself",
        venv="nearfield",
        command=(*before, "{python}", "-m", module, "{port}"),
        path=CHAT,
        body=_chat("chat"),
        ready="bench: ready",
        environment={"PYTHONPATH": "{repo}"},
    )


UPSTREAM = _upstream("benchmarks.edge_upstream", "taskset", "-c", "{client_cpus}")
EDGE = (
    _gateway("nearfield, everything on", *PINNED),
    _proxy("envoy", "Envoy", LAUNCH, "envoy"),
    _proxy("nginx", "nginx", LAUNCH, "nginx"),
    _proxy("haproxy", "HAProxy", LAUNCH, "haproxy"),
    _proxy("aiohttp", "aiohttp, server and client", "{here}/peers/proxies/naive.py"),
    _proxy(
        "litellm", "LiteLLM proxy", "{here}/peers/litellm/server.py",
        venv="litellm", ready="/health/liveliness",
    ),
)  # fmt: skip


def _leastconn(name: str, title: str, *options: str) -> Side:
    command = ("{python}", LAUNCH, "leastconn", *options)
    return Side(name, title, "proxies", command, CHAT, _chat("chat"), "/v1/models", PROXY)


def _serve(name: str, title: str, *options: str) -> Side:
    """Serve's replicas are actors, so its are its own; they take as long as the others'."""
    command = ("{python}", "{here}/peers/ray_serve/replicas.py", *options)
    environment = {
        **PROXY,
        "PYTHONPATH": "{repo}",
        "BENCH_RAY_DIR": "{scratch}/r",
    }
    return Side(name, title, "nearfield", command, CHAT, _chat("chat"), "bench: ready", environment)


REGION = _upstream("benchmarks.replica_upstream")
REPLICAS = (
    _gateway("nearfield"),
    _leastconn("leastconn", "HAProxy, leastconn"),
    _leastconn("leastconn-sized", "HAProxy, leastconn, maxconn = slots", "sized"),
    _serve("serve", "Ray Serve, power of two choices"),
    _serve("serve-sized", "Ray Serve, max_ongoing_requests = slots", "sized"),
)

SUITES: Mapping[str, tuple[Side, ...]] = {
    "embed": EMBED,
    "generate": GENERATE,
    "ingress": INGRESS,
    "edge": EDGE,
    "replicas": REPLICAS,
}
