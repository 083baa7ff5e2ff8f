"""Whatever happens to requests, every reservation is settled, every claim ended, every try taken
away again: nothing leaks, nothing goes below zero."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from nearfield.core.errors import Unavailable
from nearfield.edge.decisions import Admission
from nearfield.edge.gate import KeyGate
from nearfield.edge.idempotency import KeyedRequests
from nearfield.edge.limiter import LimitedRouter
from nearfield.edge.proxy.exchange import Exchange
from nearfield.edge.proxy.plain import Remember
from nearfield.edge.proxy.ports import Answer, Attempt, Fields, Grant, Leg, Request, Target
from nearfield.edge.proxy.proxy import Proxy
from nearfield.edge.retries import BudgetRetries
from nearfield.edge.suspects import Suspects
from nearfield.policy.limit import Limit
from nearfield.policy.quota import Limits
from nearfield.store.shares import ShareKeeper

from tests.support.gates import key_of, leg_of, request_of, table_of
from tests.support.stores import MemoryIdempotency, MemoryQuotas

LIMITS = Limits(requests_per_minute=10_000, tokens_per_minute=20_000, concurrent_streams=6)
TARGETS = [Target("h", port) for port in range(3)]
JSON = [(b"content-type", b"application/json")]
EVENTS = [(b"content-type", b"text/event-stream")]
USAGE = b'{"usage":{"prompt_tokens":5,"completion_tokens":6}}'
ACTS = (
    "answer", "stream", "refused", "closed", "late", "503", "429", "500", "crash", "400", "hang",
    "truncated", "abandoned", "raises",
)  # fmt: skip


@dataclass(frozen=True)
class Script:
    """One request: what each try meets, and what its client does."""

    acts: tuple[str, ...]
    leaves: str
    key: int | None
    stream: bool
    criticality: bytes
    hedge: bool
    body: int


SCRIPTS = st.builds(
    Script,
    st.lists(st.sampled_from(ACTS), min_size=1, max_size=4).map(tuple),
    st.sampled_from(("never", "never", "never", "at once", "soon", "later")),
    st.sampled_from((None, None, 0, 1)),
    st.booleans(),
    st.sampled_from((b"critical", b"default", b"sheddable")),
    st.booleans(),
    st.integers(0, 2),
)

CRASHED = [(b"x-nearfield-error-code", b"engine_crashed")]


class Wire:
    """An upstream connection that does as the request's script says."""

    def __init__(self, stage: Stage, act: str) -> None:
        self.stage = stage
        self.act = act
        self.receiver: Any = None

    def send(self, receiver: Any, head: bytes, body: bytes, *, bodiless: bool) -> None:
        self.receiver = receiver
        later = asyncio.get_running_loop().call_later
        if self.act == "late":
            later(0.01, self.go)
        else:
            later(0.0, self.go)

    def go(self) -> None:
        receiver, act = self.receiver, self.act
        if receiver is None or act == "hang":
            return
        if act == "closed":
            self.lose("closed")
        elif act == "abandoned":
            for exchange in tuple(self.stage.proxy.live):
                exchange.abandon(receiver.leg.target)
        elif act in ("stream", "truncated"):
            receiver.on_head(200, [*EVENTS], None)
            receiver.on_data(b'data: {"x":1}\n\n' * 3)
            if act == "truncated":
                self.lose("truncated")
            else:
                self.end(b"data: [DONE]\n\n")
        else:
            status = int(act) if act.isdigit() else 500 if act == "crash" else 200
            receiver.on_head(status, [*JSON, *(CRASHED if act == "crash" else ())], None)
            self.end(b"{}" if act == "crash" else USAGE)

    def end(self, data: bytes) -> None:
        receiver = self.receiver
        if receiver is not None:
            receiver.on_data(data)
        receiver, self.receiver = self.receiver, None
        if receiver is not None:
            receiver.on_end()

    def lose(self, kind: str) -> None:
        receiver, self.receiver = self.receiver, None
        if receiver is not None:
            receiver.on_lost(kind)

    def drop(self) -> None:
        self.receiver = None

    def discard(self) -> None:
        self.receiver = None

    def pause(self) -> None: ...
    def resume(self) -> None: ...


