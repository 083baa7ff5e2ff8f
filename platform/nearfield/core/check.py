"""Checking whole configs: what one file says, and whether several go together. No I/O.

    problems = check([("chat.yaml", parse(text))])

Every rule is looked at, so that one run names everything there is to mend.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from nearfield.core import cluster
from nearfield.core.catalog import (
    EfficiencyFile,
    HardwareFile,
    ModelsFile,
    PriceFile,
    PublishedFile,
)
from nearfield.core.catalog_files import check_models
from nearfield.core.federation import GatewayFile, RegionFile
from nearfield.core.problems import Finding, Problem, did_you_mean, dotted, findings, shown
from nearfield.core.scaling import SCALING_POLICY, ScalingOptions
from nearfield.core.serve_config import (
    AGENT_BUILDER,
    MODEL_BUILDER,
    MODEL_DEPLOYMENT,
    Application,
    ServeConfig,
)
from nearfield.core.spec import BUILTIN_MODELS, NAME_PATTERN, ModelSpec, TpuSlice
from nearfield.core.yaml_document import Document, Path
from pydantic import BaseModel, ValidationError

Kind = Literal[
    "serve", "region", "gateway", "cluster",
    "hardware", "prices", "models", "published", "efficiency",
]  # fmt: skip
_OTHERS: dict[Kind, type[BaseModel]] = {
    "region": RegionFile,
    "gateway": GatewayFile,
    "hardware": HardwareFile,
    "prices": PriceFile,
    "models": ModelsFile,
    "published": PublishedFile,
    "efficiency": EfficiencyFile,
}
_MODEL_ROUTE = re.compile(r"/[A-Za-z0-9._-]+")


def check(documents: Sequence[tuple[str, Document]]) -> list[Problem]:
    """All problems of the files (name, document), each by itself and all of them together."""
    problems = [
        located(file, document, finding)
        for file, document in documents
        for finding in _check_document(document)
    ]
    return sorted(
        [*problems, *_check_together(documents)], key=lambda p: (p.file, p.line or 0, p.field)
    )


def kind_of(document: Document) -> Kind:
    """What a file describes, by its first words: a region, a gateway, a cluster's nodes, a part of
    the catalogue; else a Serve config."""
    keys = document.value.keys() if isinstance(document.value, dict) else ()
    if "applications" in keys:
        return "serve"
    if "available_node_types" in keys or _is_manifest(document.value):
        return "cluster"
    return next((kind for kind in _OTHERS if kind in keys), "serve")


def _is_manifest(value: Any) -> bool:
    """Whether it is KubeRay's."""
    return isinstance(value, dict) and str(value.get("apiVersion", "")).startswith("ray.io/")


def title(document: Document) -> str:
    """A name for what a valid file describes, by its kind: `region eu-west`; of a Serve config, its
    models."""
    if (kind := kind_of(document)) == "serve":
        return ", ".join(app["args"]["model"] for _, app in model_applications(document))
    value = document.value
    if kind == "cluster":
        name = value["metadata"]["name"] if _is_manifest(value) else value["cluster_name"]
        count = len(cluster.node_types(value))
        return f"cluster {name}, {count} node types"
    return f"{kind} {value[kind]}"


def located(file: str, document: Document, finding: Finding) -> Problem:
    """The finding with its file and line."""
    return Problem(
        file=file,
        field=dotted(finding.path),
        message=finding.message,
        remedy=finding.remedy,
        value=shown(finding.value) if finding.has_value else None,
        line=document.line_of(finding.path),
    )


def repeated(document: Document) -> Iterator[Finding]:
    """Keys that a section has twice."""
    for duplicate in document.duplicates:
        yield Finding(
            duplicate.path,
            f"stands here twice, first on line {duplicate.first_line}",
            "remove one of them: YAML silently takes the last",
            duplicate.value,
        )


