"""Answers that are made here: refusals in the caller's dialect, status lines, dates."""

from __future__ import annotations

import http
import math
import time
from email.utils import formatdate

import msgspec
from nearfield.api.error_bodies import code_header, oip_error, oip_error_event, openai_error
from nearfield.core.errors import NearfieldError
from nearfield.edge.proxy.ports import Answer, Dialect, Fields

_REASONS = {status.value: status.phrase for status in http.HTTPStatus}
STATUS_LINES = {
    status: f"HTTP/1.1 {status} {_REASONS.get(status, '')}\r\n".encode("ascii")
    for status in range(200, 600)
}
NO_BODY = frozenset((204, 304))
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

_encode = msgspec.json.Encoder().encode


def error_bytes(error: NearfieldError, dialect: Dialect) -> bytes:
    """The error's body."""
    return _encode(oip_error(error) if dialect == "oip" else openai_error(error))


def last_words(error: NearfieldError, dialect: Dialect) -> bytes:
    """The event that ends a stream."""
    return _encode(oip_error_event(error) if dialect == "oip" else openai_error(error))


def refusal(error: NearfieldError, dialect: Dialect) -> Answer:
    """The error as a complete answer."""
    headers = code_header(error)
    if error.retry_after_s is not None:
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_s))))
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    return Answer(error.status, error_bytes(error, dialect), headers=headers)


class Dates:
    """The `date` header, made once a second."""

    def __init__(self) -> None:
        self._second = 0
        self._text = b""

    def now(self) -> bytes:
        """The time as HTTP writes it."""
        second = int(time.time())
        if second != self._second:
            self._second = second
            self._text = formatdate(second, usegmt=True).encode("ascii")
        return self._text


def fields_of(answer: Answer, date: bytes) -> Fields:
    """The header fields of an answer made here, without those that frame it."""
    return [(b"date", date), (b"content-type", answer.content_type), *answer.headers]
