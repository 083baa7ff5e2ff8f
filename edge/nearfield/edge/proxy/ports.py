"""What others plug into the forwarding path, and the plain data that is exchanged with them.

    Gate      may this request pass, as whom, with which limits?
    Router    which target takes it (again, after a failure)?
    Retries   may it be tried again; when is a second try started beside the first?
    Recorder  is told how it ended, exactly once
    Tap       sees the answer that one request got, as it passes (usage, idempotency)
    Pages     answer what the gateway knows by itself (health, metrics, console)

A port answers at once where it can. Where it cannot (a database, a queue) it returns a future
of the same answer; the request waits for it, and cancels it when its client leaves or its deadline
passes. A refusal is returned, not raised; an exception is a bug, and becomes a 500.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, TypeVar

from nearfield.core.errors import NearfieldError

Dialect: TypeAlias = Literal["openai", "oip"]
Fields: TypeAlias = "tuple[tuple[bytes, bytes], ...] | list[tuple[bytes, bytes]]"
"""Header fields, names in lower case."""

FailureKind: TypeAlias = Literal[
    "refused",  # no connection: nobody listens, or too many connections are open
    "connect_timeout",
    "closed",  # the connection ended before the first byte of the answer
    "protocol",  # the answer is not HTTP
    "status",  # an answer after which another target may do better (429, 500, 502, 503, 504)
    "truncated",  # the answer broke off
    "abandoned",  # the target was given up by whoever watches it
    "deadline",
    "cancelled",  # the client left, or another try won
]
REPLICA = b"x-nearfield-replica"
"""The header field of an answer that names who it is from."""
NEVER_SENT: frozenset[FailureKind] = frozenset({"refused", "connect_timeout"})
"""After these the target cannot have seen the request."""


@dataclass(slots=True, eq=False)
class Trace:
    """W3C trace context: the caller's trace or a new one, and the span of this gateway's part.

    Attributes:
        parent_id: the caller's span, 16 hex digits; empty where there is none.
    """

    trace_id: bytes
    span_id: bytes
    parent_id: bytes
    sampled: bool


@dataclass(slots=True, eq=False)
class Request:
    """A request that was parsed and found well-formed. Times are on `time.monotonic()`.

    Attributes:
        method: upper case. target: path and query as sent. path: what an upstream is asked for:
            the target without a leading `/{model}`.
        headers: names in lower case, repeated ones joined; what `Connection` lists is gone.
        body: complete once the Gate's `admit` is asked.
        model: from the path, else from a JSON body, else None. stream, max_tokens: from the body.
        says_model: it goes where a JSON body names the model.
        peer: the client's address.
        caller: the Gate's own, from `enter` to `admit`. page: what answers it here, if anything.
    """

    method: bytes
    target: bytes
    path: bytes
    dialect: Dialect
    headers: dict[bytes, bytes]
    request_id: bytes
    trace: Trace
    started_s: float
    deadline_s: float
    model: str | None = None
    says_model: bool = False
    peer: str = ""
    body: bytes = b""
    stream: bool = False
    max_tokens: int | None = None
    caller: Any = None
    page: Page | None = None


@dataclass(slots=True, eq=False)
class Target:
    """Where requests can be sent: one replica, or another region's gateway.

    The same object for as long as the target exists: connections are pooled by it.

    Attributes:
        prefix: put before the request's path (`/chat`).
        tls: None for plain HTTP. server_name: for TLS, and in `host`; else the address.
        about: the Router's own.
    """

    host: str
    port: int
    prefix: bytes = b""
    tls: ssl.SSLContext | None = None
    server_name: str | None = None
    connect_s: float = 1.0
    about: Any = None
    authority: bytes = field(init=False, default=b"")

    def __post_init__(self) -> None:
        name = self.server_name or (f"[{self.host}]" if ":" in self.host else self.host)
        self.authority = f"{name}:{self.port}".encode("ascii")


@dataclass(slots=True, eq=False)
class Leg:
    """A decision of the Router: this target, asked like so.

    Attributes:
        headers: for the upstream. shown: for the client (`x-nearfield-endpoint`, …).
        path, body: in place of the request's own (a fallback model).
    """

    target: Target
    headers: Fields = ()
    shown: Fields = ()
    path: bytes | None = None
    body: bytes | None = None


@dataclass(slots=True, eq=False)
class Attempt:
    """One try at one target, as far as it has come. `status` is 0 until the answer's head.

    Attributes:
        request, grant: whose try it is, once it is counted (`Router.began`).
        reused: over a connection that was kept.
        heard_s: when the last bytes of the answer came.
        retry_after: an answer that is unavailable (503) says when to come back.
        code, replica: of an answer from 429 on: what its `x-nearfield-error-code` and its
            `x-nearfield-replica` say.
    """

    leg: Leg
    started_s: float
    reused: bool = False
    first_byte_s: float | None = None
    heard_s: float | None = None
    retry_after: bool = False
    code: bytes = b""
    replica: bytes = b""
    ended_s: float | None = None
    status: int = 0
    failure: FailureKind | None = None
    request: Request | None = None
    grant: Grant | None = None


class Tap(Protocol):
    """Sees an answer pass. Must be quick: it runs between the upstream's bytes and the client's."""

    def on_head(self, status: int, fields: Fields) -> None:
        """The answer begins."""
        ...

    def on_data(self, data: bytes) -> None:
        """A part of the body passes."""
        ...

    def on_end(self, outcome: Outcome, complete: bool) -> None:
        """It is over; `complete`: nothing is missing.

        Called exactly once for each grant, also where there was no answer to see: one that was
        made here, or none, since the client left. What was tried for it stands in the outcome.
        """
        ...


@dataclass(slots=True, eq=False)
class Grant:
    """The Gate's consent.

    Attributes:
        headers: for the upstream: the passport. shown: for the client: rate limits.
        replayable: executing it twice does no harm, so it may be tried again although a target
            may have begun it. Methods that are safe by definition always may.
        outlives: once it runs it runs to its end, although its client may leave: somebody keeps the
            answer (`Idempotency-Key`).
        about: the Gate's own; the Router, the Recorder and others may know its type.
    """

    headers: Fields = ()
    shown: Fields = ()
    replayable: bool = False
    outlives: bool = False
    tap: Tap | None = None
    about: Any = None


@dataclass(slots=True, eq=False)
class Answer:
    """A complete answer that needs no upstream. error: the reason's code where it is a refusal."""

    status: int
    body: bytes = b""
    content_type: bytes = b"application/json"
    headers: Fields = ()
    error: str | None = None


