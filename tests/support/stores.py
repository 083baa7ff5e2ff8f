"""Stores in memory, which fail when they are told to."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence

from nearfield.core.errors import Unavailable
from nearfield.policy.quota import Bucket, Claim, Grant, Lease, Limits, renew
from nearfield.store.ports import Answered, Claimed, InFlight, OtherRequest


class Fragile:
    """`gone`: it cannot be reached."""

    def __init__(self) -> None:
        self.gone = False
        self.lock = threading.Lock()

    def check(self) -> None:
        if self.gone:
            raise Unavailable("gone", code="database_unavailable", retry_after_s=2.0)


class MemoryQuotas(Fragile):
    """Buckets of the same limits for everybody."""

    def __init__(self, limits: Limits) -> None:
        super().__init__()
        self.limits = limits
        self.buckets: dict[tuple[str, str], Bucket] = {}
        self.leases: dict[tuple[str, str], dict[str, Lease]] = {}

    def renew(self, claims: Sequence[Claim]) -> list[Grant]:
        self.check()
        grants = []
        with self.lock:
            for claim in claims:
                limit = self.limits.of(claim.dimension)
                assert limit is not None
                place = claim.subject, claim.dimension
                leases = self.leases.setdefault(place, {})
                self.buckets[place], leases[claim.holder], grant = renew(
                    limit, self.buckets.get(place), leases, claim, now_s=time.monotonic()
                )
                grants.append(grant)
        return grants

    def sweep(self) -> int:
        return 0


class MemoryIdempotency(Fragile):
    """See `store.ports.Idempotency`."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[tuple[str, str], dict[str, object]] = {}
        self.claimed = 0

    def claim(
        self, tenant: str, key: str, *, fingerprint: str, owner: str, lease_s: float
    ) -> Claimed | InFlight | Answered | OtherRequest:
        self.check()
        now_s = time.monotonic()
        with self.lock:
            row = self.rows.setdefault(
                (tenant, key), {"fingerprint": fingerprint, "attempt": 0, "ends_s": 0.0}
            )
            if row["fingerprint"] != fingerprint:
                return OtherRequest()
            if isinstance(answer := row.get("answer"), Answered):
                return answer
            ends_s, attempt = row["ends_s"], row["attempt"]
            assert isinstance(ends_s, float)
            assert isinstance(attempt, int)
            if ends_s > now_s:
                return InFlight(ends_s - now_s)
            row |= {"attempt": attempt + 1, "ends_s": now_s + lease_s, "owner": owner}
            self.claimed += 1
            return Claimed(attempt + 1, orphaned=ends_s != 0.0)

    def lives(self, owner: str, *, lease_s: float) -> None:
        self.check()
        with self.lock:
            for row in self.rows.values():
                if row.get("owner") == owner and row["ends_s"] != 0.0:
                    row["ends_s"] = time.monotonic() + lease_s

    def abandon(self, tenant: str, key: str, attempt: int) -> bool:
        return self._change(tenant, key, attempt, ends_s=-math.inf, owner="")

    def complete(
        self, tenant: str, key: str, attempt: int, answer: Answered, *, keep_s: float
    ) -> bool:
        return self._change(tenant, key, attempt, answer=answer)

    def release(self, tenant: str, key: str, attempt: int) -> bool:
        return self._change(tenant, key, attempt, ends_s=0.0)

    def sweep(self) -> int:
        return 0

    def _change(self, tenant: str, key: str, attempt: int, **values: object) -> bool:
        self.check()
        with self.lock:
            row = self.rows[tenant, key]
            if row["attempt"] != attempt or row["ends_s"] == 0.0 or "answer" in row:
                return False
            row |= values
            return True
