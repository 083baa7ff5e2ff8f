"""Cluster files: what nodes a cluster can have, and whether the replicas of a model fit on any.

Two kinds are read: Ray's cluster launcher's (`ray up`), and KubeRay's RayCluster. Pure; a test
holds what is read of a RayCluster against what the installed Ray reads of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from nearfield.core.problems import Finding, did_you_mean, shown
from nearfield.core.serve_config import Count, Labels, Section
from nearfield.core.spec import tpu_pod_type
from nearfield.core.yaml_document import Path
from pydantic import BaseModel, ConfigDict, Field

ACCELERATOR, MARKET = "ray.io/accelerator-type", "ray.io/market-type"
SLICE, WORKER, TOPOLOGY, POD_TYPE = (
    "ray.io/tpu-slice-name",
    "ray.io/tpu-worker-id",
    "ray.io/tpu-topology",
    "ray.io/tpu-pod-type",
)
"""Labels that Ray gives the hosts of a TPU slice by itself."""
HEAD_GROUP = "headgroup"
"""What KubeRay calls the head's group."""
LABELS = (
    ACCELERATOR,
    MARKET,
    "ray.io/availability-region",
    "ray.io/availability-zone",
    "ray.io/node-group",
    SLICE,
    WORKER,
    TOPOLOGY,
    POD_TYPE,
)
_SELECTOR = re.compile(r"(?P<no>!?)(?:(?P<in>in)\((?P<several>[^()]+)\)|(?P<one>[^!()]+))")


class LauncherNodeType(Section):
    """A node type of the cluster launcher. `labels` are what replicas select by."""

    node_config: dict[str, Any]
    resources: dict[str, Annotated[int, Field(ge=0)]]
    labels: Labels = Field({})
    min_workers: Count = 0
    max_workers: Count | None = None
    idle_timeout_s: float | None = None
    priority: int = 0
    initialization_commands: list[str] = Field([])
    worker_setup_commands: list[str] = Field([])
    docker: dict[str, Any] = Field({})


class Provider(BaseModel):
    """Who has the machines. Each provider has keys of its own."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)
    type: str


class LauncherFile(Section):
    """A file for `ray up`, strictly: Ray's own schema, and what our pools need of it."""

    cluster_name: str
    max_workers: Count = 2
    upscaling_speed: float = 1.0
    idle_timeout_minutes: float = 5.0
    provider: Provider
    auth: dict[str, Any] = Field({})
    docker: dict[str, Any] = Field({})
    head_node_type: str
    available_node_types: dict[str, LauncherNodeType]
    file_mounts: dict[str, str] = Field({})
    cluster_synced_files: list[str] = Field([])
    file_mounts_sync_continuously: bool = False
    rsync_exclude: list[str] = Field([])
    rsync_filter: list[str] = Field([])
    metadata: dict[str, Any] = Field({})
    initialization_commands: list[str] = Field([])
    setup_commands: list[str] = Field([])
    head_setup_commands: list[str] = Field([])
    worker_setup_commands: list[str] = Field([])
    head_start_ray_commands: list[str] = Field([])
    worker_start_ray_commands: list[str] = Field([])
    no_restart: bool = False


@dataclass(frozen=True, slots=True)
class NodeType:
    """What a node of a cluster has.

    Attributes:
        resources: in Ray's words. labels: known before it runs; more may come from the node.
        is_slice: of several hosts that come together.
    """

    name: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]
    is_slice: bool = False

    def lacks(self, resources: Mapping[str, float], labels: Mapping[str, str]) -> dict[str, float]:
        """What of a request it does not have, in words, and how much of it, from 0 to 1."""
        found = {
            f"{name} {self.resources.get(name, 0):g} of {amount:g}": 1.0
            - self.resources.get(name, 0.0) / amount
            for name, amount in resources.items()
            if amount > self.resources.get(name, 0.0)
        }
        for key, wanted in labels.items():
            if key not in _dynamic(self) and not selects(wanted, self.labels.get(key)):
                found[f"{key} is {self.labels.get(key, 'not set')}"] = 1.0
        return found


def selects(wanted: str, value: str | None) -> bool:
    """Whether a label's value is what a selector wants: `v`, `!v`, `in(a, b)` or `!in(a, b)`."""
    match = _SELECTOR.fullmatch(wanted.strip())
    if match is None:
        return False
    several = match["several"] or match["one"]
    listed = value in [each.strip() for each in several.split(",")]
    return listed != bool(match["no"])


def node_types(data: Mapping[str, Any]) -> list[NodeType]:
    """The node types of a cluster file of either kind, the head's too. Not its validation: what is
    no node type is left out."""
    if "available_node_types" in data:
        found = data["available_node_types"]
        entries = found.items() if isinstance(found, dict) else ()
        return [_launcher(str(name), entry) for name, entry in entries if isinstance(entry, dict)]
    spec = data.get("spec")
    spec = spec.get("rayClusterConfig", spec) if isinstance(spec, dict) else {}
    groups: list[tuple[str, Any]] = [(HEAD_GROUP, spec.get("headGroupSpec"))]
    workers = spec.get("workerGroupSpecs")
    groups += [(str(g.get("groupName")), g) for g in workers or [] if isinstance(g, dict)]
    return [_kuberay(name, group) for name, group in groups if isinstance(group, dict)]


