"""Who may call, for what, and how much: the Gate of a gateway.

    enter   a key, or another gateway's passport; at the end of the head, before the body is read
    admit   model, place, class of caller; suspects; quotas; Idempotency-Key; the passport

What a request may say of itself:

    x-nearfield-criticality   critical, default or sheddable: what overload refuses last, and first
    x-nearfield-mode          nearest (the default) or economy: the cheapest that meets the SLO
    x-slo-ttft-ms             the time to the first token that economy must keep
    x-slo-tpot-ms             per token after it: checked here, and passed on to the replica
    x-request-timeout-ms      its deadline; a passport's comes first if it is sooner
    x-session-id              requests of one conversation go where its cache is; in a body,
                              prompt_cache_key
    x-nearfield-hedge         1: may be run twice at once to be quick (embeddings, tensors)
    Idempotency-Key           see `idempotency`

`critical` is for callers that an operator has singled out: keys that belong to a product. Others
that claim it are `default`. Whoever claims anything is told what holds, in
`x-nearfield-criticality` of the answer.

Without a store there are no keys: everybody passes, without limits, as one anonymous caller.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import Iterable
from typing import Any, Final

import msgspec
from nearfield.api.keys import KeyTable, Principal, Scope
from nearfield.api.passport import (
    HEADER,
    Criticality,
    PassportKeys,
    PassportKeyUnknown,
    bearer_part,
)
from nearfield.core.errors import BadRequest, DeadlineExceeded, NearfieldError, NotFound
from nearfield.core.spec import NAME_PATTERN
from nearfield.edge.decisions import SUSPECT, TRIAL, Admission, Kind
from nearfield.edge.idempotency import Keeper, KeyedRequests, check_key, replay
from nearfield.edge.meter import BYTES_PER_TOKEN, Meter
from nearfield.edge.proxy.answers import refusal
from nearfield.edge.proxy.ports import Answer, Grant, Request, Soon, Tap
from nearfield.edge.retries import SAFE_METHODS
from nearfield.edge.suspects import Suspects
from nearfield.policy.endpoints import CRITICAL, CRITICALITIES, DEFAULT, SHEDDABLE, Caller, Mode
from nearfield.policy.quota import UNBOUNDED, Lack, Reservation
from nearfield.store.ports import Answered
from nearfield.store.shares import ShareKeeper

PASSPORT_MS: Final = 600_000
"""How long a passport is good at most: a request may wait for its model to start from zero, and be
tried again. Its deadline ends it sooner."""
MOST_LISTED_MODELS: Final = 16
"""Of a key, that stand in its passports. Of one with more only the model asked for does: a passport
is a header, and has its bound."""

DEFAULT_OUTPUT_TOKENS: Final = 512
"""What is expected to come where the caller does not say: a spec's own default."""
MOST_OUTPUT_TOKENS: Final = 1 << 20
"""Longer than any context: a larger number is no wish, and is not counted."""
MOST_CALLERS: Final = 4096
"""Keys, and classes of callers, whose records are kept at hand."""

SLO_STEPS_S: Final = (
    0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0, 60.0
)  # fmt: skip
"""An SLO is taken for the next of these below it: for each there is a plan."""
MOST_MS: Final = 3_600_000

CRITICALITY: Final = b"x-nearfield-criticality"
IDEMPOTENCY_KEY: Final = b"idempotency-key"

_KINDS: Final[dict[bytes, Kind]] = {
    b"/v1/chat/completions": "generate",
    b"/v1/completions": "generate",
    b"/v1/responses": "generate",
    b"/v1/embeddings": "embed",
}
_OIP_KINDS: Final[dict[bytes, Kind]] = {
    b"infer": "tensor",
    b"generate": "generate",
    b"generate_stream": "generate",
}
_NAME: Final = re.compile(NAME_PATTERN)
_CLAIMS: Final = {name.encode(): level for level, name in enumerate(CRITICALITIES)}
_MODES: Final[dict[bytes, Mode]] = {b"nearest": "nearest", b"economy": "economy"}
_INFERENCE: Final[frozenset[Scope]] = frozenset({"inference"})
_ANONYMOUS: Final = Principal("anonymous", None, "anonymous", _INFERENCE, None, None)


