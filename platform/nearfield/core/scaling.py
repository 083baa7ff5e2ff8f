"""What a model's YAML says about its scaling: the `policy_kwargs` of nearfield's policy in Serve.

    autoscaling_config:
      min_replicas: 0
      max_replicas: 8
      target_ongoing_requests: 8
      upscale_delay_s: 0
      downscale_delay_s: 0
      metrics_interval_s: 1
      policy:
        policy_function: nearfield.serving.scaling:Scaling
        policy_kwargs: {usd_per_hour: 2.1, max_usd_per_hour: 12}

Everything has a default. Bounds and the target of requests stay Serve's own.
"""

from __future__ import annotations

from typing import Literal

from nearfield.core.spec import Name, Strict
from pydantic import Field

SCALING_POLICY = "nearfield.serving.scaling:Scaling"
"""The `policy_function` of it."""


class ScalingOptions(Strict):
    """One pool's part. Pools of one `model` in a region are scaled together."""

    model: Name | None = Field(
        None, description="joins the pools of one model; absent: this application is alone"
    )
    pool: Name = Field("default", description="as in the application's args")
    products: list[Name] = Field([], description="whose pool it is; empty: everybody's")
    kind: Literal["spot", "on_demand"] = "on_demand"
    node_types: list[str] = Field(
        [],
        description="of the cluster file, that its replicas run on: while their launches fail, "
        "other pools take over at once",
    )
    zone: str = Field("", max_length=64, description="spot pools of several zones are spread over")
    usd_per_hour: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="price of one replica; pools are compared by it"
    )
    boot_s: float = Field(
        60.0, gt=0, le=7200, description="from asking for a replica to its serving, until measured"
    )
    max_wait_s: float = Field(
        2.0, gt=0, le=600, description="a request that waits longer for its turn is late"
    )
    max_late: float = Field(0.01, gt=0, lt=1, description="share of requests that may be late")
    max_usd_per_hour: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="bill of the model's pools in this region"
    )
    hold_s: float = Field(
        600.0, ge=0, le=86_400, description="capacity that was needed within so long is kept"
    )
    idle_s: float = Field(
        300.0, ge=0, le=86_400, description="to zero after so long without a request"
    )
