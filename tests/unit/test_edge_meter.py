"""What an answer took, read as it passes, and what is charged for it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from nearfield.edge.decisions import Admission, Kind, Tokens
from nearfield.edge.meter import Meter
from nearfield.edge.proxy.ports import Attempt, FailureKind, Outcome, Target
from nearfield.edge.suspects import Suspects
from nearfield.policy.quota import Reservation

from tests.support.gates import granted, leg_of, request_of

JSON = [(b"content-type", b"application/json")]
EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8")]
USAGE = {
    "prompt_tokens": 11,
    "completion_tokens": 7,
    "total_tokens": 18,
    "prompt_tokens_details": {"cached_tokens": 4},
}


class Charged(Reservation):
    """What is charged, each time."""

    def __init__(self) -> None:
        super().__init__([], 0, 0)
        self.tokens: list[int] = []

    def settle(self, tokens: int) -> None:
        self.tokens.append(tokens)


def measured(
    *parts: bytes,
    status: int = 200,
    fields: Any = JSON,
    kind: Kind = "generate",
    complete: bool = True,
    error: str | None = None,
    failure: FailureKind | None = None,
    sent: bool = True,
) -> tuple[Outcome, int, Tokens | None]:
    """The end, what is charged, and billed, of an answer of these parts to 100 tokens of prompt."""
    request = request_of()
    admission: Admission = granted(kind=kind, tokens=150, prompt_tokens=100).about
    reservation = Charged()
    meter = Meter(request, admission, reservation, Suspects())
    outcome = Outcome(request, error=error)
    if sent:
        leg = leg_of(Target("h", 1))
        outcome.attempts.append(Attempt(leg, 0.0, ended_s=1.0, failure=failure))
    if status:
        meter.on_head(status, fields)
        for part in parts:
            meter.on_data(part)
            outcome.body_bytes += len(part)
    meter.on_end(outcome, complete)
    (charged,) = reservation.tokens
    return outcome, charged, admission.used


def measure(*parts: bytes, **how: Any) -> tuple[int, Tokens | None]:
    """What is charged, and billed."""
    return measured(*parts, **how)[1:]


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields, separators=(",", ":")).encode() + b"\n\n"


TEXT = event(choices=[{"delta": {"content": "x"}}], usage=None)
DONE = b"data: [DONE]\n\n"


class TestWholeAnswers:
    @pytest.mark.parametrize("size", [1, 7, 4095, 4096, 100_000])
    def test_the_usage_is_found_however_it_is_cut(self, size: int) -> None:
        body = json.dumps({"choices": "x" * 30_000, "usage": USAGE}, separators=(",", ":")).encode()
        parts = [body[i : i + size] for i in range(0, len(body), size)]
        charged, used = measure(*parts)
        assert charged == 18
        assert used is not None
        assert (used.input, used.cached, used.output, used.guessed) == (11, 4, 7, False)

    def test_spaces_do_not_matter(self) -> None:
        charged, _ = measure(json.dumps({"usage": USAGE}, indent=2).encode())
        assert charged == 18

    def test_text_that_looks_like_usage_is_none(self) -> None:
        text = json.dumps({"choices": '"usage":{"prompt_tokens":0}', "usage": USAGE})
        assert measure(text.encode())[0] == 18
        lie = json.dumps({"usage": USAGE, "choices": '"usage":{"prompt_tokens":0}'})
        assert measure(lie.encode())[0] == 18

    def test_embeddings(self) -> None:
        usage = {"prompt_tokens": 9, "total_tokens": 9}
        body = json.dumps({"data": [0.1] * 2000, "usage": usage}).encode()
        assert measure(body, kind="embed")[0] == 9

    @pytest.mark.parametrize(
        "said",
        [None, 5, "x", {"prompt_tokens": -1}, {"prompt_tokens": 2**60}, {"prompt_tokens": "9"}],
    )
    def test_nonsense_is_not_believed(self, said: object) -> None:
        charged, used = measure(json.dumps({"usage": said}).encode())
        assert used is not None
        assert charged >= 0
        assert used.input in (0, 100)

    def test_without_usage_it_is_guessed(self) -> None:
        charged, used = measure(b"x" * 80)
        assert charged == 120
        assert used is not None
        assert (used.input, used.output, used.guessed) == (100, 20, True)
        assert measure(b"x" * 80_000)[0] == 150, "never more than was asked for"

    def test_what_is_compressed_is_guessed(self) -> None:
        fields = [*JSON, (b"content-encoding", b"gzip")]
        _, used = measure(json.dumps({"usage": USAGE}).encode(), fields=fields)
        assert used is not None
        assert used.guessed

    def test_tensors_have_no_tokens(self) -> None:
        assert measure(b"{}", kind="tensor") == (0, None)
        assert measure(b"{}", kind="other") == (0, None)


class TestStreams:
    def test_with_usage(self) -> None:
        last = event(choices=[], usage=USAGE)
        for parts in ((TEXT, TEXT, last, DONE), (TEXT + TEXT + last + DONE,)):
            charged, used = measure(*parts, fields=EVENTS)
            assert (charged, used and used.guessed) == (18, False)

    def test_without_usage_events_are_counted(self) -> None:
        end = event(choices=[{"finish_reason": "stop"}])
        charged, used = measure(*([TEXT] * 30), end, DONE, fields=EVENTS)
        assert charged == 130
        assert used is not None
        assert (used.input, used.output, used.guessed) == (100, 30, True)

    def test_one_that_was_cut_short_is_charged_for_what_came(self) -> None:
        charged, used = measure(
            *([TEXT] * 12), fields=EVENTS, complete=False, error="cancelled", failure="cancelled"
        )
        assert charged == 110
        assert used is not None

    @pytest.mark.parametrize("left", [None, "cancelled"])
    def test_one_that_ends_with_an_error_says_so_and_takes_what_came(
        self, left: str | None
    ) -> None:
        error = {"message": 'a "code":"x"', "param": None, "code": "engine_crashed"}
        last = event(error=error)
        outcome, charged, used = measured(*([TEXT] * 12), last, fields=EVENTS, error=left)
        assert outcome.error == "engine_crashed"
        assert charged == 111
        assert used is not None
        assert used.guessed

    def test_an_error_without_a_code_is_one(self) -> None:
        outcome, _, _ = measured(TEXT, event(error="The model failed."), fields=EVENTS)
        assert outcome.error == "upstream_failed"
        told, _, _ = measured(TEXT, event(error="x"), fields=EVENTS, error="deadline_exceeded")
        assert told.error == "deadline_exceeded", "whoever cut it knows better"

    def test_text_about_errors_is_none(self) -> None:
        text = event(choices=[{"delta": {"content": 'data: {"error":{"code":"x"}}'}}])
        assert measured(text, DONE, fields=EVENTS)[0].error is None
        assert measured(b'{"error":{"code":"x"}}')[0].error is None


class TestNoAnswer:
    def test_errors_are_free(self) -> None:
        for status in (400, 429, 500, 503):
            assert measure(b"{}", status=status) == (0, None)

    def test_nobody_took_it(self) -> None:
        assert measure(status=0, error="no_healthy_region", sent=False) == (0, None)
        assert measure(status=0, error="upstream_failed", failure="closed") == (0, None)

    @pytest.mark.parametrize("error", ["cancelled", "deadline_exceeded"])
    def test_who_gives_up_is_charged_for_the_prompt(self, error: str) -> None:
        assert measure(status=0, error=error, failure="cancelled", complete=False) == (100, None)
        assert measure(status=0, error=error, failure="refused", complete=False) == (0, None)
        assert measure(status=0, error=error, sent=False, complete=False) == (0, None)


def test_what_another_gateway_refuses_as_one_that_kills_is_refused_here_too() -> None:
    suspects, request = Suspects(), request_of({"poison": 1})
    meter = Meter(request, granted().about, Charged(), suspects)
    meter.on_head(422, [*JSON, (b"x-nearfield-error-code", b"request_quarantined")])
    meter.on_end(Outcome(request), complete=True)
    refused = suspects.convicted(request)
    assert refused is not None
    assert refused.code == "request_quarantined"
