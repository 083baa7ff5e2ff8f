"""What the gateway answers of itself: models, health, its region for others, decisions explained.

    GET /v1/models[/{model}], /{model}/v1/models        who may call: what that caller may ask
    GET /v2, /v2/models/{model}[/versions/{version}]/ready   likewise
    GET /v2/health/live, /v2/health/ready, /healthz, /livez, /readyz     anybody
    GET /-/nearfield/region                             gateways, by their passports
    GET /-/nearfield/status, /-/nearfield/route?model=  platform administrators

Where there is no store, anybody may call; where nobody signs passports, any gateway may ask.
Paths are those of `Request.path`: a leading `/{model}` is in `Request.model`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version as installed_version
from typing import Any, Final
from urllib.parse import parse_qsl, unquote

import msgspec
from nearfield.api.keys import KeyTable, Principal
from nearfield.api.load import REGION_PATH, is_gateways
from nearfield.api.passport import HEADER, PassportKeys
from nearfield.core.errors import BadRequest, Forbidden, NearfieldError, NotFound, Unauthenticated
from nearfield.edge.distance import place_of
from nearfield.edge.known import Known
from nearfield.edge.proxy.answers import refusal
from nearfield.edge.proxy.ports import Answer, Dialect, Page, Request
from nearfield.edge.world import World
from nearfield.policy.endpoints import CRITICALITIES, DEFAULT, Caller, Mode, Refusal
from nearfield.policy.explain import Explanation
from nearfield.policy.route import Pick

STATUS_PATH: Final = "/-/nearfield/status"
ROUTE_PATH: Final = "/-/nearfield/route"
_ROUTE_QUERY: Final = (
    "model", "from", "jurisdiction", "product", "version", "mode", "slo_ms", "criticality",
)  # fmt: skip
_MODES: Final[tuple[Mode, ...]] = ("nearest", "economy")
_NEWS: Final = ((b"cache-control", b"no-store"),)

_encode = msgspec.json.Encoder().encode
_Handler = Callable[[Request], Answer]


class ModelPages:
    """The pages of one gateway process."""

    def __init__(self, world: World, keys: KeyTable | None) -> None:
        """
        Args:
            keys: who may call; None: anybody.
        """
        self._world = world
        self._keys = keys
        self._created_s = int(time.time())

    def routes(self) -> dict[tuple[str, str], Page]:
        """By method and pattern of the path."""
        return {
            ("GET", "/v1/models"): _page(self._models, "openai"),
            ("GET", "/v1/models/{model}"): _page(self._model, "openai"),
            ("GET", "/v2"): _page(self._server, "oip"),
            ("GET", "/v2/health/live"): _page(self._oip_live, "oip"),
            ("GET", "/v2/health/ready"): _page(self._oip_ready, "oip"),
            ("GET", "/v2/models/{model}/ready"): _page(self._oip_model_ready, "oip"),
            ("GET", "/v2/models/{model}/versions/{version}/ready"): _page(
                self._oip_model_ready, "oip"
            ),
            ("GET", "/healthz"): _page(self._live, "openai"),
            ("GET", "/livez"): _page(self._live, "openai"),
            ("GET", "/readyz"): _page(self._ready, "openai"),
            ("GET", REGION_PATH): _page(self._region, "openai"),
            ("GET", STATUS_PATH): _page(self._status, "openai"),
            ("GET", ROUTE_PATH): _page(self._route, "openai"),
        }

    # ---- models -----------------------------------------------------------------------------

    def _models(self, request: Request) -> Answer:
        caller = self._caller(request)
        names = sorted(self._visible(caller))
        if request.model is not None:
            names = [self._require(request.model, caller)]
        return _json({"object": "list", "data": [self._describe(name) for name in names]})

    def _model(self, request: Request) -> Answer:
        name = unquote(_path(request).removeprefix("/v1/models/"))
        return _json(self._describe(self._require(name, self._caller(request))))

    def _describe(self, name: str) -> dict[str, Any]:
        """As a replica describes its own (`api.openai_answers.model_body`)."""
        return {
            "id": name,
            "object": "model",
            "created": self._created_s,
            "owned_by": "nearfield",
        }

    def _require(self, name: str, principal: Principal | None) -> str:
        """
        Raises:
            NotFound: there is no such model, or not for this caller.
        """
        if name not in self._visible(principal):
            raise NotFound(
                f"The model {name[:128]!r} does not exist.", param="model", code="model_not_found"
            )
        return name

    def _visible(self, principal: Principal | None) -> Mapping[str, Sequence[Known]]:
        """The models that the caller may ask, with the endpoints that it may use."""
        found = {}
        for name, endpoints in self._world.models.items():
            allowed = None if principal is None else principal.models
            if allowed is not None and name not in allowed:
                continue
            usable = [known for known in endpoints if _may_use(principal, known)]
            if usable:
                found[name] = usable
        return found

    def _caller(self, request: Request) -> Principal | None:
        """
        Raises:
            NearfieldError: who calls may not.
        """
        if self._keys is None:
            return None
        return self._keys.authenticate(request.headers.get(b"authorization"), time.time())

    # ---- Open Inference Protocol ------------------------------------------------------------

    def _server(self, request: Request) -> Answer:
        self._caller(request)
        return _json(
            {
                "name": "nearfield",
                "version": installed_version("nearfield"),
                "extensions": ["binary_tensor_data", "generate"],
            }
        )

    def _oip_live(self, request: Request) -> Answer:
        return _json({"live": True})

    def _oip_ready(self, request: Request) -> Answer:
        return _state({"ready": self._is_ready}, good=self._is_ready)

    def _oip_model_ready(self, request: Request) -> Answer:
        _, _, _, name, *rest = _path(request).split("/")
        principal = self._caller(request)
        endpoints = self._visible(principal)[self._require(name, principal)]
        if rest[0] == "versions":
            endpoints = [known for known in endpoints if known.endpoint.version == rest[1]]
            if not endpoints:
                raise NotFound(
                    f"The model {name!r} has no version {rest[1][:128]!r}.",
                    param="version",
                    code="version_not_found",
                )
        good = not self._world.draining and any(known.routable for known in endpoints)
        return _state({"name": name, "ready": good}, good=good)

    # ---- health -----------------------------------------------------------------------------

    @property
    def _is_ready(self) -> bool:
        return self._world.ready and not self._world.draining

    def _live(self, request: Request) -> Answer:
        return _json({"status": "ok"})

    def _ready(self, request: Request) -> Answer:
        if self._is_ready:
            return _json({"status": "ok"})
        why = "draining" if self._world.draining else "no replica can be reached anywhere"
        return _state({"status": "unavailable", "reason": why}, good=False)

    # ---- for other gateways and for operators -----------------------------------------------

    def _region(self, request: Request) -> Answer:
        keys = self._world.passports
        if keys is not None:
            _require_gateway(keys, request)
        report = self._world.report(time.monotonic() - request.started_s)
        return Answer(200, _encode(report), headers=_NEWS)

    def _status(self, request: Request) -> Answer:
        self._require_platform(request)
        world = self._world
        now_s = world.clock()
        return _json(
            {
                "gateway": world.site.gateway,
                "home": world.site.home,
                "jurisdiction": world.site.jurisdiction,
                "ready": self._is_ready,
                "draining": world.draining,
                "regions": [region.to_json() for region in world.regions],
                "changes": [
                    {
                        "name": change.name,
                        "before": change.before,
                        "after": change.after,
                        "reason": change.reason,
                        "ago_s": round(now_s - change.at_s, 3),
                    }
                    for change in reversed(world.changes)
                ],
            }
        )

    def _route(self, request: Request) -> Answer:
        self._require_platform(request)
        asked = dict(parse_qsl(request.target.partition(b"?")[2].decode("latin-1")))
        if odd := sorted(asked.keys() - set(_ROUTE_QUERY)):
            raise BadRequest(
                f"There is no parameter {odd[0][:64]!r} here: {', '.join(_ROUTE_QUERY)}.",
                param=odd[0][:64],
            )
        model = asked.get("model")
        if not model:
            raise BadRequest("model is missing: name the model to ask.", param="model")
        place = None if "from" not in asked else place_of(asked["from"])
        criticality = _one_of(asked, "criticality", CRITICALITIES, CRITICALITIES[DEFAULT])
        explanation, decision = self._world.explain(
            model,
            version=asked.get("version"),
            caller=_caller_of(asked),
            client=place,
            criticality=CRITICALITIES.index(criticality),
        )
        told = {
            "model": model,
            "gateway": self._world.site.gateway,
            "from": None if place is None else {"name": asked["from"], **place._asdict()},
            "distances": "measured by this gateway" if place is None else "assumed",
        }
        return _json({**told, **_decision(explanation, decision)})

    def _require_platform(self, request: Request) -> None:
        """
        Raises:
            NearfieldError: it is no platform administrator who calls.
        """
        principal = self._caller(request)
        if principal is not None:
            principal.require_scope("platform")


def _page(handler: _Handler, dialect: Dialect) -> Page:
    """Refusals are answers too."""

    def page(request: Request) -> Answer:
        try:
            return handler(request)
        except NearfieldError as error:
            return refusal(error, dialect)

    return page


def _json(data: Any) -> Answer:
    return Answer(200, _encode(data), headers=_NEWS)


def _state(data: dict[str, Any], *, good: bool) -> Answer:
    return Answer(200 if good else 503, _encode(data), headers=_NEWS)


def _path(request: Request) -> str:
    return request.path.partition(b"?")[0].decode("latin-1")


def _may_use(principal: Principal | None, known: Known) -> bool:
    """Whether a caller's requests may ever go there."""
    if principal is None:
        return True
    endpoint = known.endpoint
    if principal.jurisdictions is not None and endpoint.jurisdiction not in principal.jurisdictions:
        return False
    return endpoint.products is None or principal.product in endpoint.products


