"""The model spec: everything a developer says about one model, strict and frozen.

It stands in the `args` of an application in a plain Ray Serve config:

    applications:
      - name: chat
        route_prefix: /chat
        import_path: nearfield.serving:app
        args:
          model: chat
          source: builtin://abacus
          engine: generate

What Ray Serve already has a word for (replicas, autoscaling, resources) stays in Serve's own
`deployments:` section, under the deployment name `replica`.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

NAME_PATTERN = r"^[A-Za-z0-9](?:[A-Za-z0-9._-]{0,127})$"
"""Names of models, versions and adapters: safe in a URL, a path and a metric label."""

IMPORT_PATTERN = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"

SOURCE_SCHEMES = ("builtin", "hf", "s3", "file")

BUILTIN_MODELS = ("abacus", "minilm")
"""What `builtin://` names: weights that are installed with nearfield."""


def _plain_name(value: str) -> str:
    if ".." in value:
        raise ValueError("may not contain '..'")
    return value


Name = Annotated[str, Field(pattern=NAME_PATTERN), AfterValidator(_plain_name)]


def _source(value: str) -> str:
    scheme, separator, rest = value.partition("://")
    if not separator or scheme not in SOURCE_SCHEMES:
        known = ", ".join(f"{s}://" for s in SOURCE_SCHEMES)
        raise ValueError(f"must start with one of {known}")
    if not rest.strip("/"):
        raise ValueError(f"names nothing after {scheme}://")
    if scheme == "hf" and not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", rest):
        raise ValueError("must look like hf://org/model or hf://org/model@revision")
    if scheme == "builtin" and not re.fullmatch(NAME_PATTERN, rest):
        raise ValueError("must look like builtin://name")
    if scheme == "file" and not rest.startswith("/"):
        raise ValueError("must be an absolute path: file:///path/to/model")
    if ".." in rest.split("/"):
        raise ValueError("may not contain '..'")
    return value


Source = Annotated[str, AfterValidator(_source)]


class Strict(BaseModel):
    """Frozen, and a key it does not know is an error: a typo must never be a default."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Limits(Strict):
    """Bounds of one replica. Beyond them a request is refused at once, never left hanging."""

    max_running: int = Field(64, ge=1, le=4096, description="requests inside the engine at once")
    max_queued: int = Field(
        256, ge=0, le=65536, description="requests waiting behind them; one more is a 429"
    )
    timeout_s: float = Field(
        120.0, gt=0, le=3600, description="a request's deadline when it brings none of its own"
    )
    max_body_bytes: int = Field(16 * 2**20, ge=1024, le=2**30)
    drain_s: float = Field(
        30.0, ge=0, le=3600, description="how long a stopping replica may finish what it accepted"
    )


class GenerateEngine(Strict):
    """Text generation on transformers and torch with continuous batching."""

    kind: Literal["generate"] = "generate"
    max_model_len: int | None = Field(
        None, ge=16, description="context window, tokens; the model's own when absent"
    )
    max_batch: int = Field(16, ge=1, le=1024, description="sequences decoded in one step")
    kv_cache_tokens: int | None = Field(
        None,
        ge=64,
        description="KV-cache budget, tokens over all sequences; absent: max_batch x "
        "max_model_len, at most half of the free memory",
    )
    prefill_chunk_tokens: int = Field(
        512, ge=16, le=65536, description="prompt tokens computed between two decode steps"
    )
    default_max_tokens: int = Field(512, ge=1, description="when a chat request names none")
    quantization: Literal["none", "int8"] = "none"
    chat_template: str | None = Field(
        None, description="a Jinja template; the model's own if absent"
    )


