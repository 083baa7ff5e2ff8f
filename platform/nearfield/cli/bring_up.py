"""From applications to answers: deploy, wait, ask each model a real question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nearfield.cli import deploy
from nearfield.cli.probe import Answer, ask
from nearfield.cli.region import Region, Report
from nearfield.core.serve_config import MODEL_BUILDER
from nearfield.core.spec import ModelSpec

_ASK_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Started:
    """An application that was brought up, or why it was not.

    Attributes:
        url: its base URL, None without a route.
        spec, answer: of a model that runs; an application of another kind is not asked.
        reason: why it is not ready; None if it is.
    """

    name: str
    url: str | None
    spec: ModelSpec | None = None
    answer: Answer | None = None
    reason: str | None = None

    @property
    def ready(self) -> bool:
        return self.reason is None

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "endpoint": self.url,
            "ready": self.ready,
            "reason": self.reason,
            "answer": self.answer.text if self.answer else None,
        }


def bring_up(
    region: Region, apps: Sequence[dict[str, Any]], *, timeout_s: float, report: Report
) -> list[Started]:
    """Deploy applications beside what runs, in their order; returns when all run or have failed.

    Raises:
        NearfieldError: as `deploy.apply` and `deploy.wait_until_running` do.
    """
    deploy.apply(region, apps)
    return answers(region, apps, timeout_s=timeout_s, report=report)


def answers(
    region: Region, apps: Sequence[dict[str, Any]], *, timeout_s: float, report: Report
) -> list[Started]:
    """The part of `bring_up` that waits, for applications that are being deployed."""
    names = [app["name"] for app in apps]
    outcomes = deploy.wait_until_running(region, names, timeout_s=timeout_s, report=report)
    return [_ask(region, app, outcome) for app, outcome in zip(apps, outcomes, strict=True)]


def _ask(region: Region, app: dict[str, Any], outcome: deploy.Outcome) -> Started:
    name, url = outcome.name, region.url_of(app.get("route_prefix", "/"))
    if not outcome.ready or url is None or app["import_path"] != MODEL_BUILDER:
        return Started(name, url, reason=outcome.reason)
    spec = ModelSpec.model_validate(app["args"])
    answer = ask(url, spec, timeout_s=_ASK_TIMEOUT_S, settings=region.settings)
    reason = None if answer.error is None else f"it does not answer: {answer.error}"
    return Started(name, url, spec, answer, reason)