def model_applications(document: Document) -> Iterator[tuple[int, dict[str, Any]]]:
    """The applications of a config that serve models of ours, with their index."""
    for index, app in _applications(document):
        if isinstance(app, dict) and app.get("import_path") == MODEL_BUILDER:
            yield index, app


def _applications(document: Document) -> Iterator[tuple[int, Any]]:
    apps = document.value.get("applications") if isinstance(document.value, dict) else None
    if isinstance(apps, list):
        yield from enumerate(apps)


def _check_document(document: Document) -> Iterator[Finding]:
    yield from repeated(document)
    data = document.value
    if not isinstance(data, dict):
        yield Finding((), "must be a section of keys", "begin with `applications:`", data)
        return
    kind = kind_of(document)
    if kind == "cluster":
        yield from _check_cluster(data)
        return
    if kind != "serve":
        problems = list(_validate(_OTHERS[kind], data, (), strict=True))
        yield from problems
        if kind == "models" and not problems:
            yield from check_models(ModelsFile.model_validate(data))
        return
    if "import_path" in data and "applications" not in data:
        yield Finding(
            ("import_path",),
            "stands at the top: this is a single application",
            "put it into a list, `applications:` and below it `- name: …`",
            data["import_path"],
        )
        return
    yield from _validate(ServeConfig, data, ())
    for index, app in _applications(document):
        at: Path = ("applications", index)
        yield from _validate(Application, app, at)
        if not isinstance(app, dict):
            continue
        path = app.get("import_path")
        if path == MODEL_BUILDER:
            yield from _check_model(app, at)
        elif path == AGENT_BUILDER:
            continue
        elif isinstance(path, str) and re.match(r"near_?field\b", path):
            yield Finding(
                (*at, "import_path"),
                "names nothing in nearfield that can be served",
                f"did you mean {MODEL_BUILDER}?",
                path,
            )


def _check_cluster(data: dict[str, Any]) -> Iterator[Finding]:
    if not _is_manifest(data):
        problems = list(_validate(cluster.LauncherFile, data, (), strict=True))
        yield from problems or cluster.check_cluster(data)
        return
    kinds = ("RayCluster", "RayService")
    if data.get("kind") not in kinds:
        yield Finding(
            ("kind",), "describes no cluster", f"it is one of {', '.join(kinds)}", data.get("kind")
        )
    elif not any(each.name != cluster.HEAD_GROUP for each in cluster.node_types(data)):
        yield Finding(
            ("spec",), "has no worker groups", "add workerGroupSpecs", None, has_value=False
        )
    elif not isinstance((data.get("metadata") or {}).get("name"), str):
        yield Finding(("metadata", "name"), "is missing", "name it", has_value=False)


def _validate(
    schema: type[BaseModel], data: Any, at: Path, *, strict: bool | None = None
) -> Iterator[Finding]:
    try:
        schema.model_validate(data, strict=strict)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
        for found in findings(details, schema, data):
            yield Finding(
                (*at, *found.path), found.message, found.remedy, found.value, found.has_value
            )


def _check_model(app: dict[str, Any], at: Path) -> Iterator[Finding]:
    if "args" not in app:
        yield Finding(
            (*at, "args"), "is missing", "add args with the model's spec", has_value=False
        )
    elif isinstance(app["args"], dict):
        yield from _validate(ModelSpec, app["args"], (*at, "args"), strict=True)
        yield from _check_builtin(app["args"].get("source"), (*at, "args", "source"))
        yield from _check_slice(app, at)
    yield from _check_route(app, at)
    deployments = app.get("deployments")
    for index, deployment in enumerate(deployments if isinstance(deployments, list) else []):
        if isinstance(deployment, dict):
            here = (*at, "deployments", index)
            yield from _check_replica(deployment, index, here)
            yield from _check_scaling(app, deployment, (*here, "autoscaling_config"))


