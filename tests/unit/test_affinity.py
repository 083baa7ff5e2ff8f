"""Who has seen the beginning of a prompt."""

from __future__ import annotations

from nearfield.edge.affinity import EDGES, FORGOTTEN_S, HOLDERS, NOBODY, Affinity


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def body(length: int, fill: str = "a") -> bytes:
    return (fill * length).encode()


def test_a_prompt_that_begins_alike_is_found_as_far_as_it_does() -> None:
    memory = Affinity(Clock())
    memory.saw(memory.keys("t", None, 0, body(5000)), 1, 7)
    found = memory.find(memory.keys("t", None, 0, body(2000) + body(9000, "b")))
    assert (found.endpoint, found.tokens) == (1, 1536 // 4)
    assert found.replicas == {7: 384}
    assert memory.find(memory.keys("t", None, 0, body(9000, "b"))) is NOBODY


def test_tenants_share_nothing() -> None:
    memory = Affinity(Clock())
    memory.saw(memory.keys("t", b"s", 100, body(5000)), 1, 7)
    assert memory.find(memory.keys("u", b"s", 100, body(5000))) is NOBODY


def test_a_session_is_known_whatever_its_body() -> None:
    memory = Affinity(Clock())
    memory.saw(memory.keys("t", b"s", 100, b"short"), 1, 7)
    found = memory.find(memory.keys("t", b"s", 300, b"other"))
    assert (found.endpoint, found.tokens, found.replicas) == (1, 100, {7: 100})


def test_short_prompts_leave_nothing() -> None:
    memory = Affinity(Clock())
    memory.saw(memory.keys("t", None, 10, body(EDGES[0] - 1)), 1, 7)
    assert len(memory) == 0


def test_several_hold_what_everybody_sends_and_the_latest_are_remembered() -> None:
    memory = Affinity(Clock())
    keys = memory.keys("t", None, 0, body(600))
    for replica in range(HOLDERS + 2):
        memory.saw(keys, 1, replica)
    memory.saw(keys, 1, 3)
    assert set(memory.find(keys).replicas) == {2, 3, 4, 5}


def test_another_region_is_remembered_without_its_replica() -> None:
    memory = Affinity(Clock())
    keys = memory.keys("t", b"s", 50, b"")
    memory.saw(keys, 4, -1)
    assert memory.find(keys) == (4, 50, {})


def test_it_is_forgotten_in_time_and_in_number() -> None:
    clock = Clock()
    memory = Affinity(clock, most=10)
    keys = memory.keys("t", b"s", 50, b"")
    memory.saw(keys, 1, 1)
    clock.now_s = FORGOTTEN_S + 1
    assert memory.find(keys) is NOBODY
    for number in range(100):
        memory.saw(memory.keys("t", b"%d" % number, 50, b""), 1, 1)
    assert len(memory) == 10
    assert memory.find(memory.keys("t", b"99", 50, b"")).endpoint == 1
    assert memory.find(memory.keys("t", b"5", 50, b"")) is NOBODY
