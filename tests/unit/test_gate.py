"""Who is let in, as whom, and what the region is told of it."""

from __future__ import annotations

import time
from typing import Any

import pytest
from nearfield.api.keys import Key
from nearfield.api.passport import HEADER, Passport, PassportKeys
from nearfield.core.errors import NearfieldError
from nearfield.edge.decisions import Admission
from nearfield.edge.gate import MOST_OUTPUT_TOKENS, KeyGate
from nearfield.edge.proxy.ports import Answer, Grant, Outcome, Request
from nearfield.edge.suspects import Suspects
from nearfield.policy.endpoints import CRITICAL, DEFAULT, SHEDDABLE

from tests.support.gates import key_of, request_of, table_of

PASSPORTS = PassportKeys.generate()


def gate_of(*keys: Key, suspects: Suspects | None = None, **fields: Any) -> KeyGate:
    """A gate before these keys."""
    table = table_of(*keys, **fields) if keys else None
    return KeyGate(suspects or Suspects(), table=table, passports=PASSPORTS)


def let_in(gate: KeyGate, request: Request) -> Grant:
    """Through both doors."""
    assert gate.enter(request) is None
    grant = gate.admit(request)
    assert isinstance(grant, Grant), grant
    return grant


def about(grant: Grant) -> Admission:
    admission = grant.about
    assert isinstance(admission, Admission)
    return admission


def passport_in(grant: Grant) -> Passport:
    ((name, value),) = grant.headers
    assert name == HEADER
    return PASSPORTS.verify(value, now_ms=int(time.time() * 1000))


def refused(gate: KeyGate, request: Request) -> str | None:
    """The code of the refusal, at whichever door."""
    error = gate.enter(request) or gate.admit(request)
    assert isinstance(error, NearfieldError), error
    return error.code


class TestWho:
    def test_a_key(self) -> None:
        key, header = key_of(product="web", models=frozenset({"chat", "embed"}))
        gate = gate_of(key, jurisdictions=frozenset({"eu", "ch"}))
        grant = let_in(gate, request_of(headers={b"authorization": header}, timeout_s=20))
        admission = about(grant)
        assert (admission.principal.tenant, admission.principal.key_id) == ("acme", key.id)
        assert (admission.from_gateway, admission.kind) == (False, "generate")
        assert admission.caller.jurisdictions == {"eu", "ch"}
        assert admission.caller.product == "web"
        passport = passport_in(grant)
        assert (passport.tenant, passport.product, passport.key_id) == ("acme", "web", key.id)
        assert passport.models == ("chat", "embed")
        assert passport.jurisdictions == ("ch", "eu")
        assert passport.request_id == "req-1"
        assert passport.criticality == "default"
        assert 19.5 < passport.timeout_s <= 20.0
        assert passport.expires_ms == passport.deadline_ms

    @pytest.mark.parametrize(
        "header",
        [None, b"", b"Bearer", b"Basic x", b"Bearer ' OR '1'='1", b"Bearer nf_" + b"a" * 99],
    )
    def test_no_key(self, header: bytes | None) -> None:
        key, _ = key_of()
        request = request_of(headers={} if header is None else {b"authorization": header})
        error = gate_of(key).enter(request)
        assert error is not None
        assert error.status == 401

    def test_a_key_for_something_else(self) -> None:
        key, header = key_of(scopes=frozenset({"admin"}))
        assert refused(gate_of(key), request_of(headers={b"authorization": header})) == (
            "scope_missing"
        )

    def test_a_key_for_other_models(self) -> None:
        key, header = key_of(models=frozenset({"embed"}))
        assert refused(gate_of(key), request_of(headers={b"authorization": header})) == (
            "model_not_allowed"
        )

    def test_of_a_key_with_many_models_the_passport_names_the_one(self) -> None:
        key, header = key_of(models=frozenset({"chat", *(f"m{n}" for n in range(1000))}))
        grant = let_in(gate_of(key), request_of(headers={b"authorization": header}))
        assert passport_in(grant).models == ("chat",)

    def test_without_a_store_everybody_may_call(self) -> None:
        grant = let_in(gate_of(), request_of())
        assert about(grant).principal.tenant == "anonymous"
        assert about(grant).caller.jurisdictions is None
        assert passport_in(grant).tenant == "anonymous"

    def test_without_passport_keys_none_is_signed_and_none_is_taken(self) -> None:
        gate = KeyGate(Suspects())
        assert let_in(gate, request_of()).headers == ()
        assert refused(gate, request_of(headers={HEADER: b"1.a.b.c"})) == "passport_key_unknown"

    def test_the_same_key_is_the_same_class_of_callers(self) -> None:
        (one, header), (other, _) = key_of(), key_of()
        gate = gate_of(one, other)
        first, second = (
            about(let_in(gate, request_of(headers={b"authorization": header}))).caller
            for _ in range(2)
        )
        assert first is second


