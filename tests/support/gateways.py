"""Gateways with the real Gate, Retries and limiter over a real store, on real sockets.

    python -m tests.support.gateways DATABASE_URL UPSTREAM_PORT LEASE_S

serves one in a process of its own, which can be killed, and prints its port.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import uvloop
from nearfield.api.passport import PassportKeys
from nearfield.core.errors import NearfieldError
from nearfield.edge.decisions import Routed
from nearfield.edge.gate import KeyGate
from nearfield.edge.idempotency import LEASE_S, MOST_BYTES, KeyedRequests
from nearfield.edge.limiter import LimitedRouter
from nearfield.edge.proxy.limits import Limits as ProxyLimits
from nearfield.edge.proxy.plain import Spread
from nearfield.edge.proxy.ports import Attempt, Grant, Leg, Request, Target
from nearfield.edge.retries import BudgetRetries
from nearfield.edge.suspects import Suspects
from nearfield.policy.limit import Limit
from nearfield.store.follow import KeyFollower
from nearfield.store.ports import Idempotency, Quotas
from nearfield.store.shares import ShareKeeper
from nearfield.store.sql import Store

from tests.support.edge import Forwarding, forwarding
from tests.support.gates import PEPPER, leg_of
from tests.support.hosting import until


class Replicas(Spread):
    """Replicas of one region: those that were not tried first, the emptier of two."""

    def __init__(self, targets: Sequence[Target]) -> None:
        super().__init__(targets, seed=1)
        self._legs = [leg_of(target, replica=f"r{n}") for n, target in enumerate(targets)]

    def pick(
        self, request: Request, grant: Grant, attempts: Sequence[Attempt]
    ) -> Leg | NearfieldError:
        found = super().pick(request, grant, attempts)
        if isinstance(found, Routed) and grant.about.trial is not None:
            return replace(found, trial=True)
        return found


@dataclass
class Gateway:
    """A gateway, and what stands at its door."""

    running: Forwarding
    gate: KeyGate
    keyed: KeyedRequests
    suspects: Suspects
    limited: LimitedRouter
    router: Any


@asynccontextmanager
async def gateway(
    store: Store,
    targets: Sequence[Target],
    *,
    quotas: Quotas | None = None,
    idempotency: Idempotency | None = None,
    passports: PassportKeys | None = None,
    router: Any = None,
    limit: Limit | None = None,
    limits: ProxyLimits | None = None,
    lease_s: float = LEASE_S,
    most_bytes: int = MOST_BYTES,
    wait_s: float = 5.0,
) -> AsyncIterator[Gateway]:
    """A gateway before these replicas. Afterwards its books must balance."""
    async with AsyncExitStack() as stack:
        follower = await stack.enter_async_context(
            KeyFollower(store.directory, PEPPER, poll_s=0.05)
        )
        shares = await stack.enter_async_context(ShareKeeper(quotas or store.quotas, wait_s=wait_s))
        keyed = await stack.enter_async_context(
            KeyedRequests(
                idempotency or store.idempotency,
                owner="test",
                lease_s=lease_s,
                most_bytes=most_bytes,
            )
        )
        suspects = Suspects()
        retries = BudgetRetries(suspects)
        inner = router or Replicas(targets)
        limited = LimitedRouter(inner, retries, limit=limit)
        gate = KeyGate(
            suspects,
            table=follower.table,
            shares=shares,
            keyed=keyed,
            passports=passports or PassportKeys.generate(),
        )
        async with forwarding(
            targets, gate=gate, router=limited, retries=retries, limits=limits
        ) as running:
            yield Gateway(running, gate, keyed, suspects, limited, inner)
        await until(lambda: not keyed.unbalanced, 5.0)
        assert limited.unbalanced == 0
        if isinstance(inner, Replicas):
            assert set(inner.running.values()) <= {0}
        assert all(share.reserved == 0 for share in shares._shares.values())


async def serve(url: str, upstream_port: int, lease_s: float) -> None:
    target = Target("127.0.0.1", upstream_port)
    async with gateway(Store(url), [target], lease_s=lease_s) as own:
        print(own.running.address[1], flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
