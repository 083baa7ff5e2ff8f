"""Health under any history: nobody is ejected last, nothing lasts for ever, the healthy stay."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from nearfield.policy.health import (
    Answered,
    Event,
    Failed,
    Group,
    Probed,
    Rules,
    Tick,
    back_s,
    step,
    weight,
    with_members,
)

NAMES = ("a", "b", "c")
RULES = Rules()
names = st.sampled_from(NAMES)
events = st.one_of(
    st.builds(
        lambda name, passed, deep, in_flight, silent_s: (
            lambda now_s: Probed(
                name, passed, now_s - 1, deep, in_flight, silent_s and now_s - silent_s
            )
        ),
        names,
        st.booleans(),
        st.booleans(),
        st.integers(0, 3),
        st.one_of(st.none(), st.floats(0.01, 3)),
    ),
    st.builds(
        lambda name, count, slow: lambda _: Answered(name, count, slow),
        names,
        st.integers(0, 30),
        st.floats(0.1, 20),
    ),
    st.builds(
        lambda name, answered: lambda _: Failed(name, "reset", answered), names, st.integers(0, 3)
    ),
    st.just(lambda _: Tick()),
)
histories = st.lists(
    st.tuples(st.floats(0, 4), events, st.floats(0, 1, exclude_max=True)), max_size=80
)


def up(group: Group) -> set[str]:
    return {name for name, u in group.members.items() if u.health == "up"}


@given(histories, st.sampled_from(["unknown", "up"]))
@settings(max_examples=150)
def test_every_step_keeps_the_promises(history: list, start: str) -> None:  # type: ignore[type-arg]
    now_s = 100.0
    group = with_members(Group(), NAMES, now_s, start=start)  # type: ignore[arg-type]
    for wait_s, make, draw in history:
        now_s += wait_s
        event: Event = make(now_s)
        before = group
        group, transitions = step(group, event, now_s, draw)
        for transition in transitions:
            assert before.members[transition.name].health == transition.before
            assert transition.before != transition.after
            assert transition.reason
            if transition.after == "ejected" and transition.before == "up":
                assert up(group), "the last one up was ejected"
        changed = {t.name for t in transitions}
        for name, upstream in group.members.items():
            assert (before.members[name].health != upstream.health) == (name in changed)
            assert 0.1 <= weight(upstream, now_s, RULES) <= 1.0
            assert 0 <= back_s(upstream, now_s, RULES) <= RULES.eject_cap_s
            assert len(upstream.window) <= RULES.window_s + 1
            if upstream.health == "ejected":
                assert upstream.until_s <= now_s + RULES.eject_cap_s
        if not isinstance(event, Tick):
            assert all(before.members[n] is group.members[n] for n in NAMES if n != event.name)


@given(histories)
@settings(max_examples=60)
def test_whatever_happened_peace_brings_everybody_back(history: list) -> None:  # type: ignore[type-arg]
    now_s = 100.0
    group = with_members(Group(), NAMES, now_s)
    for wait_s, make, draw in history:
        now_s += wait_s
        group, _ = step(group, make(now_s), now_s, draw)
    for _ in range(400):
        now_s += 1
        for name in NAMES:
            group, _ = step(group, Probed(name, True, now_s), now_s, 0.5)
            group, _ = step(group, Probed(name, True, now_s, deep=True), now_s, 0.5)
            group, _ = step(group, Answered(name, 10, 1.0), now_s, 0.5)
        group, _ = step(group, Tick(), now_s, 0.5)
    assert up(group) == set(NAMES)
    assert all(weight(u, now_s, RULES) == 1.0 for u in group.members.values())


@given(
    st.lists(
        st.tuples(st.floats(0.05, 2), st.integers(2, 50), st.integers(0, 1), st.floats(0.5, 1.9)),
        max_size=100,
    )
)
def test_a_healthy_one_with_the_odd_failure_is_left_alone(
    history: list[tuple[float, int, int, float]],
) -> None:
    """Fewer than half fail, no two in a row, none is thrice as slow: nothing happens."""
    now_s = 100.0
    group = with_members(Group(), NAMES, now_s, start="up")
    for wait_s, answered, failed, slow in history:
        now_s += wait_s
        for name in NAMES:
            events: list[Event] = [Answered(name, answered, slow), Tick()]
            events += [Failed(name, "reset")] * failed
            events.append(Probed(name, True, now_s))
            for event in events:
                group, transitions = step(group, event, now_s, 0.5)
                assert not transitions
