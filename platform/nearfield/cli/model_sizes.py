"""Which model is meant on the command line, and what of it decides its cost."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nearfield.core.architecture import Architecture, UnknownArchitecture, architecture_of
from nearfield.core.catalog import KnownModel
from nearfield.core.errors import BadRequest, NotFound
from nearfield.core.problems import did_you_mean

_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "bf16", "half": "fp16"}
HUB_TIMEOUT_S = 5.0
_ENDINGS = ("-instruct", "-chat", "-it", "-hf", "-base", "-v0.1", "-v0.2", "-v0.3")


@dataclass(frozen=True, slots=True)
class ModelSize:
    """A model to plan for.

    Attributes:
        architecture: its shape. precision: of its checkpoint. source: of its weights, as a model's
            file names them; None if nothing says it. name: to call it in a file. told: where the
            shape is from, in words. context: that its file asks for.
    """

    architecture: Architecture
    precision: str
    source: str | None
    name: str
    told: str
    context: int | None = None


def model_size(given: str, known: Mapping[str, KnownModel]) -> ModelSize:
    """The model that is meant by a path, a source or a name.

    Raises:
        BadRequest: there is none, or its configuration does not say what is needed.
    """
    path = Path(given)
    if path.suffix in (".yaml", ".yml"):
        return _from_file(path, known)
    if path.is_dir() or path.suffix == ".json":
        config = path / "config.json" if path.is_dir() else path
        source = f"file://{config.parent.resolve()}"
        return _from_config(_read(config), source, config.parent.resolve().name, str(config))
    if "://" in given:
        return _from_source(given, known)
    if (name := _known_name(given, known)) is not None:
        found = _from_known(name, known[name])
        # `Llama-3.1-8B-Instruct` has the shape of `llama-3.1-8b`, and other weights.
        return found if name == given.lower() else replace(found, source=None)
    if given.count("/") == 1 and not given.startswith((".", "/")):
        return _from_source(f"hf://{given}", known)
    near = did_you_mean(given.lower(), known)
    raise BadRequest(
        f"There is no model {given!r} here: " + (f"did you mean {near}? " if near else "") + "Give "
        "a config.json or its folder, a model's YAML, hf://org/model, or one of "
        f"{', '.join(sorted(known))}",
        param="model",
    )


def _from_file(path: Path, known: Mapping[str, KnownModel]) -> ModelSize:
    from nearfield.core.check import model_applications
    from nearfield.core.problems import Problem
    from nearfield.core.yaml_file import read_document

    document = read_document(path, str(path))
    if isinstance(document, Problem):
        raise BadRequest(f"{path} {document.message}: {document.remedy}", param="model")
    for _, application in model_applications(document):
        args = application.get("args")
        if not isinstance(args, dict):
            continue
        source = args.get("source")
        if not isinstance(source, str):
            raise BadRequest(
                f"{path}: args.source is missing, so nothing says how large the model is: plan for "
                "its config.json instead",
                param="model",
            )
        found = _from_source(source, known)
        engine = args.get("engine")
        context = engine.get("max_model_len") if isinstance(engine, dict) else None
        name = args.get("model")
        return ModelSize(
            found.architecture,
            found.precision,
            source,
            name if isinstance(name, str) else found.name,
            f"{path}: {found.told}",
            context if isinstance(context, int) else None,
        )
    raise BadRequest(
        f"{path} serves no model of nearfield's: nearfield check {path}", param="model"
    )


def _from_source(source: str, known: Mapping[str, KnownModel]) -> ModelSize:
    scheme, _, rest = source.partition("://")
    if scheme == "builtin":
        if (name := _known_name(rest, known)) is not None:
            return _from_known(name, known[name], source)
        from nearfield.weights.resolve import builtin

        try:
            shipped = builtin(rest) / "config.json"
        except NotFound:
            raise BadRequest(f"{source} does not ship with nearfield", param="model") from None
        return _from_config(_read(shipped), source, rest, source)
    if scheme == "file":
        return _from_config(_read(Path(rest) / "config.json"), source, Path(rest).name, source)
    if scheme == "hf":
        repository, _, revision = rest.partition("@")
        last = repository.rpartition("/")[2]
        if (name := _known_name(last, known)) is not None:
            return _from_known(name, known[name], source)
        config = _from_hub(repository, revision or "main")
        return _from_config(config, source, last, f"{source}, its config.json")
    raise BadRequest(
        f"{source}: only hf://, file:// and builtin:// can be read here: give its config.json",
        param="model",
    )


def _from_hub(repository: str, revision: str) -> dict[str, Any]:
    """Its config.json, from the hub: HF_ENDPOINT and HF_TOKEN count, as everywhere.

    Raises:
        BadRequest: it cannot be had; the message says why, and what to give instead.
    """
    import httpx

    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    token = os.environ.get("HF_TOKEN")
    headers = {"authorization": f"Bearer {token}"} if token else {}
    why = "holds no configuration"
    try:
        answer = httpx.get(
            f"{hub}/{repository}/resolve/{revision}/config.json",
            headers=headers,
            timeout=HUB_TIMEOUT_S,
            follow_redirects=True,
        )
        if answer.status_code == 200:
            config = answer.json()
            if isinstance(config, dict):
                return config
        elif answer.status_code in (401, 403):
            why = "may be read with a token only: set HF_TOKEN"
        else:
            why = f"is answered {answer.status_code}"
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError, ValueError) as error:
        why = f"cannot be had ({type(error).__name__})"
    raise BadRequest(
        f"The configuration of hf://{repository} at {hub} {why}. Give its config.json, or one of "
        "the known models",
        param="model",
    )


def _from_known(name: str, model: KnownModel, source: str | None = None) -> ModelSize:
    config = model.config
    repository = "/".join(model.source.removeprefix("https://huggingface.co/").split("/")[:2])
    return _from_config(config, source or f"hf://{repository}", name, f"known: {model.source}")


def _from_config(config: Mapping[str, Any], source: str, name: str, told: str) -> ModelSize:
    try:
        architecture = architecture_of(name, config)
    except UnknownArchitecture as error:
        raise BadRequest(
            f"{told}: {error.field} {error}: the planner knows transformers with a config.json as "
            "Hugging Face writes it",
            param="model",
        ) from None
    return ModelSize(architecture, _precision(config, told), source, name, told)


def _precision(config: Mapping[str, Any], told: str) -> str:
    """Of the checkpoint: what it is quantised to, else its type."""
    quantised = config.get("quantization_config")
    if isinstance(quantised, Mapping):
        method = str(quantised.get("quant_method", ""))
        bits = quantised.get("bits") or quantised.get("w_bit")
        if "fp8" in method:
            return "fp8"
        if method in ("awq", "gptq", "bitsandbytes", "mxfp4") or bits == 4:
            return "int8" if bits == 8 or quantised.get("load_in_8bit") else "int4"
        if method == "compressed-tensors":
            return "fp8" if "float" in str(quantised.get("format", "")) else "int8"
        raise BadRequest(
            f"{told}: quantization_config.quant_method {method!r} is unknown to the planner: say "
            "with --precision what it comes to",
            param="precision",
        )
    text = config.get("text_config")
    inner = text if isinstance(text, Mapping) else config
    dtype = config.get("torch_dtype") or config.get("dtype") or inner.get("torch_dtype")
    return _DTYPES.get(str(dtype), "bf16")


def _known_name(given: str, known: Mapping[str, KnownModel]) -> str | None:
    """`Llama-3.1-8B-Instruct` is `llama-3.1-8b`: the same shape."""
    name = given.lower().removeprefix("meta-")
    for _ in range(3):
        if name in known:
            return name
        name = next((name.removesuffix(end) for end in _ENDINGS if name.endswith(end)), name)
    return name if name in known else None


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadRequest(f"{path} does not exist: give a config.json", param="model") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadRequest(f"{path} cannot be read as JSON: {error}", param="model") from None
    if not isinstance(data, dict):
        raise BadRequest(f"{path} holds no configuration", param="model")
    return data
