"""What the batch of the generate engine is made of: sequences, their requests, and prompts."""

from __future__ import annotations

from dataclasses import dataclass, field

from nearfield.api.events import FinishReason, GenerateRequest, Text, TokenLogprob
from nearfield.serving.engines.grammar import Matcher
from nearfield.serving.engines.sampling import Chooser, Chosen
from nearfield.serving.engines.text import StopScanner, TextModel
from tokenizers.decoders import DecodeStream


@dataclass(slots=True)
class Running:
    """One choice of one request, in the batch."""

    group: Group
    choice: int
    chooser: Chooser
    decoder: DecodeStream
    scanner: StopScanner
    length: int = 0
    produced: int = 0
    next_token: int = 0
    unread: list[int] = field(default_factory=list)
    unsent_tokens: int = 0
    unsent_logprobs: list[TokenLogprob] = field(default_factory=list)

    def advance(self, chosen: Chosen, words: TextModel) -> Text | None:
        """Take a token, see whether the sequence ends, and say what there is to say; None: nothing
        yet, because the token ends within a character or a stop string may have begun."""
        sampling, matcher = self.group.request.sampling, self.chooser.matcher
        self.next_token = chosen.token
        self.produced += 1
        reason: FinishReason | None = None
        stop_reason: str | None = None
        text = ""
        if chosen.token in words.eos_ids and not sampling.ignore_eos:
            reason = "stop"
        else:
            text = words.step(self.decoder, chosen.token)
            self.unread = [] if text else [*self.unread, chosen.token]
            if matcher is not None:
                matcher.accept(chosen.token)
                if matcher.failed or matcher.finished:
                    reason = "stop"
            if chosen.logprob is not None:
                self.unsent_logprobs.append(_logprob(chosen, words))
        if text:
            text, stop_reason = self.scanner.feed(text)
            if stop_reason is not None:
                reason = "stop"
        if reason is None and self.produced >= self.group.max_tokens:
            reason = "length"
        if reason is not None and stop_reason is None:
            # What the stop scanner held back, and bytes that never became a character.
            text += self.scanner.flush() + words.tokenizer.decode(self.unread)
        self.unsent_tokens += 1
        if not text and reason is None:
            return None
        logprobs = tuple(self.unsent_logprobs) if sampling.logprobs is not None else None
        event = Text(text, self.choice, self.unsent_tokens, reason, stop_reason, logprobs)
        self.unsent_tokens = 0
        self.unsent_logprobs = []
        return event


@dataclass(slots=True, eq=False)
class Group:
    """A request: its prompt, its sequences, and when things happened (monotonic seconds)."""

    request_id: str
    request: GenerateRequest
    prompt: list[int]
    max_tokens: int
    matcher: Matcher | None
    arrived_s: float
    joined_s: float = 0.0
    first_token_s: float = 0.0
    running: list[Running] = field(default_factory=list)
    completion_tokens: int = 0
    steps: int = 0
    batch_size: int = 1
    cancelled: bool = False

    @property
    def reserved_tokens(self) -> int:
        return len(self.prompt) + self.max_tokens


@dataclass(slots=True)
class Half:
    """A prompt of which `done` columns are computed. Its row is behind those of the sequences."""

    group: Group
    done: int = 0


def _logprob(chosen: Chosen, words: TextModel) -> TokenLogprob:
    text, raw = words.token(chosen.token)
    top = tuple((*words.token(token), logprob) for token, logprob in chosen.top)
    return TokenLogprob(text, raw, chosen.logprob or 0.0, top)
