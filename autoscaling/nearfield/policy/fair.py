"""Whose request is next, where several share one replica: start-time fair queueing.

    start  = max(virtual time, finish of the flow's request before it)
    finish = start + cost / the flow's weight

The request with the least start is next, and virtual time is the start of what was last taken.
First come, first served gives most to who sends most: a burst of one flow delays all. Here a flow
that asks for less than its share hardly waits, and what others leave is shared by those that want
it: no capacity is set aside, none is idle while somebody waits.

A flow is whoever should be kept apart: a product, or a tenant. Cost is tokens, of the prompt where
prompts are what waits. In any span in which two flows both wait, what they are served differs, by
weight, by one largest request of each at most. A flow that was idle waits for at most one request
of each other one, and for the one in service: nothing that has begun is interrupted. Where an
engine computes prompts in chunks and can change between them, each chunk is a request here.

Source: Goyal, Vin and Cheng, "Start-time Fair Queueing", SIGCOMM 1996. Here a start is computed
when a request comes to the head of its flow, not when it arrives, so that one that is given up
costs its flow nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")


@dataclass(slots=True)
class _Flow(Generic[Item]):
    """finish: of its last request that was taken. start: of the one at its head."""

    waiting: deque[tuple[Item, float]] = field(default_factory=deque)
    finish: float = 0.0
    start: float = 0.0
    since: int = 0  # when its head came there: ties go to who has waited longer


class FairQueue(Generic[Item]):
    """What waits for one server, by flow. Changed in place: it is on every request's path.

    `push` and `pop` take time in the number of flows that wait, never of requests.
    """

    __slots__ = ("_count", "_flows", "_ties", "_virtual")

    def __init__(self) -> None:
        self._flows: dict[Hashable, _Flow[Item]] = {}
        self._virtual = 0.0
        self._ties = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Item]:
        """By flow, the oldest of each first."""
        for flow in self._flows.values():
            for item, _ in flow.waiting:
                yield item

    def push(self, item: Item, flow: Hashable, cost: float) -> None:
        """One more waits.

        Args:
            cost: above 0; of the flow's weight's size: tokens, divided by the weight.

        Raises:
            ValueError: the cost is none.
        """
        if not cost > 0:
            raise ValueError(f"a request of {flow!r} costs {cost}: it must be above 0")
        known = self._flows.get(flow)
        if known is None:
            known = self._flows[flow] = _Flow(finish=self._virtual)
        known.waiting.append((item, cost))
        self._count += 1
        if len(known.waiting) == 1:
            self._head(known)

    def pop(self, ready: Callable[[Item], bool] | None = None) -> Item | None:
        """Take who is next; None: nobody waits, or nobody who could be served.

        Args:
            ready: whether one at the head of its flow can be served now. Flows that cannot keep
                their turn.
        """
        flow = self._next(ready)
        if flow is None:
            return None
        item, cost = flow.waiting.popleft()
        self._count -= 1
        self._virtual = max(self._virtual, flow.start)
        flow.finish = flow.start + cost
        if flow.waiting:
            self._head(flow)
        else:
            self._forget()
        return item

    def remove(self, item: Item) -> bool:
        """Somebody gave up; whether they were waiting. Takes time in what waits."""
        for flow in self._flows.values():
            for i, (other, _) in enumerate(flow.waiting):
                if other is item:
                    del flow.waiting[i]
                    self._count -= 1
                    if i == 0 and flow.waiting:
                        self._head(flow)
                    return True
        return False

    def _head(self, flow: _Flow[Item]) -> None:
        flow.start = max(self._virtual, flow.finish)
        self._ties += 1
        flow.since = self._ties

    def _next(self, ready: Callable[[Item], bool] | None) -> _Flow[Item] | None:
        waiting = [flow for flow in self._flows.values() if flow.waiting]
        waiting.sort(key=lambda flow: (flow.start, flow.since))
        for flow in waiting:
            if ready is None or ready(flow.waiting[0][0]):
                return flow
        return None

    def _forget(self) -> None:
        """Flows that wait for nothing and owe nothing are as if they had never been."""
        self._flows = {
            name: flow
            for name, flow in self._flows.items()
            if flow.waiting or flow.finish > self._virtual
        }


class PieceQueue(Generic[Item]):
    """Prompts that are computed in pieces, their flows in turn: each piece is a request.

    Within a flow prompts are computed one after another, so at most one of each flow is half
    computed.
    """

    __slots__ = ("_left", "_most_tokens", "_queue")

    def __init__(self, most_tokens: float) -> None:
        """
        Args:
            most_tokens: of a piece.
        """
        self._most_tokens = most_tokens
        self._queue: FairQueue[tuple[Item, float]] = FairQueue()
        self._left: dict[Item, deque[tuple[Item, float]]] = {}

    def __contains__(self, item: Item) -> bool:
        """Whether a piece of it waits."""
        return item in self._left

    def __bool__(self) -> bool:
        return bool(self._left)

    def push(self, item: Item, flow: Hashable, tokens: float) -> None:
        """One more prompt waits; an empty one takes a turn, too."""
        left = max(1, tokens)
        pieces = self._left[item] = deque()
        while left > 0:
            piece = (item, min(left, self._most_tokens))
            left -= piece[1]
            pieces.append(piece)
            self._queue.push(piece, flow, piece[1])

    def pop(self, ready: Callable[[Item, float], bool]) -> tuple[Item, float] | None:
        """Take the piece that is next, and its tokens; None: none that could be computed.

        Args:
            ready: whether a piece of so many tokens can be computed now.
        """
        piece = self._queue.pop(lambda piece: ready(*piece))
        if piece is not None:
            pieces = self._left[piece[0]]
            pieces.popleft()
            if not pieces:
                del self._left[piece[0]]
        return piece

    def remove(self, item: Item) -> None:
        """It was given up, if any of it waits: its turns are others'."""
        for piece in self._left.pop(item, ()):
            self._queue.remove(piece)
