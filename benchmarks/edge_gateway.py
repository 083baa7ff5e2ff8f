"""nearfield's forwarding path with everything on: keys, passports, routing, records, traces.

    python -m benchmarks.edge_gateway PORT UPSTREAM_PORT

The ports here do the work that the real ones do for each request: a key is looked up by its id and
compared in constant time, two windows are counted, a passport is signed, one of two targets is
chosen, a record is kept and written out in batches, and one trace in a hundred is sampled.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import hashlib
import hmac
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import uvloop
from nearfield.core.errors import NearfieldError, RateLimited, Unauthenticated
from nearfield.edge.proxy.listener import Listener, bind
from nearfield.edge.proxy.plain import Careful
from nearfield.edge.proxy.ports import Attempt, Grant, Leg, Outcome, Request, Target
from nearfield.edge.proxy.proxy import Proxy

from benchmarks.workload import KEY_ID, SECRET

PEPPER = b"pepper-of-the-benchmark"
PASSPORT_S = 60
FLUSH_S = 0.5


@dataclass(slots=True)
class Caller:
    """A key as it is kept, and what it has used of this minute."""

    digest: bytes
    tenant: str
    minute: int = 0
    requests: int = 0
    max_requests: int = 10**9


class Keys:
    """A gate of one key."""

    def __init__(self) -> None:
        digest = hmac.digest(PEPPER, SECRET.encode(), "sha256")
        self._callers = {KEY_ID: Caller(digest, "tenant")}
        self._signing = hashlib.sha256(PEPPER).digest()

    def enter(self, request: Request) -> NearfieldError | None:
        given = request.headers.get(b"authorization", b"")
        if not given.startswith(b"Bearer nf_"):
            return Unauthenticated("Send a key.")
        identity, _, secret = given[10:].partition(b"_")
        caller = self._callers.get(identity.decode("latin-1"))
        if caller is None or not hmac.compare_digest(
            hmac.digest(PEPPER, secret, "sha256"), caller.digest
        ):
            return Unauthenticated("The key is not known.")
        request.caller = caller
        return None

    def admit(self, request: Request) -> Grant | NearfieldError:
        caller: Caller = request.caller
        now = int(time.time())
        if caller.minute != now // 60:
            caller.minute, caller.requests = now // 60, 0
        if caller.requests >= caller.max_requests:
            return RateLimited("Too many requests this minute.", retry_after_s=60 - now % 60)
        caller.requests += 1
        left = caller.max_requests - caller.requests
        claims = b'{"kid":"1","tenant":"%b","model":"%b","exp":%d,"id":"%b"}' % (
            caller.tenant.encode(),
            (request.model or "").encode(),
            now + PASSPORT_S,
            request.request_id,
        )
        signed = hmac.digest(self._signing, claims, "sha256")
        passport = base64.urlsafe_b64encode(claims + signed)
        return Grant(
            headers=((b"x-nearfield-passport", passport),),
            shown=(
                (b"x-ratelimit-limit-requests", b"%d" % caller.max_requests),
                (b"x-ratelimit-remaining-requests", b"%d" % left),
                (b"x-ratelimit-reset-requests", b"%ds" % (60 - now % 60)),
            ),
            replayable=True,
            about=caller,
        )


class TwoChoices:
    """Of two targets drawn at random the one with the lower predicted time."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self._legs = [
            Leg(target, shown=((b"x-nearfield-endpoint", b"eu-west/chat/cpu-%d" % n),))
            for n, target in enumerate(targets)
        ]
        self._running = dict.fromkeys(targets, 0)
        self._service_s = dict.fromkeys(targets, 0.001)

    def pick(self, request: Request, grant: Grant, attempts: Sequence[Attempt]) -> Leg:
        legs = self._legs
        one = legs[int(random.random() * len(legs))]
        other = legs[int(random.random() * len(legs))]
        return one if self._score(one.target) <= self._score(other.target) else other

    def _score(self, target: Target) -> float:
        return self._service_s[target] * (1 + self._running[target])

    def began(self, attempt: Attempt) -> None:
        self._running[attempt.leg.target] += 1

    def ended(self, attempt: Attempt) -> None:
        target = attempt.leg.target
        self._running[target] -= 1
        if attempt.first_byte_s is not None:
            took_s = attempt.first_byte_s - attempt.started_s
            self._service_s[target] += 0.05 * (took_s - self._service_s[target])


class Books:
    """Keeps a record of each request and writes them out in batches, with the sampled traces."""

    def __init__(self) -> None:
        self._records: list[tuple[object, ...]] = []
        self._traces: list[tuple[object, ...]] = []
        self.written_bytes = 0
        self._encode = msgspec.json.Encoder().encode

    def done(self, outcome: Outcome) -> None:
        request = outcome.request
        self._records.append(
            (
                request.request_id, request.model, outcome.status, outcome.error,
                len(request.body), outcome.body_bytes, request.started_s, outcome.ended_s,
            )
        )  # fmt: skip
        if request.trace.sampled:
            trace = request.trace
            times = [(a.started_s, a.first_byte_s, a.ended_s) for a in outcome.attempts]
            self._traces.append((trace.trace_id, trace.span_id, trace.parent_id, times))

    def malformed(self, code: str) -> None:
        self._records.append((code,))

    def flush(self) -> None:
        """What a writer thread would be given; here it is rendered, on the same core."""
        records, self._records = self._records, []
        traces, self._traces = self._traces, []
        self.written_bytes += len(self._encode((records, traces)))
        asyncio.get_running_loop().call_later(FLUSH_S, self.flush)


async def serve(port: int, upstream_port: int) -> None:
    targets = [Target("127.0.0.1", upstream_port) for _ in range(2)]
    books = Books()
    proxy = Proxy(Keys(), TwoChoices(targets), Careful(), books, sample_ratio=0.01)
    await Listener(proxy).open([bind("127.0.0.1", port)])
    books.flush()
    print("bench: ready", flush=True)
    gc.freeze()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), int(sys.argv[2])))
