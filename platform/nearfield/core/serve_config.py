"""A Ray Serve config, strictly: the keys Serve knows, and no others, at every level.

Serve itself lets unknown keys pass (`max_ongoing_request: 8` deploys, and does nothing) and
learns of many wrong values only when a replica starts. Here a config is refused before anything
is deployed. The fields mirror `ray.serve.schema`; a test compares them with the installed Ray.

Types are strict, YAML's own: `"4"` is not a number and `yes` is not a string.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

MODEL_BUILDER = "nearfield.serving:app"
"""The `import_path` of an application that serves a model."""

AGENT_BUILDER = "nearfield.control:app"
"""The `import_path` of the application that tells gateways where the replicas are."""

MODEL_DEPLOYMENT = "replica"
"""The one deployment of such an application."""

Count = Annotated[int, Field(ge=0)]
PositiveCount = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveSeconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Factor = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Quantity = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Port = Annotated[int, Field(ge=1, le=65535)]
Labels = dict[str, str]


def _import_path(value: str) -> str:
    separator = ":" if ":" in value else "."
    head, _, tail = value.rpartition(separator)
    if not (head and tail) or ":" in head:
        raise ValueError("must name a module and something in it, like package.module:name")
    return value


ImportPath = Annotated[str, AfterValidator(_import_path)]


class Section(BaseModel):
    """A section of the config: an unknown key is an error, and `1` is not `"1"`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class LoggingConfig(Section):
    """How Serve logs."""

    encoding: Literal["TEXT", "JSON"] | None = None
    log_level: Literal["CRITICAL", "ERROR", "WARNING", "INFO", "DEBUG"] | None = None
    logs_dir: str | None = None
    enable_access_log: bool = True
    additional_log_standard_attrs: list[str] = []


class TracingConfig(Section):
    """Serve's own traces."""

    enabled: bool = False
    exporter_import_path: str = ""
    sampling_ratio: float = Field(0.01, ge=0, le=1)


class HttpOptions(Section):
    """Where Serve listens for HTTP. Fixed once Serve runs."""

    host: str | None = None
    port: Port = 8000
    root_path: str = ""
    request_timeout_s: PositiveSeconds | None = None
    keep_alive_timeout_s: PositiveCount = 90
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile_password: str | None = None
    ssl_ca_certs: str | None = None


class GrpcOptions(Section):
    """Where Serve listens for gRPC. Fixed once Serve runs."""

    port: Port = 9000
    grpc_servicer_functions: list[str] = []
    request_timeout_s: PositiveSeconds | None = None
    enable_reflection: bool = True


class ControllerRuntimeEnv(Section):
    """What Serve lets a config set for its controller."""

    env_vars: dict[str, str] = {}


class ControllerOptions(Section):
    """Serve's controller."""

    runtime_env: ControllerRuntimeEnv | None = None


class RuntimeEnv(Section):
    """What a replica's process needs besides the image it runs in."""

    working_dir: str | None = None
    py_modules: list[str] | None = None
    py_executable: str | None = None
    excludes: list[str] | None = None
    env_vars: dict[str, str] | None = None
    pip: list[str] | dict[str, Any] | str | None = None
    uv: list[str] | dict[str, Any] | str | None = None
    conda: dict[str, Any] | str | None = None
    container: dict[str, Any] | None = None
    image_uri: str | None = None
    nsight: dict[str, str] | str | None = None
    rocprof_sys: dict[str, Any] | str | None = None
    worker_process_setup_hook: str | None = None
    config: dict[str, Any] | None = None


class Fallback(Section):
    """Where else a replica may run. Labels only: the resources it needs stay the same."""

    label_selector: Labels


class RayActorOptions(Section):
    """What one replica needs of a node."""

    runtime_env: RuntimeEnv | None = None
    num_cpus: Quantity | None = None
    num_gpus: Quantity | None = None
    memory: Quantity | None = None
    resources: dict[str, Quantity] = {}
    accelerator_type: str | None = None
    label_selector: Labels | None = None
    fallback_strategy: list[Fallback] | None = None


class AutoscalingPolicy(Section):
    """A policy of one's own."""

    policy_function: ImportPath | None = None
    policy_kwargs: dict[str, Any] = {}


