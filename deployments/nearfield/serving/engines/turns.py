"""Whose prompt is computed next: flows in turn, a chunk at a time (`policy.fair`).

A long prompt is several pieces, and between them it may be another flow's turn: somebody's
document does not keep everybody's questions waiting. Within a flow prompts are computed one after
another, so at most one of each flow is half computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from nearfield.policy.fair import FairQueue
from nearfield.serving.engines.sequence import Group

Piece = tuple[Group, int]
"""Tokens of a prompt."""


class Turns:
    """What waits for the model's thread, which alone may call it (but for `waiting`)."""

    def __init__(self, chunk_tokens: int) -> None:
        """
        Args:
            chunk_tokens: most tokens of prompts in one forward pass.
        """
        self._chunk_tokens = chunk_tokens
        self._queue: FairQueue[Piece] = FairQueue()
        self._pieces: dict[Group, deque[Piece]] = {}  # those not taken yet, of each
        self._waiting: dict[Group, None] = {}

    def __bool__(self) -> bool:
        return bool(self._pieces)

    @property
    def waiting(self) -> list[Group]:
        """Those that have not begun, in order of arrival."""
        return list(self._waiting)

    def add(self, group: Group) -> None:
        left = max(1, len(group.prompt))
        pieces = self._pieces[group] = deque()
        self._waiting[group] = None
        while left:
            piece = (group, min(left, self._chunk_tokens))
            left -= piece[1]
            pieces.append(piece)
            self._queue.push(piece, group.request.flow, piece[1])

    def remove(self, group: Group) -> None:
        """It is over, or was given up: its turns are others'."""
        self._waiting.pop(group, None)
        for piece in self._pieces.pop(group, ()):
            self._queue.remove(piece)

    def take(self, fits: Callable[[Group], bool]) -> list[Group]:
        """Whose turn it is: one that is computed in chunks, or several that make up a chunk.

        Args:
            fits: whether a request may begin now, beside all that were asked about before and did.
                One that does not is waited for: nobody begins before it, so that it is not starved.
        """
        full = False

        def ready(piece: Piece) -> bool:
            nonlocal full
            group = piece[0]
            if group not in self._waiting:
                return True  # it has begun
            full = full or not fits(group)
            return not full

        first = self._take(ready)
        if first is None:
            return []
        groups = [first]
        if first in self._pieces or len(first.prompt) > self._chunk_tokens:
            return groups
        width = len(first.prompt)

        def joins(piece: Piece) -> bool:
            group = piece[0]
            wider = max(width, len(group.prompt))
            if group not in self._waiting or wider * (len(groups) + 1) > self._chunk_tokens:
                return False
            return ready(piece)

        while (group := self._take(joins)) is not None:
            width = max(width, len(group.prompt))
            groups.append(group)
        return groups

    def _take(self, ready: Callable[[Piece], bool]) -> Group | None:
        piece = self._queue.pop(ready)
        if piece is None:
            return None
        group = piece[0]
        self._waiting.pop(group, None)
        pieces = self._pieces[group]
        pieces.popleft()
        if not pieces:
            del self._pieces[group]
        return group
