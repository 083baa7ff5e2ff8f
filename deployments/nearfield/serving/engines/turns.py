"""Whose prompt is computed next: flows in turn, a chunk at a time (`policy.fair`).

A long prompt is several pieces, and between them it may be another flow's turn: somebody's
document does not keep everybody's questions waiting.
"""

from __future__ import annotations

from collections.abc import Callable

from nearfield.policy.fair import PieceQueue
from nearfield.serving.engines.sequence import Group


class Turns:
    """What waits for the model's thread, which alone may call it (but for `waiting`)."""

    def __init__(self, chunk_tokens: int) -> None:
        """
        Args:
            chunk_tokens: most tokens of prompts in one forward pass.
        """
        self._chunk_tokens = chunk_tokens
        self._pieces: PieceQueue[Group] = PieceQueue(chunk_tokens)
        self._waiting: dict[Group, None] = {}

    def __bool__(self) -> bool:
        return bool(self._pieces)

    @property
    def waiting(self) -> list[Group]:
        """Those that have not begun, in order of arrival."""
        return list(self._waiting)

    def add(self, group: Group) -> None:
        self._waiting[group] = None
        self._pieces.push(group, group.request.flow, len(group.prompt))

    def remove(self, group: Group) -> None:
        """It is over, or was given up: its turns are others'."""
        self._waiting.pop(group, None)
        self._pieces.remove(group)

    def take(self, fits: Callable[[Group], bool]) -> list[Group]:
        """Whose turn it is: one that is computed in chunks, or several that make up a chunk.

        Args:
            fits: whether a request may begin now, beside all that were asked about before and did.
                One that does not is waited for: nobody begins before it, so that it is not starved.
        """
        full = False

        def ready(group: Group, _: float) -> bool:
            nonlocal full
            if group not in self._waiting:
                return True  # it has begun
            full = full or not fits(group)
            return not full

        first = self._take(ready)
        if first is None:
            return []
        groups = [first]
        if len(first.prompt) > self._chunk_tokens:
            return groups
        width = len(first.prompt)

        def joins(group: Group, tokens: float) -> bool:
            wider = max(width, len(group.prompt))
            if group not in self._waiting or wider * (len(groups) + 1) > self._chunk_tokens:
                return False
            return ready(group, tokens)

        while (group := self._take(joins)) is not None:
            width = max(width, len(group.prompt))
            groups.append(group)
        return groups

    def _take(self, ready: Callable[[Group, float], bool]) -> Group | None:
        piece = self._pieces.pop(ready)
        if piece is None:
            return None
        self._waiting.pop(piece[0], None)
        return piece[0]
