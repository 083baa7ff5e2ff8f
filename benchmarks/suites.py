"""One measurement of one side, and the rounds that alternate between sides."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import edge, machine, replicas, workload
from benchmarks.load import Job
from benchmarks.server import (
    Running,
    SideFailed,
    figures_of,
    helper_environment,
    load,
    running,
)
from benchmarks.sides import SUITES, Side, tick

LIMIT = "limit"
LIMITED = frozenset({"embed", "generate", "edge"})
"""Suites with a limit."""
PROXIES: dict[str, Callable[..., dict[str, float]]] = {
    "edge": edge.measure,
    "replicas": replicas.measure,
}
"""Suites that compute nothing, and how they are measured."""
STREAMS = (1, 4, 16)
TICKER_STREAMS = 64
TICKER_PATH = "/ticker/v1/chat/completions"
REPO = Path(__file__).parent.parent

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Options:
    """`seconds`: of each measured window. `only`: names of sides; empty: all."""

    rounds: int
    seconds: float
    only: tuple[str, ...]
    quick: bool


def run(suite: str, options: Options) -> dict[str, Any]:
    """All rounds of a suite: what results/<suite>.json holds."""
    sides = [s for s in SUITES[suite] if not options.only or s.name in options.only]
    measured: list[dict[str, Any]] = []
    described = machine.describe()
    measures = PROXIES.get(suite)
    weights = Path() if measures else workload.encoder_directory()
    with tempfile.TemporaryDirectory(prefix="nb-data-") as name:
        data = Path(name)
        if measures is None:
            _write_data(data)
        for number in range(1, options.rounds + 1):
            # A limit is a side like any other: what slows the machine must slow it too.
            if suite in LIMITED and (not options.only or LIMIT in options.only):
                measured.append(_one(number, LIMIT, lambda: _limit(suite, data, options)))
            for side in sides:

                def measure(side: Side = side) -> Figures:
                    if measures is not None:
                        return measures(side, data, seconds=options.seconds, quick=options.quick)
                    with running(side, data, weights) as server:
                        return {
                            "ready_s": server.started_s,
                            **_measure(suite, side, server, data, options),
                        }

                measured.append(_one(number, side.name, measure))
    return {
        "suite": suite,
        "machine": described,
        "options": dataclasses.asdict(options),
        "measured": measured,
    }


def _write_data(data: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.workload", str(data)]
    subprocess.run(command, cwd=REPO, env=helper_environment(), check=True, capture_output=True)
    config = f"""\
proxy_location: HeadOnly
http_options: {{host: 127.0.0.1, request_timeout_s: 3660}}
applications:
  - name: lm
    route_prefix: /lm
    import_path: nearfield.serving:app
    args: {{model: lm, engine: generate, source: "file://{data / "lm"}"}}
    deployments:
      - name: replica
        ray_actor_options: {{num_cpus: 1}}
"""
    (data / "lm.yaml").write_text(config)


def _one(number: int, name: str, measure: Any) -> dict[str, Any]:
    """A measurement with its circumstances; a side that fails does not end the run."""
    busy = machine.busy_share(1.0)
    began_s = time.monotonic()
    record: dict[str, Any] = {"round": number, "side": name, "busy_before": round(busy, 3)}
    try:
        record["figures"] = {key: round(value, 4) for key, value in measure().items()}
    except SideFailed as error:
        record["failed"] = str(error)
    record["took_s"] = round(time.monotonic() - began_s, 1)
    shown = record.get("failed") or "  ".join(
        f"{key} {value:g}" for key, value in record["figures"].items() if key in _SHOWN
    )
    note = f"  (machine {100 * busy:.0f}% busy)" if busy > machine.BUSY_SHARE else ""
    print(f"  round {number}  {name:20}  {record['took_s']:5.1f} s  {shown}{note}", flush=True)
    return record


_SHOWN = {
    "rps", "alone_p50_ms", "c1_p50_ms", "c32_rps", "c32_p99_ms", "s1_tokens_per_s",
    "s16_tokens_per_s", "alone_ttft_p50_ms", "prefill_p50_ms", "first_ms", "sse_ttft_p50_ms",
    "sse_gap_p99_ms", "c32_cpu_us", "many_grown_mb", "frozen_mb", "l60_p99_ms", "l80_p99_ms",
}  # fmt: skip


def _limit(suite: str, data: Path, options: Options) -> Figures:
    if suite == "edge":
        return edge.measure(None, data, seconds=options.seconds, quick=options.quick)
    command = [sys.executable, "-m", "benchmarks.limits", suite, str(data)]
    command += ["--quick"] if options.quick else []
    return figures_of(command, None, 300)


def _measure(suite: str, side: Side, server: Running, data: Path, options: Options) -> Figures:
    texts = workload.prompts() if suite == "generate" else workload.sentences()
    bodies = [side.body(text, str(data)) for text in texts]
    job = Job(server.port, side.path, bodies, 1, seconds=options.seconds)
    if suite == "generate":
        return _generate(job, options)
    figures = _embed(job, options)
    if suite == "ingress":
        figures |= _ticks(job, options)
    return figures


def _embed(job: Job, options: Options) -> Figures:
    first = load(dataclasses.replace(job, requests=1, bodies=job.bodies[-1:]))
    figures = {"first_ms": first["p50_ms"]}
    warmup_s = 0.3 if options.quick else 1.5
    for connections in (1, 32):
        part = dataclasses.replace(job, connections=connections, warmup_s=warmup_s)
        figures |= _prefixed(f"c{connections}", load(part))
    return figures


def _generate(job: Job, options: Options) -> Figures:
    stream = dataclasses.replace(job, stream=True)
    figures = {
        "first_ms": load(dataclasses.replace(stream, requests=1, bodies=job.bodies[-1:]))["p50_ms"]
    }
    # Each prompt once, as the limit's bare prefill has them; the windows below end before that.
    short = [{**body, "max_tokens": 4} for body in job.bodies]
    alone = load(dataclasses.replace(stream, requests=len(short), bodies=short))
    figures |= {
        "alone_ttft_p50_ms": alone["ttft_p50_ms"],
        "alone_ttft_p99_ms": alone["ttft_p99_ms"],
    }
    for streams in STREAMS:
        part = dataclasses.replace(stream, connections=streams)
        if not options.quick:
            load(dataclasses.replace(part, requests=streams, bodies=job.bodies[-streams:]))
        figures |= _prefixed(f"s{streams}", load(part))
    return figures


def _ticks(job: Job, options: Options) -> Figures:
    prompts = workload.prompts()
    ticker = dataclasses.replace(
        job,
        path=TICKER_PATH,
        bodies=[tick(prompt, "") for prompt in prompts],
        connections=TICKER_STREAMS,
        stream=True,
    )
    load(dataclasses.replace(ticker, requests=TICKER_STREAMS))
    alone = load(dataclasses.replace(ticker, connections=1, seconds=min(2, options.seconds)))
    return _prefixed("sse1", alone) | _prefixed("sse", load(ticker))


def _prefixed(prefix: str, figures: Figures) -> Figures:
    return {f"{prefix}_{key}": value for key, value in figures.items()}


def venvs(suites: Iterable[str], only: tuple[str, ...]) -> set[str]:
    """Whose environments a run needs."""
    return {s.venv for suite in suites for s in SUITES[suite] if not only or s.name in only}