def _check_slice(app: dict[str, Any], at: Path) -> Iterator[Finding]:
    """A replica with a slice asks for what only its first host has."""
    given = app["args"].get("slice")
    try:
        wanted = TpuSlice.model_validate(given, strict=True)
    except ValidationError:
        return  # none, or it was told with the rest of args
    deployments = app.get("deployments")
    first = deployments[0] if isinstance(deployments, list) and deployments else None
    options = first.get("ray_actor_options") if isinstance(first, dict) else None
    asked = options.get("resources") if isinstance(options, dict) else None
    if not isinstance(asked, dict) or asked.get(wanted.head_resource) != 1:
        yield Finding(
            (*at, "args", "slice"),
            "is reserved from its first host, which the replica does not ask for",
            f"write ray_actor_options: {{resources: {{{wanted.head_resource}: 1}}}} for the "
            f"deployment {MODEL_DEPLOYMENT}",
            given,
        )
    elif "TPU" in asked:
        yield Finding(
            (*at, "deployments", 0, "ray_actor_options", "resources", "TPU"),
            "does not go with slice, which reserves all chips of all hosts",
            "remove it",
            asked["TPU"],
        )


def _check_builtin(source: Any, at: Path) -> Iterator[Finding]:
    scheme = "builtin://"
    if not isinstance(source, str) or not source.startswith(scheme):
        return
    name = source.removeprefix(scheme)
    if re.fullmatch(NAME_PATTERN, name) and name not in BUILTIN_MODELS:
        close = did_you_mean(name, BUILTIN_MODELS)
        known = ", ".join(scheme + known for known in BUILTIN_MODELS)
        remedy = f"did you mean {scheme}{close}?" if close else f"there are {known}"
        yield Finding(at, "is none of the models that ship with nearfield", remedy, source)


def _check_route(app: dict[str, Any], at: Path) -> Iterator[Finding]:
    here = (*at, "route_prefix")
    route = app.get("route_prefix")
    name = app.get("name") if isinstance(app.get("name"), str) else "chat"
    if route is None:
        yield Finding(
            here,
            "is missing",
            f"add route_prefix: /{name}; without it, every model would stand at /",
            has_value=False,
        )
    elif isinstance(route, str) and not _MODEL_ROUTE.fullmatch(route):
        yield Finding(
            here,
            "must be one segment of letters, digits, '.', '_' and '-' after a slash",
            f"write route_prefix: /{name}",
            route,
        )
    elif isinstance(route, str) and route.startswith("/-"):
        yield Finding(
            here,
            "begins with /-, where Serve's own pages are",
            f"write route_prefix: /{name}",
            route,
        )


def _check_replica(deployment: dict[str, Any], index: int, at: Path) -> Iterator[Finding]:
    name = deployment.get("name")
    if isinstance(name, str) and (name != MODEL_DEPLOYMENT or index > 0):
        yield Finding(
            (*at, "name"),
            f"a model has one deployment, called {MODEL_DEPLOYMENT}",
            f"write name: {MODEL_DEPLOYMENT}, once; other code goes into an application of its own",
            name,
        )
    if "request_router_config" in deployment:
        yield Finding(
            (*at, "request_router_config"),
            "does not go with a model: its replicas are reached directly, past Serve's router",
            "remove it",
            deployment["request_router_config"],
        )


def _check_scaling(app: dict[str, Any], deployment: dict[str, Any], at: Path) -> Iterator[Finding]:
    """Where nearfield's policy scales: its options, and Serve's that would come between."""
    config = deployment.get("autoscaling_config")
    policy = config.get("policy") if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(policy, dict):
        return
    function = policy.get("policy_function")
    if function != SCALING_POLICY:
        if isinstance(function, str) and re.match(r"near_?field\b", function):
            yield Finding(
                (*at, "policy", "policy_function"),
                "names no policy of nearfield",
                f"did you mean {SCALING_POLICY}?",
                function,
            )
        return
    for key, default, most, remedy in _SERVE_BETWEEN:
        value = config.get(key, default)
        if isinstance(value, int | float) and value > most:
            what = f"is {default:g} by Serve's default" if key not in config else "is too long"
            yield Finding((*at, key), what, remedy, config.get(key), key in config)
    for key in _SERVE_FACTORS:
        if config.get(key) not in (None, 1, 1.0):
            yield Finding(
                (*at, key), "changes what nearfield's policy decides", "remove it", config[key]
            )
    options = policy.get("policy_kwargs", {})
    here = (*at, "policy", "policy_kwargs")
    if isinstance(options, dict):
        problems = list(_validate(ScalingOptions, options, here, strict=True))
        yield from problems or _check_scaling_options(app, config, options, here)


