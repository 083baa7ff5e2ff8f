"""Routing decisions one by one: refusals, queues, sessions, prices, deadlines, words."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from nearfield.core.errors import Forbidden, NotFound, RateLimited, Unavailable
from nearfield.policy.endpoints import (
    CRITICAL,
    DEFAULT,
    SHEDDABLE,
    Ask,
    Caller,
    Endpoint,
    EndpointState,
    Refusal,
)
from nearfield.policy.explain import explain, summary
from nearfield.policy.route import Pick, Plan, alternatives, pick, plan

ANYONE = Caller()


def at(number: int, region: str, **facts: Any) -> EndpointState:
    names = {f.name for f in dataclasses.fields(Endpoint)}
    identity: dict[str, Any] = {
        "model": "chat",
        "version": "1",
        "pool": "l4",
        "jurisdiction": region.split("-")[0],
        **{k: v for k, v in facts.items() if k in names},
    }
    state: dict[str, Any] = {
        "rtt_s": 0.02,
        "slots": 4,
        "max_queued": 10,
        "first_byte_s": 0.03,
        "hold_s": 0.4,
        **{k: v for k, v in facts.items() if k not in names},
    }
    return EndpointState(Endpoint(region=region, **identity), number, **state)


EU = at(0, "eu-west")
US = at(1, "us-east", rtt_s=0.1)


def made(*states: EndpointState, caller: Caller = ANYONE, **options: Any) -> Plan:
    return plan(states, options.pop("ask", Ask("chat")), caller, now_s=0, **options)


def chosen(found: Pick | Refusal) -> tuple[str, str]:
    assert isinstance(found, Pick)
    return found.candidate.state.endpoint.region, found.why


def refused(found: Pick | Refusal) -> Refusal:
    assert isinstance(found, Refusal)
    return found


@pytest.mark.parametrize(
    ("states", "caller", "ask", "kind", "code", "after_s"),
    [
        ((), ANYONE, Ask("chat"), NotFound, "model_not_found", None),
        ((US,), ANYONE, Ask("other"), NotFound, "model_not_found", None),
        ((EU,), ANYONE, Ask("chat", "2"), NotFound, "version_not_found", None),
        (
            (US,),
            Caller(jurisdictions=frozenset({"eu"})),
            Ask("chat"),
            Forbidden,
            "outside_jurisdiction",
            None,
        ),
        (
            (at(0, "eu-west", products=frozenset({"bank"})),),
            Caller(product="shop"),
            Ask("chat"),
            Forbidden,
            "no_pool",
            None,
        ),
        (
            (at(0, "eu-west", health="down", back_s=2.2),),
            ANYONE,
            Ask("chat"),
            Unavailable,
            "no_healthy_region",
            3.0,
        ),
        ((at(0, "eu-west", draining=True),), ANYONE, Ask("chat"), Unavailable, "draining", 5.0),
        (
            (at(0, "eu-west", replicas=0, slots=0),),
            ANYONE,
            Ask("chat"),
            Unavailable,
            "no_capacity",
            5.0,
        ),
    ],
)
def test_a_refusal_says_which_filter_left_nobody(
    states: tuple[EndpointState, ...],
    caller: Caller,
    ask: Ask,
    kind: type[Exception],
    code: str,
    after_s: float | None,
) -> None:
    error = refused(pick(made(*states, caller=caller, ask=ask), [0, 0], 0.5)).error()
    assert type(error) is kind
    assert error.code == code
    assert error.retry_after_s == after_s


def test_data_stays_inside_even_when_everything_there_is_down() -> None:
    caller = Caller(jurisdictions=frozenset({"eu"}))
    down = at(0, "eu-west", health="down")
    error = refused(pick(made(down, US, caller=caller), [0, 0], 0.1)).error()
    assert isinstance(error, Unavailable)
    assert error.retry_after_s == 3.0


def test_those_who_come_back_are_spread() -> None:
    refusal = Refusal("health", "down", 10.0)
    assert refusal.error(0.0).retry_after_s == 10.0
    assert refusal.error(0.99).retry_after_s == 15.0


def test_a_full_queue_is_a_429_with_the_time_until_there_is_room() -> None:
    full = at(0, "eu-west", load=14)
    error = refused(pick(made(full), [0], 0.5, criticality=CRITICAL)).error()
    assert isinstance(error, RateLimited)
    assert error.code == "queue_full"
    assert error.retry_after_s == 1.0  # a turn every 0.1 s


def test_the_nearest_is_chosen_and_a_queue_spills() -> None:
    current = made(EU, US)
    assert chosen(pick(current, [0, 0], 0.5)) == ("eu-west", "nearest")
    assert chosen(pick(current, [4, 0], 0.5)) == ("us-east", "spilled")  # a turn is 0.1 s
    assert chosen(pick(current, [4, 5], 0.5)) == ("eu-west", "nearest")


def test_what_this_gateway_got_back_since_the_poll_counts_too() -> None:
    busy = at(0, "eu-west", load=6, own=6)
    current = made(busy, US)
    assert chosen(pick(current, [6, 0], 0.5))[0] == "us-east"
    assert chosen(pick(current, [3, 0], 0.5))[0] == "eu-west"


def test_a_queue_that_does_not_move_is_believed_over_the_mean() -> None:
    stuck = at(0, "eu-west", load=5, queue_age_s=9.0)
    found = pick(made(stuck), [0], 0.5)
    assert isinstance(found, Pick)
    assert found.wait_s == pytest.approx(9.0)


def test_of_near_equals_the_emptier_of_two_is_taken() -> None:
    twin = at(1, "eu-north", rtt_s=0.0201, load=3)
    current = made(EU, twin)
    assert current.near == 2
    drawn = [chosen(pick(current, [0, 0], i / 100))[0] for i in range(100)]
    assert drawn.count("eu-west") == 75  # of four ways to draw two, three hold the emptier one
    assert {why for _, why in [chosen(pick(current, [0, 0], 0.1))]} == {"near-equal"}


def test_a_far_idle_pool_and_a_near_one_at_zero() -> None:
    cold = at(0, "eu-west", replicas=0, slots=0, cold_start_s=2.0)
    assert chosen(pick(made(cold, US), [0, 0], 0.5))[0] == "us-east"
    alone = pick(made(cold), [3], 0.5)
    assert isinstance(alone, Pick)
    assert alone.predicted_s == pytest.approx(2.05)
    full = refused(pick(made(cold), [9], 0.5))
    assert (full.filter, full.retry_after_s) == ("full", 2.0)


def test_a_preferred_pool_is_used_until_its_queue_costs_more_than_the_preference() -> None:
    spot = at(0, "eu-west", pool="spot")
    reserve = at(1, "eu-west", pool="on-demand", handicap_s=0.25)
    current = made(spot, reserve)
    pools = []
    for mine in range(4, 8):
        found = pick(current, [mine, 0], 0.5)
        assert isinstance(found, Pick)
        pools.append(found.candidate.state.endpoint.pool)
        assert found.predicted_s < 0.36  # the preference is no part of the prediction
    assert pools == ["spot", "spot", "on-demand", "on-demand"]


def test_the_sessions_cache_outweighs_the_way() -> None:
    here = at(0, "eu-west", first_byte_s=0.2, prefill_token_s=0.0001)
    there = at(1, "us-east", rtt_s=0.1, first_byte_s=0.2, prefill_token_s=0.0001)
    current = made(here, there)
    cold = pick(current, [0, 0], 0.5, session=1, cached_tokens=500)
    assert chosen(cold) == ("eu-west", "nearest")
    warm = pick(current, [0, 0], 0.5, session=1, cached_tokens=1500)
    assert chosen(warm) == ("us-east", "session")
    assert isinstance(warm, Pick)
    assert warm.predicted_s == pytest.approx(0.1 + 0.2 - 0.15)
    swamped = pick(current, [0, 9], 0.5, session=1, cached_tokens=1500)
    assert chosen(swamped)[0] == "eu-west"
    assert chosen(pick(current, [0, 0], 0.5, session=7, cached_tokens=9)) == ("eu-west", "nearest")


def test_economy_takes_the_cheapest_that_keeps_the_slo() -> None:
    near = at(0, "eu-west", unit_usd=2.0)
    cheap = at(1, "us-east", rtt_s=0.1, unit_usd=1.0)
    far = at(2, "asia-south", rtt_s=0.4, unit_usd=0.5)
    caller = Caller(mode="economy", slo_s=0.25)
    current = made(near, cheap, far, caller=caller)
    assert chosen(pick(current, [0, 0, 0], 0.5)) == ("us-east", "cheapest")
    assert chosen(pick(current, [0, 8, 0], 0.5)) == ("eu-west", "spilled")  # 0.5 s behind others
    # In time for this request's own deadline only the near one is.
    assert chosen(pick(current, [0, 0, 0], 0.5, allowed_s=0.1))[0] == "eu-west"
    # Nothing keeps the SLO: the nearest.
    strict = Caller(mode="economy", slo_s=0.01)
    assert chosen(pick(made(near, cheap, caller=strict), [0, 0], 0.5))[0] == "eu-west"


def test_in_economy_a_session_does_not_pay_more_for_its_cache() -> None:
    near = at(0, "eu-west", unit_usd=2.0, prefill_token_s=0.001)
    cheap = at(1, "us-east", rtt_s=0.1, unit_usd=1.0)
    current = made(near, cheap, caller=Caller(mode="economy", slo_s=0.5))
    assert chosen(pick(current, [0, 0], 0.5, session=0, cached_tokens=500))[0] == "us-east"


def test_sheddable_requests_leave_the_rest_of_the_queue_to_others() -> None:
    current = made(EU)
    outcomes = {
        mine: [
            isinstance(pick(current, [mine], 0.5, criticality=level), Pick)
            for level in (CRITICAL, DEFAULT, SHEDDABLE)
        ]
        for mine in (8, 9, 12, 13, 14)
    }
    assert outcomes == {
        8: [True, True, True],
        9: [True, True, False],
        12: [True, True, False],
        13: [True, False, False],
        14: [False, False, False],
    }


def test_what_would_be_late_is_refused_by_criticality() -> None:
    current = made(EU)  # 0.05 s, and 0.1 s for each turn of the queue
    waits = [4]
    late = {"allowed_s": 0.12}
    assert isinstance(pick(current, waits, 0.5, criticality=CRITICAL, **late), Pick)
    assert isinstance(pick(current, waits, 0.5, criticality=DEFAULT, **late), Pick)
    shed = refused(pick(current, waits, 0.5, criticality=SHEDDABLE, **late))
    assert shed.filter == "deadline"
    assert isinstance(shed.error(), Unavailable)
    assert shed.error().retry_after_s is not None
    assert isinstance(pick(current, [5], 0.5, criticality=DEFAULT, **late), Refusal)
    assert isinstance(pick(current, waits, 0.5, criticality=CRITICAL, allowed_s=0.01), Refusal)


def test_a_declared_smaller_model_answers_before_anybody_is_refused() -> None:
    small = made(at(2, "eu-west", model="small"), ask=Ask("small"))
    current = made(EU, degraded=(small,))
    assert chosen(pick(current, [0, 0, 0], 0.5)) == ("eu-west", "nearest")
    for own, allowed_s in (([14, 0, 0], 9.0), ([6, 0, 0], 0.3)):  # full; late
        found = pick(current, own, 0.5, allowed_s=allowed_s)
        assert chosen(found) == ("eu-west", "fallback")
        assert isinstance(found, Pick)
        assert found.candidate.state.endpoint.model == "small"
        assert "instead of chat" in explain(current, found, own).outcome
    dead = made(at(0, "eu-west", health="down"), degraded=(small,))
    assert chosen(pick(dead, [0, 0, 0], 0.5))[1] == "fallback"
    # A model that is not there is not degraded to another one: the caller should hear of it.
    missing = made(ask=Ask("typo"), degraded=(small,))
    assert refused(pick(missing, [0, 0, 0], 0.5)).filter == "model"
    # Too late there as well.
    assert isinstance(pick(current, [9, 0, 9], 0.5, allowed_s=0.3), Refusal)


def test_a_fallback_model_is_planned_for_the_same_callers() -> None:
    european = Caller(jurisdictions=frozenset({"eu"}))
    anywhere = made(at(1, "us-east", model="small"), ask=Ask("small"))
    with pytest.raises(ValueError, match="same class of callers"):
        made(EU, caller=european, degraded=(anywhere,))


def test_where_a_request_goes_when_its_endpoint_failed() -> None:
    asia = at(2, "asia-south", rtt_s=0.15)
    second = at(3, "eu-west", pool="h100", rtt_s=0.02, load=9)
    small = made(at(4, "us-east", model="small"), ask=Ask("small"))
    current = made(EU, US, asia, second, degraded=(small,))
    own = [0] * 5
    after = [c.state.number for c in alternatives(current, own, tried={0})]
    assert after == [1, 2, 3, 4]  # by time as queues are now, then the smaller model
    lost = [c.state.number for c in alternatives(current, own, tried={0}, lost_region="eu-west")]
    assert lost == [1, 2, 4]
    assert [c.state.number for c in alternatives(current, [0, 14, 0, 0, 0], tried={0})] == [2, 3, 4]


def test_an_explanation_has_a_line_for_every_endpoint_with_its_numbers() -> None:
    outside = at(3, "us-west")
    dead = at(2, "eu-south", health="down")
    cold = at(1, "eu-north", replicas=0, slots=0, cold_start_s=2.0, unit_usd=1.5)
    caller = Caller(jurisdictions=frozenset({"eu"}))
    current = made(EU, cold, dead, outside, caller=caller)
    own = [5, 0, 0, 0]
    found = pick(current, own, 0.5)
    assert isinstance(found, Pick)
    story = explain(current, found, own)
    by_region = {line.endpoint.split("/")[0]: line for line in story.lines}
    assert by_region["eu-west"].verdict == "chosen"
    assert by_region["eu-west"].wait_s == pytest.approx(0.2)
    assert by_region["eu-west"].load == 5
    assert by_region["eu-north"].predicted_s == pytest.approx(2.05)
    assert by_region["eu-north"].reason == "1800.0 ms slower"
    assert by_region["eu-south"].verdict == "health"
    assert by_region["us-west"].reason == "us is not in eu"
    text = str(story)
    assert text.splitlines()[0].startswith("eu-west/chat@1/l4: nearest; 250.0 ms = 20.0 way")
    assert "→" in text.splitlines()[2]
    assert summary(found) == "nearest; 250.0 ms = 20.0 way + 200.0 wait + 30.0 first byte"
    assert summary(found).isascii()


def test_an_explanation_of_a_refusal() -> None:
    busy = at(0, "eu-west", load=20)
    current = made(busy, US, caller=Caller(jurisdictions=frozenset({"eu"})))
    found = pick(current, [0, 0], 0.5)
    text = str(explain(current, found, [0, 0]))
    assert text.startswith("Refused (full): The model 'chat' is busy everywhere.")
    assert "no room for default requests" in text


class TestTheSetStands:
    """Who counts as equally near, as the way to the second of two regions changes."""

    @staticmethod
    def held(*steps: tuple[float, float | None]) -> list[set[int]]:
        """At each moment, with that round trip to the second region; None: it is gone."""
        current: Plan | None = None
        found = []
        for now_s, rtt_s in steps:
            states = [at(0, "eu-a", rtt_s=0.1, first_byte_s=0.0)]
            if rtt_s is not None:
                states.append(at(1, "eu-b", rtt_s=rtt_s, first_byte_s=0.0))
            current = plan(states, Ask("chat"), ANYONE, now_s=now_s, previous=current)
            found.append(set(current.held))
        return found

    def test_it_changes_freely_while_it_is_new(self) -> None:
        assert self.held((0, 0.12), (30, 0.1005), (59, 0.12)) == [{0}, {0, 1}, {0}]

    def test_an_equal_joins_once_it_has_stood(self) -> None:
        joining = self.held((0, 0.12), (100, 0.1005), (299, 0.1005), (300, 0.1005))
        assert joining == [{0}, {0}, {0}, {0, 1}]

    @pytest.mark.parametrize(("rtt_s", "at_once"), [(0.097, False), (0.094, True), (0.05, True)])
    def test_who_is_noticeably_nearer_does_not_wait(self, rtt_s: float, at_once: bool) -> None:
        before, after = self.held((0, 0.2), (100, rtt_s))
        assert before == {0}
        assert (1 in after) == at_once

    @pytest.mark.parametrize(("rtt_s", "at_once"), [(0.11, False), (0.113, True), (0.5, True)])
    def test_who_is_noticeably_farther_leaves_at_once(self, rtt_s: float, at_once: bool) -> None:
        assert self.held((0, 0.1), (100, rtt_s)) == [{0, 1}, {0} if at_once else {0, 1}]

    def test_who_is_gone_is_left_out_and_comes_back_without_waiting_anew(self) -> None:
        steps = self.held((0, 0.1), (310, None), (320, 0.1))
        assert steps == [{0, 1}, {0}, {0, 1}]


def test_how_busy_a_region_is_is_no_difference_from_its_neighbour() -> None:
    """Its first byte takes longer because fewer replicas share its prompts: the way decides."""
    home = at(0, "eu-west", rtt_s=0.001, first_byte_s=0.045)
    larger = at(1, "eu-north", rtt_s=0.010, first_byte_s=0.030)
    found = made(home, larger)
    picked = pick(found, [0, 0], 0.5)
    assert chosen(picked) == ("eu-west", "nearest")
    assert isinstance(picked, Pick)
    assert picked.predicted_s == pytest.approx(0.046)  # what is told is what is expected
    lines = explain(found, picked, [0, 0]).lines
    assert lines[1].reason == "9.0 ms slower where first bytes are alike"


@pytest.mark.parametrize(
    ("first_byte_s", "region"),
    [(0.065, "eu-north"), (0.150, "eu-north"), (0.059, "eu-west")],
)
def test_slower_hardware_is_a_difference(first_byte_s: float, region: str) -> None:
    home = at(0, "eu-west", rtt_s=0.001, first_byte_s=first_byte_s)
    faster = at(1, "eu-north", rtt_s=0.004, first_byte_s=0.030)
    assert chosen(pick(made(home, faster), [0, 0], 0.5))[0] == region


def test_between_pools_of_one_region_every_millisecond_counts() -> None:
    slow = at(0, "eu-west", pool="l4", first_byte_s=0.045)
    fast = at(1, "eu-west", pool="h100", first_byte_s=0.035)
    far = at(2, "us-east", pool="h100", first_byte_s=0.030, rtt_s=0.1)
    found = pick(made(slow, fast, far), [0, 0, 0], 0.5)
    assert isinstance(found, Pick)
    assert found.candidate.state.endpoint.pool == "h100"
    assert found.candidate.state.endpoint.region == "eu-west"


def test_what_company_cost_is_forgotten_when_it_has_gone() -> None:
    """Nobody is sent to the near region any more, so nobody learns that it is quick again."""
    far = at(1, "us-east", rtt_s=0.05, first_byte_s=0.03, load=3)

    def near(first_byte_s: float, load: int) -> EndpointState:
        return at(0, "eu-west", rtt_s=0.001, first_byte_s=first_byte_s, load=load)

    found = made(near(0.04, 3), far)  # what it takes with little to do
    found = plan([near(0.4, 4), far], Ask("chat"), ANYONE, now_s=600, previous=found)
    assert chosen(pick(found, [0, 0], 0.5))[0] == "us-east"
    expected_s = []
    for now_s in (601, 660, 1200):
        found = plan([near(0.4, 0), far], Ask("chat"), ANYONE, now_s=now_s, previous=found)
        expected_s.append(found.by_number[0].candidate.state.first_byte_s)
    assert expected_s == pytest.approx([0.396, 0.22, 0.04], rel=0.01)
    assert chosen(pick(found, [0, 0], 0.5))[0] == "eu-west"
    found = plan([near(0.4, 1), far], Ask("chat"), ANYONE, now_s=1201, previous=found)
    assert found.by_number[0].candidate.state.first_byte_s == 0.4  # measured is measured
