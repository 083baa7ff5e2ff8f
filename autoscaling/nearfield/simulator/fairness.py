"""Replicas that take products in turn, in the events mode: `policy.fair` in place of first come.

Only the order differs from `engine.Batch`: between two chunks of a long prompt another product may
come, by the queue of `serving.engines.turns`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from nearfield.policy.fair import PieceQueue
from nearfield.simulator.engine import Batch, Request, Timing
from nearfield.simulator.events import EventWorld
from nearfield.simulator.fleet import Pool, Replica
from nearfield.simulator.lane import EventReplica
from nearfield.simulator.parts import Gateway
from nearfield.simulator.scenario import Scenario


class FairBatch(Batch):
    """A batch that computes prompts in the order of whose turn it is.

    `prefilling` has those that have begun, the ones that are computed now at its front. `waiting`
    has the others by age: they are not in the batch, so that they can be overtaken.
    """

    __slots__ = ("_products", "_turns")

    def __init__(
        self,
        timing: Timing,
        max_wait_s: float,
        products: Mapping[str, str],
    ) -> None:
        """
        Args:
            products: by the name of their traffic.
        """
        super().__init__(timing, max_wait_s)
        self._products = products
        self._turns: PieceQueue[Request] = PieceQueue(timing.chunk)

    def add(self, request: Request, now_s: float) -> bool:
        self._turns.push(request, self._products[request.source.name], request.prompt)
        self.waiting.append(request)
        return False if self._prompts else self._next(now_s)

    def run(self, now_s: float) -> list[Request]:
        done = super().run(now_s)
        if not self._prompts:
            self._next(now_s)
        return done

    def _next(self, now_s: float) -> bool:
        """Begin the pieces whose turn it is, a chunk of them; whether there are any."""
        self.expire(now_s)
        chunk = self.timing.chunk
        tokens = 0.0
        begun: list[Request] = []
        while True:
            room = chunk - tokens if begun else math.inf
            piece = self._turns.pop(partial(self._ready, room=room))
            if piece is None:
                break
            request = piece[0]
            tokens += piece[1]
            if request not in self.prefilling:
                self.waiting.remove(request)
                self._enter(request, now_s)
            if request not in begun:
                begun.append(request)
        if not begun:
            return False
        self._advance(now_s)
        for request in reversed(begun):
            self.prefilling.remove(request)
            self.prefilling.appendleft(request)
        self._compute(len(begun), tokens)
        self._reckon()
        return True

    def _ready(self, request: Request, tokens: float, room: float) -> bool:
        return tokens <= room and (request in self.prefilling or self._fits(request))

    def _begin_prompts(self) -> None:
        """Nothing begins but in turn: `_next`."""

    def _join(self, now_s: float) -> None:
        """Likewise."""

    def _end_prompts(self, now_s: float, done: list[Request]) -> None:
        """Those of which pieces are left go on later."""
        begun = [self.prefilling.popleft() for _ in range(self._prompts)]
        whole = [request for request in begun if request not in self._turns]
        self.prefilling.extend(request for request in begun if request in self._turns)
        self.prefilling.extendleft(reversed(whole))
        self._prompts = len(whole)
        super()._end_prompts(now_s, done)

    def expire(self, now_s: float) -> None:
        known = len(self.expired)
        super().expire(now_s)
        for request in self.expired[known:]:
            self._turns.remove(request)

    def remove(self, gateway: Gateway, now_s: float) -> list[Request]:
        gone = super().remove(gateway, now_s)
        for request in gone:
            self._turns.remove(request)
        if gone and not self._prompts:
            self._next(now_s)
        return gone

    def clear(self) -> list[Request]:
        self._turns = PieceQueue(self.timing.chunk)
        return super().clear()


class FairWorld(EventWorld):
    """A run in which every replica takes products in turn."""

    def __init__(self, scenario: Scenario, folder: Path, **options: Any) -> None:
        super().__init__(scenario, folder, **options)
        self._products = {t.traffic: t.product or t.traffic for t in scenario.traffic}

    def replica(self, pool: Pool, number: int, name: str) -> Replica:
        replica = super().replica(pool, number, name)
        assert isinstance(replica, EventReplica)
        timing = replica.batch.timing
        replica.batch = FairBatch(timing, replica.batch.max_wait_s, self._products)
        return replica
