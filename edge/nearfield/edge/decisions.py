"""What the ports of this gateway tell each other about a request: who asks, and where it went.

The Gate puts an `Admission` into `Grant.about`; the Router answers with a `Routed` leg. Retries,
the Recorder and the pages read both and need to know neither of their makers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from nearfield.api.keys import Principal
from nearfield.core.errors import Unavailable
from nearfield.edge.proxy.ports import NEVER_SENT, Attempt, Leg
from nearfield.policy.endpoints import DEFAULT, Caller
from nearfield.policy.explain import Explanation

Kind = Literal["generate", "embed", "tensor", "other"]
"""Of work: what may be hedged, and how its size is guessed."""

# What gateways tell each other of a request, in its head.
FROM: Final = b"x-nearfield-from"
"""Names the gateway that sent a request here. Also where nobody signs passports it keeps requests
from going round: whoever sends it is served at home, and gains nothing by it."""
VERSION: Final = b"x-nearfield-version"
TRIAL: Final = b"x-nearfield-trial"
"""The fingerprint of a body that was inside a replica when that died: it is tried alone."""
SUSPECT: Final = b"x-nearfield-suspect"
"""Its body was inside a replica that died, but hardly did it: it runs beside others, and is
remembered for it if another one dies."""
AVOID: Final = b"x-nearfield-avoid"
"""Replicas that failed on it, as their answers named them: another one is to have it, if any is."""

_REPLICA_LOST: Final = "replica_lost"
"""The code of a region's gateway that cannot run a request again which was inside a replica that
died: whoever sent it may, elsewhere, as a suspect."""
_REPLICA_LOST_SAID: Final = _REPLICA_LOST.encode("ascii")


@dataclass(slots=True, eq=False)
class Tokens:
    """What an answer said that it took. `cached` are among `input`.

    Attributes:
        guessed: it did not say: from the bytes of its prompt, and from its events or bytes.
    """

    input: int = 0
    cached: int = 0
    output: int = 0
    guessed: bool = False


@dataclass(slots=True, eq=False)
class Admission:
    """A request as the Gate let it in.

    Attributes:
        principal: whose it is. caller: the class of callers it is routed as.
        criticality: a position, see `policy.endpoints`.
        from_gateway: another gateway sent it here with a passport: it is served at home, and its
            limits were counted there.
        tokens: guess of its work: of the prompt, and what may come.
        prompt_tokens: guess of the prompt alone.
        version: of the model, where the caller names one.
        session: where the caller names one (`x-session-id`, `prompt_cache_key`), salted by its
            tenant.
        hedge: its caller opted in. idempotency_key: its caller's, if any.
        used: what it really took, once the Gate's Tap has seen the answer; None: there was none, or
            it is not counted in tokens.
        trial: the fingerprint of its body, once it may have killed a replica: from then on it runs
            only where no other suspect does (`policy.quarantine.may_try`). trial_s: how long that
            is; None: to its end.
        accused: it was inside a replica that died, and leaves its region only as
            `policy.quarantine.departure` says, although it is not tried (`suspicion`).
        confined: the region that its next try may not leave; None: any will do.
        tries: begun for it so far.
    """

    principal: Principal
    caller: Caller
    kind: Kind = "other"
    criticality: int = DEFAULT
    from_gateway: bool = False
    tokens: int = 1
    prompt_tokens: int = 0
    version: str | None = None
    session: bytes | None = None
    hedge: bool = False
    idempotency_key: bytes | None = None
    used: Tokens | None = None
    trial: bytes | None = None
    trial_s: float | None = None
    accused: bool = False
    confined: str | None = None
    tries: int = 0


@dataclass(slots=True, eq=False)
class Routed(Leg):
    """A leg, and why this one.

    Attributes:
        endpoint: `eu-west/chat@1/default`. region, model, version, pool: its parts.
        replica: the replica at home; None for another region's gateway or Serve's own ingress.
        why, reason: in one word, and in one line (`policy.explain.summary`).
        predicted_s: time to the first byte. first_byte_s: of it, once it runs and waits no more.
        trial: no other suspect runs there. ingress: it goes to Serve's own ingress.
        explain: the decision for every endpoint; called only where somebody asks.
    """

    endpoint: str = ""
    region: str = ""
    model: str = ""
    version: str = ""
    pool: str = ""
    replica: str | None = None
    why: str = ""
    reason: str = ""
    predicted_s: float = 0.0
    trial: bool = False
    explain: Callable[[], Explanation] | None = None
    first_byte_s: float = 0.0
    ingress: bool = False


def replica_gone(*, suspect: bool) -> Unavailable:
    """A region's word that nobody is left for what was inside a replica that is gone.

    Args:
        suspect: it may have killed it: whoever sent it here is to know.
    """
    return Unavailable(
        "The replica that had this request is gone, and its region has no other for it at the "
        "moment. Send the request again later.",
        code=_REPLICA_LOST if suspect else "no_capacity",
        retry_after_s=1.0,
    )


def said_replica_lost(attempt: Attempt) -> bool:
    """Whether another gateway has answered so of a suspect."""
    return attempt.code == _REPLICA_LOST_SAID


def crossed(attempt: Attempt, first: str | None) -> bool:
    """Whether it counts as a run in another region than the first.

    Not where the other region's gateway was lost with it: no request does that.
    """
    leg = attempt.leg
    if not isinstance(leg, Routed) or leg.region == first or attempt.failure in NEVER_SENT:
        return False
    return leg.replica is not None or attempt.failure not in ("closed", "abandoned")
