"""Many requests as one: what a large system does in the mean, in time that its size does not touch.

Time goes in ticks. In each, a stream's requests are sent as a few packets of whole requests; every
packet is routed by `policy.route` as one request would be, with the lengths of one of its requests
and the waiting of one. A pool has two stages, prompts and answers, and what is in them follows

    y' = begun - R / prefill_s                     prompts, in order of time, R of them at once
    z' = R / prefill_s - z / (answer x step_s)     answers, all at once

with the speeds of `engine.Timing`, solved over the tick (answers in two halves one after the other,
as their lengths vary less than exponentially). That knows how much is served and how long
a backlog lasts, but not that requests come in clumps. So to every packet a wait is added that is
drawn from a steady state: for a place, by Sakasegawa ("An approximation formula
Lq = a.rho^b/(1-rho)", 1977) with Allen and Cunneen's correction for the variance of arrivals and of
work; for a prompt's turn, see `flow.turn_s`.

Requests are counted in whole numbers here too: nothing is lost in rounding. `policy.limit` learns
from a pool as from one replica. `policy.rank` is left out: a pool's replicas share its work evenly.
docs/simulate.md says how far both modes agree; tests/simulation/test_simulator_modes.py holds them
to it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any

from nearfield.policy import health
from nearfield.policy.endpoints import Refusal
from nearfield.policy.limit import WINDOW_S, Window, comparable_s
from nearfield.policy.route import alternatives, pick
from nearfield.simulator.arrivals import Tick
from nearfield.simulator.books import InvariantError
from nearfield.simulator.events import TRIES
from nearfield.simulator.fleet import Pool, Replica
from nearfield.simulator.flow import (
    HALVES,
    MOST_BUSY,
    Cohort,
    Flow,
    Packet,
    drawn,
    median,
    steady,
    turn_s,
)
from nearfield.simulator.parts import Gateway
from nearfield.simulator.world import CONNECT_TIMEOUT_S, World

MOST_CV2 = 16.0
"""Largest variance believed in for a wait: clumps of hours are a rate, and no clump."""
MOST_WINDOWS = 10
"""Of `policy.limit`, learnt from in one tick."""
HOLDS = 3.0
"""Mean times in service after which a draining replica is empty."""
SMOOTH = 0.3
"""Weight of a tick in what a pool knows of its requests."""
KNOWN, KNOWN_PACKET = 200.0, 0.02
"""Requests over which their lengths are averaged; and the weight of one packet in the variance."""
RATE_S = 30.0
"""Time over which the rate is averaged that a steady state belongs to: shorter peaks are clumps,
which the formula knows of, and longer ones make a backlog."""


class FluidWorld(World):
    """A run in ticks."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.flows = [Flow(pool) for pool in self.pools]
        self._slow: frozenset[int] = frozenset()
        self._seen = [list(gateway.own) for gateway in self.gateways]

    def run(self, progress: Callable[[float], None] = lambda share: None) -> None:
        self.begin()
        tick_s = self.scenario.tick_s
        ticks = max(1, round(self.end_s / tick_s))
        tick_s = self.end_s / ticks
        shown = max(1, ticks // 500)
        for i in range(ticks):
            begun_s, stop_s = i * tick_s, (i + 1) * tick_s
            self._until(math.nextafter(begun_s, math.inf))
            self.now_s = begun_s
            self._arrivals(begun_s, stop_s)
            self.now_s = stop_s
            for flow in self.flows:
                if flow.queued or flow.inside or flow.rate_rps > 1e-6:
                    self._serve(flow, begun_s, stop_s)
            if i % shown == 0:
                progress((i + 1) / ticks)
        self._until(math.nextafter(self.end_s, math.inf))
        self.now_s = self.end_s
        self.check()

    # ---- on the way -----------------------------------------------------------------------------

    def _arrivals(self, begun_s: float, stop_s: float) -> None:
        """The tick's packets, in order of time, each to where it goes."""
        most = self.scenario.packets
        turns: list[list[tuple[Packet, Tick]]] = [[] for _ in range(most)]
        for source in self.sources:
            tick = source.stream.tick(stop_s, most)
            count = tick.count
            if not count:
                continue
            source.tally.came(begun_s, count)
            gateway = source.gateway
            if gateway is None:
                source.tally.failed("refused", begun_s, count, "no gateway")
                continue
            self.in_flight += count
            if begun_s >= gateway.due_s:
                self.poll(gateway)
            packets = min(count, most)
            sent = 0
            for k in range(packets):
                upto = count * (k + 1) // packets
                at = (k + self.draw()) / packets
                prompt, answer = tick.lengths[k % len(tick.lengths)]
                came_s = begun_s + (stop_s - begun_s) * at
                packet = Packet(source, gateway, upto - sent, came_s, prompt, answer)
                turns[min(most - 1, int(at * most))].append((packet, tick))
                sent = upto
        for gateway in self.gateways:
            self._seen[gateway.index][:] = gateway.own
        passed_s = (stop_s - begun_s) / most
        for flow in self.flows:
            flow.seen = float(flow.load)
        for turn in turns:
            for packet, tick in turn:
                self._route(packet, tick.prompt, tick.answer)
            self._pass(passed_s, stop_s - begun_s)

    def _pass(self, passed_s: float, tick_s: float) -> None:
        """What gateways believe to be in flight goes on ending while the tick's packets are sent.

        In the books it does so at the tick's end only: else a tick that is longer than a request
        takes would look like an overload.
        """
        for flow in self.flows:
            if flow.seen <= 0.0:
                continue
            if flow.queued > flow.prompts + flow.answers:  # it ends as fast as it can, no faster
                ended = flow.done * passed_s / tick_s
                keep = max(0.0, 1.0 - ended / flow.seen)
            else:
                keep = math.exp(-passed_s / max(1e-9, flow.pool.hold_s))
            flow.seen *= keep
            number = flow.pool.number
            for seen in self._seen:
                if seen[number]:
                    seen[number] = int(seen[number] * keep + 0.5)

    def _route(self, packet: Packet, prompt: float, answer: float) -> None:
        """`prompt`, `answer`: the mean of the requests that come with it."""
        source, gateway = packet.source, packet.gateway
        plan = gateway.plans[source.callers]
        assert plan is not None
        found = pick(
            plan,
            self._seen[gateway.index],
            self.draw(),
            criticality=source.criticality,
            allowed_s=source.timeout_s,
        )
        if isinstance(found, Refusal):
            self._fail(packet, packet.count, "refused", found.filter)
            return
        number = found.candidate.state.number
        left = self._send(packet, self.flows[number], prompt, answer)
        if left:
            self._spill(left, number, prompt, answer, "refused")

    def _send(self, packet: Packet, flow: Flow, prompt: float, answer: float) -> Packet | None:
        """To that endpoint; what it has no room for, or cannot be reached by, comes back."""
        pool, source, gateway = flow.pool, packet.source, packet.gateway
        self.allowed(source, gateway, pool)
        if not self.regions[pool.region].alive:
            packet.lag_s += CONNECT_TIMEOUT_S
            self._hear(gateway, health.Failed(pool.endpoint.region, "no connection"))
            return packet
        most = pool.timing.slots + pool.timing.max_queued
        shed = False
        if pool.ready:
            limit = flow.limit.room(source.criticality)
            shed = limit < most and pool.ready >= TRIES
            most = min(most, limit)
        room = int(max(1, pool.ready) * most - flow.seen)
        left: Packet | None = None
        if packet.count > room:
            left = packet if room <= 0 else packet.part(packet.count - room)
            pool.arrivals += left.count
            pool.late += left.count
            if shed:
                self._fail(left, left.count, "refused", "overloaded")
            if room <= 0:
                return None if shed else left
            packet.count = room
            left = None if shed else left
        count = packet.count
        packet.rtt_s = gateway.rtts_s[pool.number] + source.way_s + pool.timing.request_s
        gateway.own[pool.number] += count
        self._seen[gateway.index][pool.number] += count
        flow.seen += count
        flow.queue.append(packet)
        flow.queued += count
        pool.load += count
        pool.arrivals += count
        pool.work_in += count * (prompt + answer)
        share = -math.expm1(-count / KNOWN)
        pool.prompt += share * (prompt - pool.prompt)
        pool.answer += share * (answer - pool.answer)
        flow.prompt2 += min(share, KNOWN_PACKET) * (packet.prompt**2 - flow.prompt2)
        flow.cv2 += share * (min(MOST_CV2, source.stream.cv2) - flow.cv2)
        return left

    def _spill(self, packet: Packet, tried: int, prompt: float, answer: float, how: str) -> None:
        gateway = packet.gateway
        left: Packet | None = packet
        if gateway.alive:
            if self.now_s >= gateway.due_s:
                self.poll(gateway)
            plan = gateway.plans[packet.source.callers]
            assert plan is not None
            for candidate in alternatives(plan, self._seen[gateway.index], tried=(tried,)):
                if left is None:
                    return
                left = self._send(left, self.flows[candidate.state.number], prompt, answer)
        if left is not None:
            self._fail(left, left.count, how, "full")

    def _fail(self, packet: Packet, count: int, how: str, reason: str) -> None:
        self.in_flight -= count
        packet.source.tally.failed(how, self.now_s, count, reason)

    def _leave(self, flow: Flow, packet: Packet, count: int) -> None:
        """They are at this endpoint no more."""
        flow.pool.load -= count
        if packet.gateway.alive:
            packet.gateway.own[flow.pool.number] -= count

    # ---- at work --------------------------------------------------------------------------------

    def _serve(self, flow: Flow, begun_s: float, stop_s: float) -> None:
        """One tick of one pool."""
        pool, timing = flow.pool, flow.pool.timing
        while flow.queue and flow.queue[0].came_s + flow.queue[0].source.timeout_s < begun_s:
            packet = flow.queue.popleft()
            flow.queued -= packet.count
            self._leave(flow, packet, packet.count)
            self._fail(packet, packet.count, "expired", "")
            pool.late += packet.count
        working = pool.ready + pool.draining
        if not working:
            return
        tick_s = stop_s - begun_s
        speed = self._speed(pool, working)
        rows = timing.rows(pool.prompt, pool.answer)
        places = pool.ready * rows
        asked = float(flow.queued)
        begun = asked
        for _ in range(2):  # who begins depends on who ends
            prompts, answers, prefill_s, step_s, done = self._stages(
                flow, begun, tick_s, working, speed
            )
            begun = max(0.0, min(asked, places - flow.inside + done))
        begins = min(flow.queued, int(begun + self.draw()))
        weight = -math.expm1(-tick_s / RATE_S) if flow.rate_rps else 1.0
        flow.rate_rps += weight * (begins / tick_s - flow.rate_rps)
        backlog = begins < flow.queued or (bool(flow.queue) and flow.queue[0].came_s < begun_s)
        flow.prompts, flow.halves = prompts, answers
        if begins:
            self._begin(flow, begins, begun_s, tick_s, backlog, prefill_s, step_s, speed)
        pool.waiting = flow.queued
        pool.queue_age_s = stop_s - flow.queue[0].came_s if flow.queue else 0.0
        flow.done = ends = int(flow.inside - prompts - sum(answers) + 0.5)
        if ends > 0:
            self._end(flow, min(ends, flow.inside), stop_s)

    def _speed(self, pool: Pool, working: int) -> float:
        """Replicas at work, as many as full-speed ones."""
        if pool.number not in self._slow:
            return float(working)
        return sum(
            1.0 / replica.factor
            for replica in pool.replicas.values()
            if replica.stage in ("ready", "draining")
        )

    def _stages(
        self, flow: Flow, begun: float, tick_s: float, working: int, speed: float
    ) -> tuple[float, list[float], float, float, float]:
        """What is in both stages after a tick, and how fast they were.

        Returns:
            (prompts, answers by half, seconds of a prompt, seconds of a token, requests done)
        """
        pool, timing = flow.pool, flow.pool.timing
        slow = working / speed
        after, into = list(flow.halves), 0.0
        decoding = flow.answers / working
        prefill_s = step_s = timing.step_s
        computed = begun
        for _ in range(2):  # with the mean of the tick's beginning and end
            prefill_s = slow * timing.mean_prefill_s(pool.prompt, decoding)
            each_s = slow * timing.prompts_s(pool.prompt, decoding)
            computed = min(flow.prompts + begun, tick_s * working / max(each_s, 1e-9))
            rate_rps = computed / tick_s if flow.prompts > 1.0 else flow.rate_rps
            step_s = slow * timing.decode_s(rate_rps / working * slow, pool.prompt, decoding)
            half_s = max(0.0, pool.answer - 1.0) * step_s / HALVES
            into, after = computed, []
            for before in flow.halves:
                left = 0.0
                if half_s > 0.0:
                    level = into / tick_s * half_s
                    left = level + (before - level) * math.exp(-tick_s / half_s)
                after.append(left)
                into += before - left
            decoding = (flow.answers + sum(after)) / 2 / working
        prompts = flow.prompts + begun - computed
        return prompts, after, prefill_s, step_s, into

    def _begin(
        self,
        flow: Flow,
        begins: int,
        begun_s: float,
        tick_s: float,
        backlog: bool,
        prefill_s: float,
        step_s: float,
        speed: float,
    ) -> None:
        """So many get a place: from now on it is known how long they take."""
        pool, timing = flow.pool, flow.pool.timing
        working = pool.ready + pool.draining
        before_s = flow.prompts / working * prefill_s  # prompts that are before one's own
        rate_rps, cv2 = flow.rate_rps, flow.cv2
        busy = min(MOST_BUSY, rate_rps * prefill_s / working)
        prompt2 = max(flow.prompt2, pool.prompt**2) / max(1.0, pool.prompt) ** 2 - 1.0
        wait = busy, turn_s(busy, working, prefill_s, cv2, prompt2) / max(busy, 1e-9)
        places = max(1, pool.ready) * timing.rows(pool.prompt, pool.answer)
        hold_s = prefill_s + pool.answer * step_s
        full = steady(rate_rps * hold_s / places, places, hold_s, (cv2 + 1.0) / 2)
        max_wait_s = self._max_wait_s[pool.spec.model]
        slow = working / speed
        decoding = flow.answers / working
        draw = self.draw
        took: list[tuple[float, int]] = []
        taken = 0
        while taken < begins:
            packet = flow.queue[0]
            count = min(packet.count, begins - taken)
            at_s = packet.came_s
            if backlog:
                at_s = max(at_s, begun_s + tick_s * (taken + 0.5 * count) / begins)
            waited_s = at_s - packet.came_s + packet.lag_s
            if not backlog:
                waited_s += drawn(full, draw)
            if waited_s > max_wait_s:
                pool.late += count
            own_s = slow * timing.prefill_s(packet.prompt, decoding)
            own_s += draw() * min(1.0, decoding) * step_s  # until an iteration begins
            first_s = before_s + own_s + drawn(wait, draw)
            took.append((comparable_s(waited_s + first_s, packet.prompt), count))
            ttft_s = packet.rtt_s + waited_s + first_s
            total_s = ttft_s + max(0, packet.answer - 1) * step_s
            flow.cohorts.append(Cohort(packet, count, ttft_s, total_s))
            taken += count
            if count == packet.count:
                flow.queue.popleft()
            else:
                flow.queue[0] = packet.part(packet.count - count)
                packet.count = count
        peak = math.ceil(max(flow.seen, flow.prompts + flow.answers) / working)
        flow.queued -= begins
        flow.inside += begins
        window = Window(median(took), peak)
        for _ in range(max(1, min(MOST_WINDOWS, round(tick_s / (2 * WINDOW_S))))):
            flow.limit = flow.limit.learn(window)
        mean_wait_s = wait[0] * wait[1]
        first_s = prefill_s + before_s + mean_wait_s
        pool.first_byte_s += SMOOTH * (first_s - pool.first_byte_s)
        pool.hold_s += SMOOTH * (first_s + pool.answer * step_s - pool.hold_s)

    def _end(self, flow: Flow, ends: int, now_s: float) -> None:
        pool = flow.pool
        flow.inside -= ends
        self.in_flight -= ends
        pool.served += ends
        cohorts = flow.cohorts
        while ends:
            cohort = cohorts[0]
            count = min(cohort.count, ends)
            packet = cohort.packet
            tally = packet.source.tally
            tally.answered(cohort.ttft_s, cohort.total_s, now_s, count)
            if pool.endpoint.region != packet.gateway.name:
                tally.abroad += count
            self._leave(flow, packet, count)
            ends -= count
            cohort.count -= count
            if not cohort.count:
                cohorts.popleft()

    # ---- the world's questions ------------------------------------------------------------------

    def refresh(self, pool: Pool) -> None:
        flow = self.flows[pool.number]
        pool.waiting = flow.queued
        pool.queue_age_s = max(0.0, self.now_s - flow.queue[0].came_s) if flow.queue else 0.0

    def pace(self, replica: Replica, factor: float) -> None:
        super().pace(replica, factor)
        slow = {p.number for p in self.pools if any(r.factor > 1 for r in p.replicas.values())}
        self._slow = frozenset(slow)

    def drained(self, replica: Replica) -> None:
        pool = replica.pool
        if not self.flows[pool.number].inside:
            self._gone(replica)
            return
        after_s = HOLDS * pool.hold_s
        if after_s < pool.spec.drain_s:
            self.at(self.now_s + after_s, self._cut, replica)

    def vanished(self, replica: Replica) -> None:
        pool = replica.pool
        flow = self.flows[pool.number]
        others = pool.ready + pool.draining
        if replica.ready_s == math.inf or not flow.inside:
            return
        share = 1.0 / (others + 1)
        if replica.drained_s < math.inf:
            had_s = self.now_s - replica.drained_s
            cut = had_s >= pool.spec.drain_s * (1 - 1e-9) or replica.due_s <= self.now_s
            if not cut:
                share = 0.0  # it went because it was empty
            else:
                share *= math.exp(-had_s / max(pool.hold_s, 1e-9))
        count = flow.inside if not others else min(flow.inside, round(share * flow.inside))
        if count:
            self._lose_inside(flow, count)

    def _lose_inside(self, flow: Flow, count: int) -> None:
        """So many die with their replica: those whose answer has begun are lost, the others are
        sent again."""
        inside = flow.prompts + flow.answers
        replayed = round(count * flow.prompts / inside) if inside > 0 else 0
        flow.shrink(count)
        again: list[Packet] = []
        for number, end in ((count - replayed, 0), (replayed, -1)):
            left = number
            while left:
                cohort = flow.cohorts[end]
                taken = min(cohort.count, left)
                packet = cohort.packet
                self._leave(flow, packet, taken)
                if end == 0:
                    self._fail(packet, taken, "lost", "its answer has begun")
                else:
                    part = packet.part(taken)
                    part.lag_s = self.now_s - packet.came_s
                    again.append(part)
                left -= taken
                cohort.count -= taken
                if not cohort.count:
                    del flow.cohorts[end]
        for packet in again:
            packet.source.tally.replayed += packet.count
            packet.came_s = self.now_s
            self._spill(packet, -1, packet.prompt, packet.answer, "lost")

    def strand(self, pool: Pool) -> None:
        flow = self.flows[pool.number]
        queue, flow.queue, flow.queued = flow.queue, deque(), 0
        for packet in queue:
            self._leave(flow, packet, packet.count)
            packet.source.tally.replayed += packet.count
            self._spill(packet, pool.number, packet.prompt, packet.answer, "lost")

    def cancel(self, gateway: Gateway) -> None:
        for flow in self.flows:
            for packet in [each for each in flow.queue if each.gateway is gateway]:
                flow.queued -= packet.count
                self._leave(flow, packet, packet.count)
                self._fail(packet, packet.count, "lost", "its gateway is gone")
            flow.queue = deque(each for each in flow.queue if each.gateway is not gateway)
            gone = [each for each in flow.cohorts if each.packet.gateway is gateway]
            if not gone:
                continue
            flow.shrink(sum(each.count for each in gone))
            for cohort in gone:
                self._leave(flow, cohort.packet, cohort.count)
                self._fail(cohort.packet, cohort.count, "lost", "its gateway is gone")
            flow.cohorts = deque(c for c in flow.cohorts if c.packet.gateway is not gateway)

    def check(self) -> None:
        super().check()
        for flow in self.flows:
            pool = flow.pool
            queued = sum(packet.count for packet in flow.queue)
            inside = sum(cohort.count for cohort in flow.cohorts)
            known = sum(gateway.own[pool.number] for gateway in self.gateways)
            if (queued, inside) != (flow.queued, flow.inside) or not (
                flow.load == pool.load == known
            ):
                raise InvariantError(
                    f"{pool.endpoint.name}: {queued + inside} requests are there, {pool.load} are "
                    f"counted and gateways know of {known}"
                )
            if inside and not pool.ready + pool.draining:
                raise InvariantError(f"{pool.endpoint.name}: requests without a replica")
        if sum(pool.load for pool in self.pools) != self.in_flight:
            raise InvariantError("requests in flight are at no endpoint, or at two")
