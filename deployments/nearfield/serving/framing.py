"""Messages between a replica and its engine's process: length-prefixed pickles on a socketpair.

A frame is four bytes of length (little-endian) and a pickle (protocol 5) of `(kind, payload)`.
Both ends are our own processes on one host, so a pickle is as trustworthy as the code that
reads it.

Pickling a frozen dataclass costs ten times a tuple (4.6 against 0.4 µs), and an array in one twenty
times its bytes (31 against 2.6 µs to write). So what crosses for every token, or for every short
request, does so as plain values: `Text` as the tuple of its fields, `Embedded` as a list of them.
"""

from __future__ import annotations

import pickle
import socket
import struct
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from nearfield.api.events import Embedded, Event, Text, Timings
from nearfield.core.spec import ModelSpec
from nearfield.serving.engines.base import Slice

LENGTH = struct.Struct("<I")
JOIN_BELOW_BYTES = 1 << 16
"""Up to here the length is copied in front of the body to save a system call."""


class Kind(IntEnum):
    """What a frame carries. START to CLOSE go to the engine's process, the rest come from it."""

    START = 0  # Start
    SUBMIT = 1  # (request id, Request)
    CANCEL = 2  # request id
    CLOSE = 3  # None
    LOADED = 4  # Capabilities
    REFUSED = 5  # NearfieldError: the model cannot be served
    EVENTS = 6  # list of (request id, packed event)
    STATS = 7  # EngineStats; also the sign that the process lives


@dataclass(frozen=True, slots=True)
class Start:
    """What a replica tells its engine's process first."""

    spec: ModelSpec
    threads: int
    slice: Slice | None = None


def encode(kind: Kind, payload: Any) -> list[bytes]:
    """The frame, in one part or two."""
    body = pickle.dumps((int(kind), payload), protocol=5)
    length = LENGTH.pack(len(body))
    return [length + body] if len(body) < JOIN_BELOW_BYTES else [length, body]


def pack_events(events: Iterable[tuple[str, Event]]) -> list[tuple[str, Any]]:
    """Events as they cross; `unpack_event` makes them whole again."""
    return [(request_id, _pack(event)) for request_id, event in events]


def _pack(event: Event) -> Any:
    if type(event) is Text:
        return (
            event.text,
            event.choice,
            event.tokens,
            event.finish_reason,
            event.stop_reason,
            event.logprobs,
        )
    if type(event) is Embedded:
        t = event.timings
        timings = (t.started_s, t.queue_s, t.prefill_s, t.decode_s, t.batch_size, t.steps)
        vectors = np.ascontiguousarray(event.vectors, np.float32)
        return [vectors.tobytes(), vectors.shape, event.prompt_tokens, timings]
    return event


def unpack_event(packed: Any) -> Event:
    """An event from what `pack_events` made of it."""
    if type(packed) is tuple:
        return Text(*packed)
    if type(packed) is list:
        data, shape, prompt_tokens, timings = packed
        vectors = np.frombuffer(data, np.float32).reshape(shape)
        return Embedded(vectors, prompt_tokens, Timings(*timings))
    event: Event = packed
    return event


class FrameReader:
    """Cuts a byte stream into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Sequence[tuple[int, Any]]:
        """The messages that `data` completes, in order."""
        source: bytes | bytearray = data
        if self._buffer:
            self._buffer += data
            source = self._buffer
        messages: list[tuple[int, Any]] = []
        start, size = 0, len(source)
        with memoryview(source) as view:
            while size - start >= LENGTH.size:
                body = start + LENGTH.size
                end = body + LENGTH.unpack_from(view, start)[0]
                if end > size:
                    break
                messages.append(pickle.loads(view[body:end]))  # noqa: S301
                start = end
        if source is self._buffer:
            del self._buffer[:start]
        elif start < size:
            self._buffer += data[start:]
        return messages


class Channel:
    """The engine's end: blocking, and safe to send on from any thread."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()
        self._stream = sock.makefile("rb")

    def send(self, kind: Kind, payload: Any = None) -> None:
        """Write one frame whole, waiting while the replica is behind.

        Raises:
            OSError: the replica is gone.
        """
        parts = encode(kind, payload)
        with self._lock:
            for part in parts:
                self._sock.sendall(part)

    def receive(self) -> tuple[int, Any] | None:
        """The next message; None once the replica is gone."""
        header = self._stream.read(LENGTH.size)
        if len(header) < LENGTH.size:
            return None
        size = LENGTH.unpack(header)[0]
        body = self._stream.read(size)
        if len(body) < size:
            return None
        message: tuple[int, Any] = pickle.loads(body)  # noqa: S301
        return message

    def close(self) -> None:
        """Close the socket."""
        self._stream.close()
        self._sock.close()
