"""What `nearfield new` writes."""

from __future__ import annotations

import re
from pathlib import Path

from nearfield.core.errors import BadRequest
from nearfield.core.spec import NAME_PATTERN

_CONFIG = """\
# A plain Ray Serve config: `nearfield check`, `nearfield up` and `serve run` all take it.

proxy_location: HeadOnly
http_options:
  host: 127.0.0.1
  request_timeout_s: 3660

applications:
  - name: {name}
    # Behind the prefix: /v1 for OpenAI clients, /v2 for the Open Inference Protocol.
    route_prefix: /{name}
    import_path: nearfield.serving:app
    args:
      model: {name}  # the name clients ask for
{engine}
      limits:
        max_running: 64        # inside the engine at once
        max_queued: 256        # waiting behind them; one more is answered 429
        timeout_s: 120
    deployments:
      - name: replica          # Serve's own options: replicas, autoscaling, resources
        num_replicas: 1
        ray_actor_options:
          num_cpus: 1
"""

_ENGINES = {
    "generate": """\
      source: builtin://abacus # or hf://org/model, s3://bucket/prefix, file:///path
      engine:
        kind: generate
        max_batch: 16          # sequences decoded in one step""",
    "embed": """\
      source: builtin://minilm # or hf://org/model, s3://bucket/prefix, file:///path
      engine:
        kind: embed
        slo_ms: 50             # queueing plus compute should stay below""",
    "tensor": """\
      source: file://{directory}  # put model.onnx there; or s3://bucket/prefix
      engine:
        kind: tensor
        file: model.onnx
        max_batch: 1           # above 1, requests are joined along the first dimension""",
    "remote": """\
      engine:
        kind: remote
        url: http://127.0.0.1:8001/v1
        # upstream_model: its name there, if it is another
        # api_key_env: UPSTREAM_API_KEY, a variable where replicas run""",
    "custom": """\
      engine: {module}:{class_name}  # a class of {module}.py, beside this file""",
}

_ENGINE = '''\
"""The engine of {name}: one class. nearfield gives it both APIs, streaming, bounds and metrics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nearfield.serving.engines.base import EngineContext, FunctionEngine


class {class_name}(FunctionEngine):
    """Says what it was told, in capitals. Replace `generate`, or define `embed` or `infer`."""

    def setup(self, context: EngineContext) -> None:
        """Load what you need here, once: `context.weights`, `context.options`."""

    def generate(self, request: Any) -> Iterator[str]:
        """Yield the answer in pieces: each is streamed to the caller at once."""
        text = request.prompt or request.messages[-1]["content"]
        for word in text.split():
            yield word.upper() + " "
'''

_README = """\
# {name}

    nearfield check {name}.yaml    # what is wrong with it, if anything
    nearfield up {name}.yaml       # run it on this machine; Ctrl-C ends it
    nearfield serve {name}.yaml    # or into a region that already runs
"""


def project(name: str, engine: str, directory: Path) -> dict[str, str]:
    """The files of a new project, by name. `directory`: where it will be, absolute.

    Raises:
        BadRequest: the name is none that a model can have.
    """
    if not re.fullmatch(NAME_PATTERN, name) or ".." in name or name.startswith("-"):
        raise BadRequest(
            f"NAME is {name!r}: it must begin with a letter or digit and hold only letters, "
            "digits, '.', '_' and '-', like chat or chat-v2",
            param="name",
        )
    words = re.findall(r"[A-Za-z0-9]+", name)
    module = "_".join(words).lower()
    class_name = "".join(word.capitalize() for word in words)
    if module[0].isdigit():
        module, class_name = f"model_{module}", f"Model{class_name}"
    values = {
        "name": name,
        "module": module,
        "class_name": class_name,
        "directory": str(directory),
    }
    section = _ENGINES[engine].format(**values)
    files = {f"{name}.yaml": _CONFIG.format(name=name, engine=section)}
    if engine == "custom":
        files[f"{module}.py"] = _ENGINE.format(**values)
    files["README.md"] = _README.format(**values)
    return files
