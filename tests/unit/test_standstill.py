"""That a process stood still, seen by its event loop's clock."""

from __future__ import annotations

from collections.abc import Callable

from nearfield.core.standstill import LATE_S, SETTLE_S, TICK_S, Standstill


class Clock:
    """The clock and the timers of an event loop."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self._due: list[tuple[float, Callable[[], None]]] = []

    def time(self) -> float:
        return self.now_s

    def call_later(self, delay_s: float, call: Callable[[], None]) -> None:
        self._due.append((self.now_s + delay_s, call))

    def fire(self) -> None:
        due = [call for due_s, call in self._due if due_s <= self.now_s]
        self._due = [timer for timer in self._due if timer[0] > self.now_s]
        for call in due:
            call()

    def run(self, for_s: float) -> None:
        """As a loop that has time does."""
        until_s = self.now_s + for_s
        while self.now_s < until_s:
            self.now_s += 0.1
            self.fire()


def made() -> tuple[Clock, Standstill]:
    clock = Clock()
    return clock, Standstill(clock)


def test_a_loop_that_runs_waits_for_nothing() -> None:
    clock, standstill = made()
    for _ in range(100):
        clock.run(0.3)
        assert standstill.wait_s() == 0.0


def test_a_busy_loop_is_none_that_stood_still() -> None:
    clock, standstill = made()
    clock.run(3.0)
    clock.now_s += 0.9 * LATE_S
    assert standstill.wait_s() == 0.0


def test_what_is_read_before_the_timer_fires_waits() -> None:
    clock, standstill = made()
    clock.run(3.0)
    clock.now_s += TICK_S + LATE_S + 5.0
    assert standstill.wait_s() == SETTLE_S
    clock.fire()
    clock.now_s += 0.1
    assert 0.0 < standstill.wait_s() < SETTLE_S
    clock.run(SETTLE_S)
    assert standstill.wait_s() == 0.0


def test_what_is_read_after_the_timer_fired_waits() -> None:
    clock, standstill = made()
    clock.run(3.0)
    clock.now_s += TICK_S + LATE_S + 5.0
    clock.fire()
    assert standstill.wait_s() == SETTLE_S
