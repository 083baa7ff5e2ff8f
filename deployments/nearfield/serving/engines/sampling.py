"""Choosing the next tokens of a batch of sequences from their logits.

Every sequence has its own random stream (so its seed means the same in any company) and one
uniform number a step picks a token by inverting the cumulative distribution. Filters apply in
the order that vLLM and transformers document: penalties, constraint, temperature, top-k,
top-p, min-p. Log-probabilities are the model's own, before any of it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from nearfield.api.events import Sampling
from nearfield.serving.engines.grammar import Matcher
from torch import Tensor

NUCLEUS_CANDIDATES = 1024
"""top-p first looks at this many candidates; a flatter distribution is sorted whole."""


@dataclass(slots=True)
class Chooser:
    """One sequence's sampling state.

    `prompt_counts` and `output_counts` feed the penalties and are kept only if one is on.
    """

    sampling: Sampling
    random: random.Random
    matcher: Matcher | None = None
    prompt_ids: frozenset[int] = frozenset()
    output_counts: Counter[int] = field(default_factory=Counter)

    @classmethod
    def start(
        cls, sampling: Sampling, choice: int, prompt: Sequence[int], matcher: Matcher | None
    ) -> Chooser:
        seed = None if sampling.seed is None else f"{sampling.seed}:{choice}"
        repeats = sampling.repetition_penalty != 1.0
        return cls(
            sampling,
            random.Random(seed),
            matcher,
            frozenset(prompt) if repeats else frozenset(),
        )

    @property
    def penalised(self) -> bool:
        s = self.sampling
        return bool(s.presence_penalty or s.frequency_penalty or s.repetition_penalty != 1.0)

    @property
    def plain_greedy(self) -> bool:
        s = self.sampling
        return (
            s.temperature == 0
            and s.logprobs is None
            and self.matcher is None
            and not self.penalised
        )


@dataclass(frozen=True, slots=True)
class Chosen:
    """A chosen token; with logprobs asked: its own and the likeliest (token, logprob)."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def choose(logits: Tensor, choosers: Sequence[Chooser]) -> list[Chosen]:
    """Next tokens for `logits` [sequences, vocab]; advances the choosers' random streams."""
    if all(chooser.plain_greedy for chooser in choosers):
        return [Chosen(token) for token in logits.argmax(dim=-1).tolist()]
    logits = logits.float()
    scores = logits.clone()
    for row, chooser in enumerate(choosers):
        if chooser.penalised:
            _penalise(scores[row], chooser)
        if chooser.matcher is not None:
            chooser.matcher.mask(scores[row])
    tokens = scores.argmax(dim=-1).tolist()
    sampled = [row for row, chooser in enumerate(choosers) if chooser.sampling.temperature > 0]
    if sampled:
        picked = _sample(scores[sampled], [choosers[row] for row in sampled])
        for row, token in zip(sampled, picked, strict=True):
            tokens[row] = token
    for token, chooser in zip(tokens, choosers, strict=True):
        if chooser.penalised:
            chooser.output_counts[token] += 1
    return _with_logprobs(logits, choosers, tokens)


def _penalise(scores: Tensor, chooser: Chooser) -> None:
    sampling = chooser.sampling
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(chooser.prompt_ids | set(chooser.output_counts)))
        seen = seen.to(scores.device)
        old = scores[seen]
        factor = sampling.repetition_penalty
        scores[seen] = torch.where(old > 0, old / factor, old * factor)
    if chooser.output_counts and (sampling.presence_penalty or sampling.frequency_penalty):
        ids = torch.tensor(list(chooser.output_counts), device=scores.device)
        counts = torch.tensor(
            list(chooser.output_counts.values()), dtype=scores.dtype, device=scores.device
        )
        scores[ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts


def _sample(scores: Tensor, choosers: Sequence[Chooser]) -> list[int]:
    device = scores.device
    temperature = torch.tensor([c.sampling.temperature for c in choosers], device=device)
    probabilities = torch.softmax(scores / temperature[:, None].clamp(min=1e-5), dim=-1)
    uniform = torch.tensor([[c.random.random()] for c in choosers], device=device)
    vocab = probabilities.shape[-1]
    narrow = any(
        0 < c.sampling.top_k < vocab or c.sampling.top_p < 1 or c.sampling.min_p > 0
        for c in choosers
    )
    if not narrow:
        return _invert(probabilities, uniform)
    top_p = torch.tensor([c.sampling.top_p for c in choosers], device=device)
    top_k = torch.tensor([c.sampling.top_k or vocab for c in choosers], device=device)
    min_p = torch.tensor([c.sampling.min_p for c in choosers], device=device)
    candidates = min(NUCLEUS_CANDIDATES, vocab)
    top, ids = probabilities.topk(candidates, dim=-1)
    if candidates < vocab:
        # Exact whenever the candidates hold all that the filters may keep.
        enough = (top.sum(-1) >= top_p) & (top_p < 1) | (top_k <= candidates)
        enough |= (min_p > 0) & (top[:, -1] < min_p * top[:, 0])
        if not bool(enough.all()):
            top, ids = probabilities.sort(dim=-1, descending=True)
    before = top.cumsum(-1) - top
    ranks = torch.arange(top.shape[-1], device=device)
    drop = ranks >= top_k[:, None]
    mass = torch.where(drop, 0.0, top).sum(-1, keepdim=True)
    drop |= before >= top_p[:, None] * mass
    drop |= top < min_p[:, None] * top[:, :1]
    drop[:, 0] = False
    kept = top.masked_fill(drop, 0.0)
    positions = _invert(kept, uniform)
    return [int(ids[row, position]) for row, position in enumerate(positions)]


def _invert(weights: Tensor, uniform: Tensor) -> list[int]:
    """The index where the cumulative weight passes `uniform` of the total, per row."""
    cumulative = weights.double().cumsum(-1)
    picked = torch.searchsorted(cumulative, uniform.double() * cumulative[:, -1:], right=True)
    # A uniform of almost 1 must not step past the last token that has any weight.
    last = weights.shape[-1] - 1 - (weights > 0).flip(-1).int().argmax(-1, keepdim=True)
    indices: list[int] = torch.minimum(picked, last)[:, 0].tolist()
    return indices


def _with_logprobs(logits: Tensor, choosers: Sequence[Chooser], tokens: list[int]) -> list[Chosen]:
    wanted = [row for row, c in enumerate(choosers) if c.sampling.logprobs is not None]
    chosen = [Chosen(token) for token in tokens]
    if not wanted:
        return chosen
    logprobs = torch.log_softmax(logits[wanted], dim=-1)
    for index, row in enumerate(wanted):
        k = choosers[row].sampling.logprobs or 0
        top: tuple[tuple[int, float], ...] = ()
        if k:
            values, ids = logprobs[index].topk(min(k, logprobs.shape[-1]))
            top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        chosen[row] = Chosen(tokens[row], float(logprobs[index, tokens[row]]), top)
    return chosen
