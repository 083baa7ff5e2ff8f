"""A client's HTTP/2 frames, counted before anything is made of them.

What a frame means is the h2 library's business. How many there may be is ours: most kinds cost
their sender nine bytes, and us a parse and often an answer (CVE-2019-9511 to -9518). Each of those
is paid for out of an allowance, which requests and data refill.
"""

from __future__ import annotations

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEAD_BYTES = 9
MAX_FRAME_BYTES = 2**14
"""What SETTINGS_MAX_FRAME_SIZE is where nothing else is said, and nothing else is said here."""

MAX_ALLOWANCE = 1000
"""Frames that bring no work. A client that opens a connection and its windows sends about five."""
FOR_A_REQUEST = 10
FOR_DATA_SENT = 2
"""A client may open two windows, its stream's and the connection's, for each frame that it gets."""
SOLID_BYTES = 1024
"""A part of a body that is worth its frame."""

_DATA, _HEADERS, _GOAWAY, _CONTINUATION = 0, 1, 7, 9
_END_HEADERS = 4


class Flood(Exception):
    """More frames, or a larger head, than what they bring is worth. The connection is closed.

    Attributes:
        code: the reason in one word.
    """

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


class Frames:
    """Reads the heads of one connection's frames as they pass.

    Attributes:
        leaving: the client will ask no more. Its GOAWAY is kept from h2, which would end the
            answers that it still waits for.
        in_head: a request's head has begun and not ended.
    """

    __slots__ = (
        "_allowance", "_block_bytes", "_dropping", "_left_bytes", "_max_block_bytes", "_rest",
        "in_head", "leaving",
    )  # fmt: skip

    def __init__(self, max_block_bytes: int) -> None:
        """`max_block_bytes`: of one head, as it is compressed."""
        self._max_block_bytes = max_block_bytes
        self._allowance = MAX_ALLOWANCE
        self._block_bytes = 0
        self._left_bytes = len(PREFACE)  # of the frame that began last
        self._dropping = False  # it is kept from h2
        self._rest = b""  # the beginning of a frame's head
        self.in_head = False
        self.leaving = False

    def read(self, data: bytes) -> bytes:
        """What h2 is to get of `data`, and of what was held back before.

        Raises:
            Flood: it is too much for what it brings.
        """
        if self._rest:
            data = self._rest + data
            self._rest = b""
        at, end = self._left_bytes, len(data)
        begin = min(at, end) if self._dropping else 0
        parts: list[bytes] = []
        while end - at >= HEAD_BYTES:
            length = int.from_bytes(data[at : at + 3], "big")
            kind = data[at + 3]
            self._weigh(kind, data[at + 4], length)
            after = at + HEAD_BYTES + length
            self._dropping = kind == _GOAWAY and not self.in_head
            if self._dropping:
                self.leaving = True
                parts.append(data[begin:at])
                begin = min(after, end)
            at = after
        if at < end:
            self._rest = data[at:]
            end = at
        self._left_bytes = at - end
        if not parts:
            return data if begin == 0 and end == len(data) else data[begin:end]
        parts.append(data[begin:end])
        return b"".join(parts)

    def sent(self) -> None:
        """A part of an answer went out: the client may have to open its windows for the next."""
        self._allowance = min(MAX_ALLOWANCE, self._allowance + FOR_DATA_SENT)

    def _weigh(self, kind: int, flags: int, length: int) -> None:
        if length > MAX_FRAME_BYTES:
            # h2 would keep all of it, up to 16 MB, and then refuse it.
            raise Flood("frame_too_large")
        if kind == _DATA:
            worth = 1 if length >= SOLID_BYTES else -1
        elif kind == _HEADERS:
            worth = FOR_A_REQUEST
            self._block_bytes = length
            self.in_head = not flags & _END_HEADERS
        else:
            worth = -1
            if kind == _CONTINUATION:
                self._block_bytes += length
                self.in_head = not flags & _END_HEADERS
        if self.in_head and self._block_bytes > self._max_block_bytes:
            raise Flood("headers_too_large")
        self._allowance = min(MAX_ALLOWANCE, self._allowance + worth)
        if self._allowance < 0:
            raise Flood("http2_flood")


class Patience:
    """How many requests a client may take back before they were answered (CVE-2023-44487).

    Each cost us a try at an upstream, and its connection there.
    """

    MOST = 200.0
    PER_S = 20.0
    """A client that stops what it no longer wants stays under it; one that floods does not."""

    __slots__ = ("_left", "_since_s")

    def __init__(self, now_s: float) -> None:
        self._left = self.MOST
        self._since_s = now_s

    def spend(self, now_s: float) -> None:
        """One was taken back.

        Raises:
            Flood: there were too many.
        """
        self._left = min(self.MOST, self._left + (now_s - self._since_s) * self.PER_S) - 1
        self._since_s = now_s
        if self._left < 0:
            raise Flood("http2_rapid_reset")
