"""A client's connection over HTTP/2: many exchanges at once, each on a stream of its own.

    Connection   frames in and out, windows, floods, the clock of the connection
        │
    Stream       one request and its answer, bounded both ways, with a clock of its own
        │
    Collector    the answer to a `Call`, which is put into a message when it is complete

What frames mean is the h2 library's business; how many there are, how large, and by when, is ours.
What is wrong with a frame costs the connection; what is wrong with a request costs its stream.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    DataReceived,
    Event,
    RemoteSettingsChanged,
    RequestReceived,
    StreamEnded,
    StreamReset,
    WindowUpdated,
)
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes, Settings
from hyperframe.frame import GoAwayFrame
from nearfield.edge.proxy.frames import PREFACE, Flood, Frames, Patience
from nearfield.edge.proxy.h2_stream import Stream
from nearfield.edge.proxy.upstream import reset

if TYPE_CHECKING:
    from nearfield.edge.proxy.proxy import Proxy

log = logging.getLogger("nearfield.edge.proxy")

ALPN = "h2"
PREFACE_BEGINS = PREFACE[:18]
"""As far as HTTP/1.1 reads it: a head without fields."""

WINDOW_BYTES = 2**20
"""Of a body, and of all bodies of one connection, that may be on its way: 100 Mbit/s over 80 ms of
round trip. What arrives is taken at once, as long as `Limits` has room for it."""
SLICE_BYTES = 2**14
"""h2 copies what it has not read yet with every frame: it is fed in slices."""
MAX_UNSENT_BYTES = 2**18
"""Beyond the usual buffer, of answers to the frames of a client that reads nothing."""
HARD_HEAD = 4
"""A head this many times larger than may be costs the connection, not just its stream."""
MAX_CLOSED_STREAMS = 1024
"""Of which h2 remembers how they were closed; its own 65,536 are six megabytes a connection."""
LAST_STREAM = 2**31 - 1
HTTP2_WINDOW_BYTES = 2**16 - 1

OPEN, CLOSING = range(2)

_CONFIG = H2Configuration(
    client_side=False,
    header_encoding=None,
    # What upstreams answer was read strictly, and what we answer was written by us.
    validate_outbound_headers=False,
    normalize_outbound_headers=False,
)


class _Wire(H2Connection):
    MAX_CLOSED_STREAMS = MAX_CLOSED_STREAMS


class Connection(asyncio.Protocol):
    """One client.

    Attributes:
        peer: its address. wire: the library's side. choked: the client does not read.
        streams: those whose answer is not complete.
    """

    __slots__ = (
        "_advised", "_frames", "_greeted", "_last", "_leaving", "_patience", "_state", "_transport",
        "_was_in_head", "choked", "due_s", "peer", "proxy", "streams", "timer", "wire",
    )  # fmt: skip
    _transport: asyncio.Transport

    def __init__(self, proxy: Proxy) -> None:
        limits = proxy.limits
        self.proxy = proxy
        self.peer = ""
        self.wire = _Wire(_CONFIG)
        self.wire.local_settings = Settings(
            client=False,
            initial_values={
                SettingCodes.MAX_CONCURRENT_STREAMS: limits.max_streams,
                SettingCodes.MAX_HEADER_LIST_SIZE: limits.max_head_bytes,
                SettingCodes.INITIAL_WINDOW_SIZE: WINDOW_BYTES,
            },
        )
        self.wire.decoder.max_header_list_size = HARD_HEAD * limits.max_head_bytes
        self.streams: dict[int, Stream] = {}
        self.choked = False
        self._frames = Frames(HARD_HEAD * limits.max_head_bytes)
        self._patience = Patience(proxy.loop.time())
        self._state = OPEN
        self._greeted = False  # the client has sent its settings
        self._was_in_head = False
        self._leaving = False  # the process stops
        self._advised = False  # the client was asked to go elsewhere
        self._last: int | None = None  # the last stream that is still answered
        self.due_s = 0.0
        self.timer: asyncio.TimerHandle | None = None

    # ---- asyncio.Protocol -------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's is no asyncio.Transport
        proxy = self.proxy
        proxy.clients.add(self)
        self.due_s = proxy.loop.time() + proxy.limits.head_s
        proxy.timers.watch(self)
        self._transport.set_write_buffer_limits(high=proxy.limits.client_buffer_bytes)
        peer = transport.get_extra_info("peername")
        self.peer = peer[0] if isinstance(peer, tuple) else ""
        self.wire.initiate_connection()
        self.wire.increment_flow_control_window(WINDOW_BYTES - HTTP2_WINDOW_BYTES)
        self.flush()
        if len(proxy.clients) > proxy.limits.max_connections:
            self._fail(ErrorCodes.ENHANCE_YOUR_CALM, "overload")

    def data_received(self, data: bytes) -> None:
        if self._state == CLOSING:
            return
        try:
            data = self._frames.read(data)
            for at in range(0, len(data), SLICE_BYTES):
                events = self._understood(data[at : at + SLICE_BYTES])
                if events is None:
                    return
                self._take(events)
        except Flood as flood:
            self._fail(ErrorCodes.ENHANCE_YOUR_CALM, flood.code)
            return
        self.flush()
        self._look_at_heads()
        limit = self.proxy.limits.client_buffer_bytes + MAX_UNSENT_BYTES
        if self.choked and self._transport.get_write_buffer_size() > limit:
            reset(self._transport)
        elif self._frames.leaving and not self.streams:
            self._shut()

    def _understood(self, data: bytes) -> list[Event] | None:
        """What the client's bytes mean; None where they are no HTTP/2, and the connection ends."""
        try:
            return self.wire.receive_data(data)
        except ProtocolError as error:
            log.debug("a connection broke HTTP/2's rules: %s", error)
            self._fail(None, "http2_error")
            return None

    def eof_received(self) -> bool:
        """The client sends no more, not even windows: it has left."""
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self._state = CLOSING
        self.proxy.client_gone(self)
        self.proxy.timers.unwatch(self)
        self._desert()

    def pause_writing(self) -> None:
        self.choked = True
        self._wait(self.proxy.limits.stall_s)

    def resume_writing(self) -> None:
        self.choked = False
        if self._state == OPEN:
            limits = self.proxy.limits
            wait_s = limits.drain_idle_s if self._leaving else limits.idle_s
            self.due_s = self.proxy.loop.time() + wait_s
            self._send_on()

    # ---- what the client said ---------------------------------------------------------------

    def _take(self, events: Sequence[Event]) -> None:
        taken_back: set[int] = set()
        for event in events:
            if isinstance(event, StreamReset):
                # First, so that nothing is begun that its client does not want any more.
                taken_back.add(event.stream_id)
                stream = self.streams.get(event.stream_id)
                if stream is not None and stream.answered:
                    stream.on_lost()
                    continue
                self._patience.spend(self.proxy.loop.time())
                if stream is not None:
                    stream.on_lost()
        windows_opened = False
        for event in events:
            if isinstance(event, RequestReceived):
                if event.stream_id not in taken_back:
                    self._begin(event)
            elif isinstance(event, DataReceived):
                self.wire.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                stream = self.streams.get(event.stream_id)
                if stream is not None and event.data:
                    stream.on_data(event.data)
            elif isinstance(event, StreamEnded):
                stream = self.streams.get(event.stream_id)
                if stream is not None:
                    stream.on_end()
            elif isinstance(event, WindowUpdated):
                windows_opened = True
            elif isinstance(event, RemoteSettingsChanged):
                windows_opened = True
                if not self._greeted:
                    self._greeted = True
                    self._rest(self.proxy.loop.time())
        if windows_opened:
            self._send_on()

    def _begin(self, event: RequestReceived) -> None:
        number = event.stream_id
        if self._last is not None and number > self._last:
            self.wire.reset_stream(number, ErrorCodes.REFUSED_STREAM)
            return
        stream = self.streams[number] = Stream(self, number)
        stream.on_head(event.headers, complete=event.stream_ended is not None)

    def _look_at_heads(self) -> None:
        """A head that comes in pieces must come to its end."""
        in_head = self._frames.in_head
        if in_head and not self._was_in_head:
            due_s = self.proxy.loop.time() + self.proxy.limits.head_s
            self.due_s = min(self.due_s, due_s)
            self.proxy.timers.sooner(self)
        elif self._was_in_head and not in_head:
            self._rest(self.proxy.loop.time())
        self._was_in_head = in_head

    # ---- for the streams --------------------------------------------------------------------

    def flush(self) -> None:
        """Send what was written to the wire."""
        data = self.wire.data_to_send()
        if data and not self._transport.is_closing():
            self._transport.write(data)

    def sent(self) -> None:
        """A part of an answer was written to the wire."""
        self._frames.sent()
        self.flush()

    def forget(self, stream: Stream) -> None:
        """It is over, and all of its answer is sent."""
        self.streams.pop(stream.number, None)
        if self.streams or self._state == CLOSING:
            return
        if self._last is not None or self._frames.leaving:
            self._shut()
        elif self._leaving and not self._advised:
            self._advise()
        else:
            self._rest(self.proxy.loop.time())

    def _send_on(self) -> None:
        """Windows are open again: every stream that waits for that sends a part in turn."""
        waiting = [stream for stream in self.streams.values() if stream.unsent_bytes]
        while waiting and not self.choked:
            waiting = [stream for stream in waiting if stream.send_part()]
        self.flush()

    # ---- closing ----------------------------------------------------------------------------

    def _rest(self, now_s: float) -> None:
        """Nothing runs: when to close, if nothing comes."""
        if not self._leaving:
            self.due_s = now_s + self.proxy.limits.idle_s

    def _say_goodbye(self, last: int) -> None:
        """GOAWAY, by hand: after h2's own nothing could be sent, no answer either."""
        frame = GoAwayFrame(0, last_stream_id=last, error_code=ErrorCodes.NO_ERROR)
        self.flush()
        self._transport.write(frame.serialize())

    def _fail(self, code: ErrorCodes | None, why: str) -> None:
        """This is not, or no longer, listened to. `code`: None where h2 has said it already."""
        self.proxy.recorder.malformed(why)
        self._state = CLOSING
        self._desert()
        if code is not None:
            self.wire.close_connection(code)
        self.flush()
        self._shut()

    def _desert(self) -> None:
        for stream in tuple(self.streams.values()):
            stream.on_lost()

    def _shut(self) -> None:
        """Close when what was written is sent, or after a while."""
        self._state = CLOSING
        self._transport.close()
        self._wait(self.proxy.limits.linger_s)

    def drain(self) -> None:
        """The process is stopping.

        The client is told when nothing runs, or after a moment: many (all that are built on h2)
        give up the answers that they wait for when they are.
        """
        if self._state == OPEN and not self._leaving:
            self._leaving = True
            if self.streams:
                self._wait(self.proxy.limits.drain_idle_s)
            else:
                self._advise()

    def _advise(self) -> None:
        """Tell the client to go elsewhere with its next requests. Some may be on their way."""
        self._advised = True
        self._say_goodbye(LAST_STREAM)
        self._wait(self.proxy.limits.drain_idle_s)

    def _wait(self, seconds: float) -> None:
        self.due_s = self.proxy.loop.time() + seconds
        self.proxy.timers.sooner(self)

    def cut(self) -> None:
        """The time to drain is over."""
        for stream in tuple(self.streams.values()):
            stream.cut()
        self._transport.abort()

    def on_due(self, now_s: float) -> None:
        if self._state == CLOSING:
            self._transport.abort()
        elif self.choked:
            reset(self._transport)  # it takes nothing
        elif not self._greeted or self._frames.in_head:
            self._fail(ErrorCodes.ENHANCE_YOUR_CALM, "request_timeout")
        elif self._leaving and not self._advised:
            self._advise()
        elif self.streams and (self._last is not None or not self._leaving):
            self.due_s = now_s + self.proxy.limits.idle_s  # the streams have their own
        else:
            self._last = self.wire.highest_inbound_stream_id
            self._say_goodbye(self._last)
            self.due_s = now_s + self.proxy.limits.idle_s
            if not self.streams:
                self._shut()
