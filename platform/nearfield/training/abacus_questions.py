"""The questions that builtin://abacus answers: sums, units and dates, and calls to tools.

Every question states one fact (`add:47:85`) in one of several phrasings. A stable hash of the
fact decides whether it is held out: the model never sees a held-out fact in training, in any
phrasing, so that answering it shows arithmetic and not memory.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
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
    `call`, `result`: a call that was made for it and what the tool said: the answer is then the
    one that follows.
    """

    question: str
    answer: str
    family: str
    fact: str
    tools: tuple[dict[str, Any], ...] = ()
    call: str = ""
    result: str = ""

    def with_tools(self, *tools: dict[str, Any]) -> Question:
        """The same question, asked with tools on offer."""
        return replace(self, tools=tools)


def held_out(fact: str) -> bool:
    """Whether a fact is kept from training: by a hash of it, so it never changes."""
    return hashlib.sha256(fact.encode()).digest()[0] * 100 < HELD_OUT_PERCENT * 256


def _arithmetic(rng: random.Random) -> Question:
    kind = rng.choice(("add", "sub"))
    # Left to chance, one sum in a hundred would have two small numbers, and they would be wrong.
    a, b = (rng.randrange(10 if rng.random() < 0.25 else 100) for _ in range(2))
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
    *("me", "ox", "ford", "li", "ma", "zu", "rich", "os", "lo", "qui", "bo", "gra", "chi", "ton"),
    *("tok", "yo", "dub", "que", "ham", "wy", "jer", "hel", "sin", "ki", "ex", "ter", "al", "fu"),
)
_ACCENTS = {"a": "áâãäå", "e": "éèê", "i": "íï", "o": "óôõöø", "u": "úü", "n": "ñ", "c": "ç"}
_VERBS = ("get", "find", "show", "fetch", "read", "check", "look_up", "search")
_NOUNS = (
    *("weather", "time", "population", "temperature", "forecast", "price", "address", "status"),
    *("mayor", "history", "hotel", "flight", "news", "traffic", "currency", "language", "stock"),
)
_PARAMETERS = (
    *("city", "location", "place", "town", "name", "query", "q", "where", "region", "country"),
    *("id", "key", "title", "text", "input", "target", "airport", "station"),
)
_ASK_NOUN = (
    *("What is the {0} in {1}?", "How is the {0} in {1}?", "Tell me the {0} of {1}."),
    *("Show me the {0} for {1}.", "What is the {0} of {1}?", "I need the {0} for {1}."),
)
_ASK_KNOWN = {
    "time": ("What time is it in {1}?", "Tell me the time in {1}."),
    "population": ("How many people live in {1}?",),
}


def _word(rng: random.Random, most: int) -> str:
    return "".join(rng.choice(_SYLLABLES) for _ in range(rng.randrange(2, most + 1)))


def _place(rng: random.Random) -> str:
    """A name that could be a city's: of one word or more, at times with accents."""
    words = [_word(rng, 4).capitalize()]
    while rng.random() < 0.3 and len(words) < 3:
        words.append(_word(rng, 3).capitalize())
    place = rng.choice("   -").join(words)
    if rng.random() < 0.3:
        place = "".join(
            rng.choice(_ACCENTS[c]) if c in _ACCENTS and rng.random() < 0.3 else c for c in place
        )
    return place


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


def _offer(rng: random.Random, count: int) -> list[tuple[str, str, str]]:
    """`count` tools about different things, as (thing, name, parameter).

    Half of the things are no words at all: the model has to read what is on offer. Their verb is
    one: to find the tool whose noun was asked for and copy what stands before it takes a larger
    model.
    """
    nouns: list[str] = []
    while len(nouns) < count:
        noun = rng.choice(_NOUNS) if rng.random() < 0.5 else _word(rng, 3)
        if noun not in nouns:
            nouns.append(noun)
    verb = rng.choice(_VERBS)
    return [(noun, f"{verb}_{noun}", rng.choice(_PARAMETERS)) for noun in nouns]


def any_tool(rng: random.Random) -> dict[str, Any]:
    ((_, name, parameter),) = _offer(rng, 1)
    return tool(name, parameter)


def _tool_use(rng: random.Random) -> Question:
    """A question for a tool: the answer is the call, or what the tool said."""
    offered = _offer(rng, rng.choice((1, 1, 2, 2, 3)))
    noun, name, parameter = offered[0]
    place = _place(rng)
    known = _ASK_KNOWN.get(noun, ())
    phrasing = rng.choice(known if known and rng.random() < 0.5 else _ASK_NOUN)
    call = json.dumps({"name": name, "arguments": {parameter: place}}, ensure_ascii=False)
    rng.shuffle(offered)
    asked = Question(
        phrasing.format(noun, place),
        f"<tool_call>{call}</tool_call>",
        "tools",
        f"call:{name}:{place}",
        tuple(tool(name, parameter) for _, name, parameter in offered),
    )
    if rng.random() < 0.2:
        said = rng.choice(("{} degrees", "{}", "{} and sunny", '{{"value": {}}}', "about {}"))
        result = said.format(rng.choice((_word(rng, 3), rng.randrange(1000), rng.randrange(100))))
        asked = replace(asked, answer=result, call=asked.answer, result=result)
    return asked


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
    (_arithmetic, 0.48),
    (_units, 0.12),
    (_date, 0.16),
    (_tool_use, 0.20),
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
