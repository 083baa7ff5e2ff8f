"""The health of an upstream, one kind of evidence at a time. Time is walked, never waited for."""

from __future__ import annotations

import pytest
from nearfield.policy.health import (
    Answered,
    Event,
    Failed,
    Group,
    Probed,
    Rules,
    Tick,
    Transition,
    back_s,
    is_fault,
    patience_s,
    probe_after_s,
    step,
    weight,
    with_members,
)

RULES = Rules()


class Clock:
    """A group, walked through events."""

    def __init__(self, *names: str, start: str = "up") -> None:
        self.now_s = 1000.0
        self.seen: list[Transition] = []
        self.group = with_members(Group(), names, self.now_s, start=start)  # type: ignore[arg-type]

    def feed(self, *events: Event, draw: float = 0.5) -> None:
        for event in events:
            self.group, transitions = step(self.group, event, self.now_s, draw)
            self.seen += transitions

    def wait(self, seconds: float) -> None:
        """Ticks four times a second, with probes that pass."""
        until_s = self.now_s + seconds
        while self.now_s < until_s:
            self.now_s += 0.25
            self.feed(Tick())

    def probe(self, name: str, passed: bool, **facts: object) -> None:
        sent_s = self.now_s
        self.now_s += 0.01 if passed else 1.0
        self.feed(Probed(name, passed, sent_s, **facts))  # type: ignore[arg-type]

    def health(self, name: str) -> str:
        return self.group.members[name].health

    def weight(self, name: str) -> float:
        return weight(self.group.members[name], self.now_s, RULES)


def fail(clock: Clock, name: str, times: int, answered: int = 0) -> None:
    clock.feed(*[Failed(name, "connection reset", answered)] * times)


def test_a_new_upstream_is_up_with_its_first_probe_at_once() -> None:
    clock = Clock("a", start="unknown")
    assert clock.health("a") == "unknown"
    clock.probe("a", True)
    assert clock.health("a") == "up"
    assert clock.weight("a") == 1.0
    assert [(t.before, t.after) for t in clock.seen] == [("unknown", "up")]


def test_two_failed_probes_take_out_and_three_passes_bring_back_slowly() -> None:
    clock = Clock("a", "b")
    clock.probe("a", False)
    assert clock.health("a") == "up"
    clock.probe("a", False, reason="timed out")
    assert clock.health("a") == "down"
    assert clock.seen[-1].reason == "its probe failed: timed out"
    assert back_s(clock.group.members["a"], clock.now_s, RULES) == 3.0
    for _ in range(2):
        clock.probe("a", True)
        assert clock.health("a") == "down"
    clock.probe("a", False)  # in a row, or not at all
    for _ in range(3):
        clock.probe("a", True)
    assert clock.health("a") == "up"
    assert clock.weight("a") == pytest.approx(0.1, abs=0.01)
    clock.wait(15)
    assert clock.weight("a") == pytest.approx(0.55, abs=0.02)
    clock.wait(16)
    assert clock.weight("a") == 1.0


def test_probes_take_out_even_the_last_one() -> None:
    clock = Clock("a")
    clock.probe("a", False)
    clock.probe("a", False)
    assert clock.health("a") == "down"


def test_an_upstream_that_answers_requests_is_not_dead() -> None:
    clock = Clock("a", "b")
    for _ in range(5):
        clock.probe("a", False, in_flight=9, heard_s=clock.now_s + 0.9)
    assert clock.health("a") == "up"


def test_a_probe_is_waited_for_less_where_requests_are_overdue() -> None:
    assert patience_s(RULES, way_s=0.05) == pytest.approx(0.7)
    assert patience_s(RULES, way_s=0.6) == RULES.probe_timeout_s, "it is far"


def test_one_that_is_silent_with_requests_in_flight_needs_no_second_probe() -> None:
    clock = Clock("a", "b")
    clock.probe("a", False, in_flight=9, heard_s=clock.now_s - 0.1)
    assert clock.health("a") == "down"
    assert clock.seen[-1].reason.startswith("silent with 9 requests in flight")
    # Nothing in flight: silence is nothing special.
    clock.probe("b", False, in_flight=0, heard_s=clock.now_s - 0.1)
    assert clock.health("b") == "up"


def test_the_tiny_inference_finds_an_engine_that_is_dead_behind_a_living_server() -> None:
    clock = Clock("a", "b")
    for _ in range(2):
        clock.probe("a", True)
        clock.probe("a", False, deep=True)
    assert clock.health("a") == "down"
    assert "tiny inference" in clock.seen[-1].reason
    assert back_s(clock.group.members["a"], clock.now_s, RULES) == 5.0
    for _ in range(5):
        clock.probe("a", True)
    assert clock.health("a") == "down"  # its pages answered before, too
    clock.probe("a", True, deep=True)
    clock.probe("a", True)
    assert clock.health("a") == "up"


def test_three_failures_in_a_row_eject_and_an_answer_in_between_saves() -> None:
    clock = Clock("a", "b")
    fail(clock, "a", 2)
    fail(clock, "a", 2, answered=1)
    assert clock.health("a") == "up"
    fail(clock, "a", 2)
    assert clock.health("a") == "ejected"
    assert clock.seen[-1].reason == "3 requests in a row failed, the last: connection reset"


def test_half_of_ten_in_ten_seconds_eject() -> None:
    clock = Clock("a", "b")
    for _ in range(4):
        fail(clock, "a", 1, answered=1)
        clock.now_s += 1
    assert clock.health("a") == "up"  # 4 of 8
    fail(clock, "a", 1, answered=1)
    assert clock.health("a") == "ejected"
    assert clock.seen[-1].reason.startswith("5 of 10 requests failed in 10 s")
    slow = Clock("a", "b")
    for _ in range(40):  # the same share, too few at a time
        fail(slow, "a", 1, answered=1)
        slow.now_s += 2.5
    assert slow.health("a") == "up"


