"""Replicas that take products in turn, in the events mode: `policy.fair` in place of first come.

Only the order differs from `engine.Batch`: one prompt after another, none interrupted, as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nearfield.policy.fair import FairQueue
from nearfield.simulator.engine import Batch, Request, Timing
from nearfield.simulator.events import EventWorld
from nearfield.simulator.fleet import Pool, Replica
from nearfield.simulator.lane import EventReplica
from nearfield.simulator.parts import Gateway
from nearfield.simulator.scenario import Scenario


class FairBatch(Batch):
    """A batch whose next prompt is that of the product whose turn it is.

    One prompt is in the batch and not computed, as in `serving.engines.generate`; the others wait,
    where they can still be overtaken. `waiting` has them by age.
    """

    __slots__ = ("_products", "_turns")

    def __init__(self, timing: Timing, max_wait_s: float, products: Mapping[str, str]) -> None:
        """
        Args:
            products: by the name of their traffic.
        """
        super().__init__(timing, max_wait_s)
        self._products = products
        self._turns: FairQueue[Request] = FairQueue()

    def add(self, request: Request, now_s: float) -> bool:
        if self.waiting or self.prefilling or not self._fits(request):
            self.waiting.append(request)
            product = self._products[request.source.name]
            self._turns.push(request, product, max(1.0, request.prompt))
            return False
        return self._enter(request, now_s)

    def run(self, now_s: float) -> list[Request]:
        done = super().run(now_s)
        if self.waiting and not self.prefilling:
            self._join(now_s)
            self._reckon()
        return done

    def _join(self, now_s: float) -> None:
        self.expire(now_s)
        while not self.prefilling:
            request = self._turns.peek()
            if request is None or not self._fits(request):
                return
            self._turns.pop()
            self.waiting.remove(request)
            self._enter(request, now_s)

    def expire(self, now_s: float) -> None:
        known = len(self.expired)
        super().expire(now_s)
        for request in self.expired[known:]:
            self._turns.remove(request)

    def remove(self, gateway: Gateway, now_s: float) -> list[Request]:
        for request in [each for each in self.waiting if each.gateway is gateway]:
            self._turns.remove(request)
        return super().remove(gateway, now_s)

    def clear(self) -> list[Request]:
        self._turns = FairQueue()
        return super().clear()


class FairWorld(EventWorld):
    """A run in which every replica takes products in turn."""

    def __init__(self, scenario: Scenario, folder: Path, **options: Any) -> None:
        super().__init__(scenario, folder, **options)
        self._products = {t.traffic: t.product or t.traffic for t in scenario.traffic}

    def replica(self, pool: Pool, number: int, name: str) -> Replica:
        replica = super().replica(pool, number, name)
        assert isinstance(replica, EventReplica)
        batch = replica.batch
        replica.batch = FairBatch(batch.timing, batch.max_wait_s, self._products)
        return replica
