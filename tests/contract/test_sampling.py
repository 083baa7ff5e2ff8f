"""Choosing tokens: each filter against its definition, on logits small enough to see."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from nearfield.api.events import Sampling
from nearfield.serving.engines import sampling as module
from nearfield.serving.engines.sampling import Chooser, choose

PROBABILITIES = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03])
LOGITS = PROBABILITIES.log()


def draw(count: int = 4000, logits: torch.Tensor = LOGITS, **sampling: float) -> Counter[int]:
    """Tokens that one seeded sequence draws from the same logits again and again."""
    chooser = Chooser.start(Sampling(seed=1, **sampling), 0, [], None)  # type: ignore[arg-type]
    return Counter(choose(logits[None], [chooser])[0].token for _ in range(count))


def test_plain_sampling_follows_the_distribution() -> None:
    seen = draw()
    for token, probability in enumerate(PROBABILITIES.tolist()):
        assert seen[token] / 4000 == pytest.approx(probability, abs=0.03)


def test_temperature_sharpens() -> None:
    sharp = (LOGITS / 0.5).softmax(-1)
    seen = draw(temperature=0.5)
    assert seen[0] / 4000 == pytest.approx(sharp[0].item(), abs=0.03)


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.51}, {0, 1}),
        ({"top_p": 0.74}, {0, 1}),
        ({"top_p": 0.9}, {0, 1, 2}),
        ({"min_p": 0.2}, {0, 1, 2}),
        ({"top_k": 4, "min_p": 0.4}, {0, 1}),
        # top-p measures what top-k left: 0.5 of 0.75 is two thirds.
        ({"top_k": 2, "top_p": 0.66}, {0}),
    ],
)
def test_filters_keep_what_they_say(filters: dict[str, float], kept: set[int]) -> None:
    assert set(draw(**filters)) == kept


def test_a_flat_distribution_wider_than_the_candidates_is_still_exact(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "NUCLEUS_CANDIDATES", 4)
    seen = draw(logits=torch.zeros(40), top_p=0.5)
    assert len(seen) == 20
    seen = draw(logits=torch.zeros(40), top_k=30)
    assert len(seen) == 30
    assert len(draw(logits=torch.zeros(40), min_p=0.5)) == 40


def test_mixed_batch_gives_each_row_its_own_rule() -> None:
    rows = [
        Chooser.start(Sampling(temperature=0), 0, [], None),
        Chooser.start(Sampling(seed=3, top_k=1), 0, [], None),
        Chooser.start(Sampling(seed=3, logprobs=2), 0, [], None),
    ]
    chosen = choose(LOGITS.repeat(3, 1), rows)
    assert [chosen[0].token, chosen[1].token] == [0, 0]
    assert chosen[0].logprob is None
    assert chosen[2].logprob == pytest.approx(LOGITS[chosen[2].token].item(), abs=1e-5)
    assert [token for token, _ in chosen[2].top] == [0, 1]


def test_penalties_follow_their_formulas() -> None:
    logits = torch.tensor([2.0, 1.9, -1.0])
    chooser = Chooser.start(
        Sampling(temperature=0, presence_penalty=0.06, frequency_penalty=0.06), 0, [], None
    )
    assert [choose(logits[None], [chooser])[0].token for _ in range(4)] == [0, 1, 0, 0]
    chooser = Chooser.start(Sampling(temperature=0, repetition_penalty=1.2), 0, [0], None)
    assert choose(logits[None], [chooser])[0].token == 1  # 2.0 / 1.2 < 1.9
    assert chooser.sampling.repetition_penalty == 1.2


def test_choices_of_one_seed_differ_and_repeat() -> None:
    def run(choice: int) -> list[int]:
        chooser = Chooser.start(Sampling(seed=9), choice, [], None)
        return [choose(LOGITS[None], [chooser])[0].token for _ in range(30)]

    assert run(0) == run(0)
    assert run(0) != run(1)
