"""Budgets hold over any history; a query of death is found whatever runs beside it."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from nearfield.policy.quarantine import MOST_RECORDS, Quarantine, may_try
from nearfield.policy.retry import MOST_ATTEMPTS, Budget, History, hedge_budget, may_replay


@given(
    st.lists(st.tuples(st.floats(0, 3), st.integers(0, 200), st.integers(0, 60)), max_size=60),
    st.sampled_from([Budget(), hedge_budget(), Budget(share=0.1, least=1)]),
)
@settings(max_examples=200)
def test_extras_never_exceed_their_share_of_any_window(
    history: list[tuple[float, int, int]], budget: Budget
) -> None:
    """Requests arrive and as many extras as can be had are taken, marked once a second."""
    now_s, requests, marked_s = 0.0, 0, 0.0
    budget = budget.mark(now_s, requests)
    log = [(now_s, 0, 0)]
    for wait_s, arrived, asked in history:
        now_s += wait_s
        while marked_s + 1 <= now_s:
            marked_s += 1
            budget = budget.mark(marked_s, requests)
        requests += arrived
        for _ in range(asked):
            budget, _ = budget.take(now_s, requests, in_flight=0, extra_in_flight=0)
        log.append((now_s, requests, budget.extras))
        for then_s, _, extras_then in log:
            if then_s >= now_s - budget.window_s + 1:
                first_s = now_s - budget.window_s - 1
                before = [entry for entry in log if entry[0] <= first_s] or log[:1]
                allowed = budget.share * (requests - before[-1][1])
                assert budget.extras - extras_then <= max(budget.least, allowed)
    quiet = len(log) * budget.least
    assert budget.extras <= quiet + budget.share * requests


@given(
    st.builds(
        History,
        begun=st.booleans(),
        idempotent=st.booleans(),
        keyed=st.booleans(),
        runs=st.integers(0, 4),
        refusals=st.integers(0, 9),
        crossings=st.integers(0, 2),
        suspect=st.booleans(),
        guilty=st.booleans(),
        left_s=st.floats(0, 10),
    ),
    st.sampled_from(["refused", "died", "failed"]),
    st.booleans(),
    st.booleans(),
)
def test_no_replay_breaks_a_rule(
    history: History, cause: str, crosses: bool, region_lost: bool
) -> None:
    verdict = may_replay(history, cause, crosses=crosses, region_lost=region_lost)  # type: ignore[arg-type]
    assert verdict.reason
    if verdict.allowed:
        assert not history.begun
        assert not history.guilty
        assert history.runs < MOST_ATTEMPTS
        assert cause == "refused" or history.idempotent or history.keyed
        assert not crosses or history.crossings == 0
        assert verdict.isolated == history.suspect
        assert verdict.budgeted == (cause == "failed")


@dataclass
class Sent:
    body: bytes
    deadly: bool
    history: History = field(default_factory=History)
    trial: bool = False
    left: int = 2


class Region:
    """Replicas that a deadly body kills, a gateway that replays, and time in ticks of 0.25 s."""

    def __init__(self, replicas: int, rng: random.Random) -> None:
        self.replicas: list[list[Sent]] = [[] for _ in range(replicas)]
        self.down = [0] * replicas
        self.quarantine = Quarantine()
        self.waiting: list[Sent] = []
        self.outcomes: Counter[tuple[bool, str]] = Counter()
        self.kills: Counter[int] = Counter()
        self.rng = rng
        self.tick = 0

    @property
    def now_s(self) -> float:
        return self.tick * 0.25

    def step(self, arriving: list[Sent]) -> None:
        self.tick += 1
        self.down = [max(0, left - 1) for left in self.down]
        waiting, self.waiting = self.waiting + arriving, []
        for sent in waiting:
            self._send(sent)
        for number, inside in enumerate(self.replicas):
            killers = [sent for sent in inside if sent.deadly]
            if killers:
                for sent in killers:
                    self.kills[id(sent)] += 1
                self._die(number)
        for inside in self.replicas:
            for sent in inside:
                sent.left -= 1
            for sent in [s for s in inside if s.left <= 0]:
                inside.remove(sent)
                self.quarantine = self.quarantine.absolved(sent.body)
                self.outcomes[sent.deadly, "answered"] += 1

    def _send(self, sent: Sent) -> None:
        standing = self.quarantine.standing(sent.body, self.now_s)
        if standing == "quarantined":
            self.outcomes[sent.deadly, "quarantined"] += 1
            return
        sent.trial = standing == "suspect"
        alive = [i for i, down in enumerate(self.down) if not down]
        if sent.trial:
            trying = [s.body for inside in self.replicas for s in inside if s.trial]
            alive = [
                i
                for i in alive
                if may_try(
                    sent.body,
                    trying=trying,
                    suspects_there=sum(s.trial for s in self.replicas[i]),
                )
            ]
        if not alive:
            self.waiting.append(sent)
            return
        sent.left = 2
        number = min(alive, key=lambda i: (len(self.replicas[i]), self.rng.random()))
        self.replicas[number].append(sent)

    def _die(self, number: int) -> None:
        inside, self.replicas[number] = self.replicas[number], []
        self.down[number] = 8
        bodies = [(sent.body, sent.trial) for sent in inside]
        self.quarantine, guilty = self.quarantine.blamed(bodies, self.now_s)
        for sent in inside:
            history = History(
                runs=sent.history.runs,
                suspect=self.quarantine.standing(sent.body, self.now_s) == "suspect",
                guilty=sent.body in guilty,
            )
            if may_replay(history, "died").allowed:
                sent.history = History(runs=history.runs + 1)
                self.waiting.append(sent)
            else:
                self.outcomes[sent.deadly, "failed"] += 1


@given(
    st.integers(3, 8), st.integers(1, 12), st.integers(0, 6), st.booleans(), st.integers(0, 2**32)
)
@settings(max_examples=150, deadline=None)
def test_a_query_of_death_is_quarantined_and_costs_no_innocent_anything(
    replicas: int, rate: int, copies_at_once: int, popular: bool, seed: int
) -> None:
    """Fifty copies, one after another or many at once, among innocents that may all be alike."""
    rng = random.Random(seed)
    region = Region(replicas, rng)
    left, innocents = 50, 0
    for tick in range(400):
        arriving = []
        for _ in range(rate if tick < 200 else 0):
            innocents += 1
            body = b"hello" if popular and rng.random() < 0.5 else b"%d" % innocents
            arriving.append(Sent(body, False))
        if tick % 4 == 0:
            for _ in range(min(left, 1 + copies_at_once)):
                arriving.append(Sent(b"death", True))
                left -= 1
        rng.shuffle(arriving)
        region.step(arriving)
    assert left == 0
    assert not region.waiting
    assert region.outcomes[False, "answered"] == innocents
    assert region.outcomes[True, "answered"] == 0
    # What is unavoidable: the copies that are inside before the first of them has killed.
    assert region.outcomes[True, "quarantined"] >= 50 - 2 * (1 + copies_at_once)
    assert sum(region.kills.values()) <= 2 + 2 * copies_at_once


@given(st.integers(2, 6), st.integers(1, 10), st.integers(0, 2**32))
@settings(deadline=None)
def test_a_lost_node_convicts_nobody(lost: int, rate: int, seed: int) -> None:
    """Several replicas die at once, all of them with the prompt that everybody sends: all are
    answered, but those that were alone with their replica when it died."""
    rng = random.Random(seed)
    region = Region(lost + 2, rng)
    innocents = 0
    for tick in range(120):
        innocents += rate if tick < 60 else 0
        region.step([Sent(b"hello", False) for _ in range(rate if tick < 60 else 0)])
        if tick == 20:
            for number in range(lost):
                region._die(number)
    assert region.outcomes[False, "quarantined"] == 0
    assert region.outcomes[False, "answered"] >= innocents - lost
    assert not region.waiting


@given(st.lists(st.binary(min_size=1, max_size=2), max_size=60), st.floats(0, 2))
def test_memory_is_bounded_and_time_forgets(bodies: list[bytes], wait_s: float) -> None:
    quarantine = Quarantine()
    now_s = 0.0
    for body in bodies:
        now_s += wait_s
        quarantine, guilty = quarantine.blamed([(body, True), (b"other" + body, False)], now_s)
        assert guilty <= {body}
    assert len(quarantine.records) <= len(set(bodies))
    assert all(quarantine.standing(body, now_s + 601) == "clear" for body in bodies)
    crowd = [(b"%d" % i, False) for i in range(2 * MOST_RECORDS)]
    quarantine, _ = Quarantine().blamed(crowd, 0.0)
    assert len(quarantine.records) == MOST_RECORDS
