"""Which replicas wait for a machine, in the installed Ray's own messages."""

from __future__ import annotations

from collections import Counter
from typing import Any

from nearfield.serving.cluster import _asked, _demanded
from ray.core.generated import autoscaler_pb2, common_pb2, gcs_pb2


def actor(labels: dict[str, str], **resources: float) -> Any:
    return gcs_pb2.ActorTableData(required_resources=resources, label_selector=labels)  # type: ignore[attr-defined]


def demand(labels: dict[str, list[str]], **resources: float) -> Any:
    constraints = [
        common_pb2.LabelSelectorConstraint(label_key=key, label_values=values)  # type: ignore[attr-defined]
        for key, values in labels.items()
    ]
    selector = common_pb2.LabelSelector(label_constraints=constraints)  # type: ignore[attr-defined]
    return _demanded(
        autoscaler_pb2.ResourceRequest(resources_bundle=resources, label_selectors=[selector])  # type: ignore[attr-defined]
    )


def test_pools_of_one_shape_are_told_apart_by_their_labels() -> None:
    """A replica that has been given a machine is in the actor table like one that waits for it."""
    h100 = actor({"accelerator": "H100", "market": "spot"}, GPU=1)
    l4 = actor({"accelerator": "in(L4,A10)"}, GPU=1)
    waits = demand({"accelerator": ["H100"], "market": ["spot"]}, GPU=1)
    assert _asked(h100, Counter([waits])) == waits
    assert _asked(h100, Counter()) is None
    assert _asked(l4, Counter([waits])) is None
    either = demand({"accelerator": ["A10", "L4"]}, GPU=1)
    assert _asked(l4, Counter([waits, either])) == either
    assert _asked(actor({"accelerator": "in(L4,A10)"}, GPU=2), Counter([either])) is None


def test_each_demand_is_one_replicas() -> None:
    """Two have been asked for, and one waits."""
    one = demand({}, TPU=4)
    demanded = Counter([one])
    found = [_asked(actor({}, TPU=4), demanded)]
    demanded[one] -= 1
    found.append(_asked(actor({}, TPU=4), demanded))
    assert found == [one, None]
