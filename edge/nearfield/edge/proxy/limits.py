"""Every bound of the forwarding path, in one place."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True, slots=True)
class Limits:
    """What one gateway process takes, holds and waits for.

    Attributes:
        max_connections: open client connections; one more is answered 503 and closed.
        max_target_bytes: of a request's path and query; a longer one is a 414.
        max_head_bytes, max_headers: of a request's head; a larger one is a 431.
        max_body_bytes: of one request's body; a larger one is a 413.
        max_held_bytes: request bodies held in memory, all together; beyond it, 503.
        head_s: from a request's first byte (or the connection's start) to the end of its head.
        body_grace_s, min_body_bytes_per_s: a body that is slower than this rate, after the grace,
            ends in a 408.
        idle_s: a connection kept open between two requests.
        stall_s: a client that takes no byte of its answer for so long is cut off.
        linger_s: how long a refused client may go on sending before the connection is reset.
        timeout_s, max_timeout_s: a request's deadline when it brings none, and the longest it may
            ask for (`x-request-timeout-ms`).
        drain_idle_s: when draining, how long an idle connection may still bring a last request.
        client_buffer_bytes: unsent answer beyond which the upstream is no longer read.
        max_streams: requests of one HTTP/2 connection at once.
        max_message_bytes: of an answer that is sent as one message (gRPC); a larger one is refused.
        max_upstream_connections, max_upstream_idle, upstream_idle_s: per target; idle connections
            are closed before the upstream would (uvicorn: 5 s).
        max_response_head_bytes: of an upstream's answer; a larger one is a 502.
    """

    max_connections: int = 10_000
    max_target_bytes: int = 8 * KIB
    max_head_bytes: int = 32 * KIB
    max_headers: int = 100
    max_body_bytes: int = 16 * MIB
    max_held_bytes: int = 256 * MIB
    head_s: float = 10.0
    body_grace_s: float = 10.0
    min_body_bytes_per_s: float = 1.0 * KIB
    idle_s: float = 75.0
    stall_s: float = 60.0
    linger_s: float = 2.0
    timeout_s: float = 600.0
    max_timeout_s: float = 3600.0
    drain_idle_s: float = 2.0
    client_buffer_bytes: int = 32 * KIB
    max_streams: int = 128
    max_message_bytes: int = 64 * MIB
    max_upstream_connections: int = 1024
    max_upstream_idle: int = 128
    upstream_idle_s: float = 4.0
    max_response_head_bytes: int = 64 * KIB

    def body_due_s(self, since_s: float, size: int) -> float:
        """By when there must be more of a body that began then, and has come to `size` bytes."""
        return since_s + self.body_grace_s + size / self.min_body_bytes_per_s
