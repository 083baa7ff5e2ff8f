"""What others need of a store, in four parts. Every method is one transaction.

All of them raise `Unavailable` when the database cannot be reached; nothing has happened then, or
all of it has. They block: call them from a thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import msgspec
from nearfield.api.keys import Key, Product, Snapshot, Tenant
from nearfield.policy.quota import Claim, Grant


class Directory(Protocol):
    """Tenants, products and keys. Whatever changes gets a revision, higher than all before."""

    def revision(self) -> int:
        """The newest revision: one small read, to be asked every second."""

    def changes(self, since: int) -> Snapshot:
        """Everything that changed after `since`; 0: everything."""

    def tenant(self, name: str) -> Tenant:
        """
        Raises:
            NotFound: there is none.
        """

    def tenants(self, *, after: str | None = None, limit: int | None = None) -> list[Tenant]:
        """By name: those beyond the name `after`, `limit` of them at most."""

    def add_tenant(self, tenant: Tenant) -> None:
        """
        Raises:
            Conflict: the name is taken.
        """

    def change_tenant(self, name: str, change: Callable[[Tenant], Tenant]) -> Tenant:
        """Replace a tenant by what `change` makes of it; nobody else changes it meanwhile.

        Raises:
            NotFound: there is none.
        """

    def product(self, tenant: str, name: str) -> Product:
        """
        Raises:
            NotFound: there is none.
        """

    def products(
        self, tenant: str | None = None, *, after: str | None = None, limit: int | None = None
    ) -> list[Product]:
        """A tenant's by name, likewise; or all, by tenant."""

    def add_product(self, product: Product) -> None:
        """
        Raises:
            Conflict: the name is taken. NotFound: there is no such tenant.
        """

    def change_product(
        self, tenant: str, name: str, change: Callable[[Product], Product]
    ) -> Product:
        """Likewise.

        Raises:
            NotFound: there is none.
        """

    def key(self, key_id: str) -> Key:
        """
        Raises:
            NotFound: there is none.
        """

    def keys(
        self, tenant: str | None = None, *, after: str | None = None, limit: int | None = None
    ) -> list[Key]:
        """A tenant's, or all, oldest first; those that come after the key with the id `after`.

        Raises:
            NotFound: there is no such key among them.
        """

    def add_key(self, key: Key) -> None:
        """
        Raises:
            NotFound: there is no such tenant or product.
        """

    def rotate_key(self, key_id: str, digest: str, *, now_s: float, grace_s: float) -> Key:
        """Give a key another secret; the former one is good for `grace_s` more.

        Raises:
            NotFound: there is none. Conflict: it is revoked.
        """

    def revoke_key(self, key_id: str, *, now_s: float) -> Key:
        """Revoke a key for good; again changes nothing.

        Raises:
            NotFound: there is none.
        """


class Quotas(Protocol):
    """The buckets behind all limits."""

    def renew(self, claims: Sequence[Claim]) -> list[Grant]:
        """Answer claims (`policy.quota.renew`), at most one for each subject and dimension."""

    def sweep(self) -> int:
        """Forget leases that expired long ago; returns how many."""


class Usage(msgspec.Struct, frozen=True):
    """What one request used. Times are Unix seconds.

    A Struct, since one is made and written down for every request: a sixth of a dataclass's time.

    Attributes:
        record_id: names the request: another record of that name is the same one, and not kept.
        outcome: `ok`, or the code of the error. What was cut short was still used.
        guessed: the answer did not tell its tokens: they are estimated.
    """

    record_id: str
    tenant: str
    product: str | None
    key_id: str
    model: str
    version: str
    region: str
    endpoint: str
    operation: str
    outcome: str
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    started_s: float
    duration_s: float
    guessed: bool = False


GroupBy = Literal["tenant", "product", "key", "model", "region", "endpoint", "outcome", "day"]


@dataclass(frozen=True, slots=True)
class UsageTotal:
    """The sum over records that are alike.

    Attributes:
        group: the values of what it is grouped by.
        guessed_requests: those whose tokens are estimated.
    """

    group: tuple[str | None, ...]
    requests: int
    guessed_requests: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    duration_s: float


class Ledger(Protocol):
    """Usage records: added, never changed."""

    def append(self, records: Sequence[Usage]) -> int:
        """Add records; returns how many were not there yet."""

    def totals(
        self,
        by: Sequence[GroupBy],
        *,
        tenant: str | None = None,
        since_s: float | None = None,
        until_s: float | None = None,
        skip: int = 0,
        limit: int | None = None,
    ) -> list[UsageTotal]:
        """Sums over requests that started in [since, until), ordered by group: all but the first
        `skip`, `limit` of them at most."""


@dataclass(frozen=True, slots=True)
class Claimed:
    """The request is the caller's to execute, as long as it says that it lives.

    Attributes:
        attempt: to be given back with the answer, so that nobody else's counts.
        orphaned: an earlier attempt ended without a word: it may have been executed.
    """

    attempt: int
    orphaned: bool


@dataclass(frozen=True, slots=True)
class InFlight:
    """Somebody else is executing it. lease_left_s: or dead, if it is not heard of for so long."""

    lease_left_s: float


@dataclass(frozen=True, slots=True)
class Answered:
    """It was executed; this is its answer."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


@dataclass(frozen=True, slots=True)
class OtherRequest:
    """The same idempotency key came with another request."""


class Idempotency(Protocol):
    """Who executes a request that may come twice, and what came of it."""

    def claim(
        self, tenant: str, key: str, *, fingerprint: str, owner: str, lease_s: float
    ) -> Claimed | InFlight | Answered | OtherRequest:
        """Ask to execute a request.

        Args:
            key: the caller's `Idempotency-Key`. fingerprint: of the request: path and body.
            owner: the process that asks, this time it runs: another name after each start.
            lease_s: once it has not said for so long that it lives, and `DOUBT_S` after somebody
                noticed, others may have what it has claimed.
        """

    def lives(self, owner: str, *, lease_s: float) -> None:
        """Still executing all that it has claimed."""

    def abandon(self, tenant: str, key: str, attempt: int) -> bool:
        """What came of it is not known: the next one finds it orphaned. False: as in `release`."""

    def complete(
        self, tenant: str, key: str, attempt: int, answer: Answered, *, keep_s: float
    ) -> bool:
        """Keep the answer for so long. False: somebody else has it now."""

    def release(self, tenant: str, key: str, attempt: int) -> bool:
        """Nothing was executed: the next one may. False: somebody else has it now."""

    def sweep(self) -> int:
        """Forget what is older than it is kept; returns how many."""
