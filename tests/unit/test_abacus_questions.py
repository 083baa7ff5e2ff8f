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
    asked = [q for q in held_out_questions(2000, seed=4) if q.family == "tools"]
    calls = [q for q in asked if q.answer.startswith("<tool_call>")]
    for question in calls:
        call = json.loads(question.answer.removeprefix("<tool_call>").removesuffix("</tool_call>"))
        offered = {t["function"]["name"]: t["function"]["parameters"] for t in question.tools}
        assert list(call["arguments"]) == offered[call["name"]]["required"]
        assert all(value in question.question for value in call["arguments"].values())
    followed = [q for q in asked if q.call]
    assert all(q.answer == q.result for q in followed)
    assert min(len(calls), len(followed)) > 20


def test_small_numbers_are_trained_too() -> None:
    trained = itertools.islice(training_questions(random.Random(0)), 10_000)
    small = sum(bool(re.fullmatch(r"(add|sub):\d:\d", q.fact)) for q in trained)
    assert small > 300


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