class TestFromAnotherGateway:
    def passport(self, **fields: Any) -> Passport:
        now_ms = int(time.time() * 1000)
        given: dict[str, Any] = {
            "tenant": "acme",
            "product": "web",
            "key_id": "k1",
            "models": ("chat",),
            "jurisdictions": ("eu",),
            "request_id": "req-1",
            "criticality": "sheddable",
            "issued_ms": now_ms,
            "expires_ms": now_ms + 60_000,
            "deadline_ms": now_ms + 5_000,
            **fields,
        }
        return Passport(**given)

    def test_it_needs_no_key_and_counts_on_no_quota(self) -> None:
        key, _ = key_of()
        header = PASSPORTS.sign(self.passport())
        request = request_of(headers={HEADER: header, b"idempotency-key": b"i"})
        grant = let_in(gate_of(key), request)
        admission = about(grant)
        assert admission.from_gateway
        assert admission.idempotency_key is None, "whoever sent it keeps that promise"
        assert admission.criticality == SHEDDABLE
        assert admission.caller.jurisdictions == {"eu"}
        assert admission.principal.models == {"chat"}
        onwards = passport_in(grant)
        assert (onwards.tenant, onwards.product, onwards.key_id) == ("acme", "web", "k1")
        assert (onwards.models, onwards.jurisdictions) == (("chat",), ("eu",))
        assert onwards.criticality == "sheddable"
        assert 4.5 < onwards.timeout_s <= 5.0

    def test_its_deadline_comes_first_only_if_it_is_sooner(self) -> None:
        request = request_of(headers={HEADER: PASSPORTS.sign(self.passport())}, timeout_s=2.0)
        let_in(gate_of(), request)
        assert request.deadline_s - request.started_s == 2.0

    def test_what_it_may_not(self) -> None:
        gate = gate_of(key_of()[0])
        header = PASSPORTS.sign(self.passport())
        assert refused(gate, request_of(model="other", headers={HEADER: header})) == (
            "model_not_allowed"
        )
        forged = PassportKeys.generate().sign(self.passport())
        assert refused(gate, request_of(headers={HEADER: forged})) == "passport_key_unknown"
        old = self.passport(issued_ms=0, expires_ms=1000)
        assert refused(gate, request_of(headers={HEADER: PASSPORTS.sign(old)})) == (
            "passport_expired"
        )

    def test_a_bad_passport_is_not_made_good_by_a_key(self) -> None:
        key, authorization = key_of()
        headers = {HEADER: b"1.a.b.c", b"authorization": authorization}
        error = gate_of(key).enter(request_of(headers=headers))
        assert error is not None
        assert error.status == 401

    def test_the_secrets_can_be_changed_while_it_runs(self) -> None:
        gate = gate_of()
        new = PassportKeys.generate()
        gate.passports = new
        ((_, value),) = let_in(gate, request_of()).headers
        assert new.verify(value, now_ms=int(time.time() * 1000)).tenant == "anonymous"