def _require_gateway(keys: PassportKeys, request: Request) -> None:
    """
    Raises:
        Unauthenticated, Forbidden: it is no gateway that asks.
    """
    header = request.headers.get(HEADER)
    if header is None:
        raise Unauthenticated("This is told to gateways only.", code="passport_missing")
    if not is_gateways(keys.verify(header, now_ms=int(time.time() * 1000))):
        raise Forbidden("This passport is for inference only.", code="scope_missing")


def _caller_of(asked: Mapping[str, str]) -> Caller:
    """The class of callers that a question is about.

    Raises:
        BadRequest: a parameter has a value that is none.
    """
    bound = [name for name in asked.get("jurisdiction", "").split(",") if name]
    slo_s = None
    if "slo_ms" in asked:
        digits = asked["slo_ms"]
        if not (digits.isdigit() and 0 < len(digits) <= 9):
            raise BadRequest("slo_ms must be a whole number of milliseconds.", param="slo_ms")
        slo_s = int(digits) / 1000
    return Caller(
        jurisdictions=frozenset(bound) if bound else None,
        product=asked.get("product") or None,
        mode=_one_of(asked, "mode", _MODES, "nearest"),
        slo_s=slo_s,
    )


def _one_of(asked: Mapping[str, str], name: str, known: Sequence[Any], default: str) -> Any:
    value = asked.get(name, default)
    if value not in known:
        raise BadRequest(f"{name} must be {' or '.join(known)}.", param=name)
    return value


def _decision(explanation: Explanation, decision: Pick | Refusal) -> dict[str, Any]:
    told: dict[str, Any] = {
        "outcome": explanation.outcome,
        "endpoints": [asdict(line) for line in explanation.lines],
        "table": str(explanation),
    }
    if isinstance(decision, Refusal):
        told["endpoint"] = None
        told["refused"] = {
            "filter": decision.filter,
            "message": decision.message,
            "retry_after_s": decision.retry_after_s,
        }
        return told
    endpoint = decision.candidate.state.endpoint
    told["endpoint"] = endpoint.name
    told["region"] = endpoint.region
    told["why"] = decision.why
    told["predicted_s"] = decision.predicted_s
    return told
