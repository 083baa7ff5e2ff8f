"""A gateway's console, and a world that does as it is told, whose decisions are the real policy's.

    python -m tests.support.console --port 8899      # to look at it

Traffic is made up; what decides where it goes, and explains why, is not.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import uvloop
from nearfield.edge.decisions import Tokens
from nearfield.edge.pages_console import Access, Console, Here, LocalAccess
from nearfield.edge.proxy.listener import Listener, bind
from nearfield.edge.proxy.plain import Careful, OpenGate, Remember, Spread
from nearfield.edge.proxy.ports import FailureKind
from nearfield.edge.proxy.proxy import Proxy
from nearfield.edge.recent import Entry, Recent, Tried
from nearfield.edge.status import EndpointStatus, RegionStatus
from nearfield.policy.endpoints import Ask, Caller, Endpoint, EndpointState, Health, Refusal
from nearfield.policy.explain import Explanation, explain, summary
from nearfield.policy.health import Transition
from nearfield.policy.route import Pick, pick, plan

from tests.support.regions import Table

T = TypeVar("T")


@dataclass
class Place:
    """A region of the made-up world. `rtt_s` from the gateway."""

    name: str
    jurisdiction: str
    city: str
    latitude: float
    longitude: float
    rtt_s: float
    health: Health = "up"
    reason: str = "its first probe passed"
    weight: float = 1.0
    draining: bool = False
    since_s: float = field(default_factory=time.monotonic)


PLACES = (
    Place("eu-west", "eu", "Dublin", 53.33, -6.25, 0.0004),
    Place("eu-central", "eu", "Frankfurt", 50.11, 8.68, 0.0236),
    Place("us-east", "us", "Ashburn", 39.04, -77.49, 0.0792),
    Place("us-west", "us", "Hillsboro", 45.52, -122.99, 0.1394),
    Place("sa-east", "br", "São Paulo", -23.55, -46.63, 0.1832),
    Place("asia-south", "in", "Mumbai", 19.08, 72.88, 0.1207),
    Place("asia-northeast", "jp", "Tokyo", 35.68, 139.69, 0.2176),
)
HERE = Here("eu-west", "eu-west", "eu", "0.1.0", "Dublin", 53.33, -6.25)
REFUSED = {"status": 429, "error": "queue_full", "tries": (), "region": "", "endpoint": ""}


@dataclass
class Offer:
    """An endpoint of that world."""

    endpoint: Endpoint
    kind: str = "generate"
    replicas: int = 2
    slots: int = 16
    max_queued: int = 64
    load: int = 0
    first_byte_s: float = 0.03
    hold_s: float = 0.8
    cold_start_s: float | None = None
    queue_age_s: float = 0.0
    scaling: str = ""


def offer(region: str, model: str, pool: str = "default", version: str = "1", **how: Any) -> Offer:
    jurisdiction = next((p.jurisdiction for p in PLACES if p.name == region), "eu")
    of = {n: how.pop(n) for n in ("products", "current", "unit_usd", "handicap_s") if n in how}
    return Offer(Endpoint(region, model, version, pool, jurisdiction, **of), **how)


def offers() -> list[Offer]:
    return [
        offer("eu-west", "chat", "l4", replicas=3, slots=48, load=31, unit_usd=0.42),
        offer("eu-west", "chat", "spot", replicas=2, slots=32, load=7, unit_usd=0.16,
              handicap_s=0.005, first_byte_s=0.041),
        offer("eu-central", "chat", "l4", replicas=2, slots=32, load=9, unit_usd=0.44),
        offer("us-east", "chat", "l4", replicas=4, slots=64, load=22, unit_usd=0.36),
        offer("us-west", "chat", "l4", replicas=1, slots=16, load=3, unit_usd=0.36),
        offer("asia-south", "chat", "l4", replicas=2, slots=32, load=18, unit_usd=0.31),
        offer("asia-northeast", "chat", "l4", replicas=0, slots=0, cold_start_s=1.9, unit_usd=0.51),
        offer("eu-west", "chat", "l4", "2-rc1", replicas=1, slots=16, load=1, current=False,
              unit_usd=0.42),
        offer("eu-west", "embed", kind="embed", replicas=2, slots=64, load=12, first_byte_s=0.011,
              unit_usd=0.02, hold_s=0.011),
        offer("us-east", "embed", kind="embed", replicas=2, slots=64, load=5, first_byte_s=0.011,
              unit_usd=0.02, hold_s=0.011),
        offer("eu-west", "rerank", "search", kind="tensor", replicas=1, slots=8, load=2,
              first_byte_s=0.006, hold_s=0.006, products=frozenset({"search"}), unit_usd=0.05),
        offer("sa-east", "chat", "l4", replicas=1, slots=16, load=4, unit_usd=0.58),
    ]  # fmt: skip


class Stage:
    """The world: a `StateSource` whose parts may be changed."""

    def __init__(self, places: tuple[Place, ...] = PLACES, has: list[Offer] | None = None) -> None:
        self.places = {place.name: replace(place) for place in places}
        self.offers = offers() if has is None else has
        self.changes: deque[Transition] = deque(maxlen=256)
        self.recent = Recent()
        self.broken = False
        self._random = random.Random(7)
        self._count = 0

    # ---- StateSource ------------------------------------------------------------------------

    @property
    def regions(self) -> list[RegionStatus]:
        if self.broken:
            raise RuntimeError("the world cannot be read")
        return [self._region(place) for place in self.places.values()]

    def explain(self, model: str) -> tuple[Explanation, Pick | Refusal]:
        explanation, decision, _ = self.decide(model)
        return explanation, decision

    # ---- changing it ------------------------------------------------------------------------

    def change(self, region: str, health: Health, reason: str) -> None:
        place = self.places[region]
        now_s = time.monotonic()
        self.changes.append(Transition(region, place.health, health, reason, now_s))
        place.health, place.reason, place.since_s = health, reason, now_s

    def offered(self, name: str) -> Offer:
        return next(each for each in self.offers if each.endpoint.name == name)

    # ---- deciding ---------------------------------------------------------------------------

    def decide(
        self, model: str, caller: Caller | None = None, failed: frozenset[str] = frozenset()
    ) -> tuple[Explanation, Pick | Refusal, str]:
        states = [
            self._state(i, each)
            for i, each in enumerate(self.offers)
            if each.endpoint.model == model and each.endpoint.region not in failed
        ]
        own = [0] * len(self.offers)
        made = plan(states, Ask(model), caller or Caller(), now_s=0.0)
        decision = pick(made, own, self._random.random())
        words = summary(decision) if isinstance(decision, Pick) else decision.message
        return explain(made, decision, own), decision, words

    def request(self, model: str = "chat", /, **fields: Any) -> Entry:
        """One that has just ended, as the real policy would have sent it.

        Keywords override the entry's; `fails`: how many tries fail first; `failure`: how.
        """
        fails, failure = fields.pop("fails", 0), fields.pop("failure", "closed")
        caller = fields.pop("caller", None)
        ended_s = time.monotonic()
        self._count += 1
        draw = self._random
        tried: list[Tried] = []
        avoided: frozenset[str] = frozenset()
        spent_s = 0.0003 + draw.random() * 0.0004
        for number in range(fails + 1):
            explanation, decision, words = self.decide(model, caller, avoided)
            if not isinstance(decision, Pick):
                break
            endpoint = decision.candidate.state.endpoint
            first_s = decision.predicted_s * draw.uniform(0.8, 1.5)
            whole_s = first_s + (0 if model != "chat" else draw.uniform(0.2, 1.4))
            lost = number < fails
            tried.append(
                Tried(
                    endpoint.name, endpoint.region,
                    f"{endpoint.model}#{draw.randrange(16**5):05x}", str(decision.why), words,
                    decision.predicted_s, spent_s, None if lost else spent_s + first_s,
                    spent_s + (first_s * 0.6 if lost else whole_s), 0 if lost else 200,
                    failure if lost else None, _told(explanation),
                )
            )  # fmt: skip
            if lost:
                avoided |= {endpoint.region}
            spent_s = tried[-1].ended_s + 0.0006
        return self._entry(model, tried, ended_s, fields)

    def _entry(
        self, model: str, tried: list[Tried], ended_s: float, fields: dict[str, Any]
    ) -> Entry:
        last = tried[-1] if tried else None
        answered = last is not None and last.failure is None
        duration_s = last.ended_s + 0.0002 if last is not None else 0.0004
        began_s = ended_s - duration_s
        shifted = tuple(
            replace(
                each,
                started_s=each.started_s + began_s,
                first_byte_s=None if each.first_byte_s is None else each.first_byte_s + began_s,
                ended_s=each.ended_s + began_s,
            )
            for each in tried
        )
        first = shifted[-1].first_byte_s if answered else ended_s
        draw = self._random
        made: dict[str, Any] = {
            "request_id": f"req-{draw.getrandbits(96):024x}",
            "trace_id": f"{draw.getrandbits(128):032x}",
            "span_id": f"{draw.getrandbits(64):016x}",
            "parent_id": "",
            "sampled": False,
            "at_s": time.time() - duration_s,
            "started_s": began_s,
            "first_byte_s": first,
            "ended_s": ended_s,
            "method": "POST",
            "operation": {"embed": "embeddings", "rerank": "infer"}.get(model, "chat"),
            "stream": model == "chat",
            "tenant": draw.choice(("acme", "acme", "globex", "initech")),
            "product": None,
            "key_id": "k5h2qzj7mxwa",
            "from_gateway": draw.random() < 0.05,
            "criticality": 1,
            "model": model,
            "version": last.endpoint.partition("@")[2].partition("/")[0] if last else "",
            "region": last.region if last else "",
            "endpoint": last.endpoint if last else "",
            "status": 200 if answered else 502,
            "error": None if answered else "upstream_failed",
            "body_bytes": draw.randrange(200, 4000),
            "answer_bytes": draw.randrange(800, 20000),
            "used": Tokens(draw.randrange(40, 900), 0, draw.randrange(20, 400)),
            "tries": shifted,
        }
        entry = Entry(**{**made, **fields})
        self.recent.add(entry)
        return entry

    # ---- its parts --------------------------------------------------------------------------

    def _state(self, number: int, each: Offer) -> EndpointState:
        place = self.places[each.endpoint.region]
        return EndpointState(
            each.endpoint, number, place.rtt_s, health=place.health, weight=place.weight,
            draining=place.draining, replicas=each.replicas, slots=each.slots,
            max_queued=each.max_queued, load=each.load, first_byte_s=each.first_byte_s,
            hold_s=each.hold_s, queue_age_s=each.queue_age_s, cold_start_s=each.cold_start_s,
        )  # fmt: skip

    def _region(self, place: Place) -> RegionStatus:
        has = [each for each in self.offers if each.endpoint.region == place.name]
        home = place.name == "eu-west"
        return RegionStatus(
            place.name, place.jurisdiction, place.city, place.latitude, place.longitude, home,
            place.health, place.reason, time.monotonic() - place.since_s, place.weight,
            None if home or place.health == "unknown" else place.rtt_s, 0.4, place.draining,
            sum(each.load for each in has) // 3,
            tuple(self._endpoint(place, each) for each in has),
        )  # fmt: skip

    def _endpoint(self, place: Place, each: Offer) -> EndpointStatus:
        of = each.endpoint
        return EndpointStatus(
            of.name, of.model, of.version, of.pool, each.kind,
            None if of.products is None else sorted(of.products), of.current, of.unit_usd,
            of.handicap_s, (), place.health, place.weight, place.draining, each.replicas,
            each.slots, each.max_queued, each.load, each.load // 3, each.first_byte_s,
            each.hold_s, each.queue_age_s, each.cold_start_s,
            each.scaling, (),
        )  # fmt: skip


def _told(explanation: Explanation) -> Callable[[], Explanation]:
    return lambda: explanation


class Gateway:
    """A gateway process's console, on a loop of its own: a thread's. For tests that block."""

    def __init__(
        self,
        stage: Stage | None = None,
        access: Access | None = None,
        here: Here = HERE,
        port: int = 0,
    ) -> None:
        self.stage = stage or Stage()
        self.access = access or LocalAccess()
        self.here = here
        self.port = port
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._listener: Listener | None = None
        self.console: Console | None = None
        self._traffic: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        return f"http://localhost:{self.port}"

    def __enter__(self) -> Gateway:
        self._thread.start()
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.shut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def open(self) -> None:
        """Begin to answer, on the same port as before if there was one."""
        self._wait(self._open())

    def shut(self) -> None:
        """Answer nothing any more."""
        self._wait(self._shut())

    def do(self, work: Callable[[], T]) -> T:
        """Do something on the loop's thread."""

        async def there() -> T:
            return work()

        return self._wait(there())

    def change(self, region: str, health: Health, reason: str) -> None:
        """A region's health."""
        self.do(lambda: self.stage.change(region, health, reason))

    def traffic(self, rps: float, models: tuple[str, ...] = ("chat", "chat", "embed")) -> None:
        """So many requests a second from now on, one in forty with trouble."""

        def begin() -> None:
            if self._traffic is not None:
                self._traffic.cancel()
            self._traffic = self._loop.create_task(self._flow(rps, models)) if rps else None

        self.do(begin)

    async def _flow(self, rps: float, models: tuple[str, ...]) -> None:
        draw = random.Random(3)
        step_s = 0.05
        due = 0.0
        while True:
            due += rps * step_s
            while due >= 1:
                due -= 1
                trouble = draw.random()
                if trouble < 0.02:
                    failure: FailureKind = draw.choice(("closed", "refused", "status"))
                    self.stage.request("chat", fails=1, failure=failure)
                elif trouble < 0.025:
                    self.stage.request("chat", **REFUSED)
                else:
                    # Callers elsewhere: each bound to its own part of the world.
                    near = draw.choices((None, "us", "in", "jp", "br"), (8, 5, 2, 1, 1))[0]
                    bound = None if near is None else Caller(frozenset({near}))
                    model = draw.choice(models)
                    if bound is not None and model == "embed":
                        bound = None
                    self.stage.request(model, caller=bound)
            for each in self.stage.offers:
                if each.slots and draw.random() < 0.1:
                    load = each.load + draw.choice((-2, -1, 0, 1, 2))
                    each.load = max(0, min(each.slots + 6, load))
            await asyncio.sleep(step_s)

    async def _open(self) -> None:
        self.console = Console(self.here, self.stage, self.stage.recent, self.access)
        await self.console.__aenter__()
        pages = Table(self.console.routes())
        proxy = Proxy(OpenGate(), Spread([]), Careful(), Remember(), pages=pages)
        self._listener = Listener(proxy)
        listening = bind("127.0.0.1", self.port)
        self.port = listening.getsockname()[1]
        await self._listener.open([listening])

    async def _shut(self) -> None:
        if self._traffic is not None:
            self._traffic.cancel()
            self._traffic = None
        console, self.console = self.console, None
        if console is not None and self._listener is not None:
            console.close()
            await self._listener.drain(0.0)
            await console.__aexit__()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        future: Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result(20.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8899)
    parser.add_argument("--rps", type=float, default=140.0)
    given = parser.parse_args()
    with Gateway(port=given.port) as gateway:
        gateway.traffic(given.rps)
        print(f"{gateway.url}/console; Ctrl-C ends it", flush=True)
        with suppress(KeyboardInterrupt):
            for region in itertools.cycle(gateway.stage.places):
                time.sleep(20)
                gateway.change(region, "down", "2 probes failed: no answer in time")
                time.sleep(10)
                gateway.change(region, "up", "3 probes passed")


if __name__ == "__main__":
    main()