class TestWhat:
    @pytest.mark.parametrize(
        ("path", "kind"),
        [
            (b"/v1/chat/completions", "generate"),
            (b"/v1/completions?x=1", "generate"),
            (b"/v1/embeddings", "embed"),
            (b"/v2/models/chat/infer", "tensor"),
            (b"/v2/models/chat/generate_stream", "generate"),
            (b"/v2/models/chat/versions/3/infer", "tensor"),
            (b"/v2/models/chat/ready", "other"),
            (b"/v1/whatever", "other"),
        ],
    )
    def test_the_kind_of_work(self, path: bytes, kind: str) -> None:
        grant = let_in(gate_of(), request_of(path=path))
        assert about(grant).kind == kind
        assert grant.replayable == (kind != "other")
        assert about(grant).version == ("3" if b"versions" in path else None)

    def test_reading_is_no_inference(self) -> None:
        grant = let_in(gate_of(), request_of(b"", path=b"/v1/completions", method=b"GET"))
        assert about(grant).kind == "other"

    def test_nothing_is_there(self) -> None:
        assert refused(gate_of(), request_of(path=b"/x", model=None)) == "not_found"

    def test_no_model_is_named(self) -> None:
        assert refused(gate_of(), request_of(model=None)) == "model_missing"

    @pytest.mark.parametrize("name", ["", "a/b", "..", "a..b", "x" * 129, "é", "a\n", "-a"])
    def test_no_model_is_called_that(self, name: str) -> None:
        assert refused(gate_of(), request_of(model=name)) == "model_not_found"

    def test_a_deadline_that_has_passed(self) -> None:
        assert refused(gate_of(), request_of(timeout_s=-0.1)) == "deadline_exceeded"

    def test_how_much_work(self) -> None:
        body = b'{"model":"chat","messages":"' + b"x" * 4000 + b'"}'
        admission = about(let_in(gate_of(), request_of(body, max_tokens=100)))
        assert admission.prompt_tokens == len(body) // 4
        assert admission.tokens == admission.prompt_tokens + 100
        more = about(let_in(gate_of(), request_of({"n": 3}, max_tokens=100)))
        assert more.tokens == more.prompt_tokens + 300
        embed = about(let_in(gate_of(), request_of(body, path=b"/v1/embeddings")))
        assert embed.tokens == embed.prompt_tokens == len(body) // 4

    @pytest.mark.parametrize("asked", [-5, 10**30, None])
    def test_absurd_wishes_are_bounded(self, asked: int | None) -> None:
        admission = about(let_in(gate_of(), request_of(max_tokens=asked)))
        assert 1 <= admission.tokens <= MOST_OUTPUT_TOKENS + 10

    def test_more_choices_that_are_none(self) -> None:
        for wrong in ("x", 0, -1, None, [1]):
            admission = about(let_in(gate_of(), request_of({"n": wrong}, max_tokens=7)))
            assert admission.tokens == admission.prompt_tokens + 7

    def test_sessions_are_the_tenants_own(self) -> None:
        (one, header), (other, header2) = key_of("acme"), key_of("zeta")
        gate = gate_of(one, other)

        def session(authorization: bytes, body: Any = None, **given: bytes) -> bytes | None:
            headers = {b"authorization": authorization}
            headers |= {name.replace("_", "-").encode(): value for name, value in given.items()}
            return about(let_in(gate, request_of(body, headers=headers))).session

        assert session(header) is None
        named = session(header, x_session_id=b"s1")
        assert named == session(header, x_session_id=b"s1") != session(header2, x_session_id=b"s1")
        assert session(header, {"prompt_cache_key": "s1"}) == named
        assert session(header, {"prompt_cache_key": "s2"}, x_session_id=b"s1") == named


class TestClaims:
    def ask(self, gate: KeyGate | None = None, **headers: bytes) -> Grant:
        named = {name.replace("_", "-").encode(): value for name, value in headers.items()}
        return let_in(gate or gate_of(), request_of(headers=named))

    def test_critical_is_for_products(self) -> None:
        (plain, header), (product, header2) = key_of(), key_of(product="web")
        gate = gate_of(plain, product)
        for authorization, granted in ((header, DEFAULT), (header2, CRITICAL)):
            grant = self.ask(gate, authorization=authorization, x_nearfield_criticality=b"critical")
            assert about(grant).criticality == granted
            told = (b"x-nearfield-criticality", (b"critical", b"default")[granted])
            assert told in list(grant.shown)
        grant = self.ask(gate, authorization=header, x_nearfield_criticality=b"sheddable")
        assert about(grant).criticality == SHEDDABLE
        assert passport_in(grant).criticality == "sheddable"

    def test_who_claims_nothing_is_told_nothing(self) -> None:
        assert not self.ask().shown

    def test_economy_and_what_it_must_keep(self) -> None:
        caller = about(self.ask(x_nearfield_mode=b"economy", x_slo_ttft_ms=b"250")).caller
        assert (caller.mode, caller.slo_s) == ("economy", 0.2)
        assert about(self.ask(x_slo_ttft_ms=b"250")).caller.mode == "nearest"
        assert about(self.ask(x_nearfield_mode=b"economy")).caller.slo_s is None

    def test_callers_cannot_make_up_classes_without_end(self) -> None:
        gate = gate_of()
        classes = {
            about(self.ask(gate, x_nearfield_mode=b"economy", x_slo_ttft_ms=str(n).encode())).caller
            for n in range(1, 3000, 7)
        }
        assert len(classes) < 16

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("x_nearfield_criticality", b"urgent"),
            ("x_nearfield_mode", b"fast"),
            ("x_slo_ttft_ms", b"0"),
            ("x_slo_ttft_ms", b"-1"),
            ("x_slo_ttft_ms", b"1e3"),
            ("x_slo_tpot_ms", b"9" * 30),
        ],
    )
    def test_what_cannot_be_meant(self, name: str, value: bytes) -> None:
        request = request_of(headers={name.replace("_", "-").encode(): value})
        gate = gate_of()
        assert gate.enter(request) is None
        error = gate.admit(request)
        assert isinstance(error, NearfieldError)
        assert (error.status, error.param) == (400, name.replace("_", "-"))

    def test_hedging_is_opted_in_to(self) -> None:
        assert about(self.ask(x_nearfield_hedge=b"1")).hedge
        assert not about(self.ask(x_nearfield_hedge=b"0")).hedge

    def test_without_a_store_no_promise_of_a_single_execution_is_made(self) -> None:
        assert refused(gate_of(), request_of(headers={b"idempotency-key": b"i"})) == (
            "idempotency_unavailable"
        )
        for bad in (b"", b"x" * 256, b"\xff", b"a\tb"):
            assert refused(gate_of(), request_of(headers={b"idempotency-key": bad})) == (
                "invalid_idempotency_key"
            )


