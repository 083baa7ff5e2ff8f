"""What an answer took in tokens, read from it as it passes; what was reserved is settled by it.

A whole answer ends with its `usage`: its last kilobytes are kept and read. A stream carries it in
its last event where its caller asked for that (`stream_options.include_usage`). Where it did not,
the events are counted: each brings at least one token of text, seldom more, so their number is a
lower bound that misses a few per cent. The prompt is then taken for a token per four bytes of the
request, framing included, which is more than it is. Such a sum is marked as guessed.

What is charged against quotas; the first of it is billed, too:

    an answer, whole or cut short         what it took, as above: of a stream that broke off, its
                                          prompt and what had come
    an error of the model or the region   nothing
    none, since the caller gave up        the prompt, if it had been sent: it may have been computed
    none, since nobody took it            nothing

A stream that ends with an error event has failed although its head said 200: the outcome is told
so, by the code that stands in the event.
"""

from __future__ import annotations

import re
from typing import Final

from nearfield.api.error_bodies import ERROR_CODE
from nearfield.core.errors import EngineFailed, Unprocessable
from nearfield.edge.decisions import Admission, Tokens
from nearfield.edge.proxy.ports import NEVER_SENT, Fields, Outcome, Request
from nearfield.edge.suspects import Suspects
from nearfield.policy.quota import Reservation

BYTES_PER_TOKEN: Final = 4
"""Of English text in UTF-8; fewer in other scripts, more in code."""
TAIL_BYTES: Final = 4096
"""A usage object with all details that OpenAI knows is shorter than 1 KiB."""
OTHER_EVENTS: Final = 2
"""Of a stream, those that bring no text: the one with the reason of the end, and `[DONE]`."""

_UNTOLD: Final = b"upstream_failed"
"""What a broken stream failed of whose last event does not say."""
_USAGE: Final = b'"usage":{'
"""As our replicas write it. Inside a text its quotes would be escaped."""
_NAME: Final = b'"usage"'
_BEGIN: Final = re.compile(rb'"usage"\s*:\s*\{')
_INPUT, _CACHED, _OUTPUT = (
    re.compile(rb'"%b"\s*:\s*(\d{1,15})(?!\d)' % name)
    for name in (b"prompt_tokens", b"cached_tokens", b"completion_tokens")
)
"""Larger is no number of tokens."""
_CRASHED: Final = b"engine_crashed"
_QUARANTINED: Final = b"request_quarantined"
_BROKEN: Final = b'data: {"error"'
_CODE: Final = re.compile(rb'"code"\s*:\s*"([a-z0-9_]{1,64})"')
"""Of an error. Inside its message the quotes would be escaped."""


class Meter:
    """The Tap of one request.

    Attributes:
        status: of the answer; 0 until there is one.
    """

    __slots__ = (
        "_admission", "_events", "_is_stream", "_legible", "_request", "_reservation",
        "_suspects", "_tail", "_told", "_usage", "status",
    )  # fmt: skip

    def __init__(
        self,
        request: Request,
        admission: Admission,
        reservation: Reservation,
        suspects: Suspects,
    ) -> None:
        self.status = 0
        self._request = request
        self._admission = admission
        self._reservation = reservation
        self._suspects = suspects
        self._is_stream = False
        self._legible = True  # not compressed
        self._events = 0
        self._usage = b""  # the event that has it
        self._tail = b""  # of a stream: what came last
        self._told = b""  # the code of an error

    def on_head(self, status: int, fields: Fields) -> None:
        self.status = status
        for name, value in fields:
            if name == b"content-type":
                self._is_stream = value.startswith(b"text/event-stream")
            elif name == b"content-encoding":
                self._legible = False
        if status in (EngineFailed.status, Unprocessable.status):
            self._told = dict(fields).get(ERROR_CODE, b"")

    def on_data(self, data: bytes) -> None:
        if self._is_stream:  # in whole events
            self._events += data.count(b"\n\n")
            self._tail = data
            if _USAGE in data:
                self._usage = data
        elif len(data) >= TAIL_BYTES:
            self._tail = data[-TAIL_BYTES:]
        else:
            self._tail = (self._tail + data)[-TAIL_BYTES:]

    def on_end(self, outcome: Outcome, complete: bool) -> None:
        try:
            broken = self.broken
            if broken:
                said = _CODE.search(self._tail, self._tail.rfind(_BROKEN))
                self._told = said[1] if said is not None else _UNTOLD
                # Whoever leaves once the error has come does not undo it.
                if outcome.error in (None, "cancelled"):
                    outcome.error = self._told.decode("ascii")
            self._judge(complete and not broken)
        finally:
            self._reservation.settle(self._charge(outcome))

    @property
    def broken(self) -> bool:
        """The stream that has passed ended with an error."""
        return self._is_stream and _BROKEN in self._tail[-TAIL_BYTES:]

    def _judge(self, whole: bool) -> None:
        """Whether the body is one that kills."""
        if self._told == _CRASHED:
            self._suspects.crashed(self._request)
        elif self._told == _QUARANTINED:
            self._suspects.convicted_elsewhere(self._request)
        elif whole and 0 < self.status < 500 and self._suspects.any:
            self._suspects.answered(self._request)

    def _charge(self, outcome: Outcome) -> int:
        """Tokens to be charged; what is billed is noted in the admission."""
        status = self.status
        if 200 <= status < 300:
            used = self._admission.used = self._used(outcome.body_bytes)
            return 0 if used is None else used.input + used.output
        given_up = status == 0 and outcome.error in ("cancelled", "deadline_exceeded")
        if given_up and any(attempt.failure not in NEVER_SENT for attempt in outcome.attempts):
            return self._admission.prompt_tokens
        return 0

    def _used(self, body_bytes: int) -> Tokens | None:
        said = self._said() if self._legible else None
        if said is not None:
            return said
        admission = self._admission
        if admission.kind == "generate":
            if self._is_stream:
                output = max(0, self._events - OTHER_EVENTS)
            else:
                most = admission.tokens - admission.prompt_tokens
                output = min(most, body_bytes // BYTES_PER_TOKEN)
            return Tokens(admission.prompt_tokens, 0, output, guessed=True)
        if admission.kind == "embed":
            return Tokens(admission.prompt_tokens, guessed=True)
        return None

    def _said(self) -> Tokens | None:
        """What the answer says of itself."""
        text = self._usage or self._tail
        begins = _BEGIN.match(text, text.rfind(_NAME)) if _NAME in text else None
        if begins is None:
            return None
        at = begins.end()
        return Tokens(
            _count(_INPUT, text, at), _count(_CACHED, text, at), _count(_OUTPUT, text, at)
        )


def _count(named: re.Pattern[bytes], text: bytes, at: int) -> int:
    said = named.search(text, at)
    return 0 if said is None else int(said[1])
