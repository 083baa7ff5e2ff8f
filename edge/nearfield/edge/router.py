"""The Router: where each request goes, by the policy and by what is known; and what runs where.

    pick    a plan from memory, the endpoint by `policy.route`, at home the replica by `policy.rank`
    began, ended   every try is counted once and taken away once, whatever happened to it

A request that a gateway has sent here is served at home or not at all: it never goes on to a third
region. A try that failed is followed by one elsewhere: another replica, then another endpoint, and
once in its life another region; last, again a region that failed it, for another of its replicas.
"""

from __future__ import annotations

import asyncio
import math
import random
import re
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b

import msgspec
from nearfield.api.keys import Principal
from nearfield.core.errors import (
    BadRequest,
    NearfieldError,
    NotFound,
    RateLimited,
    Unavailable,
)
from nearfield.edge.affinity import NOBODY, Affinity, Found, Keys
from nearfield.edge.beliefs import Peer
from nearfield.edge.decisions import (
    AVOID,
    FROM,
    SUSPECT,
    TRIAL,
    VERSION,
    Admission,
    Routed,
    crossed,
    replica_gone,
    said_replica_lost,
)
from nearfield.edge.home import WAY_S, HomeEndpoint, Replica
from nearfield.edge.known import Known
from nearfield.edge.proxy.ports import (
    Answer,
    Attempt,
    Fields,
    Grant,
    Request,
    Soon,
    Target,
)
from nearfield.edge.world import World
from nearfield.policy.endpoints import Ask, Caller, Refusal
from nearfield.policy.explain import explain, summary
from nearfield.policy.health import is_fault
from nearfield.policy.quarantine import Fate, departure
from nearfield.policy.rank import Place, choose
from nearfield.policy.retry import MOST_CROSSINGS
from nearfield.policy.route import Pick, Plan, alternatives, pick

MOST_PLANS = 4096
"""Plans kept: models times classes of callers. Beyond it all are made anew."""
LEAST_COLD_S = 0.3
"""A start that took less was none: somebody else's request had begun it."""
RETRY_S = 1.0
"""When to come back where nothing better is known."""
SETTLED_S = 0.05
"""A region whose processes die one after another still answers so long after the first."""

ANYBODY = Admission(Principal("", None, "", frozenset({"inference"}), None, None), Caller())
"""Whoever was let in by a Gate that says nothing about it."""


@dataclass(slots=True, eq=False)
class Way(Routed):
    """A leg, with what it is counted by.

    Attributes:
        known: the endpoint. peer: who is asked: a replica, a region, or home's ingress.
        tokens: of its work. expected_s: to its first byte, as it was asked for.
        cold: nothing ran when it was sent. counted: it has begun and not ended.
        suspect: the fingerprint of its body, on trial there. reserved: that is counted.
        alone: no other suspect may begin there yet.
    """

    known: Known = field(kw_only=True)
    peer: Peer = field(kw_only=True)
    tokens: int = 1
    expected_s: float = 0.0
    cold: bool = False
    counted: bool = False
    suspect: bytes | None = None
    reserved: bool = False
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Prospect:
    """Where a request would go next.

    Attributes:
        crosses: to another region than its first. needs_s: predicted time to the first byte.
        wait_s: the part of it that is spent in a queue.
    """

    region: str
    crosses: bool
    needs_s: float
    wait_s: float


@dataclass(slots=True)
class _Planned:
    """A plan of one generation of the world.

    Attributes:
        caches: an engine there keeps its KV cache. reasons: lines that came before.
    """

    generation: int
    plan: Plan
    caches: bool
    reasons: dict[tuple[int, str], tuple[str, tuple[bytes, bytes]]] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Case:
    """One request, as far as choosing for it goes."""

    request: Request
    admission: Admission
    attempts: Sequence[Attempt]
    home_only: bool
    now_s: float
    keys: Keys = field(default_factory=list)
    found: Found = NOBODY


@dataclass(slots=True, eq=False)
class _Waiting:
    """A suspect that waits for a replica of its own, or to hear whether its region is lost."""

    case: _Case
    future: asyncio.Future[Way | Answer | NearfieldError]


