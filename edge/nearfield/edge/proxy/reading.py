"""A client's bytes as requests: HTTP/1.1, strictly, without any I/O.

    reader = Reader(limits)
    reader.feed(data)  → MORE, or HEAD: method, target, headers are there
    reader.read_body() → MORE, or COMPLETE: body is there, and `ahead` what follows it
    reader.restart()

The end of the head and the body's length are found here; fields and chunks are read by llhttp. A
new parser for each request costs less than resetting one, and nothing can be carried over.
"""

from __future__ import annotations

import logging

import httptools
from nearfield.edge.proxy import head
from nearfield.edge.proxy.head import Bad, bad
from nearfield.edge.proxy.limits import Limits

log = logging.getLogger("nearfield.edge.proxy")

MORE, HEAD, COMPLETE = range(3)
"""What a step has come to."""

_IN_HEAD, _AFTER_HEAD, _IN_LENGTH, _IN_CHUNKS, _DONE = range(5)

CHUNK_ALLOWANCE_BYTES = 64 * 1024
"""Chunk framing may be this much larger than the data in it: a megabyte of one-byte chunks is
an attack, not a body."""


class Reader:
    """Reads one connection's requests, one after the other. What raised `Bad` reads no more.

    Attributes:
        method, target, headers: once the head is there. minor: of HTTP/1.x, `0` or `1`.
        close: the client wants, or has to have, the connection closed after the answer.
        body, body_bytes: what has come of it; `body` only when it is complete.
        ahead: bytes after the request.
        started: part of a head is there.
    """

    __slots__ = (
        "_data", "_end", "_fields", "_framing_bytes", "_host", "_left_bytes", "_limits", "_over",
        "_parser", "_parts", "_phase", "_upgrade", "ahead", "body", "body_bytes", "close",
        "headers", "method", "minor", "started", "target",
    )  # fmt: skip

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._host = b""  # the last one that was found to be right
        self.method = self.target = self.minor = b""
        self.headers: dict[bytes, bytes] = {}
        self._fields: dict[bytes, bytes] = {}  # where llhttp's go
        self.ahead = b""
        self._data = b""
        self._end = 0
        self._left_bytes = 0  # of a body of known length
        self._framing_bytes = 0  # of a chunked one, as received
        self.restart()

    def restart(self) -> None:
        """The request was taken: read the next one."""
        self._phase = _IN_HEAD
        self._parser: httptools.HttpRequestParser | None = None
        self._parts: list[bytes] = []
        self._over = False  # llhttp has seen the last chunk
        self._upgrade = False
        self.started = False
        self.close = False
        self.body = b""
        self.body_bytes = 0

    @property
    def unread(self) -> bool:
        """Part of the request is still to come, as far as its head says."""
        length = self.headers.get(b"content-length")
        if self._phase == _AFTER_HEAD:
            got = len(self._data) - self._end
            chunked = b"transfer-encoding" in self.headers
            return chunked or (length is not None and int(length) > got)
        return self._phase != _DONE

    @property
    def wants_continue(self) -> bool:
        """The client waits for a word before it sends its body, of which nothing is here.

        Raises:
            Bad: it expects something else.
        """
        return head.wants_continue(self.headers) and self.minor == b"1" and self.body_bytes == 0

    # ---- the head ---------------------------------------------------------------------------

    def feed(self, data: bytes) -> int:
        """Read on.

        Raises:
            Bad: this is no request that is taken, and nothing after it can be read.
        """
        phase = self._phase
        if phase == _IN_HEAD:
            return self._feed_head(data)
        if phase == _IN_LENGTH:
            return self._feed_length(data)
        assert phase == _IN_CHUNKS
        return self._feed_chunks(data)

    def _feed_head(self, data: bytes) -> int:
        limits = self._limits
        if self.started:
            data = self._data + data
        elif data.startswith(b"\r\n"):
            data = data[2:]  # RFC 9112, 2.2: one empty line before a request is overlooked
            if not data:
                return MORE
        end = data.find(b"\r\n\r\n") + 4
        if end > limits.max_head_bytes or (end < 4 and len(data) > limits.max_head_bytes):
            raise Bad(head.HeadTooLarge(f"The head is larger than {limits.max_head_bytes} bytes."))
        if end < 4:
            head.check_incomplete(data)
            self._data = data
            self.started = True
            return MORE
        line = head.REQUEST_LINE.match(data)
        if line is None:
            raise head.explain_line(data)
        self.method, self.target, self.minor = line.groups()
        if len(self.target) > limits.max_target_bytes:
            raise Bad(head.TargetTooLong(f"The path is longer than {limits.max_target_bytes}."))
        self._read_fields(data if end == len(data) else data[:end])
        self._data = data
        self._end = end
        self._phase = _AFTER_HEAD
        return HEAD

    def _read_fields(self, raw: bytes) -> None:
        headers: dict[bytes, bytes] = {}
        self._fields = headers
        self._parser = parser = httptools.HttpRequestParser(self)
        try:
            parser.feed_data(raw)
        except httptools.HttpParserUpgrade:
            # Nothing is upgraded here: RFC 9110, 7.8 lets a server go on as if it were not asked.
            self._upgrade = True
        except httptools.HttpParserError as error:
            raise _why(error) from None
        if b" \r\n" in raw or b"\t\r\n" in raw:  # llhttp leaves blanks after a value
            headers = {name: value.rstrip(b" \t") for name, value in headers.items()}
        self.headers = headers
        if len(headers) > self._limits.max_headers:
            raise Bad(head.HeadTooLarge(f"There are more than {self._limits.max_headers} headers."))
        host = headers.get(b"host")
        if host != self._host or not host:
            head.check_host(host, self.minor)
            self._host = host or b""
        connection = headers.get(b"connection")
        self.close = self.minor == b"0"
        if connection is not None and connection != b"keep-alive":
            close, keep = head.drop_listed(headers, connection)
            self.close = close or (self.close and not keep)
        elif connection is not None:
            self.close = False

    # ---- the body ---------------------------------------------------------------------------

    def read_body(self) -> int:
        """The head was looked at, and the body is wanted.

        Raises:
            Bad: it is too large, or framed in a way that others could read differently.
        """
        headers, data, end = self.headers, self._data, self._end
        self._data = b""
        length = headers.get(b"content-length")
        if b"transfer-encoding" in headers:
            return self._begin_chunks(data[end:])
        wanted = 0 if length is None else int(length)
        if wanted > self._limits.max_body_bytes:
            raise head.too_large(self._limits.max_body_bytes)
        if len(data) - end >= wanted:
            self.body = data[end : end + wanted]
            self.body_bytes = wanted
            self.ahead = data[end + wanted :]
            self._phase = _DONE
            return COMPLETE
        self._left_bytes = wanted
        self._phase = _IN_LENGTH
        return self._feed_length(data[end:]) if len(data) > end else MORE

    def _feed_length(self, data: bytes) -> int:
        left = self._left_bytes
        if len(data) > left:
            self.ahead = data[left:]
            data = data[:left]
        self._left_bytes = left - len(data)
        self.body_bytes += len(data)
        self._parts.append(data)
        return MORE if self._left_bytes else self._complete()

    def _begin_chunks(self, data: bytes) -> int:
        coding = self.headers[b"transfer-encoding"]
        if coding.lower() != b"chunked" or self.minor == b"0":
            raise bad("transfer-encoding must be chunked, alone, in HTTP/1.1.")
        if self._upgrade:
            raise bad("A chunked body cannot go with an upgrade.")
        self._fields = {}  # for trailers, which nobody reads
        self._framing_bytes = 0
        self._phase = _IN_CHUNKS
        return self._feed_chunks(data) if data else MORE

    def _feed_chunks(self, data: bytes) -> int:
        self._framing_bytes += len(data)
        assert self._parser is not None
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            if not self._over:
                raise _why(error) from None
            self.close = True  # what follows is not read: the client may ask again
        if self.body_bytes > self._limits.max_body_bytes:
            raise head.too_large(self._limits.max_body_bytes)
        overhead = self._framing_bytes - self.body_bytes
        if overhead > CHUNK_ALLOWANCE_BYTES + self.body_bytes:
            raise bad("The body's chunks are too small, or their extensions too long.")
        return self._complete() if self._over else MORE

    def _complete(self) -> int:
        parts = self._parts
        self.body = parts[0] if len(parts) == 1 else b"".join(parts)
        self._parts = []
        self._parser = None
        self._phase = _DONE
        return COMPLETE

    # ---- llhttp -----------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        fields = self._fields
        if name not in fields:
            fields[name] = value
        else:
            head.join(fields, name, value)

    def on_message_begin(self) -> None:
        if self._over:
            raise bad("another request")  # in the bytes after a chunked one: see _feed_chunks

    def on_body(self, data: bytes) -> None:
        self.body_bytes += len(data)
        self._parts.append(data)

    def on_message_complete(self) -> None:
        self._over = self._phase == _IN_CHUNKS


def _why(error: httptools.HttpParserError) -> Bad:
    """Our own refusal, from inside a callback, or llhttp's."""
    inner = error.__context__
    if isinstance(inner, Bad):
        return inner
    if inner is not None:
        log.error("a request could not be read", exc_info=inner)
    return bad(f"The request is not well-formed HTTP: {str(error).strip('`')}.")
