"""What totals tell of a replica's speed."""

from __future__ import annotations

import pytest
from nearfield.api.load import ReplicaLoad, kind_of, slots_of
from nearfield.core.spec import ModelSpec
from nearfield.edge.speed import ASSUMED, GAIN, Meter, Speed, together

PRIOR = ASSUMED["generate"]


def load(**facts: float) -> ReplicaLoad:
    given = {
        "running": 0, "waiting": 0, "room": 8, "queue_age_s": 0.0, "kv_usage": 0.0, "tokens": 0,
        "crashes": 0, "slots": 4,
    }  # fmt: skip
    return ReplicaLoad(model="m", version="1", **{**given, **facts})  # type: ignore[arg-type]


class Worker:
    """A replica that has computed."""

    def __init__(self) -> None:
        self.meter = Meter()
        self.totals = dict.fromkeys(
            ("answered", "answered_tokens", "busy_s", "request_s", "first_byte_s",
             "prompt_tokens", "cached_tokens"), 0.0,
        )  # fmt: skip
        self.meter.read(load())

    def work(
        self, seconds: float, at_once: float, rate: float, request_tokens: float = 100
    ) -> None:
        answers = round(seconds * rate / request_tokens)
        self.totals["answered"] += answers
        self.totals["answered_tokens"] += round(seconds * rate)
        self.totals["busy_s"] += seconds
        self.totals["request_s"] += seconds * at_once
        self.totals["first_byte_s"] += answers * 0.2
        self.totals["prompt_tokens"] += answers * 40
        whole = ("answered", "answered_tokens", "prompt_tokens", "cached_tokens")
        self.meter.read(load(**{k: int(v) if k in whole else v for k, v in self.totals.items()}))

    @property
    def speed(self) -> Speed:
        return self.meter.speed(PRIOR, 4)


def test_nothing_seen_is_what_was_assumed() -> None:
    assert Worker().speed is PRIOR


def test_alone_and_all_together() -> None:
    worker = Worker()
    for _ in range(5):
        worker.work(10, at_once=1, rate=50)
    assert worker.speed.alone_tokens_s == pytest.approx(50)
    assert worker.speed.tokens_s == pytest.approx(50 * GAIN)  # not seen yet
    for _ in range(5):
        worker.work(10, at_once=4, rate=120)
    speed = worker.speed
    assert (speed.alone_tokens_s, speed.tokens_s) == (pytest.approx(50), pytest.approx(120))
    assert speed.request_tokens == pytest.approx(100)
    assert speed.first_byte_s == pytest.approx(0.2)
    assert speed.measured


def test_two_at_once_that_are_no_faster_than_one_tell_of_the_limit() -> None:
    worker = Worker()
    worker.work(10, at_once=1, rate=100)
    worker.work(10, at_once=2, rate=100)
    assert worker.speed.tokens_s == pytest.approx(100)


def test_two_at_once_that_are_twice_as_fast_do_not() -> None:
    worker = Worker()
    worker.work(10, at_once=1, rate=100)
    worker.work(10, at_once=2, rate=200)
    assert worker.speed.tokens_s == pytest.approx(100 * GAIN)


def test_time_spent_waiting_inside_the_engine_holds_no_slot() -> None:
    worker = Worker()
    worker.work(10, at_once=16, rate=400)  # of 4 slots: 4 compute, 12 wait
    assert worker.speed.hold_s == pytest.approx(4 * 10 / 40)


def test_work_that_has_changed_is_known_anew() -> None:
    worker = Worker()
    for _ in range(20):
        worker.work(10, at_once=1, rate=50)
    for _ in range(20):
        worker.work(10, at_once=1, rate=200)
    assert worker.speed.alone_tokens_s == pytest.approx(200, rel=0.05)


def test_idling_and_short_stretches_teach_nothing() -> None:
    worker = Worker()
    worker.work(0.2, at_once=1, rate=500)
    assert worker.speed is PRIOR
    worker.work(0.9, at_once=1, rate=500)
    assert worker.speed.measured


def test_a_replica_that_starts_anew_starts_at_zero() -> None:
    worker = Worker()
    worker.work(10, at_once=1, rate=50)
    before = worker.speed
    worker.totals = dict.fromkeys(worker.totals, 0.0)
    worker.work(0, at_once=1, rate=50)
    assert worker.speed == before
    worker.work(10, at_once=1, rate=50)
    assert worker.speed.alone_tokens_s == pytest.approx(50)


def test_only_an_engine_that_keeps_a_cache_saves_prefill() -> None:
    worker = Worker()
    worker.work(10, at_once=1, rate=100)
    assert worker.speed.prefill_token_s == 0
    worker.totals["cached_tokens"] += 100
    worker.work(10, at_once=1, rate=100)
    assert worker.speed.prefill_token_s == pytest.approx(10 * 0.2 / 300)


def test_several_replicas_together() -> None:
    fast, slow = Speed(100, 200, 50, 0.1, 0.5), Speed(50, 100, 50, 0.3, 1.0, measured=True)
    both = together([(fast, 4), (slow, 4)])
    assert (both.alone_tokens_s, both.first_byte_s) == (75, pytest.approx(0.2))
    assert both.hold_s == pytest.approx(8 / (4 / 0.5 + 4 / 1.0))  # turns add up, times do not
    with pytest.raises(ValueError):
        together([])


@pytest.mark.parametrize(
    ("engine", "kind", "slots"),
    [
        ("generate", "generate", 16),
        ({"kind": "generate", "max_batch": 500}, "generate", 64),
        ("embed", "embed", 32),
        ("tensor", "tensor", 1),
        ("vllm", "generate", 64),
        ({"kind": "remote", "url": "https://a/v1", "task": "embed"}, "embed", 64),
        ("a.b:C", "other", 64),
    ],
)
def test_kinds_and_slots(engine: object, kind: str, slots: int) -> None:
    data = {"model": "m", "engine": engine}
    if (isinstance(engine, str) and ":" not in engine) or "max_batch" in str(engine):
        data["source"] = "builtin://abacus"
    spec = ModelSpec.model_validate(data)
    assert (kind_of(spec), slots_of(spec)) == (kind, slots)
