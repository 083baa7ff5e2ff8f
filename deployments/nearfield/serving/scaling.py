"""nearfield's scaling policy as Ray Serve calls it.

    policy_function: nearfield.serving.scaling:Scaling

Serve pickles this module by value and makes one `Scaling` for each deployment in its controller.
Keep it tiny: everything else is imported, and shared there by the pools of a model.
"""

from __future__ import annotations

from typing import Any

from nearfield.serving import pools
from ray.serve.config import AutoscalingContext


class Scaling:
    """One pool's seat. `options` are a `nearfield.core.scaling.ScalingOptions`."""

    def __init__(self, **options: Any) -> None:
        self._seat = pools.Seat(options)

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The replicas this deployment should have. What was learnt is kept elsewhere."""
        return self._seat.decide(context), {}
