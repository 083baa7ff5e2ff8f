"""The questions the built-in model is trained and measured on."""

from __future__ import annotations

import datetime as dt
import itertools
import json
import random
import re

from nearfield.training.abacus_questions import (
    UNITS,
    Question,
    held_out,
    held_out_questions,
    training_questions,
)


def expected(question: Question) -> str:
    """The answer, worked out from the words alone."""
    text = question.question
    numbers = [int(n) for n in re.findall(r"\d+", text)]
    if question.family == "arithmetic":
        minus = "minus" in text or "-" in text
        return str(numbers[0] - numbers[1] if minus else numbers[0] + numbers[1])
    if question.family == "units":
        unit, short, factor = next(
            (unit, short, factor)
            for unit, target, short, factor in UNITS
            if re.search(rf"\d {unit}\b", text)
            and re.search(rf"\b({target}|{short})\b", text.replace(f"{numbers[0]} {unit}", ""))
        )
        assert unit
        return f"{numbers[0] * factor} {short}"
    date = dt.date.fromisoformat(re.findall(r"\d{4}-\d\d-\d\d", text)[0])
    return str(date + dt.timedelta(days=-1 if "before" in text else 1))


def test_answers_are_right() -> None:
    for question in held_out_questions(3000, seed=4):
        if question.family != "tools":
            assert question.answer == expected(question), question


def test_tool_questions_ask_for_a_tool_on_offer() -> None:
    calls = [q for q in held_out_questions(2000, seed=4) if q.family == "tools"]
    assert len(calls) > 50
    for question in calls:
        call = json.loads(question.answer.removeprefix("<tool_call>").removesuffix("</tool_call>"))
        assert call["name"] in {t["function"]["name"] for t in question.tools}
        assert call["arguments"]["city"] in question.question


def test_training_never_states_a_held_out_fact() -> None:
    trained = itertools.islice(training_questions(random.Random(0)), 20_000)
    measured = {q.fact for q in held_out_questions(3000, seed=2)}
    assert not measured & {q.fact for q in trained}
    assert all(held_out(fact) for fact in measured)


def test_the_same_seed_asks_the_same_questions() -> None:
    assert held_out_questions(50, seed=9) == held_out_questions(50, seed=9)
    assert held_out_questions(50, seed=9) != held_out_questions(50, seed=8)


def test_a_tenth_of_the_facts_is_held_out() -> None:
    sums = [f"add:{a}:{b}" for a in range(100) for b in range(100)]
    assert 0.08 < sum(map(held_out, sums)) / len(sums) < 0.12
