"""What a gateway keeps over a restart, so that it can start while everybody else is silent.

Where home's replicas are, what other regions said, how far they are and how fast. Regions that
were up are believed to be until their probes fail; replicas have to answer once before they get
a request, which takes milliseconds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nearfield.api.load import RegionReport, Targets
from nearfield.api.signing import read_private, write_private
from nearfield.core.errors import BadRequest
from nearfield.edge.speed import Speed
from pydantic import TypeAdapter, ValidationError

log = logging.getLogger("nearfield.edge.world")

OLDEST_S = 24 * 3600.0
"""An older state is not used."""


@dataclass(frozen=True, slots=True)
class LastGood:
    """
    Attributes:
        saved_s: Unix time. up: the regions that were.
        targets: home's replicas. reports: the other regions.
        rtts_s: by region. speeds, cold_starts_s: by endpoint.
    """

    saved_s: float
    up: tuple[str, ...]
    targets: Targets | None
    reports: tuple[RegionReport, ...]
    rtts_s: Mapping[str, float]
    speeds: Mapping[str, Speed]
    cold_starts_s: Mapping[str, float]


_LAST_GOOD: TypeAdapter[LastGood] = TypeAdapter(LastGood)


def save(path: Path, last: LastGood) -> None:
    """Write it, all or nothing.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_private(path, _LAST_GOOD.dump_json(last))


def read(path: Path) -> LastGood | None:
    """What was kept; None where it cannot be used: a gateway starts without it too."""
    if not path.exists():
        return None
    try:
        last = _LAST_GOOD.validate_json(read_private(path, "last good state"))
    except (BadRequest, ValidationError) as error:
        log.warning("the last good state is left out: %s", error)
        return None
    age_s = time.time() - last.saved_s
    if not 0 <= age_s <= OLDEST_S:
        log.warning("the last good state is left out: it is %.0f s old", age_s)
        return None
    return last
