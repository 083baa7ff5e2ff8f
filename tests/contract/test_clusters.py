"""The cluster files against the installed Ray, and against the catalogue."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import ray.autoscaler
import yaml
from nearfield.cli.config_files import check_files
from nearfield.core import cluster
from nearfield.core.catalog_files import read_catalog
from nearfield.core.spec import tpu_pod_type
from ray.autoscaler._private.kuberay import autoscaling_config as kuberay
from ray.autoscaler._private.kuberay import utils

FOLDER = Path(__file__).parents[2] / "cluster_configs" / "clusters"
FILES = sorted(FOLDER.glob("*.yaml"))
LAUNCHED = [FOLDER / "gcp.yaml", FOLDER / "aws.yaml"]


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text())
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_is_valid_by_ray_too(path: Path) -> None:
    assert check_files([path]) == []


def test_the_keys_of_a_launcher_file_are_rays() -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    assert set(cluster.LauncherFile.model_fields) == set(schema["properties"])
    (node_type,) = schema["properties"]["available_node_types"]["patternProperties"].values()
    assert set(cluster.LauncherNodeType.model_fields) == set(node_type["properties"])


def test_rays_own_refusal_is_told(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    text = (FOLDER / "aws.yaml").read_text()
    path.write_text(text.replace("max_workers: 20", "max_workers: 2", 1).replace(
        "    max_workers: 8\n", "    max_workers: 8\n    min_workers: 8\n", 1))  # fmt: skip
    (problem,) = check_files([path])
    assert "max_workers" in problem.message


def test_a_raycluster_is_read_as_rays_autoscaler_reads_it() -> None:
    manifest = read(FOLDER / "kuberay.yaml")
    manifest["metadata"].setdefault("namespace", "default")
    theirs = kuberay._derive_autoscaling_config_from_ray_cr(manifest)["available_node_types"]
    for ours in cluster.node_types(manifest):
        known = {k: v for k, v in theirs[ours.name]["resources"].items() if k != "memory"}
        assert ours.resources == known, ours.name
        assert ours.labels == theirs[ours.name]["labels"]


@pytest.mark.parametrize(("kind", "topology"), [("v5-lite-podslice", "4x4"), ("v6e-slice", "4x4")])
def test_pod_types_are_rays(kind: str, topology: str) -> None:
    version = cluster._GKE_TPUS[f"tpu-{kind}"]
    theirs = utils.tpu_node_selectors_to_type(topology, f"tpu-{kind}")
    assert tpu_pod_type(version, topology) == theirs


@pytest.mark.parametrize("path", LAUNCHED, ids=lambda path: path.name)
def test_machines_and_prices_are_the_catalogues(path: Path) -> None:
    """Each machine with an accelerator is known, has as many of them as it says, and costs what the
    comment says."""
    text, data = path.read_text(), read(path)
    catalog = read_catalog()
    place = data["provider"]["region"]
    told = dict(re.findall(r"^  ([\w-]+): +# (\d[\d.]*)", text, re.MULTILINE))
    for name, entry in data["available_node_types"].items():
        amount = entry["resources"].get("GPU") or entry["resources"].get("TPU")
        if amount is None:
            continue
        node = entry["node_config"]
        machine = node.get("InstanceType") or node.get("machineType") or "tpu-v5e, a chip"
        prices = next(p for p in catalog.prices.values() if machine in p.offers.get(place, {}))
        known, offer = prices.machines[machine], prices.offers[place][machine]
        spot = entry["labels"][cluster.MARKET] == "spot"
        usd = offer.spot_usd_h if spot else offer.on_demand_usd_h
        assert usd is not None
        assert amount % known.count == 0
        assert float(told[name]) == pytest.approx(usd * amount / known.count), name
        names = catalog.accelerators[known.accelerator].ray
        assert entry["labels"][cluster.ACCELERATOR] == names.accelerator_type
        assert names.resource in entry["resources"]


def test_kuberays_pods_have_the_environment_that_serve_needs() -> None:
    lines = (FOLDER.parent / "local" / "serve.env").read_text().splitlines()
    wanted = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    spec = read(FOLDER / "kuberay.yaml")["spec"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    pods = [group["template"]["spec"]["containers"][0] for group in groups]
    for env in (spec["autoscalerOptions"]["env"], *(pod["env"] for pod in pods)):
        given = {each["name"]: each.get("value") for each in env}
        assert {key: given[key] for key in wanted} == wanted
        assert given["RAY_AUTH_MODE"] == "token"