class _More(msgspec.Struct):
    """Fields of a body that few requests have. Of the wrong type: the replica's to refuse."""

    n: Any = None
    prompt_cache_key: Any = None


_decode_more = msgspec.json.Decoder(_More).decode


class _Known:
    """A key's principal, and what of it every request needs.

    Attributes:
        bearer: what its passports have in common; None: they name the model that is asked.
    """

    __slots__ = ("bearer", "caller", "principal")

    def __init__(self, principal: Principal, caller: Caller) -> None:
        self.principal = principal
        self.caller = caller
        models = principal.models
        several = models is not None and len(models) > MOST_LISTED_MODELS
        self.bearer = None if several else _bearer(principal, models)


def _bearer(principal: Principal, models: Iterable[str] | None) -> bytes:
    return bearer_part(
        principal.tenant,
        principal.product,
        principal.key_id,
        _listed(models),
        _listed(principal.jurisdictions),
    )


def _listed(names: Iterable[str] | None) -> tuple[str, ...] | None:
    return None if names is None else tuple(sorted(names))


class KeyGate:
    """The Gate of one gateway process. See `ports.Gate`.

    Attributes:
        passports: what passports are signed and checked with. May be replaced at any time: that is
            how the secrets are changed.
    """

    def __init__(
        self,
        suspects: Suspects,
        *,
        table: KeyTable | None = None,
        shares: ShareKeeper | None = None,
        keyed: KeyedRequests | None = None,
        passports: PassportKeys | None = None,
    ) -> None:
        """
        Args:
            suspects: shared with `BudgetRetries`.
            table: of a `KeyFollower`; None: there is no store, and everybody may call.
            shares: of the limits; None: nobody is limited.
            keyed: requests with an `Idempotency-Key`; None: they are refused.
            passports: None: none are signed, and none are taken.
        """
        self.passports = passports
        self._suspects = suspects
        self._table = table
        self._shares = shares
        self._keyed = keyed
        self._known: dict[str, _Known] = {}
        self._callers: dict[tuple[Any, ...], Caller] = {}

    # ---- who --------------------------------------------------------------------------------

    def enter(self, request: Request) -> NearfieldError | None:
        headers = request.headers
        try:
            passport = headers.get(HEADER)
            if passport is not None:
                request.caller = self._by_passport(passport, request)
            elif self._table is None:
                request.caller = _ANONYMOUS
            else:
                principal = self._table.authenticate(headers.get(b"authorization"), time.time())
                request.caller = principal
                principal.require_scope("inference")
        except NearfieldError as error:
            return error
        return None

    def _by_passport(self, header: bytes, request: Request) -> Admission:
        """Sent here by another gateway, which has counted it and refused what it had to."""
        if self.passports is None:
            raise PassportKeyUnknown("This gateway takes no passports.")
        passport = self.passports.verify(header, now_ms=int(time.time() * 1000))
        request.deadline_s = min(request.deadline_s, request.started_s + passport.timeout_s)
        models, places = passport.models, passport.jurisdictions
        principal = Principal(
            passport.tenant,
            passport.product,
            passport.key_id,
            _INFERENCE,
            None if models is None else frozenset(models),
            None if places is None else frozenset(places),
        )
        return Admission(
            principal,
            self._caller(principal, "nearest", None),
            # One that is not known here was named by a newer gateway: it can wait.
            criticality=_CLAIMS.get(passport.criticality.encode(), SHEDDABLE),
            from_gateway=True,
        )

    def _caller(self, principal: Principal, mode: Mode, slo_s: float | None) -> Caller:
        """The class that it is routed as: the same object for all that are alike."""
        key = (principal.jurisdictions, principal.product, mode, slo_s)
        caller = self._callers.get(key)
        if caller is None:
            if len(self._callers) >= MOST_CALLERS:
                self._callers.clear()
            caller = self._callers[key] = Caller(
                jurisdictions=principal.jurisdictions,
                product=principal.product,
                mode=mode,
                slo_s=slo_s,
            )
        return caller

    def _know(self, principal: Principal) -> _Known:
        known = self._known.get(principal.key_id)
        if known is None or known.principal is not principal:
            if len(self._known) >= MOST_CALLERS:
                self._known.clear()
            known = _Known(principal, self._caller(principal, "nearest", None))
            self._known[principal.key_id] = known
        return known

    # ---- what -------------------------------------------------------------------------------

    def admit(self, request: Request) -> Soon[Grant | Answer]:
        caller = request.caller
        by_gateway = type(caller) is Admission
        principal: Principal = caller.principal if by_gateway else caller
        try:
            kind, model = _wanted(request)
            principal.require_model(model)
            if request.deadline_s <= time.monotonic():
                raise DeadlineExceeded("The request's deadline has passed: it is not run.")
            if by_gateway:
                known = _Known(principal, caller.caller)
                admission = caller
                admission.kind = kind
            else:
                known = self._know(principal)
                admission = Admission(principal, known.caller, kind)
                self._read_claims(request, admission)
            self._measure(request, admission)
            if self._suspects.any:
                convicted = self._suspects.look_at(request, admission)
                if convicted is not None:
                    raise convicted
            if by_gateway and (SUSPECT in request.headers or TRIAL in request.headers):
                self._suspects.accused_elsewhere(request)
            key = admission.idempotency_key = None if by_gateway else self._key(request)
        except NearfieldError as error:
            return self._refused(request, principal, error)
        if by_gateway or self._shares is None:
            reserved: Reservation | Lack = UNBOUNDED
        else:
            reserved = self._shares.reserve_now(
                principal, tokens=_counted(admission), stream=request.stream
            )
        if type(reserved) is Reservation and key is None:
            meter = Meter(request, admission, reserved, self._suspects)
            try:
                return self._grant(request, admission, known, meter)
            except BaseException:
                reserved.settle(0)
                raise
        later = self._admit_later(request, admission, known, reserved, key)
        return asyncio.get_running_loop().create_task(later)

    async def _admit_later(
        self,
        request: Request,
        admission: Admission,
        known: _Known,
        reserved: Reservation | Lack,
        key: bytes | None,
    ) -> Grant | Answer | NearfieldError:
        """What memory alone could not answer."""
        principal = admission.principal
        reservation = reserved if isinstance(reserved, Reservation) else UNBOUNDED
        try:
            if isinstance(reserved, Lack):
                assert self._shares is not None
                reservation = await self._shares.reserve(
                    principal, tokens=_counted(admission), stream=request.stream
                )
            if key is None:
                meter = Meter(request, admission, reservation, self._suspects)
                return self._grant(request, admission, known, meter)
            return await self._admit_keyed(request, admission, known, reservation, key)
        except NearfieldError as error:
            reservation.settle(0)
            return self._refused(request, principal, error)
        except BaseException:
            reservation.settle(0)
            raise

    async def _admit_keyed(
        self,
        request: Request,
        admission: Admission,
        known: _Known,
        reservation: Reservation,
        key: bytes,
    ) -> Grant | Answer:
        keyed = self._keyed
        assert keyed is not None
        rerun = admission.kind != "other"
        tenant = admission.principal.tenant
        found = await keyed.claim(tenant, request, key, rerun=rerun)
        if isinstance(found, Answered):
            reservation.settle(0)
            return replay(found, self._shown(admission.principal))
        meter = Meter(request, admission, reservation, self._suspects)
        keeper = Keeper(meter, found, rerun=rerun, most_bytes=keyed.most_bytes)
        try:
            return self._grant(request, admission, known, keeper, outlives=True)
        except BaseException:
            found.release()
            raise

    def _key(self, request: Request) -> bytes | None:
        key = request.headers.get(IDEMPOTENCY_KEY)
        if key is None or request.method in SAFE_METHODS:
            return None
        check_key(key)
        if self._keyed is None:
            raise BadRequest(
                "This gateway has no store, so it cannot keep the promise of an Idempotency-Key: "
                "leave the header out.",
                param="idempotency-key",
                code="idempotency_unavailable",
            )
        return key

    def _read_claims(self, request: Request, admission: Admission) -> None:
        """What the caller says of the request, in its headers and in fields that few bodies have.

        Raises:
            BadRequest: something of it cannot be meant.
        """
        headers = request.headers
        principal = admission.principal
        claimed = headers.get(CRITICALITY)
        if claimed is not None:
            level = _CLAIMS.get(claimed)
            if level is None:
                raise _bad_choice(CRITICALITY, CRITICALITIES)
            if level == CRITICAL and principal.product is None and self._table is not None:
                level = DEFAULT
            admission.criticality = level
        mode_said, ttft = headers.get(b"x-nearfield-mode"), headers.get(b"x-slo-ttft-ms")
        slo_s = None if ttft is None else _step(_seconds(b"x-slo-ttft-ms", ttft))
        if mode_said is not None:
            mode = _MODES.get(mode_said)
            if mode is None:
                raise _bad_choice(b"x-nearfield-mode", tuple(n.decode() for n in _MODES))
            if mode == "economy":
                admission.caller = self._caller(principal, mode, slo_s)
        tpot = headers.get(b"x-slo-tpot-ms")
        if tpot is not None:
            _seconds(b"x-slo-tpot-ms", tpot)
        admission.hedge = headers.get(b"x-nearfield-hedge") == b"1"

    def _measure(self, request: Request, admission: Admission) -> None:
        """Guess how much work it is; find its version and its session."""
        body, kind = request.body, admission.kind
        if kind == "tensor" or request.dialect == "oip":
            admission.version = _version(request.path)
        session = request.headers.get(b"x-session-id")
        if session is not None:
            admission.session = _salted(admission.principal.tenant, session)
        if kind not in ("generate", "embed"):
            return
        prompt = admission.prompt_tokens = len(body) // BYTES_PER_TOKEN
        choices = 1
        if b'"n"' in body or b'"prompt_cache_key"' in body:
            more = _more(body)
            if type(more.n) is int:
                choices = max(1, more.n)
            if session is None and type(more.prompt_cache_key) is str:
                named = more.prompt_cache_key.encode("utf-8", "replace")
                admission.session = _salted(admission.principal.tenant, named)
        output = 0
        if kind == "generate":
            asked = request.max_tokens
            output = choices * (DEFAULT_OUTPUT_TOKENS if asked is None else max(0, asked))
        admission.tokens = max(1, prompt + min(output, MOST_OUTPUT_TOKENS))

    # ---- consent and refusal ----------------------------------------------------------------

    def _grant(
        self,
        request: Request,
        admission: Admission,
        known: _Known,
        tap: Tap,
        *,
        outlives: bool = False,
    ) -> Grant:
        keys = self.passports
        headers = () if keys is None else ((HEADER, _passport(keys, request, admission, known)),)
        shown = self._shown(admission.principal)
        if CRITICALITY in request.headers and not admission.from_gateway:
            shown.append((CRITICALITY, CRITICALITIES[admission.criticality].encode()))
        return Grant(
            headers,
            shown,
            replayable=admission.kind != "other",
            outlives=outlives,
            tap=tap,
            about=admission,
        )

    def _shown(self, principal: Principal) -> list[tuple[bytes, bytes]]:
        if self._shares is None or not principal.limits:
            return []
        return self._shares.headers(principal)

    def _refused(
        self, request: Request, principal: Principal, error: NearfieldError
    ) -> Answer | NearfieldError:
        """The error, with what is left of the caller's limits."""
        shown = self._shown(principal)
        if not shown:
            return error
        answer = refusal(error, request.dialect)
        answer.headers = [*answer.headers, *shown]
        answer.error = error.code or error.type
        return answer


