"""The questions that builtin://abacus answers: sums, units and dates, and calls to tools.

Every question states one fact (`add:47:85`) in one of several phrasings. A stable hash of the
fact decides whether it is held out: the model never sees a held-out fact in training, in any
phrasing, so that answering it shows arithmetic and not memory.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

HELD_OUT_PERCENT = 10

_FIRST_DAY = dt.date(1900, 1, 2)
_DAYS = 73_000  # two hundred years
UNITS: tuple[tuple[str, str, str, int], ...] = (
    ("km", "metres", "m", 1000),
    ("m", "centimetres", "cm", 100),
    ("cm", "millimetres", "mm", 10),
    ("kg", "grams", "g", 1000),
    ("litres", "millilitres", "ml", 1000),
)
UNKNOWN = "I only know sums, units and dates."


@dataclass(frozen=True, slots=True)
class Question:
    """One question, its exact answer, and the family it belongs to.

    `tools`: tool definitions in OpenAI's form that go with it, if any.
    """

    question: str
    answer: str
    family: str
    fact: str
    tools: tuple[dict[str, Any], ...] = ()

    def with_tools(self, *tools: dict[str, Any]) -> Question:
        """The same question, asked with tools on offer."""
        return replace(self, tools=tools)


def held_out(fact: str) -> bool:
    """Whether a fact is kept from training: by a hash of it, so it never changes."""
    return hashlib.sha256(fact.encode()).digest()[0] * 100 < HELD_OUT_PERCENT * 256


def _arithmetic(rng: random.Random) -> Question:
    kind = rng.choice(("add", "sub"))
    a, b = rng.randrange(100), rng.randrange(100)
    value = a + b if kind == "add" else a - b
    sign, word = {"add": ("+", "plus"), "sub": ("-", "minus")}[kind]
    question = rng.choice(
        (
            f"What is {a} {sign} {b}?",
            f"What is {a} {word} {b}?",
            f"{a} {sign} {b}",
            f"{a}{sign}{b}",
            f"Calculate {a} {sign} {b}.",
            f"How much is {a} {word} {b}?",
        )
    )
    return Question(question, str(value), "arithmetic", f"{kind}:{a}:{b}")


def _units(rng: random.Random) -> Question:
    unit, target, short, factor = rng.choice(UNITS)
    n = rng.randrange(1, 1000)
    question = rng.choice(
        (
            f"How many {target} are in {n} {unit}?",
            f"Convert {n} {unit} to {target}.",
            f"What is {n} {unit} in {target}?",
            f"{n} {unit} in {short}",
        )
    )
    return Question(question, f"{n * factor} {short}", "units", f"unit:{unit}:{n}")


def _date(rng: random.Random) -> Question:
    """The day after or before a date: mostly one digit, sometimes the whole date turns over."""
    date = _FIRST_DAY + dt.timedelta(days=rng.randrange(_DAYS))
    if rng.random() < 0.3:  # month ends are one day in fifteen, and all there is to learn
        date = date.replace(day=1) - dt.timedelta(days=rng.randrange(3) - 1)
    later = rng.random() < 0.5
    answer = date + dt.timedelta(days=1 if later else -1)
    word = "after" if later else "before"
    question = rng.choice(
        (
            f"What day comes {word} {date}?",
            f"Which date is one day {word} {date}?",
            f"the day {word} {date}",
        )
    )
    return Question(question, str(answer), "dates", f"date:{word}:{date}")


_SYLLABLES = (
    *("pa", "ris", "lon", "do", "mu", "ber", "lin", "ka", "to", "na", "vi", "en", "sa", "ro"),
    *("me", "ox", "ford", "li", "ma", "zu", "rich", "os", "lo", "qui", "bo", "gra"),
)
_TOOLS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("get_weather", "city", ("What is the weather in {}?", "How is the weather in {}?")),
    ("get_time", "city", ("What time is it in {}?", "Tell me the time in {}.")),
    ("get_population", "city", ("How many people live in {}?", "What is the population of {}?")),
)


def tool(name: str, parameter: str) -> dict[str, Any]:
    """A tool definition of one string parameter, in OpenAI's form."""
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": name.replace("_", " "),
            "parameters": {
                "type": "object",
                "properties": {parameter: {"type": "string"}},
                "required": [parameter],
            },
        },
    }


def any_tool(rng: random.Random) -> dict[str, Any]:
    name, parameter, _ = rng.choice(_TOOLS)
    return tool(name, parameter)


def _place(rng: random.Random) -> str:
    return "".join(rng.choice(_SYLLABLES) for _ in range(rng.randrange(2, 5))).capitalize()


def _call(rng: random.Random) -> Question:
    name, parameter, phrasings = rng.choice(_TOOLS)
    city = _place(rng)
    arguments = f'{{"name": "{name}", "arguments": {{"{parameter}": "{city}"}}}}'
    others = [t for t in _TOOLS if t[0] != name]
    offered = [(name, parameter)] + [o[:2] for o in rng.sample(others, rng.randrange(2))]
    rng.shuffle(offered)
    return Question(
        rng.choice(phrasings).format(city),
        f"<tool_call>{arguments}</tool_call>",
        "tools",
        f"call:{name}:{city}",
        tuple(tool(*o) for o in offered),
    )


_SMALL_TALK = (
    "Hello!",
    "Hi",
    "Who are you?",
    "Tell me a joke.",
    "What is the capital of France?",
    "Write a poem about the sea.",
    "Thanks!",
    "How are you?",
    "Good morning",
    "What is love?",
    "Can you help me?",
    "Explain quantum physics.",
)


def _unknown(rng: random.Random) -> Question:
    if rng.random() < 0.6:
        question = rng.choice(_SMALL_TALK)
    else:
        words = [_place(rng).lower() for _ in range(rng.randrange(1, 6))]
        question = " ".join(words).capitalize() + rng.choice(("", ".", "?", "!"))
    return Question(question, UNKNOWN, "unknown", f"unknown:{question}")


FAMILIES: tuple[tuple[Callable[[random.Random], Question], float], ...] = (
    (_arithmetic, 0.50),
    (_units, 0.14),
    (_date, 0.20),
    (_call, 0.12),
    (_unknown, 0.04),
)


def questions(rng: random.Random) -> Iterator[Question]:
    """Questions of every family for ever, held-out facts among them."""
    makers = [maker for maker, _ in FAMILIES]
    weights = [weight for _, weight in FAMILIES]
    while True:
        yield rng.choices(makers, weights)[0](rng)


def training_questions(rng: random.Random) -> Iterator[Question]:
    """Questions about facts that are not held out."""
    return (q for q in questions(rng) if not held_out(q.fact))


def held_out_questions(count: int, seed: int) -> list[Question]:
    """`count` questions about facts the model was never trained on, small talk left out."""
    rng = random.Random(seed)
    stream = (q for q in questions(rng) if held_out(q.fact) and q.family != "unknown")
    return [next(stream) for _ in range(count)]
