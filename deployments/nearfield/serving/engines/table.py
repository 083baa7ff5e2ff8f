"""Which class serves which `engine.kind`. A new engine is one file and one line here."""

from __future__ import annotations

import importlib

from nearfield.core.errors import BadRequest
from nearfield.core.spec import CustomEngine, ModelSpec
from nearfield.serving.engines.base import Engine

ENGINES: dict[str, str] = {
    "generate": "nearfield.serving.engines.generate:GenerateEngine",
    "embed": "nearfield.serving.engines.embed:EmbedEngine",
    "tensor": "nearfield.serving.engines.tensor:TensorEngine",
    "remote": "nearfield.serving.engines.remote:RemoteEngine",
    "vllm": "nearfield.serving.engines.vllm:VllmEngine",
}


def create_engine(spec: ModelSpec) -> Engine:
    """The spec's engine, not yet loaded. Only this engine's dependencies are imported.

    Raises:
        BadRequest: a custom engine's module or class cannot be used; the message says why.
    """
    if isinstance(spec.engine, CustomEngine):
        return _custom(spec.engine.import_path)
    engine: Engine = _attribute(ENGINES[spec.engine.kind])()
    return engine


def _custom(import_path: str) -> Engine:
    module_name, _, class_name = import_path.partition(":")
    try:
        found = _attribute(import_path)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise BadRequest(
                f"engine.import_path {import_path}: its module needs {error.name}, which is not "
                "installed here. Add it to the application's runtime_env or to the environment.",
                param="engine.import_path",
            ) from error
        raise BadRequest(
            f"engine.import_path {import_path}: there is no module {error.name} here. Run from "
            "your project's directory, or ship it with runtime_env.working_dir.",
            param="engine.import_path",
        ) from error
    except AttributeError as error:
        raise BadRequest(
            f"engine.import_path {import_path}: module {module_name} has no {class_name}.",
            param="engine.import_path",
        ) from error
    if not (isinstance(found, type) and issubclass(found, Engine)):
        raise BadRequest(
            f"engine.import_path {import_path} is not an engine: derive the class from "
            "nearfield.serving.engines.base.FunctionEngine or Engine.",
            param="engine.import_path",
        )
    return found()


def _attribute(import_path: str) -> type:
    module_name, _, class_name = import_path.partition(":")
    found: type = getattr(importlib.import_module(module_name), class_name)
    return found