_SERVE_BETWEEN: tuple[tuple[str, float, float, str], ...] = (
    ("upscale_delay_s", 30.0, 0.0, "write upscale_delay_s: 0; when to act is the policy's matter"),
    (
        "downscale_delay_s",
        600.0,
        0.0,
        "write downscale_delay_s: 0; when to act is the policy's matter",
    ),
    ("downscale_to_zero_delay_s", 0.0, 0.0, "remove it; idle_s in policy_kwargs is for that"),
    ("metrics_interval_s", 10.0, 5.0, "write metrics_interval_s: 1, or the policy sees the past"),
)
_SERVE_FACTORS = (
    "smoothing_factor",
    "upscale_smoothing_factor",
    "downscale_smoothing_factor",
    "upscaling_factor",
    "downscaling_factor",
)


def _check_scaling_options(
    app: dict[str, Any], config: dict[str, Any], options: dict[str, Any], at: Path
) -> Iterator[Finding]:
    args = app.get("args")
    given = args if isinstance(args, dict) else {}
    pool = given.get("pool", "default")
    name = pool.get("name", "default") if isinstance(pool, dict) else pool
    for key, own in (("model", given.get("model")), ("pool", name)):
        if key in options and own is not None and options[key] != own:
            yield Finding(
                (*at, key), f"is another than in args: {own}", f"write {key}: {own}", options[key]
            )
    least, price = config.get("min_replicas", 1), options.get("usd_per_hour", 1.0)
    budget = options.get("max_usd_per_hour")
    if budget is not None and isinstance(least, int) and least * price > budget:
        yield Finding(
            (*at, "max_usd_per_hour"),
            f"is less than min_replicas cost: {least} at {price:g} USD an hour",
            "raise it, or lower min_replicas",
            budget,
        )


def _check_together(documents: Sequence[tuple[str, Document]]) -> Iterator[Problem]:
    """Names and routes are unique in a region, so also across files; replicas fit on the nodes."""
    yield from _check_nodes(documents)
    first: dict[tuple[str, str], tuple[str, int | None]] = {}
    for file, document in documents:
        for index, app in _applications(document):
            for key, default in (("name", "default"), ("route_prefix", "/")):
                value = app.get(key, default) if isinstance(app, dict) else None
                if not isinstance(value, str):
                    continue
                path = ("applications", index, key)
                line = document.line_of(path)
                if (key, value) not in first:
                    first[key, value] = (file, line)
                    continue
                where = first[key, value]
                place = f"line {where[1]}" if where[0] == file else f"{where[0]}, line {where[1]}"
                yield located(
                    file,
                    document,
                    Finding(
                        path,
                        f"is taken by the application at {place}",
                        f"choose another {key}",
                        value,
                    ),
                )


def _check_nodes(documents: Sequence[tuple[str, Document]]) -> Iterator[Problem]:
    """Every replica fits on a node type of every cluster file."""
    for where, nodes in documents:
        if kind_of(nodes) != "cluster":
            continue
        types = cluster.node_types(nodes.value)
        for file, document in documents:
            for index, app in _applications(document):
                for found in cluster.unmet(app, types, where) if isinstance(app, dict) else ():
                    at = ("applications", index, *found.path)
                    yield located(
                        file,
                        document,
                        Finding(at, found.message, found.remedy, found.value, found.has_value),
                    )