def test_less_than_half_does_not() -> None:
    clock = Clock("a", "b")
    for _ in range(30):
        fail(clock, "a", 1, answered=2)
        clock.now_s += 0.3
    assert clock.health("a") == "up"


def test_ejections_grow_to_a_cap_and_are_forgiven() -> None:
    clock = Clock("a", "b")
    lengths = []
    for _ in range(33):
        fail(clock, "a", 3)
        member = clock.group.members["a"]
        lengths.append(member.until_s - clock.now_s)
        clock.now_s = member.until_s
        clock.feed(Tick())
        assert clock.health("a") == "up"
        assert clock.weight("a") == pytest.approx(0.1)
    assert lengths[:3] == [10.0, 20.0, 30.0]
    assert lengths[-1] == 300.0
    clock.wait(600)  # ten minutes of peace forgive ten
    fail(clock, "a", 3)
    assert clock.group.members["a"].ejections == 33 - 10 + 1
    clock.wait(300.5 + 3600)
    fail(clock, "a", 3)
    assert clock.group.members["a"].ejections == 1


@pytest.mark.parametrize(("draw", "lasts_s"), [(0.0, 8.0), (0.5, 10.0), (1.0, 12.0)])
def test_ends_of_ejections_are_spread(draw: float, lasts_s: float) -> None:
    clock = Clock("a", "b")
    clock.feed(*[Failed("a", "reset")] * 3, draw=draw)
    assert back_s(clock.group.members["a"], clock.now_s, RULES) == pytest.approx(lasts_s)
    assert probe_after_s(RULES, draw) == pytest.approx(lasts_s / 10)


def test_the_last_one_up_is_never_ejected() -> None:
    clock = Clock("a", "b", "c")
    for name in "abc":
        fail(clock, name, 5)
    assert [clock.health(name) for name in "abc"] == ["ejected", "ejected", "up"]
    clock.wait(10)
    fail(clock, "c", 1)  # others are up again, so the one that still fails goes now
    assert [clock.health(name) for name in "abc"] == ["up", "up", "ejected"]


def test_an_ejected_one_whose_probes_fail_is_down_and_comes_back_into_its_ejection() -> None:
    clock = Clock("a", "b")
    fail(clock, "a", 3)
    clock.probe("a", False)
    clock.probe("a", False)
    assert clock.health("a") == "down"
    for _ in range(3):
        clock.probe("a", True)
    assert clock.health("a") == "ejected"
    clock.wait(9)
    assert clock.health("a") == "up"


def test_an_ejection_does_not_end_while_probes_fail() -> None:
    clock = Clock("a", "b")
    fail(clock, "a", 3)
    clock.wait(9.5)
    clock.probe("a", False)
    clock.feed(Tick())
    assert clock.health("a") == "ejected"
    clock.probe("a", True)
    clock.feed(Tick())
    assert clock.health("a") == "up"


def test_a_failure_on_the_way_back_ejects_for_longer() -> None:
    clock = Clock("a", "b")
    fail(clock, "a", 3)
    clock.wait(10)
    assert clock.weight("a") < 0.2
    fail(clock, "a", 3)
    assert clock.group.members["a"].until_s - clock.now_s == 20.0
    assert clock.weight("a") == 1.0  # weights are for those that are up


def test_slow_but_alive() -> None:
    clock = Clock("a", "b", "c")
    for _ in range(40):
        clock.feed(Answered("a", 5, slowness=6.0), Answered("b", 5), Answered("c", 5, 1.3))
        clock.wait(0.25)
    assert clock.health("a") == "ejected"
    assert "times slower than its peers" in clock.seen[-1].reason
    assert clock.health("b") == clock.health("c") == "up"
    assert clock.seen[-1].at_s >= 1005


def test_everything_slow_is_nobodys_fault() -> None:
    clock = Clock("a", "b", "c")
    for _ in range(80):
        clock.feed(*[Answered(name, 5, slowness=6.0) for name in "abc"])
        clock.wait(0.25)
    assert not clock.seen


def test_alone_or_among_strangers_nothing_is_slow() -> None:
    alone = Clock("a")
    strangers = Clock("a", "b")
    for clock in (alone, strangers):
        for _ in range(80):
            clock.feed(Answered("a", 5, slowness=9.0))
            clock.wait(0.25)
        assert not clock.seen


@pytest.mark.parametrize(
    ("status", "retry_after", "fault"),
    [
        (None, False, True),
        (500, False, True),
        (502, False, True),
        (503, False, True),
        (503, True, False),
        (504, False, True),
        (429, False, False),
        (422, False, False),
        (200, False, False),
        (499, False, False),
    ],
)
def test_what_counts_against_an_upstream(
    status: int | None, retry_after: bool, fault: bool
) -> None:
    assert is_fault(status, retry_after=retry_after) is fault


def test_members_come_and_go() -> None:
    clock = Clock("a", "b")
    fail(clock, "a", 3)
    clock.group = with_members(clock.group, ["a", "c"], clock.now_s)
    assert clock.health("a") == "ejected"
    assert clock.health("c") == "unknown"
    before = clock.group
    clock.feed(Probed("b", True, clock.now_s), Failed("b", "late news"))
    assert clock.group is before


def test_a_frozen_region_is_out_within_a_probe() -> None:
    """SIGSTOP with requests in flight: the probe sent after it settles the matter."""
    clock = Clock("a", "b")
    frozen_s = clock.now_s
    clock.now_s += 0.7  # the next probe is due
    clock.probe("a", False, in_flight=20, heard_s=frozen_s)
    assert clock.health("a") == "down"
    assert clock.now_s - frozen_s < 2.3
