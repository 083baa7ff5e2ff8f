"""Cluster files, alone and with models: whether every replica fits on some node type."""

from __future__ import annotations

from pathlib import Path

import pytest
from nearfield.cli.config_files import check_files
from nearfield.core.cluster import NodeType, selects
from nearfield.core.problems import Problem
from nearfield.core.spec import tpu_pod_type

ROOT = Path(__file__).parents[2]
CLUSTERS = sorted((ROOT / "cluster_configs" / "clusters").glob("*.yaml"))

CLUSTER = """\
cluster_name: mine
max_workers: 4
provider: {type: aws, region: us-east-1}
head_node_type: head
available_node_types:
  head:
    resources: {CPU: 2}
    node_config: {InstanceType: m7a.large}
  l4:
    resources: {CPU: 4, GPU: 1}
    labels: {ray.io/accelerator-type: L4, ray.io/market-type: on-demand}
    node_config: {InstanceType: g6.xlarge}
"""
MODEL = """\
applications:
  - name: chat
    route_prefix: /chat
    import_path: nearfield.serving:app
    args:
      model: chat
      engine: generate
      source: builtin://abacus
    deployments:
      - name: replica
        ray_actor_options: {num_gpus: 1}
"""


def problems(folder: Path, model: str = MODEL, cluster: str = CLUSTER) -> list[Problem]:
    """Of both together, named m.yaml and c.yaml."""
    files = (folder / "m.yaml", folder / "c.yaml")
    for path, text in zip(files, (model, cluster), strict=True):
        path.write_text(text)
    return check_files(files, ray=False)


def only(found: list[Problem]) -> Problem:
    assert len(found) == 1, found
    return found[0]


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.name)
def test_the_shipped_pools_fit_on_every_shipped_cluster(path: Path) -> None:
    pools = ROOT / "deployments" / "models" / "pools.yaml"
    assert check_files([pools, path], ray=False) == []


def test_four_classes_of_machines_fit_where_there_are_four() -> None:
    model = ROOT / "deployments" / "models" / "accelerators.yaml"
    assert check_files([model, ROOT / "cluster_configs" / "clusters" / "gcp.yaml"], ray=False) == []


def test_the_example_for_a_laptop_fits_on_its_nodes() -> None:
    files = [ROOT / "examples" / "pools" / "assistant.yaml", ROOT / "cluster_configs" / "clusters"]
    assert check_files([files[0], files[1] / "local-fake.yaml"], ray=False) == []


def test_what_fits_is_fine(tmp_path: Path) -> None:
    assert problems(tmp_path) == []


@pytest.mark.parametrize(
    ("asked", "lacks"),
    [
        ("num_gpus: 8", "l4: GPU 1 of 8"),
        ("num_gpus: 1, num_cpus: 32", "l4: CPU 4 of 32"),
        ("num_gpus: 1, resources: {TPU: 4}", "l4: TPU 0 of 4"),
        (
            "num_gpus: 1, label_selector: {ray.io/market-type: spot}",
            "l4: ray.io/market-type is on-demand",
        ),
        ('num_gpus: 1, label_selector: {zone: "!a", x: "in(a, b)"}', "l4: x is not set"),
    ],
)
def test_what_fits_nowhere_names_the_nearest_node_type(
    tmp_path: Path, asked: str, lacks: str
) -> None:
    start = MODEL.index("{num_gpus")
    found = [p for p in problems(tmp_path, f"{MODEL[:start]}{{{asked}}}\n") if p.level == "error"]
    problem = only(found)
    assert problem.field == "applications[0].deployments[0].ray_actor_options"
    assert problem.line == 11
    assert "replica of chat fits on no node type of" in problem.message
    assert problem.message.endswith(f"the nearest, {lacks}")


def test_a_fallback_is_enough(tmp_path: Path) -> None:
    start = MODEL.index("{num_gpus")
    asked = (
        "{num_gpus: 1, label_selector: {ray.io/accelerator-type: H100}, "
        "fallback_strategy: [{label_selector: {ray.io/accelerator-type: L4}}]}\n"
    )
    assert problems(tmp_path, MODEL[:start] + asked) == []


def test_a_selector_without_a_fallback_is_warned_of(tmp_path: Path) -> None:
    """Ray would build the application on such a node (docs/clusters.md)."""
    model = MODEL.replace("num_gpus: 1", "num_gpus: 1, label_selector: {a: b}")
    (warning,) = [p for p in problems(tmp_path, model) if p.level == "warning"]
    assert warning.field.endswith("ray_actor_options.label_selector")
    assert "fallback_strategy" in warning.remedy


