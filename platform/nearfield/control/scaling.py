"""Reads what scaling decided, and why, from the cluster's head, where the controller keeps it."""

from __future__ import annotations

from collections.abc import Collection

from nearfield.api.scaling import KEY, NAMESPACE, ModelScaling, parse_model
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.exceptions import RayError

TIMEOUT_S = 2.0


class Decisions:
    """The last ones of the cluster with its head at `address` (`host:port`)."""

    def __init__(self, address: str) -> None:
        self._gcs = GcsClient(address=address)

    def read(self, applications: Collection[str]) -> tuple[ModelScaling, ...]:
        """By model, of those that one of these applications belongs to. It blocks.

        Raises:
            RuntimeError: the head does not answer.
        """
        gcs = self._gcs
        try:
            keys = gcs.internal_kv_keys(KEY.encode(), NAMESPACE, timeout=TIMEOUT_S)
            found = [gcs.internal_kv_get(key, NAMESPACE, timeout=TIMEOUT_S) for key in sorted(keys)]
        except RayError as error:
            raise RuntimeError(f"the head does not answer: {error}") from None
        models = [parse_model(kept) for kept in found if kept is not None]
        return tuple(m for m in models if any(p.application in applications for p in m.pools))