EVENTS = [(b"content-type", b"text/event-stream")]


def answer_with(
    gate: KeyGate,
    request: Request,
    status: int,
    fields: list[tuple[bytes, bytes]] | None = None,
    body: bytes = b"",
    *,
    complete: bool = True,
) -> None:
    """Let the request in, and have it answered so."""
    tap = let_in(gate, request).tap
    assert tap is not None
    tap.on_head(status, fields or [])
    if body:
        tap.on_data(body)
    tap.on_end(Outcome(request), complete)


class TestSuspects:
    def test_a_body_that_killed_twice_is_refused_and_one_that_killed_once_is_tried(self) -> None:
        suspects = Suspects()
        gate = gate_of(suspects=suspects)
        poison, harmless = request_of({"poison": 1}), request_of({"harmless": 1})
        suspects.crashed(poison)
        assert about(let_in(gate, request_of({"poison": 1}))).trial is not None
        assert about(let_in(gate, harmless)).trial is None
        suspects.crashed(poison)
        assert refused(gate, request_of({"poison": 1})) == "request_quarantined"
        assert about(let_in(gate, harmless)).trial is None

    @pytest.mark.parametrize(
        ("status", "fields", "body"),
        [
            (500, [(b"x-nearfield-error-code", b"engine_crashed")], b'{"error":"It died."}'),
            (200, EVENTS, b'data: {"error":{"message":"x","code":"engine_crashed"}}\n\n'),
            (200, EVENTS, b'data: {"error":"x","code":"engine_crashed"}\n\n'),
        ],
    )
    def test_a_crash_of_the_engine_is_read_in_the_answer(
        self, status: int, fields: list[tuple[bytes, bytes]], body: bytes
    ) -> None:
        suspects = Suspects()
        gate = gate_of(suspects=suspects)
        for times in range(2):
            request = request_of({"poison": 1})
            answer_with(gate, request, status, fields, body)
            assert suspects.any
            assert (suspects.convicted(request) is not None) == (times == 1)

    @pytest.mark.parametrize(
        ("status", "fields", "body"),
        [
            (500, [(b"x-nearfield-error-code", b"engine_failed")], b'{"error":"engine_crashed"}'),
            (500, [], b'{"error":{"code":"engine_failed"}}'),
            (200, EVENTS, b'data: {"error":{"code":"deadline_exceeded"}}\n\n'),
        ],
    )
    def test_another_error_neither_blames_nor_absolves(
        self, status: int, fields: list[tuple[bytes, bytes]], body: bytes
    ) -> None:
        suspects = Suspects()
        gate = gate_of(suspects=suspects)
        suspects.crashed(request_of({"poison": 1}))
        request = request_of({"poison": 1})
        answer_with(gate, request, status, fields, body)
        assert suspects.any
        assert suspects.convicted(request) is None

    def test_an_answer_absolves(self) -> None:
        suspects = Suspects()
        gate = gate_of(suspects=suspects)
        suspects.crashed(request_of({"poison": 1}))
        request = request_of({"poison": 1})
        answer_with(gate, request, 200)
        assert not suspects.any

    def test_half_an_answer_does_not(self) -> None:
        suspects = Suspects()
        gate = gate_of(suspects=suspects)
        suspects.crashed(request_of({"poison": 1}))
        request = request_of({"poison": 1})
        answer_with(gate, request, 200, complete=False)
        assert suspects.any


def test_refusals_are_answers_where_there_is_more_to_say() -> None:
    """Without limits there is nothing more: the error itself, for the exchange to tell."""
    gate = gate_of()
    request = request_of(model=None)
    assert gate.enter(request) is None
    assert not isinstance(gate.admit(request), Answer)