class EmbedEngine(Strict):
    """Sentence embeddings with adaptive batching and length bucketing."""

    kind: Literal["embed"] = "embed"
    runtime: Literal["auto", "onnx", "torch", "openvino"] = "auto"
    max_batch: int = Field(32, ge=1, le=4096, description="sequences in one forward")
    slo_ms: float = Field(
        50.0, gt=0, description="queueing plus compute should stay below; bounds the batch"
    )
    max_tokens: int | None = Field(
        None, ge=8, description="longest input; the model's own if absent"
    )
    truncate: bool = Field(False, description="cut longer inputs instead of refusing them")
    normalize: bool | None = Field(
        None, description="unit-length vectors; the model's own if absent"
    )
    pooling: Literal["auto", "mean", "cls"] = "auto"


class TensorEngine(Strict):
    """Any tensors-to-tensors model in ONNX, on ONNX Runtime."""

    kind: Literal["tensor"] = "tensor"
    file: str = Field("model.onnx", pattern=r"^[\w.-]+(/[\w.-]+)*\.onnx$")
    max_batch: int = Field(
        1, ge=1, le=4096, description="rows joined along a dynamic first dimension; 1: no batching"
    )
    max_wait_ms: float = Field(2.0, ge=0, description="longest wait for company in a batch")


class RemoteEngine(Strict):
    """An upstream that speaks OpenAI or the Open Inference Protocol: foreign hardware as a pool."""

    kind: Literal["remote"] = "remote"
    url: str = Field(
        pattern=r"^https?://[^\s@#?]+$", description="OpenAI: ends in /v1; OIP: without /v2"
    )
    protocol: Literal["openai", "oip"] = "openai"
    task: Literal["generate", "embed", "tensor"] = "generate"
    upstream_model: str | None = Field(None, description="its name there; ours if absent")
    api_key_env: str | None = Field(
        None, pattern=r"^[A-Z_][A-Z0-9_]*$", description="environment variable that holds the key"
    )
    connect_timeout_s: float = Field(5.0, gt=0)
    max_connections: int = Field(256, ge=1)

    @model_validator(mode="after")
    def _tensors_need_oip(self) -> Self:
        if (self.task == "tensor") != (self.protocol == "oip"):
            raise ValueError(
                "protocol oip goes with task tensor, protocol openai with task generate or embed"
            )
        return self


class VllmEngine(Strict):
    """vLLM on GPUs (`pip install nearfield[vllm]`)."""

    kind: Literal["vllm"] = "vllm"
    max_model_len: int | None = Field(None, ge=16)
    default_max_tokens: int = Field(512, ge=1)
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    tensor_parallel_size: int = Field(1, ge=1)
    quantization: str | None = None
    engine_args: dict[str, Any] = Field(
        default_factory=dict, description="passed to vLLM's AsyncEngineArgs as they are"
    )


class CustomEngine(Strict):
    """An engine of the user's own: `engine: my_package.my_module:MyEngine`."""

    kind: Literal["custom"] = "custom"
    import_path: str = Field(pattern=IMPORT_PATTERN, description="module:Class")
    options: dict[str, Any] = Field(default_factory=dict, description="passed to the class")


EngineSpec = Annotated[
    GenerateEngine | EmbedEngine | TensorEngine | RemoteEngine | VllmEngine | CustomEngine,
    Field(discriminator="kind"),
]
ENGINE_KINDS = ("generate", "embed", "tensor", "remote", "vllm", "custom")
SOURCELESS_KINDS = ("remote", "custom")


class Pool(Strict):
    """Which pool of the model this application is, and who may use it. Gateways read it.

    `pool: spot` stands for the section with its defaults.
    """

    name: Name = "default"
    products: list[Name] | None = Field(
        None, min_length=1, description="whose pool it is; absent: everybody's"
    )
    unit_usd: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="price of a unit of work (a million tokens, a thousand inferences), compared "
        "between pools by callers in economy mode",
    )
    handicap_ms: float = Field(
        0.0,
        ge=0,
        le=60_000,
        description="how long a request would rather wait elsewhere than come here: 0 for the "
        "preferred pool, some milliseconds for its stand-in",
    )


_CORES = {"v4": 2, "v5p": 2}


