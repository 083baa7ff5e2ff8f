"""What scaling goes by that Serve does not tell its policies, and where it keeps what it learnt.

A replica that finds no machine looks to a policy like any replica that starts. The cluster's head
knows better, and a node autoscaler which launches failed. Both are asked once a second, in a thread
of their own: the policy runs in the loop of Serve's controller, which must not wait. The head also
keeps what was learnt and decided, for the controller that replaces a dead one and for whoever asks.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Protocol

import ray
from nearfield.serving.cluster import Cluster, Waiting

log = logging.getLogger("ray.serve.nearfield.surroundings")

READ_S = 1.0
PLACE_S = 3.0
"""A replica that nobody has room for so long is waiting for a machine, ..."""
RECENT_S = 30.0
"""... and so is one whose node type failed to launch within so long: it is tried every few
seconds."""

_NOTHING = Waiting(Counter(), Counter(), Counter(), elastic=False, failed_s={})


class Head(Protocol):
    """The part of `Cluster` that is needed."""

    def waiting(self) -> Waiting: ...
    def keep(self, key: str, value: bytes) -> None: ...
    def kept(self, key: str) -> bytes | None: ...


class Surroundings:
    """The cluster around the policy. Whoever decides calls `attend` every time."""

    def __init__(self, head: Callable[[], Head] = Cluster.own) -> None:
        self._make_head = head
        self._head: Head | None = None
        self._waiting = _NOTHING
        self._unplaced_s: Mapping[str, float] = {}  # since when, on time.monotonic()
        self._keep: dict[str, bytes] = {}
        self._curious = False
        self._thread: threading.Thread | None = None

    def attend(self, *, curious: bool) -> None:
        """Go on reading, where there is a cluster.

        Args:
            curious: some replica is waited for, or Serve has stopped asking about one that would be
                the first. Else there is nothing to be asked.
        """
        self._curious = curious
        if self._thread is None and ray.is_initialized():
            self._thread = threading.Thread(target=self._run, name="surroundings", daemon=True)
            self._thread.start()

    def stuck(self, application: str) -> int:
        """How many of its replicas wait for a machine that nobody brings."""
        since_s = self._unplaced_s.get(application)
        if since_s is None or self._waiting.elastic or time.monotonic() - since_s < PLACE_S:
            return 0
        return self._waiting.unplaced[application]

    def refused(self, node_types: Collection[str], now_s: float) -> bool:
        """Whether a launch of one of these node types failed just now, and none came after.

        Args:
            now_s: Unix time.
        """
        failed_s = self._waiting.failed_s
        return any(now_s - failed_s[name] <= RECENT_S for name in node_types if name in failed_s)

    def has_replicas(self, application: str) -> bool:
        """Whether Serve has any replica of it, serving or not."""
        return self._waiting.starting[application] + self._waiting.up[application] > 0

    def keep(self, key: str, value: bytes) -> None:
        """Have this kept, soon."""
        self._keep[key] = value

    def kept(self, key: str) -> bytes | None:
        """What was kept by whoever decided before; None: nothing, or it cannot be had."""
        if not ray.is_initialized() and self._make_head == Cluster.own:
            return None
        try:
            return self._reach().kept(key)
        except RuntimeError as error:
            log.warning("what was learnt before cannot be read: %s", error)
            return None

    def read(self) -> None:
        """One round. `attend` has it done in its thread.

        Raises:
            RuntimeError: the head does not answer.
        """
        head = self._reach()
        while self._keep:
            key, value = next(iter(self._keep.items()))
            head.keep(key, value)
            if self._keep.get(key) is value:
                del self._keep[key]
        if not self._curious:
            self._waiting, self._unplaced_s = _NOTHING, {}
            return
        waiting, now_s = head.waiting(), time.monotonic()
        since_s = self._unplaced_s
        self._unplaced_s = {
            name: since_s.get(name, now_s) for name, count in waiting.unplaced.items() if count
        }
        self._waiting = waiting

    def _reach(self) -> Head:
        if self._head is None:
            self._head = self._make_head()
        return self._head

    def _run(self) -> None:
        while True:
            try:
                self.read()
            except RuntimeError as error:
                log.warning("%s", error)
            except Exception:
                log.exception("reading the surroundings failed unexpectedly")
            time.sleep(READ_S)