def test_each_bundle_of_a_placement_group_must_fit(tmp_path: Path) -> None:
    model = MODEL + "        placement_group_bundles: [{CPU: 1, GPU: 1}, {GPU: 2}]\n"
    problem = only(problems(tmp_path, model))
    assert problem.field == "applications[0].deployments[0].placement_group_bundles[1]"
    assert "GPU 1 of 2" in problem.message


def test_a_pool_names_node_types_that_are_there(tmp_path: Path) -> None:
    scaled = """\
        autoscaling_config:
          max_replicas: 2
          upscale_delay_s: 0
          downscale_delay_s: 0
          metrics_interval_s: 1
          policy:
            policy_function: nearfield.serving.scaling:Scaling
            policy_kwargs: {node_types: [l4s]}
"""
    problem = only(problems(tmp_path, MODEL + scaled))
    assert problem.value == "'l4s'"
    assert problem.remedy == "did you mean l4?"


@pytest.mark.parametrize(
    ("before", "after", "field", "remedy"),
    [
        ("market-type: on", "market: on", "labels.ray.io/market", "did you mean"),
        ("type: on-demand", "type: ondemand", "labels.ray.io/market-type", "write one of them"),
        ("type: on-demand", "type: spot", "labels.ray.io/market-type", "ask for a spot machine"),
        (
            "{InstanceType: g6.xlarge}",
            "{InstanceType: g6.xlarge, InstanceMarketOptions: {MarketType: spot}}",
            "labels.ray.io/market-type",
            "write ray.io/market-type: spot",
        ),
        ("head_node_type: head", "head_node_type: heads", "head_node_type", "did you mean head?"),
        ("GPU: 1", "GPU: one", "available_node_types.l4.resources.GPU", "1"),
        ("max_workers", "max_worker", "max_worker", "max_workers"),
    ],
)
def test_what_is_wrong_with_a_cluster_file(
    tmp_path: Path, before: str, after: str, field: str, remedy: str
) -> None:
    found = problems(tmp_path, cluster=CLUSTER.replace(before, after))
    about = [p for p in found if p.file.endswith("c.yaml") and field in p.field]
    assert about, found
    assert remedy in about[0].remedy + about[0].message


@pytest.mark.parametrize(
    ("wanted", "value", "fits"),
    [
        ("spot", "spot", True),
        ("spot", None, False),
        ("!spot", None, True),
        ("!spot", "spot", False),
        ("in(L4, H100)", "H100", True),
        ("in(L4,H100)", "T4", False),
        ("!in(L4, H100)", "T4", True),
        ("in(", "in(", False),
    ],
)
def test_selectors_are_rays(wanted: str, value: str | None, fits: bool) -> None:
    assert selects(wanted, value) is fits


def test_a_slice_is_called_as_google_calls_it() -> None:
    assert tpu_pod_type("v5litepod", "4x4") == "v5litepod-16"
    assert tpu_pod_type("v4", "2x2x2") == "v4-16"  # cores


SLICED = """\
applications:
  - name: big
    route_prefix: /big
    import_path: nearfield.serving:app
    args:
      model: big
      engine: nearfield.serving.engines.base:FunctionEngine
      slice: {accelerator_type: TPU-V5LITEPOD, topology: 4x4}
    deployments:
      - name: replica
        ray_actor_options: {resources: {TPU-v5litepod-16-head: 1}}
"""


def test_a_replica_with_a_slice_asks_for_its_first_host(tmp_path: Path) -> None:
    kuberay = (ROOT / "cluster_configs" / "clusters" / "kuberay.yaml").read_text()
    assert problems(tmp_path, SLICED, kuberay) == []
    problem = only(problems(tmp_path, SLICED.replace("litepod-16", "litepod-32"), kuberay)[:1])
    assert problem.field == "applications[0].args.slice"
    assert "TPU-v5litepod-16-head: 1" in problem.remedy


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("4x4", "4x4x4", "have 2 dimensions"),
        ("head: 1", "head: 1, TPU: 4", "does not go with slice"),
        ("engine: nearfield.serving.engines.base:FunctionEngine", "engine: embed", "one host"),
    ],
)
def test_what_is_wrong_with_a_slice(tmp_path: Path, before: str, after: str, says: str) -> None:
    model = SLICED.replace(before, after).replace("embed", "embed\n      source: hf://a/b")
    found = problems(tmp_path, model, CLUSTER.replace("GPU: 1}", "TPU-v5litepod-16-head: 1}"))
    assert any(says in p.message for p in found), found


def test_labels_that_only_a_running_tpu_host_has_are_not_missed() -> None:
    host = NodeType("tpu", {"CPU": 4, "TPU": 4}, {})
    assert host.lacks({"TPU": 4}, {"ray.io/tpu-topology": "2x2"}) == {}
    assert NodeType("cpu", {"CPU": 4}, {}).lacks({}, {"ray.io/tpu-topology": "2x2"}) != {}
