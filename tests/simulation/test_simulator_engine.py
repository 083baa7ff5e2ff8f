"""The simulator's engine in straight lines against one that goes step by step."""

from __future__ import annotations

import random
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
from nearfield.simulator.engine import Batch, Request, Timing

TIMING = Timing(
    token_s=1 / 9000, step_s=0.02, sequence_s=0.0004, chunk=512, slots=24, max_queued=9999
)

Asked = tuple[float, int, int]
Took = tuple[float, float]
"""To the first token, and to the last."""


def step_by_step(asked: list[Asked]) -> list[Took]:
    """Every iteration by itself: a token for each that decodes, and up to a chunk of prompts."""
    took: dict[int, Took] = {}
    first: dict[int, float] = {}
    waiting = deque(enumerate(asked))
    prompts: deque[list[float]] = deque()  # number, tokens left
    decoding: dict[int, int] = {}  # number, tokens left
    now_s = 0.0
    while waiting or prompts or decoding:
        if not prompts and not decoding:
            now_s = max(now_s, waiting[0][1][0])
        while waiting and waiting[0][1][0] <= now_s:
            if len(prompts) + len(decoding) >= TIMING.slots:
                break
            number, (_, prompt, _) = waiting.popleft()
            prompts.append([number, prompt])
        room, done = float(TIMING.chunk), []
        while prompts and room > 0:
            part = min(room, prompts[0][1])
            prompts[0][1] -= part
            room -= part
            if prompts[0][1] <= 0:
                done.append(int(prompts.popleft()[0]))
        now_s += TIMING.step_s + len(decoding) * TIMING.sequence_s
        now_s += (TIMING.chunk - room) * TIMING.token_s
        for number in list(decoding):
            decoding[number] -= 1
            if not decoding[number]:
                del decoding[number]
                took[number] = (first[number], now_s - asked[number][0])
        for number in done:
            first[number] = now_s - asked[number][0]
            decoding[number] = asked[number][2] - 1
            if not decoding[number]:
                del decoding[number]
                took[number] = (first[number], first[number])
    return [took[number] for number in range(len(asked))]


def in_lines(asked: list[Asked]) -> list[Took]:
    source: Any = SimpleNamespace(timeout_s=1e9)
    batch = Batch(TIMING, 2.0)
    requests = [Request(came_s, source, source, p, a) for came_s, p, a in asked]
    ended: dict[Request, float] = {}

    def run(until_s: float) -> None:
        while batch.next_s <= until_s and batch.load:
            at_s = batch.next_s
            ended.update((each, at_s) for each in batch.run(at_s))

    for request in requests:
        run(request.came_s)
        batch.add(request, request.came_s)
    run(1e12)
    return [(each.first_s - each.came_s, ended[each] - each.came_s) for each in requests]


@pytest.mark.parametrize("rate_rps", [1.0, 3.0, 4.5])
def test_lines_and_steps_take_as_long(rate_rps: float) -> None:
    rng = random.Random(5)
    asked, now_s = [], 0.0
    for _ in range(3000):
        now_s += rng.expovariate(rate_rps)
        prompt = 1 + int(rng.lognormvariate(6.2, 0.84))
        asked.append((now_s, prompt, 1 + int(rng.lognormvariate(4.6, 0.67))))
    steps, lines = step_by_step(asked), in_lines(asked)
    for name, column, within in (("first token", 0, 0.04), ("whole time", 1, 0.02)):
        for q in (0.5, 0.95):
            a, b = (sorted(each[column] for each in run)[int(q * 3000)] for run in (steps, lines))
            print(f"\n{rate_rps} rps, {name} p{100 * q:.0f}: {a:.3f} {b:.3f} {b / a - 1:+.1%}")
            assert b == pytest.approx(a, rel=within)