class AutoscalingConfig(Section):
    """How many replicas, by load."""

    min_replicas: Count = 1
    initial_replicas: Count | None = None
    max_replicas: PositiveCount = 1
    target_ongoing_requests: Factor | None = None
    metrics_interval_s: PositiveSeconds | None = None
    look_back_period_s: PositiveSeconds | None = None
    smoothing_factor: Factor | None = None
    upscale_smoothing_factor: Factor | None = None
    downscale_smoothing_factor: Factor | None = None
    upscaling_factor: Factor | None = None
    downscaling_factor: Factor | None = None
    downscale_delay_s: Seconds | None = None
    downscale_to_zero_delay_s: Seconds | None = None
    upscale_delay_s: Seconds | None = None
    aggregation_function: Literal["mean", "max", "min"] | None = None
    policy: AutoscalingPolicy | None = None

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}"
                + ("" if "max_replicas" in self.model_fields_set else ", which is 1 when absent")
            )
        first = self.initial_replicas
        if first is not None and not self.min_replicas <= first <= self.max_replicas:
            raise ValueError(
                f"initial_replicas {first} is not between min_replicas {self.min_replicas} "
                f"and max_replicas {self.max_replicas}"
            )
        return self


class BackpressureConfig(Section):
    """The answer when Serve's queue is full."""

    status_code: Literal[429, 503] = 503
    retry_after_s: Seconds | None = None


class RequestRouterConfig(Section):
    """How Serve's handles choose a replica."""

    request_router_class: str | None = None
    request_router_kwargs: dict[str, Any] = {}
    request_routing_stats_period_s: PositiveSeconds | None = None
    request_routing_stats_timeout_s: PositiveSeconds | None = None
    initial_backoff_s: PositiveSeconds | None = None
    backoff_multiplier: Factor | None = None
    max_backoff_s: PositiveSeconds | None = None


class GangSchedulingConfig(Section):
    """Replicas that start and stop together."""

    gang_size: PositiveCount
    gang_placement_strategy: Literal["PACK", "SPREAD"] = "PACK"
    runtime_failure_policy: Literal["RESTART_GANG"] = "RESTART_GANG"


class DeploymentActor(Section):
    """An actor shared by a deployment's replicas."""

    name: str
    actor_class: ImportPath
    init_args: list[Any] = []
    init_kwargs: dict[str, Any] = {}
    actor_options: dict[str, Any] = {}


class Deployment(Section):
    """Serve's options of one deployment."""

    name: str = Field(min_length=1)
    num_replicas: PositiveCount | Literal["auto"] | None = None
    max_ongoing_requests: PositiveCount | None = None
    max_queued_requests: Annotated[int, Field(ge=-1)] | None = None
    backpressure_config: BackpressureConfig | None = None
    user_config: dict[str, Any] | None = None
    autoscaling_config: AutoscalingConfig | None = None
    graceful_shutdown_wait_loop_s: Seconds | None = None
    graceful_shutdown_timeout_s: Seconds | None = None
    health_check_period_s: PositiveSeconds | None = None
    health_check_timeout_s: PositiveSeconds | None = None
    ray_actor_options: RayActorOptions | None = None
    placement_group_bundles: list[dict[str, Quantity]] | None = None
    placement_group_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] | None = (
        None
    )
    placement_group_bundle_label_selector: list[Labels] | None = None
    max_replicas_per_node: Annotated[int, Field(ge=1, le=100)] | None = None
    logging_config: LoggingConfig | None = None
    request_router_config: RequestRouterConfig | None = None
    gang_scheduling_config: GangSchedulingConfig | None = None
    deployment_actors: list[DeploymentActor] | None = None
    rolling_update_percentage: Annotated[float, Field(gt=0, le=1)] | None = None
    max_surge_percent: Annotated[int, Field(ge=0, le=100)] | None = None

    @model_validator(mode="after")
    def _one_way_to_count(self) -> Self:
        if isinstance(self.num_replicas, int) and self.autoscaling_config is not None:
            raise ValueError(
                f"num_replicas {self.num_replicas} and autoscaling_config exclude each other: "
                "leave out one of them, or write num_replicas: auto"
            )
        if self.max_queued_requests == 0:
            raise ValueError("max_queued_requests is -1 (no limit) or at least 1")
        return self


class Application(Section):
    """One application: a model of ours, or anything else that Serve runs.

    `args` of a model are a `ModelSpec`, which is checked on its own.
    """

    name: str = Field(min_length=1)
    route_prefix: str | None = "/"
    import_path: ImportPath
    runtime_env: RuntimeEnv | None = None
    args: dict[str, Any] = {}
    deployments: list[Deployment] = []
    autoscaling_policy: AutoscalingPolicy | None = None
    external_scaler_enabled: bool = False
    logging_config: LoggingConfig | None = None


class ServeConfig(Section):
    """A whole config file, applications aside: those are checked one by one."""

    proxy_location: Literal["Disabled", "HeadOnly", "EveryNode"] = "EveryNode"
    http_options: HttpOptions | None = None
    grpc_options: GrpcOptions | None = None
    controller_options: ControllerOptions | None = None
    logging_config: LoggingConfig | None = None
    tracing_config: TracingConfig | None = None
    target_capacity: Annotated[float, Field(ge=0, le=100)] | None = None
    applications: list[Any] = Field(min_length=1)
