"""How long requests take in a batch: one by one, and in the mean.

The engine is an iteration-level batcher (Yu et al., "Orca", OSDI 2022) with chunked prefill
(Agrawal et al., "Sarathi-Serve", OSDI 2024), which is what `serving.engines.generate` and vLLM do:
each iteration makes one token for every sequence that decodes, and computes up to a chunk of the
oldest prompts. With n sequences decoding and so many tokens of prompts an iteration takes

    step_s + n x sequence_s + tokens x token_s

and one with a single sequence and nothing else `one_s`: engines have a shorter way for it, and one
answer is quicker sent than two.

A prompt begins with an iteration and takes whole ones; short prompts that are there together share
one. The first token comes out of the last of them.

Iterations are not events. Between two changes of who is in the batch all take the same time: their
number, a fraction meanwhile, is the clock of everything that is computed. So a request costs two
events, however long its answer is. What is not as it is in life: a prompt that comes during an
iteration waits for the next one, and its tokens' time is spread over that wait as well.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

from nearfield.policy.admission import admit
from nearfield.simulator import scenario as s

if TYPE_CHECKING:
    from nearfield.simulator.fleet import Pool
    from nearfield.simulator.lane import EventReplica
    from nearfield.simulator.parts import Gateway, Source

DONE = 1e-6
"""Iterations that are none: what is left of rounding."""


@dataclass(frozen=True, slots=True)
class Timing:
    """An engine's speed, seconds and tokens.

    Attributes:
        token_s: of a prompt's token. step_s: of an iteration, sequence_s: of each sequence in it;
        one_s: of one with a single sequence; absent: like the others.
        request_s: before and after the engine, while others compute: receiving, tokenising.
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
    one_s: float = math.nan
    request_s: float = 0.0

    def __post_init__(self) -> None:
        if math.isnan(self.one_s):
            object.__setattr__(self, "one_s", self.step_s + self.sequence_s)

    @classmethod
    def of(cls, engine: s.Engine) -> Timing:
        one_ms = engine.step_ms_alone
        return cls(
            1.0 / engine.prefill_tokens_per_s,
            engine.step_ms / 1000,
            engine.step_ms_per_sequence / 1000,
            engine.prefill_chunk_tokens,
            engine.max_running,
            engine.max_queued,
            engine.kv_tokens,
            math.nan if one_ms is None else one_ms / 1000,
            engine.request_ms / 1000,
        )

    def slower(self, factor: float) -> Timing:
        """The same engine, taking so many times as long."""
        return replace(
            self,
            token_s=self.token_s * factor,
            step_s=self.step_s * factor,
            sequence_s=self.sequence_s * factor,
            one_s=self.one_s * factor,
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
        iterations, tokens = prompt / self.chunk, max(0.0, answer - 1.0)
        if tokens > iterations * decoding:
            iterations = tokens / decoding
        elif iterations > 0:
            decoding = tokens / iterations
        busy_s = prompt * self.token_s
        busy_s += iterations * (self.step_s + decoding * self.sequence_s)
        return 1.0 / max(busy_s, 1e-9)

    def alone_s(self, prompt: float, answer: float) -> float:
        """How long a request takes with nobody else there."""
        return self.prefill_s(prompt, 0.0) + max(0.0, answer - 1.0) * self.one_s

    def prefill_s(self, prompt: float, decoding: float) -> float:
        """How long a prompt takes while so many sequences decode."""
        step_s = self.step_s + decoding * self.sequence_s
        return prompt * self.token_s + max(1, math.ceil(prompt / self.chunk)) * step_s

    def mean_prefill_s(self, prompt: float, decoding: float) -> float:
        """Likewise, of prompts with this mean: whole iterations, half of one more than the mean."""
        step_s = self.step_s + decoding * self.sequence_s
        return prompt * self.token_s + max(1.0, prompt / self.chunk + 0.5) * step_s

    def prompts_s(self, prompt: float, decoding: float) -> float:
        """Seconds between two prompts where they come one after the other, short ones together."""
        step_s = self.step_s + decoding * self.sequence_s
        return prompt * (self.token_s + step_s / self.chunk)

    def decode_s(self, rate_rps: float, prompt: float, decoding: float) -> float:
        """Seconds between two tokens of an answer: an iteration, and its share of prompts.

        Args:
            rate_rps: requests a second at this replica. decoding: sequences.
        """
        free = max(0.02, 1.0 - rate_rps * prompt * self.token_s)
        step_s = self.step_s + max(1.0, decoding) * self.sequence_s
        if decoding < 2.0:  # the fewer there are in the mean, the more often one is alone
            shorter_s = self.step_s + self.sequence_s - self.one_s
            step_s -= min(1.0, 2.0 - decoding) * shorter_s
        return step_s / free


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

    The time of every call must not run backwards. After a call `next_s` says when the next prompt
    or answer is done, if nothing else changes.

    Attributes:
        decoding: (iteration with which the answer is complete, tie, request), a heap.
        prefilling: those in the batch whose prompt is not computed, the oldest first.
        waiting: those that are not in the batch.
        progress: iterations so far; from 0 again where nothing decodes.
        late: how many joined later than `max_wait_s` after they came, since it was last set to 0.
        expired: those whose deadline passed before their turn. Whoever reads it empties it.
    """

    __slots__ = (
        "_at_s", "_iteration_s", "_prompts", "_prompts_end", "_reserved", "_ties", "_tokens_s",
        "decoding", "expired", "late", "max_wait_s", "next_s", "prefilling", "progress", "timing",
        "waiting",
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
        self._prompts = 0  # the oldest in `prefilling` that are being computed
        self._prompts_end = math.inf  # the iteration with which they are done
        self._tokens_s = 0.0  # what they add to an iteration
        self._iteration_s = timing.step_s
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
        if self._prompts:
            return False  # it waits for the prompts before it; nothing is slower than it was
        self._advance(now_s)
        self._begin_prompts()
        self._reckon()
        return True

    def _begin_prompts(self) -> None:
        """With the next iteration, the oldest prompt; and those behind it that fit in its chunk."""
        prefilling, chunk = self.prefilling, self.timing.chunk
        tokens, count = prefilling[0].prompt, 1
        while count < len(prefilling) and tokens + prefilling[count].prompt <= chunk:
            tokens += prefilling[count].prompt
            count += 1
        self._compute(count, tokens)

    def _compute(self, count: int, tokens: float) -> None:
        """With the next iteration, so many of the oldest prompts, which have so many tokens."""
        timing = self.timing
        if not self.decoding:
            self.progress = 0.0  # a small number is an exact one
        begin = math.ceil(self.progress - DONE)
        self._prompts = count
        self._prompts_end = float(begin + max(1, math.ceil(tokens / timing.chunk)))
        self._tokens_s = tokens * timing.token_s / (self._prompts_end - self.progress)

    def _advance(self, now_s: float) -> None:
        passed_s = now_s - self._at_s
        if passed_s > 0.0:
            if self._prompts or self.decoding:
                self.progress += passed_s / self._iteration_s
            self._at_s = now_s

    def _reckon(self) -> None:
        """How long an iteration takes from now on, and when the next thing is done."""
        timing, decoding = self.timing, self.decoding
        end = self._prompts_end
        if decoding and decoding[0][0] < end:
            end = decoding[0][0]
        if self._prompts or len(decoding) != 1:
            iteration_s = timing.step_s + len(decoding) * timing.sequence_s + self._tokens_s
        else:
            iteration_s = timing.one_s
        self._iteration_s = iteration_s
        next_s = self._at_s + (end - self.progress) * iteration_s
        if next_s <= self._at_s:  # less than the clock can tell
            next_s = self._at_s
            self.progress = max(self.progress, end)
        self.next_s = next_s

    def run(self, now_s: float) -> list[Request]:
        """What is done by now: the requests whose answers are complete.

        Those whose prompt is done get their `first_s`.
        """
        self._advance(now_s)
        done: list[Request] = []
        decoding = self.decoding
        while decoding and decoding[0][0] - self.progress <= DONE:
            self.progress = max(self.progress, decoding[0][0])
            done.append(heappop(decoding)[2])
        if self._prompts_end - self.progress <= DONE:
            self._end_prompts(now_s, done)
        if done:
            if self._reserved:
                for request in done:
                    self._reserved.pop(request, None)
            if self.waiting:
                self._join(now_s)
        self._reckon()
        return done

    def _end_prompts(self, now_s: float, done: list[Request]) -> None:
        """Their first tokens; and the next prompts begin."""
        progress = self.progress = self._prompts_end
        prefilling = self.prefilling
        for _ in range(self._prompts):
            request = prefilling.popleft()
            request.first_s = now_s
            if request.answer > 1:
                self._ties += 1
                heappush(self.decoding, (progress + request.answer - 1, self._ties, request))
            else:
                done.append(request)
        self._no_prompts()
        if prefilling:
            self._begin_prompts()

    def _no_prompts(self) -> None:
        self._prompts, self._prompts_end, self._tokens_s = 0, math.inf, 0.0

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
        self._tokens_s *= timing.token_s / self.timing.token_s
        self.timing = timing
        self._reckon()

    def remove(self, gateway: Gateway, now_s: float) -> list[Request]:
        """Drop all that came through this gateway: their clients are gone."""
        self._advance(now_s)
        gone = [entry[2] for entry in sorted(self.decoding) if entry[2].gateway is gateway]
        gone += [request for request in self.prefilling if request.gateway is gateway]
        gone += [request for request in self.waiting if request.gateway is gateway]
        if not gone:
            return gone
        computed = list(self.prefilling)[: self._prompts]
        self.decoding = [entry for entry in self.decoding if entry[2].gateway is not gateway]
        heapify(self.decoding)
        self.prefilling = deque(r for r in self.prefilling if r.gateway is not gateway)
        self.waiting = deque(r for r in self.waiting if r.gateway is not gateway)
        for request in gone:
            self._reserved.pop(request, None)
        left = sum(request.gateway is not gateway for request in computed)
        if left:
            self._prompts = left  # their iterations go on
        else:
            self._no_prompts()
            if self.prefilling:
                self._begin_prompts()
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
        self._no_prompts()
        self.next_s = math.inf
        return had
