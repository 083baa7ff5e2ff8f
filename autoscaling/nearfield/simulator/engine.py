"""How long requests take in a batch: one by one, and in the mean.

The engine is an iteration-level batcher (Yu et al., "Orca", OSDI 2022) with chunked prefill
(Agrawal et al., "Sarathi-Serve", OSDI 2024), which is what `serving.engines.generate` and vLLM do:
each iteration makes one token for every sequence that decodes, and computes up to a chunk of the
oldest prompt. With n sequences decoding an iteration takes

    step(n) = step_s + n x sequence_s          and, while a prompt is computed,
    step(n) + chunk x token_s

Time is not cut into iterations here. Between two changes of who is in the batch, all that decode go
on at one token an iteration, and the oldest prompt at a chunk an iteration: both are straight lines
until the next prompt or answer is done. So a request costs two events, however long its answer is.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

from nearfield.policy.admission import admit
from nearfield.simulator import scenario as s

if TYPE_CHECKING:
    from nearfield.simulator.fleet import Pool
    from nearfield.simulator.lane import EventReplica
    from nearfield.simulator.parts import Gateway, Source

DONE = 1e-6
"""Tokens that are none: what is left of rounding."""


@dataclass(frozen=True, slots=True)
class Timing:
    """An engine's speed, seconds and tokens.

    Attributes:
        token_s: of a prompt's token. step_s: of an iteration, sequence_s: of each sequence in it.
        chunk: prompt tokens in an iteration.
        slots: sequences at once. kv_tokens: what their prompts and answers may have together.
    """

    token_s: float
    step_s: float
    sequence_s: float
    chunk: int
    slots: int
    max_queued: int
    kv_tokens: int | None = None

    @classmethod
    def of(cls, engine: s.Engine) -> Timing:
        return cls(
            1.0 / engine.prefill_tokens_per_s,
            engine.step_ms / 1000,
            engine.step_ms_per_sequence / 1000,
            engine.prefill_chunk_tokens,
            engine.max_running,
            engine.max_queued,
            engine.kv_tokens,
        )

    def slower(self, factor: float) -> Timing:
        """The same engine, taking so many times as long."""
        return Timing(
            self.token_s * factor,
            self.step_s * factor,
            self.sequence_s * factor,
            self.chunk,
            self.slots,
            self.max_queued,
            self.kv_tokens,
        )

    def rows(self, prompt: float, answer: float) -> float:
        """Sequences that fit at once, by slots and by KV cache."""
        if self.kv_tokens is None:
            return float(self.slots)
        return max(1.0, min(self.slots, self.kv_tokens / max(1.0, prompt + answer)))

    def full_rps(self, prompt: float, answer: float) -> float:
        """Requests a second of a full replica, of so many tokens in the mean.

        Each takes the time of its prompt, and its share of the iterations that its answer is long.
        The share is one by how many decode at once: all places, or as many as answers are kept
        going by one chunk of prompts an iteration.
        """
        decoding = self.rows(prompt, answer)
        iterations = prompt / self.chunk
        if answer > iterations * decoding:
            iterations = answer / decoding
        elif iterations > 0:
            decoding = answer / iterations
        busy_s = prompt * self.token_s
        busy_s += iterations * (self.step_s + decoding * self.sequence_s)
        return 1.0 / max(busy_s, 1e-9)

    def alone_s(self, prompt: float, answer: float) -> float:
        """How long a request takes with nobody else there."""
        return self.prefill_s(prompt, 0.0) + answer * (self.step_s + self.sequence_s)

    def prefill_s(self, prompt: float, decoding: float) -> float:
        """How long a prompt takes while so many sequences decode."""
        step_s = self.step_s + decoding * self.sequence_s
        return prompt * (self.token_s + step_s / self.chunk)

    def decode(self, rate_rps: float, prompt: float, decoding: float) -> float:
        """Seconds between two tokens of an answer: an iteration, and its share of prompts.

        Args:
            rate_rps: requests a second at this replica. decoding: sequences.
        """
        free = max(0.02, 1.0 - rate_rps * prompt * self.token_s)
        return (self.step_s + max(1.0, decoding) * self.sequence_s) / free


class Request:
    """One request in the events mode.

    Attributes:
        came_s: at the gateway. source: who sent it. tokens: its work as the policy sees it.
        gateway: where it came in. pool, replica: where it is now.
        joined_s: when it got its place in the batch. first_s: when its first token came out.
        rtt_s: from the gateway to where it is computed, and from the client to the gateway.
        runs: replicas that began to compute it. region: the first one. crossings: see
            `policy.retry`.
        ended: its answer is complete, or it was refused or lost.
    """

    __slots__ = (
        "answer", "came_s", "crossings", "deadline_s", "ended", "first_s", "gateway", "joined_s",
        "pool", "prompt", "region", "replica", "rtt_s", "runs", "source", "tokens",
    )  # fmt: skip

    def __init__(
        self, came_s: float, source: Source, gateway: Gateway, prompt: int, answer: int
    ) -> None:
        self.came_s = came_s
        self.deadline_s = came_s + source.timeout_s
        self.source = source
        self.gateway = gateway
        self.prompt = prompt
        self.answer = answer
        self.tokens = 0.0
        self.pool: Pool | None = None
        self.replica: EventReplica | None = None
        self.joined_s = self.first_s = -1.0
        self.rtt_s = 0.0
        self.runs = self.crossings = 0
        self.region = ""
        self.ended = False


class Batch:
    """What one replica computes, and who waits for it.

    `now` of every call must not run backwards. After a call `next_s` says when the next prompt or
    answer is done, if nothing else changes.

    Attributes:
        decoding: (progress at which the answer is complete, tie, request), a heap.
        prefilling: those in the batch whose prompt is not computed, the oldest first.
        waiting: those that are not in the batch.
        progress: iterations so far, as one that decoded through all of them would count.
        late: how many joined later than `max_wait_s` after they came, since it was last set to 0.
        expired: those whose deadline passed before their turn. Whoever reads it empties it.
    """

    __slots__ = (
        "_at_s", "_head", "_reserved", "_step_s", "_ties", "_token_s", "decoding", "expired",
        "late", "max_wait_s", "next_s", "prefilling", "progress", "timing", "waiting",
    )  # fmt: skip

    def __init__(self, timing: Timing, max_wait_s: float) -> None:
        self.timing = timing
        self.max_wait_s = max_wait_s
        self.decoding: list[tuple[float, int, Request]] = []
        self.prefilling: deque[Request] = deque()
        self.waiting: deque[Request] = deque()
        self.expired: list[Request] = []
        self.progress = 0.0
        self.late = 0
        self.next_s = math.inf
        self._at_s = 0.0
        self._head = 0.0  # tokens of the oldest prompt that are not computed
        self._step_s = timing.step_s  # of an iteration now
        self._token_s = math.inf  # of a prompt's token now
        self._ties = 0
        self._reserved: dict[Request, int] = {}

    @property
    def running(self) -> int:
        return len(self.decoding) + len(self.prefilling)

    @property
    def load(self) -> int:
        return len(self.decoding) + len(self.prefilling) + len(self.waiting)

    def add(self, request: Request, now_s: float) -> bool:
        """Take a request; whether `next_s` has changed."""
        if self.waiting or not self._fits(request):
            self.waiting.append(request)
            return False
        return self._enter(request, now_s)

    def _fits(self, request: Request) -> bool:
        timing = self.timing
        if len(self.decoding) + len(self.prefilling) >= timing.slots:
            return False
        if timing.kv_tokens is None:
            return True
        joining, _ = admit(
            list(self._reserved.values()),
            [(1, min(timing.kv_tokens, request.prompt + request.answer))],
            kv_tokens=timing.kv_tokens,
            max_rows=timing.slots,
            columns=0,
        )
        return joining == 1

    def _enter(self, request: Request, now_s: float) -> bool:
        if now_s - request.came_s > self.max_wait_s:
            self.late += 1
        request.joined_s = now_s
        request.runs += 1
        if self.timing.kv_tokens is not None:
            tokens = min(self.timing.kv_tokens, request.prompt + request.answer)
            self._reserved[request] = tokens
        self.prefilling.append(request)
        if len(self.prefilling) > 1:
            return False  # it waits for prompts before it; nothing is slower than it was
        self._advance(now_s)
        self._head = float(request.prompt)
        self._reckon()
        return True

    def _advance(self, now_s: float) -> None:
        passed_s = now_s - self._at_s
        if passed_s > 0.0:
            if self._step_s > 0.0:
                self.progress += passed_s / self._step_s
            if self.prefilling:
                self._head -= passed_s / self._token_s
        self._at_s = now_s

    def _reckon(self) -> None:
        """How fast everything goes from now on, and when the next thing is done."""
        timing, decoding = self.timing, self.decoding
        step_s = timing.step_s + len(decoding) * timing.sequence_s
        next_s = math.inf
        if self.prefilling:
            self._token_s = timing.token_s + step_s / timing.chunk
            step_s += timing.chunk * timing.token_s
            next_s = self._at_s + max(0.0, self._head) * self._token_s
            if next_s <= self._at_s:  # less than the clock can tell
                self._head = 0.0
        self._step_s = step_s
        if decoding:
            first = decoding[0][0]
            done_s = self._at_s + max(0.0, first - self.progress) * step_s
            if done_s <= self._at_s:
                self.progress = max(self.progress, first)
            if done_s < next_s:
                next_s = done_s
        self.next_s = next_s

    def run(self, now_s: float) -> list[Request]:
        """What is done by now: the requests whose answers are complete.

        Those whose prompt is done get their `first_s`.
        """
        self._advance(now_s)
        done: list[Request] = []
        decoding, prefilling = self.decoding, self.prefilling
        while decoding and decoding[0][0] - self.progress <= DONE:
            done.append(heappop(decoding)[2])
        if prefilling and self._head <= DONE:
            request = prefilling.popleft()
            if request.answer > 0:
                timing = self.timing
                request.first_s = now_s + timing.step_s + (len(decoding) + 1) * timing.sequence_s
                self._ties += 1
                heappush(decoding, (self.progress + request.answer, self._ties, request))
            else:
                request.first_s = now_s
                done.append(request)
            if prefilling:
                self._head = float(prefilling[0].prompt)
        if not decoding:
            self.progress = 0.0  # a small number is an exact one
        if done:
            if self._reserved:
                for request in done:
                    self._reserved.pop(request, None)
            if self.waiting:
                self._join(now_s)
        self._reckon()
        return done

    def _join(self, now_s: float) -> None:
        waiting = self.waiting
        while waiting:
            request = waiting[0]
            if request.deadline_s < now_s:
                self.expired.append(waiting.popleft())
                continue
            if not self._fits(request):
                return
            waiting.popleft()
            self._enter(request, now_s)

    def expire(self, now_s: float) -> None:
        """Put those into `expired` that have waited beyond their deadline."""
        waiting = self.waiting
        while waiting and waiting[0].deadline_s < now_s:
            self.expired.append(waiting.popleft())

    def change(self, timing: Timing, now_s: float) -> None:
        """Go on at another speed."""
        self._advance(now_s)
        self.timing = timing
        self._reckon()

    def remove(self, gateway: Gateway, now_s: float) -> list[Request]:
        """Drop all that came through this gateway: their clients are gone."""
        self._advance(now_s)
        oldest = self.prefilling[0] if self.prefilling else None
        gone = [entry[2] for entry in sorted(self.decoding) if entry[2].gateway is gateway]
        gone += [request for request in self.prefilling if request.gateway is gateway]
        gone += [request for request in self.waiting if request.gateway is gateway]
        if not gone:
            return gone
        self.decoding = [entry for entry in self.decoding if entry[2].gateway is not gateway]
        heapify(self.decoding)
        self.prefilling = deque(r for r in self.prefilling if r.gateway is not gateway)
        self.waiting = deque(r for r in self.waiting if r.gateway is not gateway)
        for request in gone:
            self._reserved.pop(request, None)
        if self.prefilling and self.prefilling[0] is not oldest:
            self._head = float(self.prefilling[0].prompt)
        self._join(now_s)
        self._reckon()
        return gone

    def clear(self) -> list[Request]:
        """Drop everything, as when the replica dies; what it had."""
        had = [entry[2] for entry in sorted(self.decoding)]
        had += [*self.prefilling, *self.waiting]
        self.decoding = []
        self.prefilling.clear()
        self.waiting.clear()
        self._reserved = {}
        self.next_s = math.inf
        return had
