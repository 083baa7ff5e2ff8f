"""What this gateway knows of the world: regions, endpoints, replicas; how far, how fast, how well.

    World
      Region        every region, from its file: who reaches it, how far it is, whether it lives
        Known       an endpoint there, as that region's gateway tells
      Home          the region this gateway stands in, if any
        HomeEndpoint
          Replica   known one by one

`follow` asks and brings in the answers; the Router reads `plan`, `books` and the endpoints, and
brings in how its requests fared. Nothing here waits or asks. What was brought in shows in the
states that the policy reads after the next `refresh`.

Evidence has levels, lest one part's failure condemn the whole: no connection speaks against a
replica or a region, an answer that is an error against that endpoint (and replica), a question that
is not answered against whoever was asked.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from nearfield.api.load import RegionReport, ReplicaLoad, Targets
from nearfield.core.errors import BadRequest
from nearfield.core.federation import RegionFile
from nearfield.edge import last_good, status
from nearfield.edge.beliefs import Beliefs, Peer
from nearfield.edge.distance import Place, likely_rtt_s
from nearfield.edge.elsewhere import Region, told
from nearfield.edge.home import CONTROLLER_AGE_S, Home, HomeEndpoint, Replica
from nearfield.edge.known import Books, Known
from nearfield.edge.last_good import LastGood
from nearfield.edge.proxy.ports import NEVER_SENT, Attempt, Target
from nearfield.edge.site import Site, target_of
from nearfield.edge.status import RegionStatus
from nearfield.policy.endpoints import Ask, Caller, EndpointState, Health, Refusal
from nearfield.policy.explain import Explanation, explain
from nearfield.policy.health import Probed, Rules, Tick, Transition, is_fault
from nearfield.policy.route import Pick, Plan, pick, plan

log = logging.getLogger("nearfield.edge.world")

REMEMBERED = 256
"""Changes of health that are kept for whoever asks what happened."""
TICK_S = 0.25
"""How often time alone may change what is believed."""
HOME_RULES = Rules(probe_s=0.25)
"""Replicas are asked four times a second: one that appears, stops or dies is noticed within one."""
LATE_S = 1.0
"""A deadline that passes is an upstream's fault only if it had at least this long, and ..."""
LATE_TIMES = 3.0
"""... this many times what was predicted: else anybody could eject it with deadlines of a
millisecond."""
OVERDUE_S = 0.25
"""A region whose answer is so much later than predicted is asked how it is, this often at most."""
LEAST_RTT_S = 1e-6
"""Shortest round trip believed in: what a gateway says it spent may exceed what was measured."""
FAR_S = 0.1
"""Round trip to a region whose last good state does not say: probes correct it in a second."""

_GONE = frozenset({"refused", "closed"})
"""Why a question was not answered, where whoever was asked may be gone: it is asked again at once,
so that a region that dies is known to within a tenth of a second."""
_BROKEN = NEVER_SENT | {"closed", "protocol", "truncated"}
_BADNESS: dict[Health, int] = {"up": 0, "ejected": 1, "unknown": 2, "down": 3}


