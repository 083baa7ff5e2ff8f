"""A stream of server-sent events that is never cut in the middle of one.

Whole events pass at once. The beginning of one waits for its end: nobody can use it before, and
if the upstream breaks off, the client still gets a well-formed error event.
"""

from __future__ import annotations

MAX_EVENT_BYTES = 256 * 1024
"""An event larger than this passes in parts; a break inside it cuts the connection."""


class EventStream:
    """What has come of one stream and is not yet a whole event."""

    __slots__ = ("_held", "_inside")

    def __init__(self) -> None:
        self._held = b""
        self._inside = False

    def take(self, data: bytes) -> bytes:
        """Everything that can be sent now that `data` has come."""
        if self._held:
            data = self._held + data
            self._held = b""
        if data.endswith((b"\n\n", b"\r\n\r\n")):
            self._inside = False
            return data
        lf, crlf = data.rfind(b"\n\n"), data.rfind(b"\r\n\r\n")
        end = max(lf + 2 if lf >= 0 else 0, crlf + 4 if crlf >= 0 else 0)
        if len(data) - end > MAX_EVENT_BYTES:
            self._inside = True
            return data
        if end:
            self._inside = False
        elif self._inside:
            return data
        self._held = data[end:]
        return data[:end]

    def rest(self) -> bytes:
        """What is left when the stream has ended as it should."""
        held, self._held = self._held, b""
        return held

    def last_words(self, error: bytes) -> bytes | None:
        """The event that ends a broken stream; None where part of an event was sent already.

        What was held back of an unfinished event is dropped: it never was one.
        """
        self._held = b""
        return None if self._inside else b"data: " + error + b"\n\n"
