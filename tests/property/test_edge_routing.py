"""Never outside, never to the dead while somebody lives, and the books always balance."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from nearfield.api.keys import Principal
from nearfield.api.load import Targets
from nearfield.core.errors import NearfieldError
from nearfield.edge.decisions import Admission
from nearfield.edge.proxy.ports import Attempt, FailureKind, Grant, Request, Trace
from nearfield.edge.router import Way, WorldRouter, _rename
from nearfield.policy.endpoints import Caller

from tests.unit.test_world import Walk, app, endpoint

JURISDICTIONS = {"eu": "eu", "us": "us", "in": "in"}
FAILURES: list[FailureKind] = [
    "refused", "connect_timeout", "closed", "protocol", "truncated", "abandoned", "deadline",
    "cancelled",
]  # fmt: skip


def request(now_s: float, model: str = "chat", **facts: Any) -> Request:
    path = b"/v1/chat/completions"
    trace = Trace(b"1" * 32, b"2" * 16, b"", False)
    made = Request(
        b"POST", path, path, "openai", {}, b"r", trace, now_s, now_s + 60, model, True, "", b"{}"
    )
    for name, value in facts.items():
        setattr(made, name, value)
    return made


def grant(bound: frozenset[str] | None, **facts: Any) -> Grant:
    principal = Principal("t", None, "k", frozenset({"inference"}), None, bound)
    about = Admission(principal, Caller(bound), kind="generate", tokens=10, **facts)
    return Grant(replayable=True, about=about)


class Gateway(RuleBasedStateMachine):
    """A gateway in eu, with two other regions, and everything that befalls it."""

    @initialize()
    def begin(self) -> None:
        self.walk = Walk()
        self.router = WorldRouter(self.walk.world, draw=lambda: 0.3)
        self.open: list[tuple[Attempt, list[Attempt], Request, Grant]] = []
        self.walk.agent(app(["a", "b"]))
        self.walk.load()
        self.walk.region("us")
        self.walk.region("in")

    # ---- what is heard

    @rule(names=st.lists(st.sampled_from("abcd"), unique=True), age_s=st.sampled_from([0.1, 60.0]))
    def agent(self, names: list[str], age_s: float) -> None:
        self.walk.world.agent_answered(Targets((app(names),), age_s), self.walk.now_s)
        self.walk.world.round()

    @rule()
    def agent_silent(self) -> None:
        self.walk.world.agent_silent("refused", self.walk.now_s)

    @rule(name=st.sampled_from("abcd"), busy=st.integers(0, 30))
    def load(self, name: str, busy: int) -> None:
        self.walk.load(name, running=min(busy, 4), waiting=max(0, busy - 4), room=max(0, 24 - busy))

    @rule(name=st.sampled_from("abcd"))
    def replica_silent(self, name: str) -> None:
        for replica in self.walk.world.replicas():
            if replica.id == name:
                self.walk.world.replica_silent(replica, "refused", self.walk.now_s)

    @rule(name=st.sampled_from(["us", "in"]), busy=st.integers(0, 30), lies=st.booleans())
    def region(self, name: str, busy: int, lies: bool) -> None:
        jurisdiction = "cn" if lies else name
        self.walk.region(name, endpoint(load=busy), jurisdiction=jurisdiction)

    @rule(name=st.sampled_from(["us", "in"]))
    def region_silent(self, name: str) -> None:
        self.walk.world.region_silent(self.walk.world.region(name), "refused", self.walk.now_s)

    @rule(seconds=st.sampled_from([0.1, 1.0, 12.0, 40.0]))
    def wait(self, seconds: float) -> None:
        self.walk.wait(seconds)

    # ---- requests

    @rule(
        bound=st.sampled_from(
            [None, frozenset({"eu"}), frozenset({"us", "in"}), frozenset({"cn"})]
        ),
        from_gateway=st.booleans(),
        trial=st.sampled_from([None, None, b"x", b"y"]),
    )
    def ask(self, bound: frozenset[str] | None, from_gateway: bool, trial: bytes | None) -> None:
        if trial is not None:
            return  # a suspect may wait, which needs a loop: tests/contract/edge
        asked, granted = request(self.walk.now_s), grant(bound, from_gateway=from_gateway)
        self._try(asked, granted, [])

    @rule(
        which=st.integers(0, 1000),
        failure=st.sampled_from([None, *FAILURES]),
        status=st.sampled_from([200, 429, 500, 503]),
        again=st.booleans(),
    )
    def end(self, which: int, failure: FailureKind | None, status: int, again: bool) -> None:
        if not self.open:
            return
        attempt, attempts, asked, granted = self.open.pop(which % len(self.open))
        self._end(attempt, failure, status)
        if again and failure is not None and failure != "cancelled":
            self._try(asked, granted, attempts)

    def _end(self, attempt: Attempt, failure: FailureKind | None, status: int) -> None:
        attempt.failure, attempt.ended_s = failure, self.walk.now_s
        if failure is None:
            attempt.status, attempt.first_byte_s = status, self.walk.now_s
        self.router.ended(attempt)
        self.router.ended(attempt)  # once more does no harm

    def _try(self, asked: Request, granted: Grant, attempts: list[Attempt]) -> None:
        found = self.router.pick(asked, granted, attempts)
        admission: Admission = granted.about
        bound = admission.caller.jurisdictions
        if isinstance(found, NearfieldError):
            self._nobody_could(admission, attempts)
            return
        assert isinstance(found, Way)
        assert bound is None or JURISDICTIONS[found.region] in bound
        assert not admission.from_gateway or found.region == "eu"
        assert found.known.state.health in ("up", "ejected")
        if found.known.state.health == "ejected":
            self._no_other_is_up(found, admission)
        crossings = {a.leg.region for a in attempts if isinstance(a.leg, Way)} | {found.region}
        refused = {a.leg.region for a in attempts if a.failure in ("refused", "connect_timeout")}
        assert len(crossings - refused) <= 2
        attempt = Attempt(found, self.walk.now_s, request=asked, grant=granted)
        attempts.append(attempt)
        self.router.began(attempt)
        self.open.append((attempt, attempts, asked, granted))

    def _no_other_is_up(self, found: Way, admission: Admission) -> None:
        bound = admission.caller.jurisdictions
        for known in self.walk.world.models["chat"]:
            if bound is not None and known.endpoint.jurisdiction not in bound:
                continue
            if admission.from_gateway and known.endpoint.region != "eu":
                continue
            assert known.state.health != "up" or not known.routable

    def _nobody_could(self, admission: Admission, attempts: list[Attempt]) -> None:
        """A first try is refused only where nobody is up, or all are full."""
        if attempts:
            return
        bound = admission.caller.jurisdictions
        for known in self.walk.world.models.get("chat", ()):
            state = known.state
            if bound is not None and known.endpoint.jurisdiction not in bound:
                continue
            if admission.from_gateway and known.endpoint.region != "eu":
                continue
            own = self.walk.world.books.own[known.number]
            room = state.slots + int(0.9 * state.max_queued) - (state.load - state.own)
            full = own >= room or bool(getattr(known, "places", ()))
            assert not known.routable or full

    # ---- always

    @invariant()
    def the_books_balance(self) -> None:
        if not hasattr(self, "walk"):
            return
        world = self.walk.world
        assert min(world.books.own, default=0) >= 0
        assert min(world.running.own, default=0) >= 0
        assert sum(world.books.own) == len(self.open)
        at_replicas = [a for a, *_ in self.open if isinstance(a.leg, Way) and a.leg.replica]
        assert sum(world.running.own) == len(at_replicas)
        assert sum(world.running.work) == 10 * len(at_replicas)

    def teardown(self) -> None:
        if not hasattr(self, "walk"):
            return
        for attempt, *_ in self.open:
            self._end(attempt, "cancelled", 0)
        world = self.walk.world
        assert set(world.books.own) <= {0}
        assert set(world.running.own) <= {0}
        assert set(world.running.work) <= {0.0}


TestGateway = Gateway.TestCase
TestGateway.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)

FIELDS = st.dictionaries(
    st.text(max_size=8), st.one_of(st.integers(), st.text(max_size=8), st.none(), st.booleans())
)


@given(fields=FIELDS)
def test_only_the_model_of_a_body_changes(fields: dict[str, Any]) -> None:
    import msgspec

    walk = Walk()
    walk.agent(app(["a"]))
    body = msgspec.json.encode({**fields, "model": "chat"})
    asked = request(walk.now_s, body=body)
    known = walk.home()
    way = Way(walk.replica("a").target, known=known, peer=walk.replica("a"))
    _rename(way, asked, "small", at_home=True)
    assert way.body is not None
    assert msgspec.json.decode(way.body) == {**fields, "model": "small"}
