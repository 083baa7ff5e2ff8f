"""Changing what a region serves, and waiting until it does.

Serve's config is declarative and whole: what a PUT leaves out is deleted. So every change reads
what is deployed, changes that and writes it back, under the region's lock. Applications that do
not change are not disturbed.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from nearfield.cli.region import Region, Report
from nearfield.core.errors import Conflict, NotFound

_POLL_S = 0.2
# Serve's words → ours. "failed" is what does not get well without help.
_STATES = {
    "NOT_STARTED": "starting",
    "DEPLOYING": "starting",
    "RUNNING": "running",
    "DEPLOY_FAILED": "failed",
    "UNHEALTHY": "failed",
    "DELETING": "stopping",
}
# How Serve words it when no node has room; nothing but a change of config helps on one machine.
_UNSCHEDULABLE = re.compile(
    r"to be scheduled\..*Resources required for each replica: (?P<needs>\{.*?\}), "
    r"total resources available: (?P<has>\{.*?\})",
    re.DOTALL,
)
_RAISED = re.compile(r"^(?P<type>[A-Za-z_][\w.]*): (?P<message>\S.*)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a deploy ended for one application; `reason` says why it is not ready."""

    name: str
    ready: bool
    reason: str | None = None


def apply(region: Region, add: Sequence[dict[str, Any]], *, remove: Collection[str] = ()) -> None:
    """Add or replace applications (as in a Serve config) and remove others, by name.

    Raises:
        BadRequest: Serve refuses the config.
        Conflict: a route is taken by an application that stays.
        NotFound: an application to remove is not there.
        Unavailable: the region does not answer.
    """
    with region.deploying():
        running = deployed(region)
        if missing := sorted(set(remove) - running.keys()):
            known = ", ".join(sorted(running)) or "none"
            raise NotFound(f"No such model here: {', '.join(missing)}. Running: {known}")
        wanted = {name: app for name, app in running.items() if name not in remove}
        wanted |= {app["name"]: app for app in add}
        _check_routes(wanted.values())
        region.api.put({**region.state.serve_options, "applications": list(wanted.values())})


def deployed(region: Region) -> dict[str, dict[str, Any]]:
    """The applications a region is to serve, by name, as they stood in their configs."""
    applications: dict[str, dict[str, Any]] = region.api.details()["applications"]
    return {
        name: app["deployed_app_config"]
        for name, app in applications.items()
        # An application that is being deleted is still listed, without a config or on its way out.
        if app.get("deployed_app_config") and app["status"] != "DELETING"
    }


def wait_until_running(
    region: Region, names: Iterable[str], *, timeout_s: float, report: Report
) -> list[Outcome]:
    """Wait until each application runs or has failed; in the order of `names`.

    Raises:
        Unavailable: the region does not answer any more.
    """
    pending = list(names)
    outcomes: dict[str, Outcome] = {}
    shown: dict[str, str] = {}
    deadline_s = time.monotonic() + timeout_s
    while True:
        applications = region.api.details()["applications"]
        for name in [name for name in pending if name not in outcomes]:
            app = applications.get(name, {"status": "NOT_STARTED", "message": ""})
            state = state_of(app)
            if shown.get(name) != state:
                shown[name] = state
                report(f"{name}: {state}")
            if state == "running" and _is_routed(region, app):
                outcomes[name] = Outcome(name, ready=True)
            elif (reason := failure(app)) is not None:
                outcomes[name] = Outcome(name, ready=False, reason=reason)
        if len(outcomes) == len(pending):
            return [outcomes[name] for name in pending]
        if time.monotonic() > deadline_s:
            late = f"not ready after {timeout_s:.0f} s; it goes on trying. See: nearfield status"
            return [outcomes.get(name, Outcome(name, False, late)) for name in pending]
        time.sleep(_POLL_S)


def _is_routed(region: Region, app: dict[str, Any]) -> bool:
    """The ingress learns of a route a moment after Serve says that its application runs."""
    route = app.get("route_prefix")
    return route is None or region.api.routes().get(route) == app["name"]


def wait_until_gone(region: Region, names: Collection[str], *, timeout_s: float) -> bool:
    """Wait until no application of these names is left; False if one still drains."""
    deadline_s = time.monotonic() + timeout_s
    while set(names) & region.api.details()["applications"].keys():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(_POLL_S)
    return True


def state_of(app: dict[str, Any]) -> str:
    """An application's state (as in Serve's details): starting, running, failed or stopping."""
    status = str(app["status"])
    return _STATES.get(status, status.lower())


def failure(app: dict[str, Any]) -> str | None:
    """Why an application (as in Serve's details) cannot serve, if it cannot, in a line or two."""
    messages = [app["message"], *(d["message"] for d in app.get("deployments", {}).values())]
    for message in messages:
        if match := _UNSCHEDULABLE.search(message):
            return (
                f"no room: a replica needs {match['needs']} and {match['has']} is free. Ask for "
                "less in ray_actor_options, or start the region with more: nearfield up --cpus N"
            )
    if state_of(app) != "failed":
        return None
    # The deployment's message carries the replica's traceback, the application's only says that.
    reasons = [reason for message in reversed(messages) if (reason := _raised(message))]
    return reasons[0] if reasons else (app["message"] or app["status"])


def _raised(trace: str) -> str | None:
    """The last exception of a traceback in text form: what to tell, without where it was raised."""
    found = list(_RAISED.finditer(trace))
    if not found:
        return None
    kind, message = found[-1]["type"], trace[found[-1].start("message") :].strip()
    return message if kind.startswith("nearfield.") else f"{kind.rpartition('.')[2]}: {message}"


def _check_routes(applications: Iterable[dict[str, Any]]) -> None:
    taken: dict[str, str] = {}
    for app in applications:
        route = app.get("route_prefix", "/")
        if route is None:
            continue
        if route in taken:
            raise Conflict(
                f"route_prefix {route} of {app['name']} is taken by {taken[route]}: choose "
                f"another, or remove that model first: nearfield rm {taken[route]}",
                param="route_prefix",
            )
        taken[route] = app["name"]
