"""The models of a region, as its Serve tells them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from nearfield.cli.deploy import failure, state_of
from nearfield.cli.region import Region
from nearfield.core.scaling import SCALING_POLICY
from nearfield.core.serve_config import MODEL_BUILDER


@dataclass(frozen=True, slots=True)
class Model:
    """One application of a region; `model`, `version`, `engine` and `source` if it serves a model.

    Attributes:
        endpoint: its base URL, None without a route.
        replicas: those that run, of `replicas_wanted`.
        state: starting, running, failed or stopping; `reason` says why it failed.
        scaled: by nearfield's policy.
    """

    application: str
    model: str | None
    version: str | None
    engine: str | None
    source: str | None
    endpoint: str | None
    replicas: int
    replicas_wanted: int
    state: str
    reason: str | None
    scaled: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def cells(self) -> tuple[str, ...]:
        """A row of a table."""
        return (
            self.model or self.application,
            self.version or "-",
            self.engine or "-",
            self.source or "-",
            f"{self.replicas}/{self.replicas_wanted}",
            self.state,
            self.endpoint or "-",
        )


def listed(region: Region) -> list[Model]:
    """All applications of the region, by name."""
    applications: dict[str, Any] = region.api.details()["applications"]
    return [_model(region, app) for _, app in sorted(applications.items())]


def _model(region: Region, app: dict[str, Any]) -> Model:
    config = app.get("deployed_app_config") or {}
    args = config.get("args", {}) if config.get("import_path") == MODEL_BUILDER else {}
    deployments = app.get("deployments", {}).values()
    replicas = [replica for item in deployments for replica in item.get("replicas", [])]
    return Model(
        application=app["name"],
        model=args.get("model"),
        version=str(args.get("version", "1")) if args else None,
        engine=_engine(args.get("engine")),
        source=args.get("source"),
        endpoint=region.url_of(app.get("route_prefix")),
        replicas=sum(replica["state"] == "RUNNING" for replica in replicas),
        replicas_wanted=sum(item.get("target_num_replicas") or 0 for item in deployments),
        state=state_of(app),
        reason=failure(app),
        scaled=any(map(_scaled, deployments)),
    )


def _scaled(deployment: dict[str, Any]) -> bool:
    config = deployment.get("deployment_config") or {}
    policy = (config.get("autoscaling_config") or {}).get("policy") or {}
    return policy.get("policy_function") == SCALING_POLICY


def _engine(engine: Any) -> str | None:
    if isinstance(engine, dict):
        return str(engine.get("import_path") or engine.get("kind"))
    return None if engine is None else str(engine)
