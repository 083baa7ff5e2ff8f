"""The answer to a `Call`: collected, and sent as one message when it is complete."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nearfield.core.errors import (
    DeadlineExceeded,
    NearfieldError,
    PayloadTooLarge,
    UpstreamFailed,
)
from nearfield.edge.proxy.answers import refusal
from nearfield.edge.proxy.head import Bad
from nearfield.edge.proxy.ports import Answer, Call, Fields

if TYPE_CHECKING:
    from nearfield.edge.proxy.h2_stream import Stream


class Collector:
    """The client's side of a call: collects the answer, and sends it as one message."""

    __slots__ = ("_call", "_fields", "_parts", "_size", "_status", "_stream")

    def __init__(self, stream: Stream, call: Call) -> None:
        self._stream = stream
        self._call = call
        self._status = 0
        self._fields: Fields = ()
        self._parts: list[bytes] = []
        self._size = 0

    def begin(self, status: int, fields: Fields, length: int | None) -> None:
        self._status, self._fields = status, fields

    def write(self, data: bytes) -> None:
        if self._status == 0:
            return
        self._parts.append(data)
        self._size += len(data)
        most = self._stream.limits.max_message_bytes
        try:
            self._stream.hold(len(data))
            if self._size > most:
                raise Bad(PayloadTooLarge(f"The answer is larger than {most} bytes."))
        except Bad as refused:
            self._refuse(refused.error)
            self._stream.leave()

    def end(self) -> None:
        if self._status:
            self._send(self._status, self._fields, b"".join(self._parts))

    def abort(self) -> None:
        if self._stream.error == DeadlineExceeded.default_code:
            self._refuse(DeadlineExceeded("The deadline passed before the answer was complete."))
        else:
            self._refuse(UpstreamFailed("The answer broke off. Send the request again."))

    def answer(self, answer: Answer) -> None:
        self._send(answer.status, answer.headers, answer.body)

    def over(self) -> None:
        self._parts = []
        self._stream.over()

    def _refuse(self, error: NearfieldError) -> None:
        refused = refusal(error, "oip")
        self._send(refused.status, refused.headers, refused.body)

    def _send(self, status: int, fields: Fields, body: bytes) -> None:
        self._status = 0
        self._parts = []
        self._stream.send_reply(self._call, status, fields, body)