class WorldRouter:
    """Routes by a `World`. One event loop's property."""

    def __init__(
        self,
        world: World,
        *,
        draw: Callable[[], float] = random.random,
        affinity: Affinity | None = None,
    ) -> None:
        """
        Args:
            draw: uniform in [0, 1).
        """
        self.world = world
        self._draw = draw
        self._affinity = Affinity(world.clock) if affinity is None else affinity
        self._plans: dict[object, _Planned] = {}
        self._own = world.books.own
        self._running = world.running
        self._here = world.site.home or ""
        name = world.site.gateway.encode("ascii")
        self._from: Fields = ((FROM, name),)
        self._trying: set[bytes] = set()
        self._waiting: deque[_Waiting] = deque()
        world.refreshed = self._wake

    # ---- the port ---------------------------------------------------------------------------

    def pick(
        self, request: Request, grant: Grant, attempts: Sequence[Attempt]
    ) -> Soon[Way | Answer]:
        """The best target now. A suspect on trial may have to wait for one."""
        model = request.model
        if model is None:
            return _no_model(request)
        about = grant.about
        admission = about if type(about) is Admission else ANYBODY
        home_only = admission.from_gateway or FROM in request.headers
        planned = self._planned(model, admission, home_only)
        if not isinstance(planned, _Planned):
            return planned
        case = _Case(request, admission, attempts, home_only, self.world.clock())
        suspect = _suspect(case)
        if suspect is not None:
            return self._try_alone(planned, case, suspect)
        if attempts:
            return self._again(planned, case)
        return self._first(planned, case)

    def began(self, attempt: Attempt) -> None:
        """A try starts."""
        way = attempt.leg
        if not isinstance(way, Way):
            return
        way.counted = True
        self._own[way.known.number] += 1
        way.known.answers.used_s = attempt.started_s
        peer = way.peer
        peer.running[attempt] = attempt.started_s + way.expected_s
        if isinstance(peer, Replica):
            peer.used_s = attempt.started_s
            self._running.own[peer.number] += 1
            self._running.work[peer.number] += way.tokens
        if way.suspect is not None:
            if not way.reserved:
                self._reserve(way)
            self._limit_trial(way, attempt)

    def ended(self, attempt: Attempt) -> None:
        """It is over."""
        way = attempt.leg
        if not isinstance(way, Way) or not way.counted:
            return
        way.counted = False
        known, peer = way.known, way.peer
        self._own[known.number] -= 1
        peer.running.pop(attempt, None)
        heard_s = attempt.heard_s
        if heard_s is not None and (peer.heard_s is None or heard_s > peer.heard_s):
            peer.heard_s = heard_s
        if isinstance(peer, Replica):
            self._running.own[peer.number] -= 1
            self._running.work[peer.number] -= way.tokens
        if way.cold and isinstance(known, HomeEndpoint):
            _learn_cold_start(known, attempt)
        self.world.ended(known, peer, attempt, way.expected_s)
        if way.reserved:
            self._release(way)
            self._wake()

    # ---- for Retries and whoever asks -------------------------------------------------------

    def prospect(
        self, request: Request, grant: Grant, attempts: Sequence[Attempt]
    ) -> Prospect | None:
        """Where the request would go if it were tried once more now; None: nowhere."""
        about = grant.about
        admission = about if type(about) is Admission else ANYBODY
        home_only = admission.from_gateway or FROM in request.headers
        if request.model is None:
            return None
        planned = self._planned(request.model, admission, home_only)
        if not isinstance(planned, _Planned):
            return None
        case = _Case(request, admission, attempts, home_only, self.world.clock())
        first = _first_region(attempts)
        tried = {attempt.leg.target for attempt in attempts}
        for found in self._elsewhere(planned.plan, case):
            if not self._untried(found, tried):
                continue
            region = found.candidate.state.endpoint.region
            crosses = first is not None and region != first
            return Prospect(region, crosses, found.predicted_s, found.wait_s)
        return None

    def _untried(self, found: Pick, tried: Collection[Target]) -> bool:
        """Whether there is anybody at that endpoint who has not had the request."""
        known = self.world.known(found.candidate.state.number)
        if not isinstance(known, HomeEndpoint):
            return known.target not in tried
        if not known.places:
            return known.ingress.target not in tried
        return any(replica.target not in tried for replica in known.by_number.values())

    # ---- choosing ---------------------------------------------------------------------------

    def _planned(
        self, model: str, admission: Admission, home_only: bool
    ) -> _Planned | NearfieldError:
        world = self.world
        version = admission.version
        models = None if home_only else admission.principal.models
        key = (model, version, admission.caller, home_only, models)
        planned = self._plans.get(key)
        if planned is not None and planned.generation == world.generation:
            return planned
        if not world.has(model):
            return self._unknown(model, home_only)
        made = world.plan(
            Ask(model, version),
            admission.caller,
            home_only=home_only,
            models=models,
            previous=None if planned is None else planned.plan,
        )
        caches = any(row.candidate.state.prefill_token_s > 0 for row in made.rows)
        planned = _Planned(world.generation, made, caches)
        if version is None or world.serves(model, version):  # else anybody could fill the memory
            if len(self._plans) >= MOST_PLANS:
                self._plans.clear()
            self._plans[key] = planned
        return planned

    def _unknown(self, model: str, home_only: bool) -> NearfieldError:
        if home_only:
            return _not_here(model)
        if self.world.complete:
            return NotFound(
                f"The model {model!r} does not exist.", param="model", code="model_not_found"
            )
        return Unavailable(
            f"The model {model!r} is not known here, and not every region has been heard yet.",
            code="no_healthy_region",
            retry_after_s=RETRY_S,
        )

    def _first(self, planned: _Planned, case: _Case) -> Way | NearfieldError:
        admission, request = case.admission, case.request
        found = self._remember(planned, case)
        session = admission.session
        decision = pick(
            planned.plan,
            self._own,
            self._draw() if session is None else _same_draw(session),
            criticality=admission.criticality,
            allowed_s=request.deadline_s - case.now_s,
            session=found.endpoint,
            cached_tokens=found.tokens,
        )
        if isinstance(decision, Refusal):
            return self._refused(decision, case)
        way = self._way(planned, decision, case, ())
        return self._spill(planned, decision, case) if way is None else way

    def _remember(self, planned: _Planned, case: _Case) -> Found:
        """Who has seen the beginning of the prompt, where that saves anything."""
        admission = case.admission
        if planned.caches and admission.kind == "generate":
            case.keys = self._affinity.keys(
                admission.principal.tenant,
                admission.session,
                admission.prompt_tokens,
                case.request.body,
            )
            if case.keys:
                case.found = self._affinity.find(case.keys)
        return case.found

    def _spill(self, planned: _Planned, full: Pick, case: _Case) -> Way | NearfieldError:
        """No replica of the best endpoint has room, although there is some over all of them."""
        for found in self._elsewhere(planned.plan, case):
            if found.candidate is not full.candidate:
                way = self._way(planned, found, case, ())
                if way is not None:
                    return way
        return RateLimited(
            f"The model {case.request.model!r} is busy everywhere. Send the request again later.",
            retry_after_s=max(RETRY_S, full.candidate.state.turn_s),
        )

    def _refused(self, refusal: Refusal, case: _Case) -> NearfieldError:
        if case.home_only and refusal.filter in ("model", "version", "pool"):
            # Another gateway believed so a moment ago: it may still find it elsewhere.
            return _not_here(case.request.model or "")
        return refusal.error(self._draw())

    def _again(
        self, planned: _Planned, case: _Case
    ) -> Way | NearfieldError | asyncio.Future[Way | Answer | NearfieldError]:
        """A try has failed, or another one is wanted beside it."""
        self._remember(planned, case)
        if case.admission.accused and _confined(case) is not None and _over(case):
            return self._stranded_or_not(planned, case) or self._wait(case)
        return self._another(planned, case) or self._give_up(planned, case)

    def _another(self, planned: _Planned, case: _Case) -> Way | None:
        """Somebody who has not had it, or whose region may have it again."""
        tried = {attempt.leg.target for attempt in case.attempts}
        for found in self._elsewhere(planned.plan, case):
            way = self._way(planned, found, case, tried)
            if way is not None:
                return way
        return None

    def _give_up(self, planned: _Planned, case: _Case) -> Way | NearfieldError:
        if _over(case):
            lost = self._is_lost(_first_region(case.attempts))
            if case.admission.accused and case.home_only and not lost:
                return replica_gone(suspect=True)
            way = self._last_resort(planned, case, {a.leg.target for a in case.attempts})
            if way is not None:
                return way
        refusal = planned.plan.refusal
        if refusal is not None:
            return self._refused(refusal, case)
        return Unavailable(
            f"Nobody else can answer for the model {case.request.model!r} now. Send the request "
            "again later.",
            code="no_healthy_region",
            retry_after_s=RETRY_S,
        )

    def _elsewhere(self, plan: Plan, case: _Case) -> Iterator[Pick]:
        """Where a request may go besides its tries so far, the best first."""
        first = _first_region(case.attempts)
        beyond, exhausted = set(), set()
        for attempt in case.attempts:
            leg = attempt.leg
            if isinstance(leg, Routed):
                if crossed(attempt, first):
                    beyond.add(leg.region)
                if leg.region != self._here:
                    exhausted.add(leg.region)
        own, confined = self._own, _confined(case)
        repeated: list[Pick] = []
        for candidate in alternatives(plan, own, tried=()):
            state = candidate.state
            region = state.endpoint.region
            if beyond and region != first and region not in beyond:
                continue
            if confined is not None and region != confined:
                continue
            if state.endpoint.model == plan.ask.model:
                row = plan.by_number[state.number]
                found = Pick(candidate, "spilled", row.wait_s(own[state.number]), 0.0, plan)
                if region not in exhausted:
                    yield found
                elif _may_repeat(case, region):
                    repeated.append(found)
                continue
            if region in exhausted:
                continue
            for smaller in plan.degraded:
                if state.number in smaller.by_number:
                    row = smaller.by_number[state.number]
                    wait_s = row.wait_s(own[state.number])
                    yield Pick(candidate, "fallback", wait_s, 0.0, smaller)
                    break
        yield from repeated

    def _last_resort(self, planned: _Planned, case: _Case, tried: set[Target]) -> Way | None:
        """Where nothing else is left: the same one, if only a kept connection had died; or home's
        ingress, which starts what has stopped."""
        last = case.attempts[-1]
        leg = last.leg
        if last.failure == "closed" and last.reused and isinstance(leg, Way):
            row = planned.plan.by_number.get(leg.known.number)
            if row is not None:
                found = Pick(row.candidate, "spilled", 0.0, 0.0, planned.plan)
                way = self._way(planned, found, case, tried - {leg.target})
                if way is not None:
                    return way
        if last.failure == "status" or last.request is None:  # it is full, and was not asked
            return None
        if not self.world.can_start:
            return None
        for row in planned.plan.rows:
            known = self.world.known(row.number)
            if (
                isinstance(known, HomeEndpoint)
                and known.ingress.target not in tried
                and known.state.cold_start_s is not None
            ):
                found = Pick(row.candidate, "spilled", 0.0, 0.0, planned.plan)
                return self._by_ingress(planned, found, case, known)
        return None

    # ---- suspects ---------------------------------------------------------------------------

    def _try_alone(
        self, planned: _Planned, case: _Case, suspect: bytes
    ) -> Way | NearfieldError | asyncio.Future[Way | Answer | NearfieldError]:
        return self._alone_or_never(planned, case, suspect) or self._wait(case)

    def _wait(self, case: _Case) -> asyncio.Future[Way | Answer | NearfieldError]:
        """Until a trial has ended, or the world has changed."""
        future: asyncio.Future[Way | Answer | NearfieldError]
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._waiting.append(_Waiting(case, future))
        if self._fate(case) == "unheard":
            loop.call_later(SETTLED_S, self.world.call_the_roll)
        return future

    def _stranded_or_not(self, planned: _Planned, case: _Case) -> Way | NearfieldError | None:
        """A suspect that is not tried: to another replica of its region, else perhaps beyond.

        None: later, once it is known whether the region is lost.
        """
        if _first_region(case.attempts) == self._here:  # another one's gateway has looked already
            way = self._another(planned, case)
            if way is not None and not _starts(way):
                return way
        fate = self._fate(case)
        if departure(fate, slight=True) == "wait":
            return None
        self._let_go(case)
        way = self._another(planned, case)
        if way is None:
            return self._give_up(planned, case)
        if fate != "lost" and not isinstance(way.known, HomeEndpoint):
            way.headers = (*way.headers, (SUSPECT, b"1"))
        return way

    def _fate(self, case: _Case) -> Fate:
        """Of the region that had it first, since its last try ended."""
        region = _first_region(case.attempts)
        if self._is_lost(region):
            return "lost"
        if region != self._here:
            return "alive"  # its gateway has just answered for it
        settled_s = (case.attempts[-1].ended_s or case.now_s) + SETTLED_S
        return "alive" if self.world.home_lived(settled_s) else "unheard"

    def _let_go(self, case: _Case) -> None:
        """It may leave its region, if it has not done so before."""
        if _crossings(case.attempts) < MOST_CROSSINGS:
            case.admission.confined = None

    def _alone_or_never(
        self, planned: _Planned, case: _Case, suspect: bytes
    ) -> Way | NearfieldError | None:
        """None: later, perhaps."""
        whither = departure(self._fate(case), slight=False)
        if whither == "go":
            case.admission.trial = None  # whatever killed its replica killed all the others too
            self._let_go(case)
            return self._another(planned, case) or self._give_up(planned, case)
        if whither == "wait":  # else what kills one replica after another would be blamed on it
            return None
        refusal = planned.plan.refusal
        if refusal is not None and refusal.retry_after_s is None:
            return self._refused(refusal, case)
        return self._alone(planned, case, suspect)

    def _alone(self, planned: _Planned, case: _Case, suspect: bytes) -> Way | None:
        """A place where no other suspect runs, for a body that runs nowhere else."""
        if suspect in self._trying:
            return None
        tried = {attempt.leg.target for attempt in case.attempts}
        first = _first_region(case.attempts)
        rows = planned.plan.rows
        at_first = [row for row in rows if row.candidate.state.endpoint.region == first]
        confined = _confined(case) is not None
        for row in at_first if at_first or confined else rows:
            known = self.world.known(row.number)
            found = Pick(row.candidate, "spilled", 0.0, 0.0, planned.plan)
            if not isinstance(known, HomeEndpoint):
                way = self._to_region(planned, found, case, known)
                way.headers = (*way.headers, (TRIAL, suspect.hex().encode("ascii")))
            else:
                own = self._running.own
                quiet = [
                    replica
                    for replica in known.by_number.values()
                    if not replica.trials and replica.target not in tried
                ]
                if not quiet:
                    continue
                replica = min(quiet, key=lambda r: own[r.number])
                way = self._to_replica(planned, found, case, known, replica, 0.0)
            way.suspect, way.trial = suspect, True
            return way
        return None

    def _is_lost(self, region: str | None) -> bool:
        return region is not None and self.world.is_lost(region)

    def _reserve(self, way: Way) -> None:
        assert way.suspect is not None
        way.reserved = True
        self._trying.add(way.suspect)
        if isinstance(way.peer, Replica):
            way.alone = True
            way.peer.trials += 1

    def _limit_trial(self, way: Way, attempt: Attempt) -> None:
        """It has begun: once it has outlived the time in which it would kill, another may begin."""
        about = None if attempt.grant is None else attempt.grant.about
        if type(about) is Admission and about.trial_s is not None:
            asyncio.get_running_loop().call_later(about.trial_s, self._outlived, way)

    def _outlived(self, way: Way) -> None:
        if way.reserved and way.alone and isinstance(way.peer, Replica):
            way.alone = way.trial = False
            way.peer.trials -= 1
            self._wake()

    def _release(self, way: Way) -> None:
        assert way.suspect is not None
        way.reserved = False
        self._trying.discard(way.suspect)
        if isinstance(way.peer, Replica) and way.alone:
            way.alone = False
            way.peer.trials -= 1

    def _wake(self) -> None:
        """A trial has ended, or the world has changed: who has waited longest goes first."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, deque()
        for each in waiting:
            if each.future.done():
                continue
            case = each.case
            suspect = _suspect(case)
            assert case.request.model is not None
            planned = self._planned(case.request.model, case.admission, case.home_only)
            if not isinstance(planned, _Planned):
                each.future.set_result(planned)
                continue
            if suspect is None:
                found = self._stranded_or_not(planned, case)
            else:
                found = self._alone_or_never(planned, case, suspect)
            if found is None:
                self._waiting.append(each)
                continue
            each.future.set_result(found)
            if isinstance(found, Way) and found.suspect is not None:
                self._reserve(found)
                # After whoever waits has been called: it may have left meanwhile.
                asyncio.get_running_loop().call_soon(self._unless_begun, found)

    def _unless_begun(self, way: Way) -> None:
        if way.reserved and not way.counted:
            self._release(way)
            self._wake()

    # ---- legs -------------------------------------------------------------------------------

    def _way(
        self, planned: _Planned, found: Pick, case: _Case, tried: Collection[Target]
    ) -> Way | None:
        """A leg to that endpoint, by a target that has not been tried; None if there is none."""
        known = self.world.known(found.candidate.state.number)
        if not isinstance(known, HomeEndpoint):
            if known.target in tried and not _may_repeat(case, known.endpoint.region):
                return None
            return self._to_region(planned, found, case, known)
        places = known.places
        if not places:
            if known.ingress.target in tried:
                return None
            return self._by_ingress(planned, found, case, known)
        if tried:
            by_number = known.by_number
            places = tuple(p for p in places if by_number[p.number].target not in tried)
        if case.home_only and AVOID in case.request.headers:
            places = _avoiding(places, known, case.request.headers[AVOID])
        admission = case.admission
        choice = choose(
            places,
            self._running.own,
            self._running.work,
            self._draw(),
            tokens=admission.tokens,
            criticality=admission.criticality,
            cached=case.found.replicas,
        )
        if choice is None:
            return None
        replica = known.by_number[choice.state.number]
        return self._to_replica(planned, found, case, known, replica, choice.wait_s)

    def _to_replica(
        self, planned: _Planned, found: Pick, case: _Case, known: HomeEndpoint, replica: Replica,
        wait_s: float,
    ) -> Way:  # fmt: skip
        speed = replica.speed
        way = self._leg(planned, found, case, known, replica, replica.target, replica.shown)
        way.replica = replica.id
        way.expected_s = WAY_S + wait_s
        way.expected_s += speed.first_byte_s if case.request.stream else speed.hold_s
        if case.keys:
            self._affinity.saw(case.keys, known.number, replica.number)
        return way

    def _to_region(self, planned: _Planned, found: Pick, case: _Case, known: Known) -> Way:
        state, request, admission = found.candidate.state, case.request, case.admission
        region = self.world.region(state.endpoint.region)
        assert known.target is not None
        way = self._leg(planned, found, case, known, region, known.target, ())
        way.headers = self._from
        if admission.version is not None:
            way.headers = (*self._from, (VERSION, admission.version.encode("utf-8", "replace")))
        failed = [a.replica for a in case.attempts if a.replica and _is_at(a, region.name)]
        if failed:
            way.headers = (*way.headers, (AVOID, b",".join(failed)))
        way.expected_s = state.rtt_s + found.wait_s
        way.expected_s += state.first_byte_s if request.stream else state.hold_s
        if way.path is None and request.path != request.target:
            way.path = request.target  # the model that the path names is for its gateway to read
        if case.keys:
            self._affinity.saw(case.keys, known.number, -1)
        return way

    def _by_ingress(self, planned: _Planned, found: Pick, case: _Case, known: HomeEndpoint) -> Way:
        ingress = known.ingress
        assert ingress.target is not None
        way = self._leg(planned, found, case, known, ingress, ingress.target, known.shown)
        way.ingress = True
        way.cold = not ingress.running
        way.expected_s = math.inf
        return way

    def _leg(
        self, planned: _Planned, found: Pick, case: _Case, known: Known, peer: Peer,
        target: Target, shown: tuple[tuple[bytes, bytes], ...],
    ) -> Way:  # fmt: skip
        endpoint = known.endpoint
        reason, reason_field = self._reason(planned, found)
        if not case.home_only:
            shown = (*shown, reason_field)
        own = tuple(self._own)
        way = Way(
            target,
            (),
            shown,
            None,
            None,
            endpoint.name,
            endpoint.region,
            endpoint.model,
            endpoint.version,
            endpoint.pool,
            None,
            found.why,
            reason,
            found.predicted_s,
            False,
            partial(explain, planned.plan, found, own, criticality=case.admission.criticality),
            found.candidate.state.first_byte_s,
            tokens=case.admission.tokens,
            known=known,
            peer=peer,
        )
        if endpoint.model != case.request.model:
            _rename(way, case.request, endpoint.model, at_home=isinstance(known, HomeEndpoint))
        return way

    def _reason(self, planned: _Planned, found: Pick) -> tuple[str, tuple[bytes, bytes]]:
        """In one line. Without a queue it is the same for all who go there."""
        key = (found.candidate.state.number, found.why)
        same = found.wait_s == 0.0 and found.saved_s == 0.0
        known = planned.reasons.get(key) if same else None
        if known is None:
            line = summary(found)
            known = line, (b"x-nearfield-reason", line.encode("ascii", "replace"))
            if same:
                planned.reasons[key] = known
        return known


def _no_model(request: Request) -> NearfieldError:
    if request.says_model and request.method == b"POST":
        return BadRequest(
            "model is missing: name the model to ask.", param="model", code="model_missing"
        )
    return NotFound("There is no such path here.", code="path_not_found")


def _not_here(model: str) -> NearfieldError:
    return Unavailable(
        f"The model {model!r} is not served in this region any more.",
        code="not_here",
        retry_after_s=RETRY_S,
    )


def _suspect(case: _Case) -> bytes | None:
    """The fingerprint of a body on trial: by our own Retries, or by those of another gateway."""
    admission = case.admission
    if admission.trial is not None:
        return admission.trial
    if not admission.from_gateway:
        return None
    told = case.request.headers.get(TRIAL)
    return told[:128] if told else None


def _first_region(attempts: Sequence[Attempt]) -> str | None:
    for attempt in attempts:
        if isinstance(attempt.leg, Routed):
            return attempt.leg.region
    return None


def _is_at(attempt: Attempt, region: str) -> bool:
    return isinstance(attempt.leg, Routed) and attempt.leg.region == region


def _crossings(attempts: Sequence[Attempt]) -> int:
    first = _first_region(attempts)
    return sum(crossed(attempt, first) for attempt in attempts)


def _starts(way: Way) -> bool:
    """Whether it leads to an ingress, which starts what has stopped."""
    return isinstance(way.known, HomeEndpoint) and way.peer is way.known.ingress


def _over(case: _Case) -> bool:
    """Nothing runs for it any more, but for an answer that may be thrown away."""
    return all(each.ended_s is not None or each.failure is not None for each in case.attempts)


def _may_repeat(case: _Case, region: str) -> bool:
    """Whether another region that failed a request may be asked again.

    Its gateway runs once what this one sends it: the budget is here. A fault may be one replica's,
    or the moment's. A region whose only replica died starts another, which is waited for.
    """
    runs = [each for each in case.attempts if _is_at(each, region)]
    if len(runs) == 1 and said_replica_lost(runs[0]):
        return True
    return all(
        each.failure == "status" and is_fault(each.status, retry_after=each.retry_after)
        for each in runs
    )


def _avoiding(places: tuple[Place, ...], known: HomeEndpoint, names: bytes) -> tuple[Place, ...]:
    """Those that another gateway has not seen failing; all, if there is no other."""
    avoided = names.split(b",")
    others = [p for p in places if known.by_number[p.number].shown_name not in avoided]
    return tuple(others) or places


def _confined(case: _Case) -> str | None:
    """The region that a further try may not leave; None: it may."""
    return case.admission.confined if case.attempts else None


def _same_draw(session: bytes) -> float:
    """Uniform in [0, 1), the same for this session at every gateway."""
    return int.from_bytes(blake2b(session, digest_size=6).digest(), "big") / 2.0**48


def _learn_cold_start(known: HomeEndpoint, attempt: Attempt) -> None:
    if attempt.failure is None and 200 <= attempt.status < 300:
        assert attempt.first_byte_s is not None
        took_s = attempt.first_byte_s - attempt.started_s
        if took_s >= LEAST_COLD_S:
            known.learn_cold_start(took_s)


_OIP_MODEL = re.compile(rb"/v2/models/[^/?]+(?:/versions/[^/?]+)?")
_PREFIX = re.compile(rb"/[^/]+(?=/v[12](?:/|\?|\Z))")
_decode = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encode = msgspec.json.Encoder().encode


def _rename(way: Way, request: Request, model: str, *, at_home: bool) -> None:
    """Ask for another model than the request did: in the path, in a JSON body, and say so."""
    name = model.encode("ascii")
    # At home the target's prefix leads to the model; elsewhere the path may have to name it.
    path = request.path if at_home or request.path == request.target else request.target
    renamed = _OIP_MODEL.sub(b"/v2/models/" + name, path, count=1)
    if path is request.target and path != request.path:
        renamed = _PREFIX.sub(b"/" + name, renamed, count=1)
    way.path = renamed
    if request.says_model and request.body:
        try:
            fields = _decode(request.body)
        except (msgspec.DecodeError, ValueError, RecursionError):
            fields = {}  # a file: the path has named the model
        if "model" in fields:
            fields["model"] = msgspec.Raw(_encode(model))
            way.body = _encode(fields)
    way.shown = (*way.shown, (b"x-nearfield-degraded", name))