def tpu_pod_type(kind: str, topology: str) -> str:
    """Google's name of a slice: `v5litepod-16` for 4x4 chips of v5e. It counts cores."""
    chips = math.prod(int(part) for part in topology.split("x"))
    return f"{kind}-{chips * _CORES.get(kind, 1)}"


class TpuSlice(Strict):
    """A whole TPU slice for each replica: several hosts, all of them or none."""

    accelerator_type: Literal["TPU-V4", "TPU-V5LITEPOD", "TPU-V5P", "TPU-V6E"] = Field(
        description="Ray's name"
    )
    topology: str = Field(pattern=r"^[1-9]\d*(x[1-9]\d*){1,2}$", description="chips: 4x4, 2x2x2")
    wait_s: float = Field(
        300.0, ge=0, le=7200, description="for hosts that come later than the first"
    )

    @model_validator(mode="after")
    def _shape(self) -> Self:
        wanted = 3 if self.accelerator_type in ("TPU-V4", "TPU-V5P") else 2
        if self.topology.count("x") + 1 != wanted:
            shape = "x".join("4" * wanted)
            raise ValueError(
                f"topology {self.topology} is none of {self.accelerator_type}'s, which have "
                f"{wanted} dimensions, as {shape}"
            )
        return self

    @property
    def chips(self) -> int:
        return math.prod(int(part) for part in self.topology.split("x"))

    @property
    def head_resource(self) -> str:
        """What each slice has once, at its first host: a replica asks for it."""
        kind = self.accelerator_type.removeprefix("TPU-").lower()
        return f"TPU-{tpu_pod_type(kind, self.topology)}-head"


class ModelSpec(Strict):
    """One model: the `args` of a Serve application with `import_path: nearfield.serving:app`."""

    model: Name = Field(description="the name clients ask for")
    version: Name = Field("1", description="reported to clients and in every metric")
    engine: EngineSpec
    source: Source | None = Field(
        None, description="weights: builtin://, hf://org/model, s3://bucket/prefix or file:///path"
    )
    s3_endpoint_url: str | None = Field(
        None, pattern=r"^https?://\S+$", description="for s3:// sources"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: the checkpoint's on an accelerator, float32 on a CPU"
    )
    threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads of the engine; absent: the replica's num_cpus"
    )
    slice: TpuSlice | None = Field(None, description="each replica's own TPU slice")
    limits: Limits = Limits()
    pool: Pool = Pool()
    fallback_models: list[Name] = Field(
        [], description="smaller models, best first, that may answer where this one cannot in time"
    )

    @model_validator(mode="before")
    @classmethod
    def _shorthands(cls, data: Any) -> Any:
        """`engine: generate`, `engine: module:Class` and `pool: spot` stand for the section with
        its defaults."""
        if not isinstance(data, dict):
            return data
        if isinstance(short := data.get("engine"), str):
            section = {"kind": "custom", "import_path": short} if ":" in short else {"kind": short}
            data = {**data, "engine": section}
        if isinstance(short := data.get("pool"), str):
            data = {**data, "pool": {"name": short}}
        return data

    @model_validator(mode="after")
    def _source_where_needed(self) -> Self:
        if self.source is None and self.engine.kind not in SOURCELESS_KINDS:
            raise ValueError(
                f"source is missing: engine {self.engine.kind} needs weights, "
                "for instance source: hf://org/model"
            )
        if self.source is not None and self.engine.kind == "remote":
            raise ValueError("source does not go with engine remote: the weights are upstream's")
        if self.slice is not None and self.engine.kind != "custom":
            raise ValueError(
                f"slice does not go with engine {self.engine.kind}, which runs on one host: write "
                "an engine of your own, which starts its workers on the others"
            )
        if self.s3_endpoint_url is not None and not (self.source or "").startswith("s3://"):
            raise ValueError("s3_endpoint_url goes only with an s3:// source")
        return self
