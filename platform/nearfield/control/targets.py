"""What Serve's controller knows of replicas: the one place that reads its alpha interfaces.

In HAProxy mode the controller lists the address of every running replica for its own proxies
(`get_target_groups`). A contract test holds this against the installed Ray.
"""

from __future__ import annotations

from typing import Any

import ray
from nearfield.api.load import Application, Target
from nearfield.core.serve_config import MODEL_BUILDER
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Controller:
    """Serve's controller of this cluster. It may be killed: then it is looked up anew."""

    def __init__(self) -> None:
        self._actor: Any = None

    async def applications(self) -> tuple[Application, ...]:
        """All applications that serve a model.

        Raises:
            ray.exceptions.RayError, ValueError: the controller does not answer.
        """
        try:
            if self._actor is None:
                self._actor = ray.get_actor(SERVE_CONTROLLER_NAME, SERVE_NAMESPACE)
            details, groups = (
                self._actor.get_serve_instance_details.remote(),
                self._actor.get_target_groups.remote(from_proxy_manager=True),
            )
            return applications(await details, await groups)
        except BaseException:
            self._actor = None
            raise


def applications(details: dict[str, Any], groups: list[Any]) -> tuple[Application, ...]:
    """From what the controller says: its `ServeInstanceDetails` and its `TargetGroup`s."""
    # Replicas listen on the host that Serve's HTTP listens on; the controller names their node's.
    bound = details["http_options"]["host"]
    local = bound if bound in LOOPBACK else None
    targets = {
        group.app_name: tuple(Target(t.name, local or t.ip, t.port) for t in group.targets)
        for group in groups
        if str(group.protocol).upper().endswith("HTTP")
    }
    found = []
    for name, app in sorted(details["applications"].items()):
        config = app.get("deployed_app_config") or {}
        if config.get("import_path") != MODEL_BUILDER or app.get("route_prefix") is None:
            continue
        found.append(
            Application(
                name=name,
                route_prefix=app["route_prefix"].rstrip("/"),
                status=getattr(app["status"], "value", app["status"]),
                spec=config.get("args") or {},
                targets=targets.get(name, ()),
            )
        )
    return tuple(found)