def check_cluster(data: Mapping[str, Any]) -> Iterator[Finding]:
    """What is wrong with the node types: labels that nothing would ever select, or that say another
    thing than the machine."""
    at: Path = ("available_node_types",)
    found = data.get("available_node_types")
    head = data.get("head_node_type")
    if isinstance(found, dict) and isinstance(head, str) and head not in found:
        close = did_you_mean(head, found)
        yield Finding(
            ("head_node_type",),
            "is none of available_node_types",
            f"did you mean {close}?" if close else f"there are {', '.join(found)}",
            head,
        )
    for name, entry in found.items() if isinstance(found, dict) else ():
        if not isinstance(entry, dict):
            continue
        labels, config = entry.get("labels", {}), entry.get("node_config", {})
        if isinstance(labels, dict):
            yield from _check_labels(labels, (*at, name, "labels"))
            if isinstance(config, dict):
                yield from _check_market(labels, config, (*at, name, "labels", MARKET))


def _check_labels(labels: Mapping[str, Any], at: Path) -> Iterator[Finding]:
    for key, value in labels.items():
        if str(key).startswith("ray.io/") and key not in LABELS:
            close = did_you_mean(str(key), LABELS)
            remedy = f"did you mean {close}?" if close else "leave ray.io/ to Ray, choose another"
            yield Finding((*at, key), "is no label of Ray's", remedy, value)
    if labels.get(MARKET, "spot") not in ("spot", "on-demand"):
        yield Finding(
            (*at, MARKET), "is neither spot nor on-demand", "write one of them", labels[MARKET]
        )


def _check_market(
    labels: Mapping[str, Any], config: Mapping[str, Any], at: Path
) -> Iterator[Finding]:
    """Pools select spot and on-demand nodes by label: it must be that of the machine."""
    market = _market(config)
    if market == "spot" and labels.get(MARKET) != "spot":
        yield Finding(
            at,
            "is not spot, and the machine in node_config is",
            f"write {MARKET}: spot, or pools take it for what it is not",
            labels.get(MARKET),
            MARKET in labels,
        )
    elif market == "on-demand" and labels.get(MARKET) == "spot":
        yield Finding(
            at,
            "is spot, and the machine in node_config is not",
            "ask for a spot machine in node_config, or write on-demand",
            labels[MARKET],
        )


def _market(config: Mapping[str, Any]) -> Literal["spot", "on-demand"] | None:
    """What the cloud is asked for; None: it cannot be told from here."""
    if "InstanceType" in config:
        options = config.get("InstanceMarketOptions") or {}
        return "spot" if options.get("MarketType") == "spot" else "on-demand"
    if "machineType" in config or "acceleratorType" in config or "acceleratorConfig" in config:
        given = config.get("scheduling") or config.get("schedulingConfig") or {}
        # The launcher's own example has a list of sections there.
        sections = given if isinstance(given, list) else [given]
        merged = {k: v for each in sections if isinstance(each, dict) for k, v in each.items()}
        is_spot = merged.get("preemptible") or merged.get("spot")
        return "spot" if is_spot or merged.get("provisioningModel") == "SPOT" else "on-demand"
    return None


def unmet(app: Mapping[str, Any], types: Sequence[NodeType], cluster: str) -> Iterator[Finding]:
    """What of an application's replicas fits on no node type of the cluster.

    Args:
        cluster: the file's name, for the message.
    """
    deployments = app.get("deployments")
    for index, deployment in enumerate(deployments if isinstance(deployments, list) else []):
        if isinstance(deployment, dict):
            yield from _unmet(str(app.get("name")), deployment, types, cluster, index)


def _unmet(
    app: str, deployment: Mapping[str, Any], types: Sequence[NodeType], cluster: str, index: int
) -> Iterator[Finding]:
    options = deployment.get("ray_actor_options") or {}
    if not isinstance(options, dict):
        return
    here: Path = ("deployments", index)
    bundles = deployment.get("placement_group_bundles")
    selectors = deployment.get("placement_group_bundle_label_selector") or [{}]
    wants: list[tuple[Path, Mapping[str, float], list[Mapping[str, str]]]] = []
    if isinstance(bundles, list):
        for n, bundle in enumerate(bundles):
            selector = selectors[n if len(selectors) > 1 and n < len(selectors) else 0]
            wants.append(((*here, "placement_group_bundles", n), bundle, [selector]))
    else:
        fallbacks = options.get("fallback_strategy") or []
        several = [options.get("label_selector") or {}]
        several += [each.get("label_selector", {}) for each in fallbacks if isinstance(each, dict)]
        wants.append(((*here, "ray_actor_options"), _resources(options), several))
    for path, resources, selector_list in wants:
        if any(not t.lacks(resources, labels) for t in types for labels in selector_list):
            continue
        lacking = min(
            ((t.lacks(resources, labels), t) for t in types for labels in selector_list),
            key=lambda found: math.fsum(found[0].values()),
            default=None,
        )
        nearest = f"; the nearest, {lacking[1].name}: {', '.join(lacking[0])}" if lacking else ""
        asked = {**resources, **selector_list[0]}
        yield Finding(
            path,
            f"{deployment.get('name', 'replica')} of {app} fits on no node type of {cluster}"
            + nearest,
            "ask for what a node type has, or add a node type to the cluster file",
            ", ".join(f"{key}: {shown(value)}" for key, value in asked.items()),
        )
    yield from _unknown_types(deployment, types, cluster, here)


