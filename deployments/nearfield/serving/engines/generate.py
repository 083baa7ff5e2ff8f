"""Text generation with continuous batching: sequences join and leave the batch at every step.

One thread owns the model. Each turn of its loop takes what has arrived, admits what fits
(`policy.admission`), computes at most `prefill_chunk_tokens` of new prompts, and then one decode
step over every running sequence; the step's tokens leave as one list of events. Tokenising and
grammar compilation happen before, on the thread that submits.
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
from nearfield.serving.engines.sequence import Group, Prefill, Running
from nearfield.serving.engines.text import StopScanner, TextModel

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
        self._waiting: deque[Group] = deque()
        self._sequences: list[Running] = []
        self._prefill: Prefill | None = None
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
            waiting = [*self._waiting, *self._arrivals]
        oldest = min((g.arrived_s for g in waiting), default=None)
        sequences = list(self._sequences)
        return EngineStats(
            running=len({id(s.group) for s in sequences})
            + (len(self._prefill.groups) if self._prefill else 0),
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
                        self._waiting.append(self._arrivals.popleft())
                try:
                    self._turn()
                except Exception as error:
                    # The model's thread must outlive any one failure: everyone who shared the
                    # step is told, and the batch starts afresh.
                    log.exception("a step failed")
                    self._fail_batch(error)

    @property
    def _busy(self) -> bool:
        return bool(self._sequences or self._waiting or self._prefill)

    def _turn(self) -> None:
        events: list[tuple[str, Event]] = []
        self._drop_ended(events)
        self._join()
        if self._prefill is not None:
            self._prefill_step(self._prefill, events)
            if events:  # a first token does not wait for the next step
                self._emit(events)
                events = []
        if self._sequences:
            self._decode_step(events)
        if events:
            self._emit(events)

    def _fail_batch(self, error: Exception) -> None:
        groups = {s.group.request_id: s.group for s in self._sequences}
        if self._prefill is not None:
            groups |= {g.request_id: g for g in self._prefill.groups}
        self._sequences, self._prefill = [], None
        message = "The model failed on this request."
        if isinstance(error, torch.OutOfMemoryError):
            message = "The model ran out of memory on this request. Send a shorter one."
        events: list[tuple[str, Event]] = []
        for group in groups.values():
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

        if any(over(group) for group in self._waiting):
            self._waiting = deque(group for group in self._waiting if not group.cancelled)
        for row in range(len(self._sequences) - 1, -1, -1):
            if over(self._sequences[row].group):
                self._leave(row)
        if (job := self._prefill) is not None:
            first = len(self._sequences)
            for index in range(len(job.groups) - 1, -1, -1):
                if over(job.groups[index]):
                    self._move(first + len(job.groups) - 1, first + index, job.done)
                    job.groups[index] = job.groups[-1]
                    job.groups.pop()
            if not job.groups:
                self._prefill = None

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
        if (job := self._prefill) is not None:
            # The prompts being computed sit behind: the last of them fills the row set free.
            self._move(last + len(job.groups), last, job.done)
            job.groups.insert(0, job.groups.pop())

    def _join(self) -> None:
        """Start computing the prompts that may join now."""
        if self._prefill is not None or not self._waiting:
            return
        slab = self.decoder.slab
        reserved = [s.group.reserved_tokens for s in self._sequences]
        waiting = [(g.request.n, g.reserved_tokens) for g in self._waiting]
        joining, columns = admit(
            reserved,
            waiting,
            kv_tokens=slab.kv_tokens,
            max_rows=self._spec.max_batch,
            columns=slab.columns,
        )
        if not joining:
            return
        groups: list[Group] = []
        budget = self._spec.prefill_chunk_tokens
        width = 0
        for group in list(self._waiting)[:joining]:
            width = max(width, len(group.prompt))
            if groups and width * (len(groups) + 1) > budget:
                break
            groups.append(group)
        for _ in groups:
            self._waiting.popleft()
        if columns != slab.columns:
            longest = max((s.length for s in self._sequences), default=0)
            slab.reshape(columns, len(self._sequences), longest)
        now_s = time.monotonic()
        for group in groups:
            group.joined_s = now_s
        self._prefill = Prefill(groups)

    def _prefill_step(self, job: Prefill, events: list[tuple[str, Event]]) -> None:
        first, count = len(self._sequences), len(job.groups)
        width = min(
            _rounded_up(job.width - job.done),
            max(1, self._spec.prefill_chunk_tokens // count),
            self.decoder.slab.columns - job.done,
        )
        stop = job.done + width
        device = self.decoder.device
        tokens = torch.zeros((count, width), dtype=torch.long)
        for row, group in enumerate(job.groups):
            part = group.prompt[job.done : stop]
            tokens[row, : len(part)] = torch.tensor(part)
        last = torch.tensor([len(group.prompt) - 1 - job.done for group in job.groups])
        logits = self.decoder.forward(
            tokens.to(device), Span(first, job.done, stop), last.clamp(0, width - 1).to(device)
        )
        self._steps += 1
        job.done = stop
        if job.done < job.width:
            return
        self._prefill = None
        new: list[Running] = []
        copies: list[tuple[int, Group, int]] = []
        for row, group in enumerate(job.groups):
            new.append(self._sequence(group, 0))
            copies += [(row, group, choice) for choice in range(1, group.request.n)]
        for row, group, choice in copies:
            self._move(first + row, first + len(new), len(group.prompt))
            new.append(self._sequence(group, choice))
        self._sequences += new
        if copies:
            logits = torch.cat([logits, logits[[row for row, _, _ in copies]]])
        chosen = choose(logits, [s.chooser for s in new])
        now_s = time.monotonic()
        for group in job.groups:
            group.first_token_s = now_s
        self._accept(first, chosen, events)

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