def _wanted(request: Request) -> tuple[Kind, str]:
    """What kind of work is asked for, and of which model.

    Raises:
        NotFound: nothing is at this path, or no model can have this name.
        BadRequest: no model is named.
    """
    kind = _KINDS.get(request.path)
    if kind is None:
        kind = _kind(request.path)
    model = request.model
    if model is None:
        if kind == "other":
            raise NotFound(f"Nothing answers {_shown(request.target)} here.")
        raise BadRequest(
            "model is missing: name the model that is asked.", param="model", code="model_missing"
        )
    if _NAME.fullmatch(model) is None or ".." in model:
        raise NotFound(
            f"The model {model[:128]!r} does not exist.", param="model", code="model_not_found"
        )
    if kind != "other" and request.method != b"POST":
        kind = "other"
    return kind, model


def _kind(path: bytes) -> Kind:
    path = path.partition(b"?")[0]
    if path.startswith(b"/v2/models/"):
        return _OIP_KINDS.get(path.rpartition(b"/")[2], "other")
    return _KINDS.get(path, "other")


def _version(path: bytes) -> str | None:
    """The one that an Open Inference path names: `/v2/models/{model}/versions/{version}/infer`."""
    _, found, rest = path.partition(b"/versions/")
    if not found:
        return None
    version = re.split(rb"[/?]", rest, maxsplit=1)[0].decode("latin-1")
    if _NAME.fullmatch(version) is None:
        raise NotFound(f"There is no version {version[:128]!r}.", code="version_not_found")
    return version


