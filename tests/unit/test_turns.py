"""Whose prompt the generate engine computes next."""

from __future__ import annotations

from nearfield.api.events import GenerateRequest
from nearfield.serving.engines.sequence import Group
from nearfield.serving.engines.turns import Turns

CHUNK = 100


def group(name: str, tokens: int, flow: str = "") -> Group:
    request = GenerateRequest(prompt="", flow=flow)
    return Group(name, request, [0] * tokens, 10, None, 0.0)


def turns(*groups: Group) -> Turns:
    made = Turns(CHUNK)
    for each in groups:
        made.add(each)
    return made


def taken(made: Turns, most: int = 20) -> list[str]:
    """Ids of what is computed, turn by turn; those of one turn joined."""
    found = []
    while made and len(found) < most:
        found.append("+".join(each.request_id for each in made.take(lambda _: True)))
    return found


def test_one_flow_is_served_in_order_and_in_company() -> None:
    made = turns(group("a", 30), group("b", 20), group("c", 40), group("d", 90))
    assert taken(made) == ["a+b", "c", "d"]  # a third one would make the rectangle too wide


def test_a_long_prompt_is_computed_alone_and_in_chunks() -> None:
    made = turns(group("long", 250), group("short", 10))
    assert taken(made) == ["long", "long", "long", "short"]


def test_other_flows_come_between_the_chunks() -> None:
    long, question = group("long", 450, "x"), group("question", 10, "y")
    made = turns(long)
    assert [g.request_id for g in made.take(lambda _: True)] == ["long"]
    made.add(question)
    assert taken(made) == ["question", "long", "long", "long", "long"]


def test_two_that_ask_for_much_share_evenly() -> None:
    made = turns(group("x", 400, "x"), group("y", 400, "y"))
    assert taken(made) == ["x", "y"] * 4


def test_who_does_not_fit_is_not_overtaken() -> None:
    large, small = group("large", 10, "x"), group("small", 10, "y")
    made = turns(large, small)
    assert made.take(lambda each: each is not large) == []
    assert made.waiting == [large, small]
    assert made.take(lambda _: True) == [large, small]


def test_who_does_not_fit_lets_those_go_on_that_have_begun() -> None:
    begun, large = group("begun", 200, "x"), group("large", 10, "y")
    made = turns(begun)
    assert made.take(lambda _: True) == [begun]
    made.add(large)
    assert made.take(lambda _: False) == [begun]
    assert made.take(lambda _: False) == []
    assert made.waiting == [large]


def test_what_is_given_up_is_forgotten() -> None:
    gone, stays = group("gone", 300, "x"), group("stays", 50, "x")
    made = turns(gone, stays)
    assert made.take(lambda _: True) == [gone]
    made.remove(gone)
    assert taken(made) == ["stays"]
    made.remove(gone)
    assert not made
    assert made.waiting == []
