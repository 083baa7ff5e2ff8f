"""An endpoint as this gateway knows it, at home or elsewhere; and the books of its requests."""

from __future__ import annotations

from collections import deque

from nearfield.api.load import Kind
from nearfield.edge.beliefs import Peer
from nearfield.edge.proxy.ports import Target
from nearfield.policy.endpoints import Endpoint, EndpointState

RESTING = 256
"""Numbers that rest before one is given out again: what is still remembered of its former holder
(an affinity, a plan) is forgotten by then."""


Key = tuple[str, str, str]
"""Of an endpoint within its region: model, version, pool."""


class Books:
    """This gateway's requests in flight and their tokens, by number; and the numbers.

    Attributes:
        own, work: requests and tokens. The policy reads these lists as they are.
    """

    def __init__(self) -> None:
        self.own: list[int] = []
        self.work: list[float] = []
        self._resting: deque[int] = deque()

    def take(self) -> int:
        """A number that nobody has."""
        if len(self._resting) > RESTING:
            return self._resting.popleft()
        self.own.append(0)
        self.work.append(0.0)
        return len(self.own) - 1

    def give_back(self, number: int) -> None:
        """Its holder is gone."""
        assert self.own[number] == 0, "a request still runs there"
        self.work[number] = 0.0  # what adding and taking away has left of rounding
        self._resting.append(number)


class Known:
    """One endpoint.

    Attributes:
        number: its position in the gateway's list of requests at endpoints.
        kind: of its work. free: asking it costs nothing but time.
        fallbacks: models that may stand in for its own.
        state: as the policy sees it.
        scaling: why it has as many replicas as it should have; empty: nobody says.
        answers: what its answers tell, wherever they come from.
        target: another region's gateway; None at home, where replicas have their own.
        shown: the header fields that name it.
    """

    def __init__(self, endpoint: Endpoint, number: int) -> None:
        self.endpoint = endpoint
        self.number = number
        self.kind: Kind = "other"
        self.free = True
        self.fallbacks: tuple[str, ...] = ()
        self.scaling = ""
        self.state = EndpointState(endpoint, number, 0.0, health="unknown", replicas=0)
        self.answers = Peer(endpoint.name, None)
        self.target: Target | None = None
        self.shown: tuple[tuple[bytes, bytes], ...] = (
            (b"x-nearfield-region", endpoint.region.encode("ascii")),
            (b"x-nearfield-endpoint", endpoint.name.encode("ascii")),
        )

    @property
    def routable(self) -> bool:
        """Whether a request could be sent there now, if nothing else forbids it."""
        state = self.state
        if state.health not in ("up", "ejected") or state.draining:
            return False
        return state.replicas > 0 or state.cold_start_s is not None