def _more(body: bytes) -> _More:
    try:
        return _decode_more(body)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return _More()  # whatever it is, it was not taken for JSON before


def _counted(admission: Admission) -> int:
    """Tokens to reserve: tensors have none."""
    return admission.tokens if admission.kind in ("generate", "embed") else 0


def _passport(keys: PassportKeys, request: Request, admission: Admission, known: _Known) -> bytes:
    part = known.bearer
    if part is None:
        part = _bearer(admission.principal, (request.model or "",))
    criticality: Criticality = CRITICALITIES[admission.criticality]  # type: ignore[assignment]
    now_ms = int(time.time() * 1000)
    left_ms = max(1, int((request.deadline_s - time.monotonic()) * 1000))
    return keys.sign_for(
        part,
        request.request_id.decode("ascii"),
        criticality,
        issued_ms=now_ms,
        expires_ms=now_ms + min(left_ms, PASSPORT_MS),
        deadline_ms=now_ms + left_ms,
    )


def _salted(tenant: str, session: bytes) -> bytes:
    """A session's name that no other tenant can name as well."""
    return hashlib.blake2b(
        session, digest_size=8, key=hashlib.blake2b(tenant.encode(), digest_size=32).digest()
    ).digest()


def _seconds(name: bytes, value: bytes) -> float:
    if value.isdigit() and len(value) <= 12 and 0 < int(value) <= MOST_MS:
        return int(value) / 1000
    raise BadRequest(
        f"{name.decode()} must be a whole number of milliseconds from 1 to {MOST_MS}.",
        param=name.decode(),
    )


def _step(slo_s: float) -> float:
    return max((step for step in SLO_STEPS_S if step <= slo_s), default=SLO_STEPS_S[0])


def _bad_choice(name: bytes, choices: tuple[str, ...]) -> BadRequest:
    return BadRequest(f"{name.decode()} must be one of {', '.join(choices)}.", param=name.decode())


def _shown(target: bytes) -> str:
    return repr(target[:128].decode("latin-1"))
