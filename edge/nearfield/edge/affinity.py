"""Who has seen the beginning of this prompt: a bounded memory of prefixes and sessions.

An engine that keeps its KV cache does not compute again what it has computed for an earlier prompt
with the same beginning. Nothing of a prompt is kept here: only hashes, under a key of this process,
of its first half kilobyte, kilobyte, and so on, seeded with the tenant (caches are not shared
between tenants). A belief costs nothing but a worse choice where it is wrong.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

MOST = 1 << 16
"""Prefixes remembered, about 200 bytes each. The oldest are forgotten first."""
FORGOTTEN_S = 300.0
"""A cache that has not been used for so long has made room for others."""
HOLDERS = 4
"""Upstreams remembered for one prefix: a system prompt that all share is soon everywhere."""
EDGES = (512, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768)
"""Lengths of prefixes, bytes of the body: each tells at least two thirds of what is shared."""
BYTES_PER_TOKEN = 4
"""Of English text, near enough for a comparison."""

Keys = list[tuple[int, int]]
"""A request's prefixes, the shortest first: hash, and the tokens that it stands for."""


class Holder(NamedTuple):
    """Somebody who has a prefix. replica: its number; -1: another region's, which is not known."""

    endpoint: int
    replica: int
    tokens: int


class Found(NamedTuple):
    """Who has how much of a request.

    Attributes:
        endpoint: who has the most of it; -1: nobody. tokens: that most.
        replicas: tokens by the replica's number.
    """

    endpoint: int
    tokens: int
    replicas: dict[int, int]


NOBODY = Found(-1, 0, {})


class Affinity:
    """See the module."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, most: int = MOST) -> None:
        self._clock = clock
        self._most = most
        self._seen: dict[int, tuple[float, tuple[Holder, ...]]] = {}

    def __len__(self) -> int:
        return len(self._seen)

    def keys(self, tenant: str, session: bytes | None, prompt_tokens: int, body: bytes) -> Keys:
        """What a request is remembered by."""
        keys: Keys = []
        chained, start = hash(tenant), 0
        for edge in EDGES:
            if edge > len(body):
                break
            chained = hash((chained, body[start:edge]))
            keys.append((chained, edge // BYTES_PER_TOKEN))
            start = edge
        if session is not None:  # all of it, as far as the last turn went
            keys.append((hash((tenant, session)), prompt_tokens))
        return keys

    def find(self, keys: Keys) -> Found:
        """Who has seen the most of it."""
        seen = self._seen
        oldest_s = self._clock() - FORGOTTEN_S
        replicas: dict[int, int] = {}
        endpoint, most = -1, 0
        for key, tokens in reversed(keys):
            entry = seen.get(key)
            if entry is None or entry[0] < oldest_s:
                continue
            for holder in entry[1]:
                held = min(tokens, holder.tokens)
                if held > most:
                    endpoint, most = holder.endpoint, held
                if holder.replica >= 0 and held > replicas.get(holder.replica, 0):
                    replicas[holder.replica] = held
        return Found(endpoint, most, replicas) if endpoint >= 0 else NOBODY

    def saw(self, keys: Keys, endpoint: int, replica: int) -> None:
        """It was sent there."""
        seen, now_s = self._seen, self._clock()
        for key, tokens in keys:
            entry = seen.pop(key, None)
            others: tuple[Holder, ...] = ()
            if entry is not None:
                others = tuple(
                    h for h in entry[1] if h.endpoint != endpoint or h.replica != replica
                )[: HOLDERS - 1]
            seen[key] = (now_s, (Holder(endpoint, replica, tokens), *others))
        while len(seen) > self._most:
            del seen[next(iter(seen))]
