"""Products with a limit on their tokens, in the events mode: production's `policy.quota`.

One gateway leases from the store's bucket, as `edge.limiter` does. What a request reserves is what
it uses, so it settles at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nearfield.policy import quota
from nearfield.simulator.events import EventWorld
from nearfield.simulator.parts import Source
from nearfield.simulator.scenario import Scenario


class Meter:
    """One product's limit: the store's bucket, and the gateway's share of it."""

    def __init__(self, product: str, tokens_per_minute: int) -> None:
        limit = quota.Limits(tokens_per_minute=tokens_per_minute).of("tokens")
        assert limit is not None
        self._limit = limit
        self._share = quota.Share(f"product:{product}", "tokens", limit, now_s=0.0)
        self._bucket: quota.Bucket | None = None
        self._leases: dict[str, quota.Lease] = {}
        self._claims = 0

    def admits(self, tokens: int, now_s: float) -> bool:
        """Whether a request of so many tokens may come in; then they are spent."""
        share = self._share
        if share.available(now_s) < tokens:
            self._renew((tokens,), now_s)
        elif share.due(now_s):
            self._renew((), now_s)
        found = quota.reserve([share], now_s, tokens=tokens, stream=False)
        if isinstance(found, quota.Lack):
            return False
        found.settle(tokens)
        return True

    def _renew(self, waiting: tuple[int, ...], now_s: float) -> None:
        self._claims += 1
        claim = self._share.claim(now_s, holder=f"gateway-{self._claims}", waiting=waiting)
        self._bucket, lease, grant = quota.renew(
            self._limit, self._bucket, self._leases, claim, now_s=now_s
        )
        self._leases = {claim.holder: lease}
        self._share.accept(claim, grant, asked_s=now_s)


class LimitedWorld(EventWorld):
    """A run in which some traffic is limited."""

    def __init__(
        self, scenario: Scenario, folder: Path, *, limits: Mapping[str, tuple[str, int]],
        **options: Any,
    ) -> None:  # fmt: skip
        """
        Args:
            limits: product and tokens a minute, by traffic. Traffic of one product shares them.
        """
        super().__init__(scenario, folder, **options)
        meters = {product: Meter(product, most) for product, most in limits.values()}
        self._meters = {traffic: meters[product] for traffic, (product, _) in limits.items()}

    def _arrive(self, source: Source, prompt: int, answer: int) -> None:
        meter = self._meters.get(source.name)
        if meter is not None and not meter.admits(prompt + answer, self.now_s):
            source.tally.came(self.now_s)
            source.tally.failed("refused", self.now_s, 1, "over its limit")
            return
        super()._arrive(source, prompt, answer)
