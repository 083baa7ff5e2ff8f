"""Who a dead replica is blamed on."""

from __future__ import annotations

import pytest
from nearfield.core.errors import Unprocessable
from nearfield.policy.quarantine import (
    Fate,
    Quarantine,
    Record,
    departure,
    fingerprint,
    may_try,
    refusal,
    suspicion,
    trial_s,
)

A, B, C = b"a", b"b", b"c"


def died(quarantine: Quarantine, now_s: float, *inside: bytes, tried: bytes = b"") -> Quarantine:
    return quarantine.blamed([(body, body == tried) for body in inside], now_s)[0]


def test_all_that_were_inside_are_suspects_until_they_are_answered() -> None:
    quarantine, guilty = Quarantine().blamed([(A, False), (B, False)], 10.0)
    assert not guilty
    assert {quarantine.standing(body, 11.0) for body in (A, B)} == {"suspect"}
    assert quarantine.standing(C, 11.0) == "clear"
    quarantine = quarantine.absolved(A)
    assert quarantine.standing(A, 11.0) == "clear"
    assert quarantine.standing(B, 311.0) == "clear"  # forgotten


def test_the_one_on_trial_did_it_and_those_beside_it_did_not() -> None:
    quarantine = died(Quarantine(), 10.0, A, B)
    quarantine, guilty = quarantine.blamed([(A, True), (C, False)], 20.0)
    assert guilty == {A}
    assert quarantine.standing(A, 21.0) == "quarantined"
    assert quarantine.standing(B, 21.0) == "suspect"
    assert quarantine.standing(C, 21.0) == "clear"
    assert quarantine.absolved(A) is quarantine  # an answer that was under way convinces nobody
    assert quarantine.standing(A, 20.0 + 600.0) == "clear"


def test_a_request_alone_with_its_replica_is_guilty_but_not_yet_quarantined() -> None:
    quarantine, guilty = Quarantine().blamed([(A, False)], 10.0)
    assert guilty == {A}
    assert quarantine.standing(A, 11.0) == "suspect"
    assert died(quarantine, 20.0, A, tried=A).standing(A, 21.0) == "quarantined"


def test_many_copies_of_one_body_prove_nothing() -> None:
    quarantine, guilty = Quarantine().blamed([(A, False)] * 20, 10.0)
    assert not guilty
    assert quarantine.standing(A, 11.0) == "suspect"


def test_replicas_that_die_together_accuse_only_what_they_shared() -> None:
    quarantine = died(Quarantine(), 10.0, A, B)
    quarantine = died(quarantine, 10.4, A, C)
    assert quarantine.standing(A, 11.0) == "suspect"
    assert quarantine.standing(C, 11.0) == "clear"
    assert quarantine.records[A].deaths == 1  # one event


def test_a_trial_among_unrelated_deaths_proves_nothing() -> None:
    quarantine = died(Quarantine(), 10.0, A, B)
    quarantine = died(quarantine, 20.0, C)
    quarantine, guilty = quarantine.blamed([(A, True)], 20.2)
    assert not guilty
    assert quarantine.standing(A, 20.3) == "suspect"
    # In a wave of its own copies it does.
    wave = died(Quarantine(), 10.0, A, B)
    wave = died(wave, 10.1, A, C)
    assert died(wave, 10.5, A, tried=A).standing(A, 11.0) == "quarantined"


def test_two_suspects_on_one_replica_leave_a_doubt() -> None:
    quarantine = died(Quarantine(), 10.0, A, B)
    quarantine, guilty = quarantine.blamed([(A, True), (B, True)], 20.0)
    assert not guilty
    assert quarantine.standing(A, 21.0) == quarantine.standing(B, 21.0) == "suspect"


@pytest.mark.parametrize(
    ("trying", "suspects_there", "may"), [((), 0, True), ((A,), 0, False), ((B,), 1, False)]
)
def test_trials_are_one_by_one(trying: tuple[bytes, ...], suspects_there: int, may: bool) -> None:
    assert may_try(A, trying=trying, suspects_there=suspects_there) is may


@pytest.mark.parametrize(
    ("deaths", "alone", "inside_s", "how"),
    [
        (1, False, 0.05, "fresh"),
        (1, False, 0.5, "slight"),
        (1, True, 0.5, "grave"),
        (2, False, 0.5, "grave"),
    ],
)
def test_who_outlived_the_time_in_which_requests_kill_is_hardly_suspected(
    deaths: int, alone: bool, inside_s: float, how: str
) -> None:
    record = Record(deaths, 300.0)
    assert suspicion(record, alone=alone, inside_s=inside_s, first_byte_s=0.01) == how


def test_a_trial_is_as_long_as_a_prompt_takes() -> None:
    assert trial_s(0.01) == 0.1
    assert trial_s(2.0) == 2.0
    assert suspicion(Record(1, 0.0), alone=False, inside_s=1.5, first_byte_s=2.0) == "fresh"


def test_what_another_gateway_found_guilty_is() -> None:
    quarantine = died(Quarantine(), 10.0, A, B).convicted(A, 11.0)
    assert quarantine.standing(A, 12.0) == "quarantined"
    assert quarantine.standing(B, 12.0) == "suspect"
    assert quarantine.standing(A, 11.0 + 600.0) == "clear"


def test_what_another_gateway_suspects_dies_of_its_next_death() -> None:
    quarantine = Quarantine().accused(A, 10.0)
    assert quarantine.standing(A, 11.0) == "suspect"
    assert quarantine.accused(A, 12.0) is quarantine
    assert quarantine.absolved(A).standing(A, 13.0) == "clear"
    assert died(quarantine, 20.0, A, tried=A).standing(A, 21.0) == "quarantined"
    convicted = Quarantine().convicted(A, 10.0)
    assert convicted.accused(A, 11.0) is convicted


@pytest.mark.parametrize(
    ("fate", "slight", "grave"),
    [("lost", "go", "go"), ("unheard", "wait", "wait"), ("alive", "go", "stay")],
)
def test_no_request_takes_a_whole_region_so_suspects_may_leave_a_lost_one(
    fate: Fate, slight: str, grave: str
) -> None:
    assert departure(fate, slight=True) == slight
    assert departure(fate, slight=False) == grave


def test_the_sender_is_told() -> None:
    quarantine = died(died(Quarantine(), 10.0, A), 20.0, A, tried=A)
    error = refusal(quarantine.records[A], 30.0)
    assert isinstance(error, Unprocessable)
    assert error.code == "request_quarantined"
    assert error.retry_after_s == 590.0
    assert "died of this request 2 times" in error.message


def test_a_fingerprint_tells_bodies_and_models_apart_and_holds_neither() -> None:
    assert fingerprint("m", b"x") == fingerprint("m", b"x")
    assert len({fingerprint("m", b"x"), fingerprint("m", b"y"), fingerprint("n", b"x")}) == 3
    assert len(fingerprint("m" * 500, b"prompt" * 1000)) == 16