class Feed(Protocol):
    """An answer that this process writes over time: server-sent events of its own.

    It ends when the client leaves, when `Line.end` is called, or at the request's deadline, which
    a page may have moved.
    """

    def open(self, line: Line) -> None:
        """The head is sent: write from now on."""
        ...

    def closed(self) -> None:
        """It is over: write no more. Called exactly once, whoever ended it."""
        ...


class Line(Protocol):
    """The client's end of a feed."""

    def send(self, data: bytes) -> bool:
        """Write; False where the client does not keep up: nothing was written."""
        ...

    def end(self) -> None:
        """The feed is complete."""
        ...


Page: TypeAlias = "Callable[[Request], Answer | Feed | asyncio.Future[Answer | Feed]]"
"""Called once the request is complete."""


@dataclass(slots=True, eq=False)
class Outcome:
    """How a request ended. Filled in as it goes; the Recorder gets it when it is complete.

    Attributes:
        status: of the answer; 499 where the client left before it had one.
        error: the reason's code where the request failed, whoever's fault it was.
        body_bytes: of the answer's body, as sent.
        first_byte_s: when the answer's head was sent.
    """

    request: Request
    grant: Grant | None = None
    attempts: list[Attempt] = field(default_factory=list)
    status: int = 0
    error: str | None = None
    body_bytes: int = 0
    first_byte_s: float | None = None
    ended_s: float = 0.0


T = TypeVar("T")
Soon: TypeAlias = "T | NearfieldError | asyncio.Future[T | NearfieldError]"


class Gate(Protocol):
    """Authenticates and admits."""

    def enter(self, request: Request) -> NearfieldError | None:
        """At the end of the head, before a byte of the body is read: is this caller known?

        Keep what was found in `request.caller`. A refusal here costs the caller its connection
        if there is a body to come.
        """
        ...

    def admit(self, request: Request) -> Soon[Grant | Answer]:
        """The request is complete: may it pass? May set an earlier `request.deadline_s`."""
        ...


class Router(Protocol):
    """Chooses targets. Is told of every try's begin and end, exactly once each."""

    def pick(
        self, request: Request, grant: Grant, attempts: Sequence[Attempt]
    ) -> Soon[Leg | Answer]:
        """The best target now; `attempts` are the tries so far, failed or still running."""
        ...

    def began(self, attempt: Attempt) -> None:
        """A try starts: count it."""
        ...

    def ended(self, attempt: Attempt) -> None:
        """It is over: see its `failure`, `status` and times."""
        ...


class Retries(Protocol):
    """Decides on more than one try. Only asked while the client has not got a byte."""

    def again(self, request: Request, grant: Grant, attempts: Sequence[Attempt]) -> bool:
        """May the request be tried again, now that the last of `attempts` failed?"""
        ...

    def hedge_after_s(self, request: Request, grant: Grant) -> float | None:
        """Start a second try beside the first after so long without an answer; None: never."""
        ...


class Reply(NamedTuple):
    """An answer in the form of another protocol: head, data, and what comes after the data."""

    head: Fields
    data: bytes
    trailers: Fields


class Call(Protocol):
    """A call of another protocol over HTTP/2 (gRPC), and the request that it stands for.

    Attributes:
        refused: why it is not taken, where its head alone says so.
        at_once: the caller has to be known before the message is read. Else what is asked for is
            known, and the caller asked about, only then.
        max_bytes: of its message, framed.
    """

    refused: NearfieldError | None
    at_once: bool
    max_bytes: int

    def read(self, request: Request) -> NearfieldError | None:
        """`request.body` is the message: make the request what it asks for, or refuse it."""
        ...

    def reply(self, status: int, fields: Fields, body: bytes) -> Reply:
        """The answer to that request, whole, as this protocol has it. Refusals are answers too."""
        ...


class Calls(Protocol):
    """Knows calls of other protocols over HTTP/2."""

    def find(self, target: bytes, headers: dict[bytes, bytes]) -> Call | None:
        """The call that this head begins; None: it is a plain request. May change `headers`."""
        ...


class Recorder(Protocol):
    """Accounts, measures, traces."""

    def done(self, outcome: Outcome) -> None:
        """A request is over. Every request that was parsed comes here exactly once."""
        ...

    def malformed(self, code: str) -> None:
        """Bytes were refused that were no request."""
        ...


class Pages(Protocol):
    """What is answered by this process itself. The Gate is not asked: a page has its own rules."""

    def find(self, request: Request) -> Page | None:
        """At the end of the head: the page that this request is for, if it is for one."""
        ...