def _unknown_types(
    deployment: Mapping[str, Any], types: Sequence[NodeType], cluster: str, at: Path
) -> Iterator[Finding]:
    """Node types that the scaling policy is to watch, and that are not there."""
    where = ("autoscaling_config", "policy", "policy_kwargs", "node_types")
    found: Any = deployment
    for key in where:
        found = found.get(key) if isinstance(found, dict) else None
    names = [each.name for each in types]
    for n, name in enumerate(found if isinstance(found, list) else []):
        if name not in names:
            close = did_you_mean(str(name), names)
            yield Finding(
                (*at, *where, n),
                f"is no node type of {cluster}",
                f"did you mean {close}?" if close else f"there are {', '.join(names)}",
                name,
            )


def _resources(options: Mapping[str, Any]) -> dict[str, float]:
    """Of a replica, in Ray's words. Memory is left out: launchers know it of the machine."""
    cpus = options.get("num_cpus")
    found: dict[str, float] = {"CPU": 1 if cpus is None else cpus}
    if options.get("num_gpus"):
        found["GPU"] = options["num_gpus"]
    extra = options.get("resources")
    found.update(extra if isinstance(extra, dict) else {})
    return {name: amount for name, amount in found.items() if isinstance(amount, int | float)}


def _launcher(name: str, entry: Mapping[str, Any]) -> NodeType:
    resources = {k: v for k, v in (entry.get("resources") or {}).items() if _is_number(v)}
    labels = {str(k): str(v) for k, v in (entry.get("labels") or {}).items()}
    config = entry.get("node_config")
    pod = config.get("acceleratorType") if isinstance(config, dict) else None
    if isinstance(pod, str) and "machineType" not in (config or {}):
        resources.setdefault(f"TPU-{pod}-head", 1)  # as Ray's provider for GCP adds it
    return NodeType(name, resources, labels, is_slice=any(_is_head(r) for r in resources))


def _kuberay(name: str, group: Mapping[str, Any]) -> NodeType:
    template = group.get("template")
    pod = template.get("spec") if isinstance(template, dict) else None
    pod = pod if isinstance(pod, dict) else {}
    containers = pod.get("containers")
    container = containers[0] if isinstance(containers, list) and containers else {}
    asked = container.get("resources", {}) if isinstance(container, dict) else {}
    given = {**asked.get("requests", {}), **asked.get("limits", {})}
    resources: dict[str, float] = {}
    for key, value in given.items():
        word = "CPU" if key == "cpu" else "GPU" if key.endswith("gpu") else None
        word = "TPU" if key == "google.com/tpu" else word
        if word is not None:
            resources[word] = math.ceil(_quantity(value))
    start = group.get("rayStartParams") or {}
    for key, word in (("num-cpus", "CPU"), ("num-gpus", "GPU")):
        if key in start:
            resources[word] = _quantity(start[key])
    nodes = pod.get("nodeSelector") or {}
    kind = _GKE_TPUS.get(nodes.get("cloud.google.com/gke-tpu-accelerator"))
    topology = nodes.get("cloud.google.com/gke-tpu-topology")
    if kind is not None and isinstance(topology, str):
        resources[f"TPU-{tpu_pod_type(kind, topology)}-head"] = 1
    labels = {str(k): str(v) for k, v in (group.get("labels") or {}).items()}
    hosts = group.get("numOfHosts", 1)
    return NodeType(name, resources, labels, is_slice=hosts != 1)


_GKE_TPUS: dict[Any, str] = {
    "tpu-v4-podslice": "v4",
    "tpu-v5-lite-device": "v5litepod",
    "tpu-v5-lite-podslice": "v5litepod",
    "tpu-v5p-slice": "v5p",
    "tpu-v6e-slice": "v6e",
}


def _quantity(value: Any) -> float:
    """A Kubernetes quantity as far as counts go: `4`, `"4"`, `"500m"`."""
    text = str(value)
    try:
        return float(text[:-1]) / 1000.0 if text.endswith("m") else float(text)
    except ValueError:
        return 0.0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_head(resource: str) -> bool:
    return re.fullmatch(r"TPU-.+-head", resource) is not None


def _dynamic(node: NodeType) -> tuple[str, ...]:
    """Labels that only the running node has."""
    tpu = any(name == "TPU" for name in node.resources)
    return ("ray.io/node-group", *((SLICE, WORKER, TOPOLOGY, POD_TYPE) if tpu else ()))
