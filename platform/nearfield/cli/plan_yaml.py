"""A plan as a model's file: one application for each part of the capacity, a pool each."""

from __future__ import annotations

from typing import Any

import yaml
from nearfield.cli.model_sizes import ModelSize
from nearfield.cli.ray_head import REQUEST_TIMEOUT_S
from nearfield.core.catalog import Accelerator
from nearfield.core.errors import BadRequest
from nearfield.core.serve_config import MODEL_BUILDER, MODEL_DEPLOYMENT
from nearfield.policy.plan import Choice, Part, RegionPlan

QUEUE = 2
"""Requests that may wait, for each that runs, before one is refused."""
SPOT_HANDICAP_MS = 0.0
ON_DEMAND_HANDICAP_MS = 5.0
"""By how much a request rather goes to spot, which is paid for less: `pool.handicap_ms`."""
_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
_QUANTISED = {"fp8": "fp8", "int8": "compressed-tensors", "int4": "awq"}


def config_of(plan: RegionPlan, size: ModelSize, accelerator: Accelerator) -> str:
    """The file's text.

    Raises:
        BadRequest: there is nothing to write, or the weights have no source.
    """
    choice = plan.choice
    if choice is None:
        raise BadRequest(f"--write: there is no plan for {plan.region}", param="write")
    if size.source is None:
        raise BadRequest(
            f"--write: only the shape of {size.name} is known, not where its weights are: plan for "
            "hf://org/model, its folder, or a model's YAML",
            param="write",
        )
    document = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": 8000, "request_timeout_s": REQUEST_TIMEOUT_S},
        "applications": [
            _application(part, choice, plan, size, accelerator) for part in choice.parts
        ],
    }
    text: str = yaml.safe_dump(document, sort_keys=False, width=96)
    return f"{_head(plan, choice, size)}\n{text}"


def _head(plan: RegionPlan, choice: Choice, size: ModelSize) -> str:
    load, work, machine = choice.replica.load, plan.workload, choice.machine
    out = f" and {work.tokens_out} out" if work.tokens_out else ""
    times = f"answers in {load.ttft_s * 1000:.0f} ms (p95)."
    if work.tokens_out:
        times = (
            f"first token {load.ttft_s * 1000:.0f} ms (p95),\nthen one each "
            f"{load.tpot_s * 1000:.1f} ms."
        )
    lines = [
        f"{size.name} in {plan.region}, as `nearfield plan` chose it: {work.rps:g} requests/s of",
        f"{work.tokens_in} tokens in{out}, on {choice.replica.label}",
        f"({machine.name} of {machine.provider} in {machine.place}).",
        "",
        f"Modelled, for each replica: {load.rps:.3g} requests/s, {load.running} at once; {times}",
        f"At list prices ${choice.usd_month:,.0f} a month.",
    ]
    precision = choice.replica.setup.precision
    made_elsewhere = precision in ("int8", "int4")  # fp8 vLLM makes itself, when it loads
    if choice.replica.kind.engine == "vllm" and made_elsewhere and precision != size.precision:
        lines += [
            "",
            f"vLLM does not quantise to {precision} itself: let `source` name a checkpoint that is",
            f"quantised, and `quantization` how ({_QUANTISED[precision]} is a guess).",
        ]
    return "\n".join(f"# {line}".rstrip() for line in "\n".join(lines).splitlines())


def _application(
    part: Part, choice: Choice, plan: RegionPlan, size: ModelSize, accelerator: Accelerator
) -> dict[str, Any]:
    several = len(choice.parts) > 1
    name = f"{size.name}-{part.capacity}" if several else size.name
    replica = choice.replica
    running = replica.load.running
    queued = running * QUEUE
    pool: dict[str, Any] = {"name": part.capacity, "unit_usd": _unit_usd(part, choice, plan)}
    if several:
        spot = part.capacity == "spot"
        pool["handicap_ms"] = SPOT_HANDICAP_MS if spot else ON_DEMAND_HANDICAP_MS
    args: dict[str, Any] = {
        "model": size.name,
        "source": size.source,
        "engine": _engine(choice, plan, size),
        "limits": {"max_running": running, "max_queued": queued},
        "pool": pool,
    }
    dtype = _DTYPES.get(replica.setup.precision)
    if dtype is not None and replica.kind.engine != "generate":
        args["dtype"] = dtype
    return {
        "name": name,
        "route_prefix": f"/{name}",
        "import_path": MODEL_BUILDER,
        "args": args,
        "deployments": [
            {
                "name": MODEL_DEPLOYMENT,
                "max_ongoing_requests": running + queued,
                "autoscaling_config": {
                    "min_replicas": 1,
                    "max_replicas": max(2 * part.replicas, 2),
                    "initial_replicas": part.replicas,
                    "target_ongoing_requests": float(max(1, round(0.8 * running))),
                },
                "ray_actor_options": _resources(choice, part, accelerator),
            }
        ],
    }


def _engine(choice: Choice, plan: RegionPlan, size: ModelSize) -> dict[str, Any]:
    setup, kind = choice.replica.setup, choice.replica.kind
    running = choice.replica.load.running
    if size.architecture.task == "embed":
        return {"kind": "embed", "max_batch": running}
    if kind.engine == "generate":
        engine: dict[str, Any] = {"kind": "generate", "max_batch": min(running, 1024)}
        if setup.precision == "int8":
            engine["quantization"] = "int8"
        return {**engine, "max_model_len": plan.workload.context}
    engine = {
        "kind": "vllm",
        "max_model_len": max(16, plan.workload.context),
        "tensor_parallel_size": setup.chips,
        "engine_args": {"max_num_seqs": running},
    }
    if setup.precision != size.precision and setup.precision in _QUANTISED:
        engine["quantization"] = _QUANTISED[setup.precision]
    return engine


def _resources(choice: Choice, part: Part, accelerator: Accelerator) -> dict[str, Any]:
    """What Ray is asked for: the accelerator's own resource, and the labels of its nodes."""
    ray, chips = accelerator.ray, choice.replica.chips
    amount = ray.per_chip * chips
    asked: dict[str, Any] = {"num_cpus": 1.0}
    if ray.resource == "GPU":
        asked["num_gpus"] = amount
    elif ray.resource == "CPU":
        asked["num_cpus"] = amount
    else:
        asked["resources"] = {ray.resource: amount}
    labels: dict[str, str] = {"ray.io/market-type": part.capacity}
    if ray.accelerator_type is not None:
        labels["ray.io/accelerator-type"] = ray.accelerator_type
    return {**asked, "label_selector": labels}


def _unit_usd(part: Part, choice: Choice, plan: RegionPlan) -> float:
    """Of a million tokens in this part, at the load it is planned for."""
    work = plan.workload
    each = max(1, work.tokens_in + work.tokens_out)
    tokens_h = choice.replica.load.rps * part.replicas * 3600.0 * each
    return float(f"{part.usd_h / tokens_h * 1e6:.4g}")
