"""Whatever stands in a config, the check answers with problems a person can act on."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from nearfield.cli.config_files import check_files

CONFIG: dict[str, Any] = {
    "proxy_location": "HeadOnly",
    "http_options": {"port": 8000},
    "applications": [
        {
            "name": "chat",
            "route_prefix": "/chat",
            "import_path": "nearfield.serving:app",
            "runtime_env": {"env_vars": {"A": "b"}},
            "args": {
                "model": "chat",
                "version": "1",
                "source": "hf://a/b",
                "engine": {"kind": "generate", "max_batch": 3},
                "limits": {"max_running": 3},
            },
            "deployments": [
                {
                    "name": "replica",
                    "autoscaling_config": {"min_replicas": 1, "max_replicas": 3},
                    "ray_actor_options": {
                        "num_cpus": 1,
                        "fallback_strategy": [{"label_selector": {"a": "b"}}],
                    },
                }
            ],
        }
    ],
}
KEYS = ("replicas", "model_path", "max_batch", "timeout", "kind", "slo_ms", "port", "url", "x")
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from(["", "2m", "a:b", "a:b:c", "builtin://x", "file:///x/..", "/-", "custom"]),
    st.lists(st.sampled_from([1, "x", None]), max_size=2),
    st.sampled_from([{}, {"a": 1}, {"kind": "embed"}, {"kind": 3}, {"kind": "custom"}]),
)


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every place in a config, except the whole."""
    entries: Any = ()
    if isinstance(value, dict):
        entries = value.items()
    elif isinstance(value, list):
        entries = enumerate(value)
    for key, inner in entries:
        yield (*path, key)
        yield from places(inner, (*path, key))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_every_answer_can_be_acted_on(data: st.DataObject) -> None:
    config = copy.deepcopy(CONFIG)
    for _ in range(data.draw(st.integers(1, 3))):
        *parents, last = data.draw(st.sampled_from(list(places(config))))
        section: Any = config
        for key in parents:
            section = section[key]
        change = data.draw(st.sampled_from(["replace", "remove", "add"]))
        if change == "replace":
            section[last] = data.draw(VALUES)
        elif change == "remove":
            del section[last]
        elif isinstance(section, dict):
            section[data.draw(st.sampled_from(KEYS))] = data.draw(VALUES)
        if not list(places(config)):
            break
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "model.yaml"
        file.write_text(yaml.safe_dump(config))
        for problem in check_files([file], ray=False):
            assert problem.message
            assert len(problem.remedy) > 3
            assert problem.line is not None
