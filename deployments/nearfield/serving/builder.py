"""The application builder: a model spec in, a Serve application out.

No `from __future__ import annotations` here: Serve validates `args` against the builder's
annotation only where that is a class, and with the import it would be a string.

Not called `app.py`: importing a module of that name would replace the function
`nearfield.serving.app` by the module.
"""

import os
from collections.abc import Mapping

from nearfield.core.spec import ModelSpec
from nearfield.serving.replica import Replica
from ray.serve import Application

SPARE_REQUESTS = 256
"""Requests Serve lets in beyond those we would take, so that it is us who refuse them: at once
and in the caller's dialect. Also room for health, metadata and metrics."""
HEALTH_CHECK_PERIOD_S = 5.0
HEALTH_CHECK_TIMEOUT_S = 15.0
DEREGISTRATION_S = 30.0
"""Serve's default for how long a stopping replica stays reachable behind HAProxy."""
SETTLE_S = 5.0


def app(args: ModelSpec) -> Application:
    """Build the application of one model; `args` is what a config has under that name.

    What stands under `deployments:` in the config, for the deployment `replica`, wins over the
    options set here.
    """
    limits = args.limits
    return Replica.options(  # type: ignore[attr-defined,no-any-return]
        max_ongoing_requests=limits.max_running + limits.max_queued + SPARE_REQUESTS,
        graceful_shutdown_timeout_s=_deregistration_s(os.environ) + limits.drain_s + SETTLE_S,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
    ).bind(args)


def _deregistration_s(environ: Mapping[str, str]) -> float:
    """How long requests may still arrive once a replica stops; `drain_s` begins after that."""
    given = environ.get("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S")
    return DEREGISTRATION_S if given is None else float(given)
