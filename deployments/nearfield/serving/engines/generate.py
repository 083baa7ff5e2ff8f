"""Text generation with continuous batching: sequences join and leave the batch at every step.

One thread owns the model. Each turn of its loop takes what has arrived, computes at most
`prefill_chunk_tokens` of the prompts whose turn it is (`turns`) and which fit (`policy.admission`),
and then one decode step over every running sequence; the step's tokens leave as one list of events.
Tokenising and grammar compilation happen before, on the thread that submits.

Rows of the cache: running sequences are 0..n-1, prompts that are half computed follow, and those
that begin are computed behind them.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import cast

import torch
from nearfield.api.events import (
    Completed,
    Event,
    Failed,
    GenerateRequest,
    Request,
    Text,
    Timings,
)
from nearfield.api.tools import detect
from nearfield.core.errors import (
    BadRequest,
    DeadlineExceeded,
    EngineFailed,
)
from nearfield.core.spec import GenerateEngine as GenerateSpec
from nearfield.policy.admission import admit
from nearfield.serving.engines.base import (
    Capabilities,
    EngineContext,
    EngineStats,
    ThreadEngine,
)
from nearfield.serving.engines.checkpoint import load_decoder
from nearfield.serving.engines.decoder import Span
from nearfield.serving.engines.grammar import GrammarCompiler, Matcher
from nearfield.serving.engines.prompt import prepare
from nearfield.serving.engines.sampling import Chooser, Chosen, choose
from nearfield.serving.engines.sequence import Group, Half, Running
from nearfield.serving.engines.text import StopScanner, TextModel
from nearfield.serving.engines.turns import Turns

log = logging.getLogger("nearfield.engine")

WIDTH_STEP = 8
"""Prompts are computed in widths that are multiples of this. Kernels are planned once a width, and
a plan costs a small model as much as the prompt."""
WARM_UP_S = 1.0


class GenerateEngine(ThreadEngine[Group]):
    """Continuous batching over a `Decoder`."""

    def load(self, context: EngineContext) -> Capabilities:
        spec = context.spec
        self._spec = cast(GenerateSpec, spec.engine)
        self.prepare_thread(context.emit)
        if context.weights is None:
            raise BadRequest("engine generate needs a source")
        torch.set_num_threads(context.threads)
        self.text = TextModel(context.weights, self._spec.chat_template)
        self.decoder, checkpoint = load_decoder(spec, self._spec, context.weights)
        self.max_model_len = checkpoint.max_model_len
        tool_format = detect(self.text.template_source or "")
        self._grammars = GrammarCompiler(self.text, self.decoder.vocab_size, tool_format)
        self._arrivals: deque[Group] = deque()
        self._turns = Turns(self._spec.prefill_chunk_tokens)
        self._sequences: list[Running] = []
        self._halves: list[Half] = []
        self._fresh: list[Group] = []  # prompts that are computed whole, in this turn
        self._warm_up()
        self.start_thread()
        return Capabilities(
            tasks=frozenset({"generate"}),
            platform="nearfield_generate",
            max_model_len=self.max_model_len,
            chat=self.text.template_source is not None,
            tool_format=tool_format,
            detail={
                "architecture": checkpoint.architecture,
                "decoder": type(self.decoder).__name__,
                "dtype": checkpoint.dtype,
                "device": str(self.decoder.device),
                "parameters": checkpoint.parameters,
                "kv_tokens": self.decoder.slab.kv_tokens,
                "kv_bytes": checkpoint.kv_bytes,
                "quantization": self._spec.quantization,
            },
        )

    # ---- any thread -------------------------------------------------------------------------

    def cancel(self, request_id: str) -> None:
        with self._wake:
            if group := self._jobs.pop(request_id, None):
                group.cancelled = True
                self._wake.notify()

    def stats(self) -> EngineStats:
        with self._wake:
            waiting = [*self._turns.waiting, *self._arrivals]
        oldest = min((g.arrived_s for g in waiting), default=None)
        sequences = list(self._sequences)
        return EngineStats(
            running=len({s.group for s in sequences}) + len(self._halves) + len(self._fresh),
            waiting=len(waiting),
            queue_age_s=0.0 if oldest is None else time.monotonic() - oldest,
            kv_used=sum(s.length for s in sequences),
            kv_total=self.decoder.slab.kv_tokens,
            steps=self._steps,
            batch_size=len(sequences),
            tokens=self._tokens,
        )

    def enqueue(self, job: Group) -> None:
        self._arrivals.append(job)

    def job(self, request_id: str, request: Request) -> Group:
        """Check and tokenise a request.

        Raises:
            BadRequest: too long, unusable prompt, or an output constraint that does not compile.
        """
        if not isinstance(request, GenerateRequest):
            raise BadRequest("This model generates text; it takes no other requests.")
        prompt, max_tokens = prepare(
            self.text,
            request,
            vocab_size=self.decoder.vocab_size,
            max_model_len=self.max_model_len,
            default_max_tokens=self._spec.default_max_tokens,
        )
        if request.n > self._spec.max_batch:
            raise BadRequest(
                f"n is {request.n}; this model computes at most {self._spec.max_batch} choices.",
                param="n",
            )
        group = Group(
            request_id,
            request,
            prompt,
            max_tokens,
            self._matcher(request),
            time.monotonic(),
        )
        reserve = group.reserved_tokens * request.n
        if reserve > self.decoder.slab.kv_tokens:
            raise BadRequest(
                f"The request needs {reserve} tokens of KV cache (prompt and max_tokens, for "
                f"{request.n} choices); this replica has {self.decoder.slab.kv_tokens}.",
                param="n" if request.n > 1 else "max_tokens",
                code="context_length_exceeded",
            )
        if request.echo:
            echo = self.text.tokenizer.decode(prompt)
            self._emit([(request_id, Text(echo, i, tokens=0)) for i in range(request.n)])
        return group

    def _matcher(self, request: GenerateRequest) -> Matcher | None:
        return self._grammars.start(request.constraint) if request.constraint else None

    # ---- the model's thread -----------------------------------------------------------------

    def _warm_up(self) -> None:
        """Run steps of every shape once: kernels are planned on the first call, not on the first
        request."""
        slab = self.decoder.slab
        with torch.inference_mode():
            slab.reshape(max(128, slab.kv_tokens // self._spec.max_batch), 0, 0)
            began_s = time.monotonic()
            for width in range(WIDTH_STEP, min(512, slab.columns) + 1, WIDTH_STEP):
                if width > 64 and time.monotonic() - began_s > WARM_UP_S:
                    break  # a large model: a plan costs nothing beside its prefill
                tokens = torch.zeros((1, width), dtype=torch.long, device=self.decoder.device)
                last = torch.tensor([width - 1], device=self.decoder.device)
                self.decoder.forward(tokens, Span(0, 0, width), last)
            rows = min(self._spec.max_batch, slab.rows)
            for count in sorted({*range(1, min(16, rows) + 1), rows}):
                start = torch.full((count,), 15, device=self.decoder.device)
                tokens = torch.zeros((count, 1), dtype=torch.long, device=self.decoder.device)
                for _ in range(2):
                    self.decoder.forward(tokens, Span(0, start, 16), None)

    def run(self) -> None:
        with torch.inference_mode():
            while True:
                with self._wake:
                    while not (self._closed or self._arrivals or self._busy):
                        self._wake.wait()
                    if self._closed:
                        return
                    while self._arrivals:
                        self._turns.add(self._arrivals.popleft())
                try:
                    self._turn()
                except Exception as error:
                    # The model's thread must outlive any one failure: everyone who shared the
                    # step is told, and the batch starts afresh.
                    log.exception("a step failed")
                    self._fail_batch(error)

    @property
    def _busy(self) -> bool:
        return bool(self._sequences or self._turns)

    def _turn(self) -> None:
        events: list[tuple[str, Event]] = []
        self._drop_ended(events)
        self._compute_prompts(events)
        if events:  # a first token does not wait for the next step
            self._emit(events)
            events = []
        if self._sequences:
            self._decode_step(events)
        if events:
            self._emit(events)

    def _fail_batch(self, error: Exception) -> None:
        halves = [half.group for half in self._halves]
        groups = {s.group: None for s in self._sequences} | dict.fromkeys([*halves, *self._fresh])
        self._sequences, self._halves, self._fresh = [], [], []
        message = "The model failed on this request."
        if isinstance(error, torch.OutOfMemoryError):
            message = "The model ran out of memory on this request. Send a shorter one."
        events: list[tuple[str, Event]] = []
        for group in groups:
            self._turns.remove(group)
            self._end(group, Failed(EngineFailed(message)), events)
        self._emit(events)

    def _end(self, group: Group, event: Event, events: list[tuple[str, Event]]) -> None:
        with self._wake:
            known = self._jobs.pop(group.request_id, None) is not None
        if known:
            events.append((group.request_id, event))

    def _drop_ended(self, events: list[tuple[str, Event]]) -> None:
        """Forget what was cancelled or is past its deadline."""
        now_s = time.monotonic()

        def over(group: Group) -> bool:
            if group.cancelled:
                return True
            deadline_s = group.request.deadline_s
            if deadline_s is None or now_s < deadline_s:
                return False
            error = DeadlineExceeded(
                "The request's deadline passed before its answer was complete. "
                "Ask for fewer tokens or allow more time.",
            )
            self._end(group, Failed(error), events)
            group.cancelled = True
            return True

        for group in self._turns.waiting:
            if over(group):
                self._turns.remove(group)
        for row in range(len(self._sequences) - 1, -1, -1):
            if over(self._sequences[row].group):
                self._leave(row)
        first = len(self._sequences)
        for index in range(len(self._halves) - 1, -1, -1):
            if over(self._halves[index].group):
                self._turns.remove(self._halves[index].group)
                last = self._halves.pop()
                if index < len(self._halves):
                    self._move(first + len(self._halves), first + index, last.done)
                    self._halves[index] = last

    def _move(self, source: int, target: int, length: int) -> None:
        if source != target and length:
            self.decoder.slab.move(source, target, length)

    def _leave(self, row: int) -> None:
        """Take a sequence out and close the gap, so that rows in use stay 0..n-1."""
        sequence = self._sequences[row]
        sequence.group.running.remove(sequence)
        last = len(self._sequences) - 1
        self._move(last, row, self._sequences[last].length)
        self._sequences[row] = self._sequences[last]
        self._sequences.pop()
        if self._halves:  # they sit behind: the last of them fills the row set free
            half = self._halves.pop()
            self._move(last + 1 + len(self._halves), last, half.done)
            self._halves.insert(0, half)

    def _compute_prompts(self, events: list[tuple[str, Event]]) -> None:
        """One forward pass over the prompts whose turn it is, if there are any."""
        if not self._turns:
            return
        slab = self.decoder.slab
        reserved = [s.group.reserved_tokens for s in self._sequences]
        for begun in self._halves:
            reserved += [begun.group.reserved_tokens] * begun.group.request.n
        columns = slab.columns

        def fits(group: Group) -> bool:
            nonlocal columns
            each, count = group.reserved_tokens, group.request.n
            joining, wanted = admit(
                reserved,
                [(count, each)],
                kv_tokens=slab.kv_tokens,
                max_rows=self._spec.max_batch,
                columns=columns,
            )
            if joining:
                columns = wanted
                reserved.extend([each] * count)
            return bool(joining)

        groups = self._turns.take(fits)
        if not groups:
            return
        half = next((h for h in self._halves if h.group is groups[0]), None)
        if half is None:
            self._fresh = groups
            for group in groups:
                group.joined_s = time.monotonic()
        behind = len(self._sequences) + len(self._halves)
        if columns != slab.columns:
            lengths = [*(s.length for s in self._sequences), *(h.done for h in self._halves)]
            slab.reshape(columns, behind, max(lengths, default=0))
        if half is None and len(groups[0].prompt) > self._spec.prefill_chunk_tokens:
            half = Half(groups[0])
            self._halves.append(half)
            self._fresh = []
        if half is None:
            logits = self._forward(groups, behind, 0)
            self._fresh = []
        else:
            row, done = len(self._sequences) + self._halves.index(half), half.done
            logits = self._forward(groups, row, done)
            half.done += self._width(groups, done)
            if half.done < len(half.group.prompt):
                return
            self._put_last(half)
            self._halves.pop()
        self._start(logits, groups, events)

    def _width(self, groups: list[Group], done: int) -> int:
        """How many columns of these prompts are computed next."""
        widest = max(len(group.prompt) for group in groups)
        return min(
            _rounded_up(widest - done),
            max(1, self._spec.prefill_chunk_tokens // len(groups)),
            self.decoder.slab.columns - done,
        )

    def _forward(self, groups: list[Group], first: int, done: int) -> torch.Tensor:
        """Compute the next columns of these prompts, in rows `first`..; logits, [groups, vocab]."""
        width = self._width(groups, done)
        device = self.decoder.device
        tokens = torch.zeros((len(groups), width), dtype=torch.long)
        for row, group in enumerate(groups):
            part = group.prompt[done : done + width]
            tokens[row, : len(part)] = torch.tensor(part)
        last = torch.tensor([len(group.prompt) - 1 - done for group in groups])
        self._steps += 1
        return self.decoder.forward(
            tokens.to(device),
            Span(first, done, done + width),
            last.clamp(0, width - 1).to(device),
        )

    def _put_last(self, half: Half) -> None:
        """Behind the others that are half computed."""
        first, index, last = len(self._sequences), self._halves.index(half), len(self._halves) - 1
        if index != last:
            other = self._halves[last]
            self.decoder.slab.swap(first + index, first + last, max(half.done, other.done))
            self._halves[index], self._halves[last] = other, half

    def _start(
        self, logits: torch.Tensor, groups: list[Group], events: list[tuple[str, Event]]
    ) -> None:
        """These prompts are computed, in the rows behind those of the halves: they run."""
        first, count = len(self._sequences), len(groups)
        if self._halves:
            order = self._before_halves(groups)
            groups, logits = [groups[i] for i in order], logits[order]
        copies = [
            (row, choice)
            for row, group in enumerate(groups)
            for choice in range(1, group.request.n)
        ]
        for i in range(len(self._halves) - 1, -1, -1):
            self._move(first + count + i, first + count + len(copies) + i, self._halves[i].done)
        new = [self._sequence(group, 0) for group in groups]
        for row, choice in copies:
            self._move(first + row, first + len(new), len(groups[row].prompt))
            new.append(self._sequence(groups[row], choice))
        self._sequences += new
        if copies:
            logits = torch.cat([logits, logits[[row for row, _ in copies]]])
        chosen = choose(logits, [s.chooser for s in new])
        now_s = time.monotonic()
        for group in groups:
            group.first_token_s = now_s
        self._accept(first, chosen, events)

    def _before_halves(self, groups: list[Group]) -> list[int]:
        """Exchange the rows of these prompts with those of the halves, which are before them; the
        order in which they are then. As few rows as possible change places."""
        first, count, halves = len(self._sequences), len(groups), len(self._halves)
        changing = min(count, halves)
        for i in range(changing):
            prompt = groups[max(0, count - halves) + i].prompt
            length = max(len(prompt), self._halves[i].done)
            self.decoder.slab.swap(first + i, first + max(count, halves) + i, length)
        order = list(range(count))
        if count <= halves:
            self._halves = self._halves[count:] + self._halves[:count]
            return order
        return order[-changing:] + order[:-changing]

    def _sequence(self, group: Group, choice: int) -> Running:
        matcher = group.matcher
        if matcher is not None and choice:
            matcher = self._matcher(group.request)
        sequence = Running(
            group,
            choice,
            Chooser.start(group.request.sampling, choice, group.prompt, matcher),
            self.text.decoder(),
            StopScanner(group.request.sampling.stop),
            length=len(group.prompt),
        )
        group.running.append(sequence)
        return sequence

    def _decode_step(self, events: list[tuple[str, Event]]) -> None:
        sequences = self._sequences
        lengths = [s.length for s in sequences]
        device = self.decoder.device
        tokens = torch.tensor([[s.next_token] for s in sequences], device=device)
        start = torch.tensor(lengths, device=device)
        logits = self.decoder.forward(tokens, Span(0, start, max(lengths) + 1), None)
        for sequence in sequences:
            sequence.length += 1
        self._steps += 1
        self._accept(0, choose(logits, [s.chooser for s in sequences]), events)

    def _accept(
        self, first: int, chosen: Sequence[Chosen], events: list[tuple[str, Event]]
    ) -> None:
        """Take the step's tokens: rows `first`.. of the batch. Ended sequences leave."""
        batch = len(self._sequences)
        self._tokens += len(chosen)
        ended: list[int] = []
        for row, choice in enumerate(chosen, start=first):
            sequence = self._sequences[row]
            group = sequence.group
            group.completion_tokens += 1
            group.steps += 1
            group.batch_size = max(group.batch_size, batch)
            text = sequence.advance(choice, self.text)
            if text is None:
                continue
            events.append((group.request_id, text))
            if text.finish_reason is not None:
                ended.append(row)
        for row in reversed(ended):
            group = self._sequences[row].group
            self._leave(row)
            if not group.running:
                self._complete(group, events)

    def _complete(self, group: Group, events: list[tuple[str, Event]]) -> None:
        now_s = time.monotonic()
        timings = Timings(
            started_s=group.arrived_s,
            queue_s=group.joined_s - group.arrived_s,
            prefill_s=group.first_token_s - group.joined_s,
            decode_s=now_s - group.first_token_s,
            batch_size=group.batch_size,
            steps=group.steps,
        )
        done = Completed(len(group.prompt), group.completion_tokens, timings)
        self._end(group, done, events)


def _rounded_up(width: int) -> int:
    return -(-width // WIDTH_STEP) * WIDTH_STEP