class Pool:
    """Connections to one target."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def take(self) -> Wire | None:
        act = self.stage.next_act()
        return None if act == "refused" else Wire(self.stage, act)

    def connect(self, receiver: Any) -> None:
        return None

    def close_idle(self) -> None: ...


class Pools:
    open = idle = 0

    def __init__(self, stage: Stage) -> None:
        self._pool = Pool(stage)

    def of(self, target: Target) -> Pool:
        return self._pool

    def close(self) -> None: ...


class Anywhere:
    """Routes to what was not tried, in turn; sometimes it has to be waited for, or fails."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.running = 0
        self.turn = 0

    def pick(self, request: Request, grant: Grant, attempts: Sequence[Attempt]) -> Any:
        self.turn += 1
        tried = {attempt.leg.target for attempt in attempts}
        left = [target for target in TARGETS if target not in tried]
        if not left:
            return Unavailable("nobody", retry_after_s=1.0)
        leg = leg_of(left[self.turn % len(left)])
        self.stage.script = self.stage.scripts[request.request_id]
        if self.turn % 5 == 0:
            future: asyncio.Future[Leg] = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_later(
                0.002, lambda: future.done() or future.set_result(leg)
            )
            return future
        return leg

    def began(self, attempt: Attempt) -> None:
        self.running += 1
        assert attempt.request is not None
        self.stage.script = self.stage.scripts[attempt.request.request_id]
        if self.stage.script.acts[0] == "raises":
            raise RuntimeError("a mistake in the router")

    def ended(self, attempt: Attempt) -> None:
        self.running -= 1


class Caller:
    """A client: `over` once."""

    def __init__(self) -> None:
        self.overs = 0
        self.status = 0

    def begin(self, status: int, fields: Fields, length: int | None) -> None:
        self.status = status

    def write(self, data: bytes) -> None: ...
    def end(self) -> None: ...
    def abort(self) -> None: ...

    def answer(self, answer: Answer) -> None:
        self.status = answer.status

    def over(self) -> None:
        self.overs += 1


class Stage:
    """A gateway without sockets."""

    def __init__(self, scripts: list[Script], flaky: bool) -> None:
        self.flaky = flaky
        self.scripts = {b"req-%d" % n: script for n, script in enumerate(scripts)}
        self.acted: dict[int, int] = {}
        self.script = scripts[0]

    def next_act(self) -> str:
        script = self.script
        count = self.acted.get(id(script), 0)
        self.acted[id(script)] = count + 1
        return script.acts[count % len(script.acts)]

    async def run(self) -> None:
        key, authorization = key_of(limits=LIMITS, product="web")
        quotas, kept = MemoryQuotas(LIMITS), MemoryIdempotency()
        suspects = Suspects()
        retries = BudgetRetries(suspects)
        router = Anywhere(self)
        limited = LimitedRouter(router, retries, limit=Limit(value=8, most=8))
        async with (
            ShareKeeper(quotas, renew_s=0.05) as shares,
            KeyedRequests(kept, owner="test", lease_s=1.0) as keyed,
        ):
            gate = KeyGate(suspects, table=table_of(key), shares=shares, keyed=keyed)
            recorder = Remember()
            self.proxy = proxy = Proxy(gate, limited, retries, recorder)
            proxy.pools = Pools(self)  # type: ignore[assignment]
            if self.flaky:
                quotas.gone = kept.gone = True
                asyncio.get_running_loop().call_later(0.03, self.mend, quotas, kept)
            callers = [self.start(proxy, name, authorization) for name in self.scripts]
            await until(lambda: len(recorder.outcomes) == len(self.scripts))
            await until(lambda: not keyed.unbalanced)
            assert not proxy.live
            assert router.running == 0
            assert limited.unbalanced == 0
            for share in shares._shares.values():
                assert share.reserved == 0, share.dimension
                assert share.spent >= 0
            for caller, outcome in callers:
                assert caller.overs <= 1
                assert outcome.ended_s > 0
                assert all(attempt.ended_s is not None for attempt in outcome.attempts)
                admission = None if outcome.grant is None else outcome.grant.about
                assert admission is None or isinstance(admission, Admission)
            proxy.close()

    def mend(self, *stores: Any) -> None:
        for store in stores:
            store.gone = False

    def start(self, proxy: Proxy, name: bytes, authorization: bytes) -> tuple[Caller, Any]:
        script = self.scripts[name]
        headers = {
            b"authorization": authorization,
            b"x-nearfield-criticality": script.criticality,
        }
        if script.key is not None:
            headers[b"idempotency-key"] = b"key-%d" % script.key
        if script.hedge:
            headers[b"x-nearfield-hedge"] = b"1"
        request = request_of(
            {"model": "chat", "body": script.body},
            path=b"/v1/embeddings" if script.hedge else b"/v1/chat/completions",
            headers=headers,
            timeout_s=0.08,
            stream=script.stream,
            max_tokens=10,
        )
        request.request_id = name
        caller = Caller()
        exchange = Exchange(proxy, caller, request)
        assert proxy.enter(request) is None
        exchange.start()
        loop = asyncio.get_running_loop()
        if script.leaves == "at once":
            exchange.client_left()
        elif script.leaves != "never":
            loop.call_later(0.0 if script.leaves == "soon" else 0.005, exchange.client_left)
        return caller, exchange.outcome


async def until(condition: Any) -> None:
    deadline_s = time.monotonic() + 5.0
    while not condition():
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.002)


@settings(max_examples=100, deadline=None)
@given(st.lists(SCRIPTS, min_size=1, max_size=12), st.booleans())
def test_the_books_balance(scripts: list[Script], flaky: bool) -> None:
    asyncio.run(Stage(scripts, flaky).run())