class World:
    """See the module. One event loop's property.

    Attributes:
        site: where this gateway stands.
        home: the region it stands in, None for an edge site.
        books: this gateway's requests at endpoints. running: those at replicas, and their tokens.
        passports: what signs its questions; may be replaced.
        generation: grows with each `refresh`: plans of former ones are old.
        alive: what is believed of the regions. changes: the last changes of health.
        draining: this gateway finishes what it has: it says so to others.
        abandon: gives up what runs at a target that is believed dead (`Proxy.abandon`).
        refreshed: told of a new generation, and that home has been heard.
        doubt: told of a peer that may be gone: whoever follows looks at once.
    """

    def __init__(
        self,
        site: Site,
        *,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """
        Args:
            clock: monotonic, seconds. draw: uniform in [0, 1).
        """
        self.site = site
        self.clock = clock
        self.books = Books()
        self.running = Books()
        self.passports = site.passports
        self.generation = 0
        self.changes: deque[Transition] = deque(maxlen=REMEMBERED)
        self.draining = False
        self.abandon: Callable[[Target], None] = _nothing
        self.doubt: Callable[[Peer], None] = _nothing
        self.refreshed: Callable[[], None] = _nobody
        self._draw = draw
        self._dirty = self._urgent = True
        self._lost: list[Target] = []
        self._serving: frozenset[HomeEndpoint] = frozenset()
        self._ticked_s = self._home_lived_s = -math.inf
        self._models: dict[str, tuple[Known, ...]] = {}
        self._by_number: dict[int, Known] = {}
        self._sound: dict[str, Beliefs] = {}
        self.alive = Beliefs(Rules(), self._region_changed, draw)
        self._regions = {
            file.region: Region(file, self._gateway_of(file), is_home=file.region == site.home)
            for file in site.regions
        }
        self.home: Home | None = None
        if site.home is not None and site.serve is not None:
            self.home = Home(
                site.home,
                self._regions[site.home].file.jurisdiction,
                target_of(site.serve, site.tls),
                self.books,
                self.running,
            )
        now_s = clock()
        last = None if site.last_good is None else last_good.read(site.last_good)
        if last is not None:
            up = [name for name in last.up if name in self._regions and name != site.home]
            self.alive.members(up, now_s, start="up")
        self.alive.members(self._regions, now_s, start="unknown")
        if last is not None:
            self._restore(last, now_s)
        self.refresh(now_s)

    def _gateway_of(self, file: RegionFile) -> Target | None:
        if file.region == self.site.home:
            return None
        if file.gateway_url is None:
            log.warning(
                "region %s names no gateway_url: nothing is sent there from here", file.region
            )
            return None
        return target_of(file.gateway_url, self.site.tls)

    # ---- for the Router ---------------------------------------------------------------------

    def has(self, model: str) -> bool:
        """Whether any region serves it."""
        return model in self._models

    def serves(self, model: str, version: str) -> bool:
        """Whether any region serves this version of it."""
        return any(known.endpoint.version == version for known in self._models.get(model, ()))

    def known(self, number: int) -> Known:
        """The endpoint of that number.

        Raises:
            KeyError: there is none any more.
        """
        return self._by_number[number]

    def region(self, name: str) -> Region:
        """
        Raises:
            KeyError: no file names it.
        """
        return self._regions[name]

    @property
    def complete(self) -> bool:
        """Every region has been heard: a model that is not known does not exist."""
        return all(
            self._home_told if region.is_home else region.report is not None
            for region in self._regions.values()
            if region.is_home or region.target is not None
        )

    @property
    def _home_told(self) -> bool:
        return self.home is not None and self.home.targets is not None

    def is_lost(self, region: str) -> bool:
        """Whether it is believed dead: its gateway; of home its agent and every replica."""
        return self.alive.of(region).health == "down"

    def home_lived(self, since_s: float) -> bool:
        """Whether anything at home has answered a question that was asked since then."""
        return self._home_lived_s >= since_s

    @property
    def can_start(self) -> bool:
        """Whether home starts a replica for a request that finds none."""
        return self.home is not None and self.home.can_start(self.clock())

    @property
    def ready(self) -> bool:
        """Whether there is anywhere that a request could be sent to."""
        return any(known.routable for known in self._by_number.values())

    def plan(
        self,
        ask: Ask,
        caller: Caller,
        *,
        home_only: bool = False,
        models: frozenset[str] | None = None,
        previous: Plan | None = None,
        client: Place | None = None,
    ) -> Plan:
        """Where requests may go by what is known at the last `refresh`.

        Args:
            home_only: not to other regions, and to no other model.
            models: those that may be asked instead of this one; None: any.
            client: predict for somebody there and not for this gateway.
        """
        now_s = self.clock()
        degraded: tuple[Plan, ...] = ()
        if not home_only:
            degraded = tuple(
                plan(self._states(name, False, client), Ask(name), caller, now_s=now_s)
                for name in self.fallbacks(ask.model)
                if models is None or name in models
            )
        states = self._states(ask.model, home_only, client)
        return plan(states, ask, caller, now_s=now_s, previous=previous, degraded=degraded)

    def fallbacks(self, model: str) -> tuple[str, ...]:
        """The models that may stand in for it, the best first: home's word, then the others'."""
        found: dict[str, None] = {}
        ours = self.site.home
        for known in sorted(
            self._models.get(model, ()), key=lambda known: known.endpoint.region != ours
        ):
            found.update(dict.fromkeys(name for name in known.fallbacks if name != model))
        return tuple(found)

    def _states(self, model: str, home_only: bool, client: Place | None) -> list[EndpointState]:
        states = [
            known.state
            for known in self._models.get(model, ())
            if not home_only or known.endpoint.region == self.site.home
        ]
        if client is None:
            return states
        return [
            replace(s, rtt_s=likely_rtt_s(client, self._regions[s.endpoint.region].place))
            for s in states
        ]

    def ended(self, known: Known, peer: Peer, attempt: Attempt, expected_s: float) -> None:
        """A try has ended: what it tells of whoever answered it, or did not.

        Args:
            peer: the replica, or the region. Home's ingress is not judged: it stands for whatever
                it has to start.
            expected_s: the time to its first byte that was predicted.
        """
        failure, status, now_s = attempt.failure, attempt.status, attempt.ended_s or self.clock()
        if not isinstance(peer, Replica | Region):
            return
        if failure in _BROKEN:
            self._beliefs_of(peer).failed(peer, str(failure), now_s)
            self._settle_failure()
            self.doubt(peer)
            if isinstance(peer, Replica):
                self.call_the_roll()
            return
        first_s = attempt.first_byte_s
        if failure is None or failure == "status":
            if is_fault(status, retry_after=attempt.retry_after):
                self._answer_failed(known, peer, f"answered {status}", now_s)
            elif first_s is not None and status != 429:
                took_s = first_s - attempt.started_s
                if not 200 <= status < 300:
                    expected_s = took_s  # a refusal says nothing about speed
                peer.answered(took_s, expected_s, now_s)
                known.answers.answered(took_s, expected_s, now_s)
        elif failure == "deadline" and first_s is None:
            took_s = now_s - attempt.started_s
            if took_s >= max(LATE_S, LATE_TIMES * expected_s):
                self._answer_failed(known, peer, f"no answer in {took_s:.1f} s", now_s)

    def _answer_failed(self, known: Known, peer: Peer, reason: str, now_s: float) -> None:
        sound = self._sound.get(known.endpoint.model)
        if sound is not None:
            sound.failed(known.answers, reason, now_s)
        if isinstance(peer, Replica):
            self._beliefs_of(peer).failed(peer, reason, now_s)
        self._settle_failure()

    def _settle_failure(self) -> None:
        if self._urgent:  # nobody is sent to who has just been ejected
            self.refresh(self.clock())

    def call_the_roll(self) -> None:
        """A replica may be dead: ask everybody at home. Did a request kill it, or is all lost?"""
        assert self.home is not None
        self.doubt(self._regions[self.home.region])
        for replica in self.replicas():
            self.doubt(replica)

    def _beliefs_of(self, peer: Peer) -> Beliefs:
        return peer.endpoint.beliefs if isinstance(peer, Replica) else self.alive

    # ---- for whoever follows ----------------------------------------------------------------

    @property
    def others(self) -> tuple[Region, ...]:
        """The regions that can be asked: not home."""
        return tuple(region for region in self._regions.values() if region.target is not None)

    def replicas(self) -> list[Replica]:
        """Those at home, the leaving ones included."""
        return [] if self.home is None else list(self.home.replicas())

    def agent_answered(self, targets: Targets, sent_s: float) -> None:
        """Home's agent has told which replicas there are."""
        assert self.home is not None
        now_s = self.clock()
        self.home.apply(targets, now_s, self._replica_beliefs)
        for known in self.home.endpoints.values():
            self._name_replicas(known, now_s)
        self.alive.feed(Probed(self.home.region, True, sent_s), now_s)
        self._changed()
        self._home_lives(sent_s)

    def agent_silent(self, reason: str, sent_s: float) -> None:
        """It has not. Its region lives as long as a replica answers."""
        assert self.home is not None
        now_s = self.clock()
        self.home.fails += 1
        replicas = self.replicas()
        lives = any(r.endpoint.beliefs.of(r.name).health in ("up", "ejected") for r in replicas)
        heard = [s for s in (replica.last_heard_s() for replica in replicas) if s is not None]
        self.alive.feed(
            Probed(
                self.home.region,
                lives,
                sent_s,
                in_flight=sum(len(replica.running) for replica in replicas),
                heard_s=max(heard, default=None),
                reason=reason,
            ),
            now_s,
        )
        self._changed()
        if not lives:
            self._doubt_again(self.alive, self._regions[self.home.region])

    def replica_answered(
        self, replica: Replica, load: ReplicaLoad, own_at: int, work_at: float, sent_s: float
    ) -> None:
        """A replica has told what it has to do.

        Args:
            own_at, work_at: this gateway's requests and tokens there when it was asked.
        """
        assert self.home is not None
        if load.model != replica.endpoint.endpoint.model:
            self.replica_silent(replica, f"it serves {load.model}", sent_s)
            return
        if not self.home.serves(replica, load.version):
            return
        replica.load, replica.own_at, replica.work_at = load, own_at, work_at
        replica.meter.read(load)
        home = replica.endpoint.endpoint.region
        if self.alive.of(home).health == "unknown":  # its agent is silent, but it lives
            self.alive.feed(Probed(home, True, sent_s), self.clock())
        self._probed(replica.endpoint.beliefs, Probed(replica.name, True, sent_s))
        self._home_lives(sent_s)

    def _home_lives(self, sent_s: float) -> None:
        self._home_lived_s = max(self._home_lived_s, sent_s)
        self.refreshed()

    def replica_silent(self, replica: Replica, reason: str, sent_s: float) -> None:
        """It has not."""
        beliefs = replica.endpoint.beliefs
        self._probed(beliefs, _failed_probe(replica, reason, sent_s))
        if reason in _GONE and not self._doubt_again(beliefs, replica) and self.home is not None:
            self._doubt_again(self.alive, self._regions[self.home.region])  # the last one, perhaps

    def region_answered(
        self, region: Region, report: RegionReport, took_s: float, own_at: dict[int, int],
        sent_s: float,
    ) -> None:  # fmt: skip
        """Another region's gateway has told of its endpoints.

        Args:
            took_s: from the question to the answer's first byte.
            own_at: this gateway's requests at its endpoints when it was asked, by number.
        """
        file = region.file
        if (report.region, report.jurisdiction) != (file.region, file.jurisdiction):
            region.wrong = (
                f"its gateway says it is {report.region} in {report.jurisdiction}, its file says "
                f"{file.region} in {file.jurisdiction}"
            )
            self.region_silent(region, region.wrong, sent_s)
            return
        now_s = self.clock()
        region.wrong = None
        region.rtt = region.rtt.learn(max(LEAST_RTT_S, took_s - report.spent_s))
        region.tell(report, own_at, self.books, now_s)
        for known in region.endpoints.values():
            sound = self._sound.get(known.endpoint.model)
            if sound is not None:
                sound.feed(Probed(known.answers.name, True, sent_s), now_s)
        self._probed(self.alive, Probed(region.name, True, sent_s))
        if region.rtt.urgent:
            self.doubt(region)

    def region_silent(self, region: Region, reason: str, sent_s: float) -> None:
        """It has not."""
        self._probed(self.alive, _failed_probe(region, reason, sent_s))
        if reason in _GONE:
            self._doubt_again(self.alive, region)

    def _doubt_again(self, beliefs: Beliefs, peer: Peer) -> bool:
        """Ask at once, while it is not settled whether it is gone."""
        unsettled = beliefs.of(peer.name).health in ("up", "ejected")
        if unsettled:
            self.doubt(peer)
        return unsettled

    def deep_probed(self, asked: Replica | Known, passed: bool, sent_s: float, reason: str) -> None:
        """A tiny inference has been answered, or has not: by a replica, or somewhere else."""
        beliefs, name = self._believed(asked)
        self._probed(beliefs, Probed(name, passed, sent_s, deep=True, reason=reason))

    def deep_down(self, asked: Replica | Known) -> bool:
        """Whether only a tiny inference can bring it back."""
        beliefs, name = self._believed(asked)
        return beliefs.of(name).deep_down

    def _believed(self, asked: Replica | Known) -> tuple[Beliefs, str]:
        if isinstance(asked, Replica):
            return asked.endpoint.beliefs, asked.name
        return self._sound[asked.endpoint.model], asked.answers.name

    def _probed(self, beliefs: Beliefs, event: Probed) -> None:
        beliefs.feed(event, self.clock())
        self._changed()

    def _replica_beliefs(self) -> Beliefs:
        return Beliefs(HOME_RULES, self._replica_changed, self._draw)

    def _region_changed(self, transition: Transition) -> None:
        endpoints = self._regions[transition.name].endpoints.values()
        self._note(transition, [known.target for known in endpoints if known.target is not None])

    def _replica_changed(self, transition: Transition) -> None:
        # Who stops takes no connection any more, and goes on with what it has.
        lost = [r.target for r in self.replicas() if r.name == transition.name and not r.stops]
        self._note(transition, lost)

    def _endpoint_changed(self, transition: Transition) -> None:
        known = self._by_number.values()
        self._note(
            transition,
            [k.target for k in known if k.target is not None and k.answers.name == transition.name],
        )

    def _note(self, transition: Transition, targets: list[Target]) -> None:
        self.changes.append(transition)
        self._dirty = self._urgent = True
        if transition.after == "down":
            self._lost += targets

    def _changed(self) -> None:
        """Something was brought in. Changes of health hold at once, the rest at the next round."""
        self._dirty = True
        if self._urgent:
            self.refresh(self.clock())
        self._give_up()

    def _give_up(self) -> None:
        lost, self._lost = self._lost, []
        for target in lost:
            self.abandon(target)

    # ---- the states that the policy reads ---------------------------------------------------

    def round(self) -> None:
        """Time has passed. Several times a second."""
        now_s = self.clock()
        if now_s >= self._ticked_s + TICK_S:
            self._ticked_s = now_s
            self._tick(now_s)
        if self._dirty:
            self.refresh(now_s)
        self._give_up()
        for region in self.others:  # who keeps requests waiting is asked before its turn
            if now_s >= region.asked_s + OVERDUE_S and self.overdue(region):
                self.doubt(region)

    def overdue(self, region: Region) -> bool:
        """Whether it keeps requests waiting that should have been answered, and is silent."""
        return region.overdue(self.clock() - OVERDUE_S)

    def _tick(self, now_s: float) -> None:
        for region in self._regions.values():
            self.alive.feed(region.take_answers(), now_s)
        self.alive.feed(Tick(), now_s)
        for known in self._by_number.values():
            sound = self._sound.get(known.endpoint.model)
            if sound is not None:
                sound.feed(known.answers.take_answers(), now_s)
        for sound in self._sound.values():
            sound.feed(Tick(), now_s)
        for replica in self.replicas():
            replica.endpoint.beliefs.feed(replica.take_answers(), now_s)
        if self.home is not None:
            for home in self.home.endpoints.values():
                home.beliefs.feed(Tick(), now_s)

    def refresh(self, now_s: float) -> None:
        """Make all states anew: plans made before are old."""
        self._dirty = self._urgent = False
        self._forget()
        models: dict[str, list[Known]] = {}
        by_number: dict[int, Known] = {}
        for region in self._regions.values():
            if region.is_home and self.home is not None:
                region.endpoints = dict(self.home.endpoints)
            for known in region.endpoints.values():
                by_number[known.number] = known
                models.setdefault(known.endpoint.model, []).append(known)
        self._by_number = by_number
        self._models = {name: tuple(known) for name, known in models.items()}
        for name in self._sound.keys() - models.keys():
            del self._sound[name]
        for name, endpoints in models.items():
            sound = self._sound.get(name)
            if sound is None:
                sound = self._sound[name] = Beliefs(Rules(), self._endpoint_changed, self._draw)
            sound.members([known.answers.name for known in endpoints], now_s, start="up")
        for region in self._regions.values():
            self._restate(region, now_s)
        self.generation += 1
        self.refreshed()

    def _free(self, home: Home) -> None:
        """Whoever waits for a pool to start goes to one that has started meanwhile.

        The machine of the first may not come for hours; the scaling policy has started another
        pool for just these requests.
        """
        serving = frozenset(known for known in home.endpoints.values() if known.places)
        for came in serving - self._serving:
            self._lost += [
                target
                for known in home.endpoints.values()
                if known.ingress.running
                and known.may_send_to(came)
                and (target := known.ingress.target) is not None
            ]
        self._serving = serving

    def _restate(self, region: Region, now_s: float) -> None:
        believed = self.alive.of(region.name)
        health: Health = "down" if region.wrong is not None else believed.health
        weight = self.alive.weight(region.name, now_s)
        back_s = self.alive.back_s(region.name, now_s)
        if region.is_home and self.home is not None:
            can_start = self.home.can_start(now_s)
            for home in self.home.endpoints.values():
                home.rebuild(
                    now_s, self.books, self.running, (health, weight, back_s), can_start=can_start
                )
                self._doubt_answers(home, now_s)
            self._free(self.home)
            return
        region.restate(health, weight, back_s)
        for known in region.endpoints.values():
            self._doubt_answers(known, now_s)

    def _doubt_answers(self, known: Known, now_s: float) -> None:
        """An endpoint is as well as its region, and as its answers."""
        sound = self._sound[known.endpoint.model]
        name, state = known.answers.name, known.state
        health, weight = sound.of(name).health, sound.weight(name, now_s)
        if health == "up" and weight >= state.weight:
            return
        worse = health if _BADNESS[health] > _BADNESS[state.health] else state.health
        known.state = replace(
            state,
            health=worse,
            weight=min(weight, state.weight),
            back_s=max(state.back_s, sound.back_s(name, now_s)),
        )

    def _forget(self) -> None:
        for region in self._regions.values():
            if not region.is_home:
                region.forget(self.books)
        now_s = self.clock()
        if self.home is not None and self.home.forget(now_s):
            for home in self.home.endpoints.values():
                self._name_replicas(home, now_s)

    # ---- for those who ask ------------------------------------------------------------------

    def report(self, spent_s: float) -> RegionReport:
        """Home, as other gateways are told of it.

        Raises:
            BadRequest: this is an edge site: it has nothing to tell of.
        """
        if self.home is None:
            raise BadRequest("This gateway stands in no region.", code="no_region")
        age_s = self.home.age_s(self.clock())
        return RegionReport(
            region=self.home.region,
            jurisdiction=self.home.jurisdiction,
            draining=self.draining,
            age_s=min(age_s, 1e9),
            spent_s=spent_s,
            endpoints=tuple(told(known) for known in self.home.endpoints.values()),
        )

    def explain(
        self,
        model: str,
        *,
        version: str | None = None,
        caller: Caller | None = None,
        client: Place | None = None,
        criticality: int = 1,
    ) -> tuple[Explanation, Pick | Refusal]:
        """How a request would be routed now, and why.

        Args:
            client: for somebody there, by assumed distances; None: as from this gateway.
        """
        made = self.plan(Ask(model, version), caller or Caller(), client=client)
        decision = pick(made, self.books.own, 0.5, criticality=criticality)
        return explain(made, decision, self.books.own, criticality=criticality), decision

    def last_good(self) -> LastGood:
        """What is known now, to be kept over a restart."""
        home = self.home
        endpoints = () if home is None else tuple(home.endpoints.values())
        return LastGood(
            saved_s=time.time(),
            up=tuple(name for name in self._regions if self.alive.of(name).health == "up"),
            targets=None if home is None else home.targets,
            reports=tuple(r.report for r in self._regions.values() if r.report is not None),
            rtts_s={r.name: r.rtt.level_s for r in self._regions.values() if r.rtt.probes},
            speeds={k.endpoint.name: k.speed for k in endpoints if k.speed.measured},
            cold_starts_s={k.endpoint.name: k.cold_start_s for k in endpoints},
        )

    def _restore(self, last: LastGood, now_s: float) -> None:
        for report in last.reports:
            region = self._regions.get(report.region)
            if region is None or region.is_home or region.target is None:
                continue
            if report.jurisdiction != region.file.jurisdiction:
                continue  # its file was changed meanwhile
            region.rtt = region.rtt.learn(max(LEAST_RTT_S, last.rtts_s.get(region.name, FAR_S)))
            region.tell(report, {}, self.books, now_s)
        if self.home is None or last.targets is None:
            return
        self.home.apply(last.targets, now_s, self._replica_beliefs)
        self.home.told_s = now_s - CONTROLLER_AGE_S  # nothing can be started by hearsay
        for known in self.home.endpoints.values():
            self._name_replicas(known, now_s)
            name = known.endpoint.name
            known.speed = last.speeds.get(name, known.speed)
            known.cold_start_s = last.cold_starts_s.get(name, known.cold_start_s)

    def _name_replicas(self, known: HomeEndpoint, now_s: float) -> None:
        names = {replica.name for replica in known.replicas.values()}
        known.beliefs.members(names, now_s, start="unknown")

    @property
    def models(self) -> Mapping[str, Sequence[Known]]:
        """All endpoints, by the model they serve."""
        return self._models

    @property
    def regions(self) -> list[RegionStatus]:
        """Every region as it is believed to be now."""
        return status.statuses(self, self._regions.values())


def _failed_probe(peer: Peer, reason: str, sent_s: float) -> Probed:
    return Probed(
        peer.name,
        False,
        sent_s,
        in_flight=len(peer.running),
        heard_s=peer.last_heard_s(),
        reason=reason,
    )


def _nothing(_: Any) -> None:
    """Nobody is to be told."""


def _nobody() -> None:
    """Nobody is to be told."""
