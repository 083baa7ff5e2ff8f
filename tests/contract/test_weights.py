"""From a source to a directory: real HTTP against an S3 server on loopback, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer
from nearfield.core.errors import BadRequest, NearfieldError, NotFound, Unavailable
from nearfield.core.spec import ModelSpec
from nearfield.weights import resolve

from tests.support.hub import hub


def spec(source: str, **more: Any) -> ModelSpec:
    return ModelSpec.model_validate({"model": "m", "engine": "embed", "source": source, **more})


@pytest.fixture(scope="module")
def s3() -> Iterator[tuple[str, Any]]:
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    keys = {"aws_access_key_id": "k", "aws_secret_access_key": "s", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=url, **keys)
    client.create_bucket(Bucket="models")
    yield url, client
    server.stop()


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NEARFIELD_CACHE_DIR", str(tmp_path / "cache"))
    for name, value in {
        "ACCESS_KEY_ID": "k",
        "SECRET_ACCESS_KEY": "s",
        "DEFAULT_REGION": "x",
    }.items():
        monkeypatch.setenv(f"AWS_{name}", value)


def put(client: Any, prefix: str, **files: bytes) -> None:
    for name, body in files.items():
        key = f"{prefix}/{name.replace('__', '.')}"
        client.put_object(Bucket="models", Key=key, Body=body)


def test_builtin_models_are_found_without_importing_them() -> None:
    directory = resolve(spec("builtin://minilm"))
    assert directory is not None
    assert (directory / "model.safetensors").is_file()
    with pytest.raises(NotFound, match="there are abacus, minilm"):
        resolve(spec("builtin://gpt-9"))


def test_a_file_source_is_the_directory_itself(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    assert resolve(spec(f"file://{tmp_path}")) == tmp_path
    with pytest.raises(NotFound, match="no such directory"):
        resolve(spec(f"file://{tmp_path}/nowhere"))


def test_no_source_is_no_directory() -> None:
    remote = {"kind": "remote", "url": "http://upstream/v1"}
    assert resolve(ModelSpec.model_validate({"model": "m", "engine": remote})) is None


def test_a_pickle_is_refused_by_name_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(BadRequest, match=r"pytorch_model\.bin.*Convert"):
        resolve(spec(f"file://{tmp_path}"))


def test_an_empty_directory_holds_nothing_to_load(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="no \\*\\.safetensors"):
        resolve(spec(f"file://{tmp_path}"))


def test_s3_is_downloaded_once_and_complete(s3: tuple[str, Any]) -> None:
    url, client = s3
    put(client, "a/b", model__safetensors=b"weights", config__json=b"{}", code__py=b"evil()")
    source = spec("s3://models/a/b", s3_endpoint_url=url)
    found: list[Path | None] = []
    threads = [threading.Thread(target=lambda: found.append(resolve(source))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    directory = found[0]
    assert directory is not None
    assert {p.name for p in directory.iterdir()} == {"model.safetensors", "config.json"}
    assert (directory / "model.safetensors").read_bytes() == b"weights"
    assert not list(directory.parent.glob("*.partial-*"))


def test_a_changed_object_is_another_directory(s3: tuple[str, Any]) -> None:
    url, client = s3
    put(client, "changing", model__safetensors=b"old")
    source = spec("s3://models/changing", s3_endpoint_url=url)
    old = resolve(source)
    put(client, "changing", model__safetensors=b"new")
    new = resolve(source)
    assert old is not None
    assert new is not None
    assert (old / "model.safetensors").read_bytes() == b"old"
    assert (new / "model.safetensors").read_bytes() == b"new"


def test_hostile_keys_stay_inside(s3: tuple[str, Any], tmp_path: Path) -> None:
    url, client = s3
    client.put_object(Bucket="models", Key="bad/../../escape.json", Body=b"x")
    client.put_object(Bucket="models", Key="bad//etc/x.json", Body=b"x")
    put(client, "bad", model__safetensors=b"w")
    directory = resolve(spec("s3://models/bad", s3_endpoint_url=url))
    assert directory is not None
    assert [p.name for p in directory.rglob("*")] == ["model.safetensors"]
    assert not list(tmp_path.rglob("escape.json"))


@pytest.mark.parametrize(
    ("source", "kind", "says"),
    [
        ("s3://models/nothing", NotFound, "nothing there"),
        ("s3://no-such-bucket/x", NotFound, "NoSuchBucket"),
    ],
)
def test_what_is_not_there_is_named(
    s3: tuple[str, Any], source: str, kind: type[NearfieldError], says: str
) -> None:
    with pytest.raises(kind, match=says):
        resolve(spec(source, s3_endpoint_url=s3[0]))


def test_a_pickle_in_a_bucket_is_refused_and_not_fetched(s3: tuple[str, Any]) -> None:
    url, client = s3
    put(client, "pickled", model__pt=b"\x80\x04evil")
    with pytest.raises(BadRequest, match=r"model\.pt"):
        resolve(spec("s3://models/pickled", s3_endpoint_url=url))


def test_an_unreachable_store_says_what_to_check() -> None:
    with pytest.raises(Unavailable, match="s3_endpoint_url"):
        resolve(spec("s3://models/x", s3_endpoint_url="http://127.0.0.1:9"))


# ---- the hub: in a process of its own, because its client reads the environment once ----------

RESOLVE = """
import sys
from nearfield.core.errors import NearfieldError
from nearfield.core.spec import ModelSpec
from nearfield.weights import resolve
for source in sys.argv[1:]:
    try:
        print(resolve(ModelSpec(model="m", engine="embed", source=source)))
    except NearfieldError as error:
        print(type(error).__name__, error)
"""


def from_hub(url: str, cache: Path, *sources: str) -> list[str]:
    environment = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"}
    run = subprocess.run(
        [sys.executable, "-c", RESOLVE, *sources],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_a_model_comes_from_the_hub_once_and_without_code(tmp_path: Path) -> None:
    files = {
        "model.safetensors": b"weights",
        "config.json": b"{}",
        "onnx/model.onnx": b"graph",
        "modeling.py": b"evil()",
        "pytorch_model.bin": b"pickle",
    }
    with hub({"org/small@main": files, "org/small@v2": files}) as (url, asked):
        first, pinned, absent = from_hub(
            url, tmp_path, "hf://org/small", "hf://org/small@v2", "hf://org/none"
        )
    assert first == pinned
    assert "NotFound source hf://org/none" in absent
    assert "HF_TOKEN" in absent
    fetched = {str(f.relative_to(first)) for f in Path(first).rglob("*") if f.is_file()}
    assert fetched == {"model.safetensors", "config.json", "onnx/model.onnx"}
    assert (Path(first) / "model.safetensors").read_bytes() == b"weights"
    assert sum("GET /org/small/resolve" in line for line in asked) == len(fetched)
    # The hub is gone: what was fetched still serves, what was not says what to check.
    again, unreachable = from_hub(url, tmp_path, "hf://org/small", "hf://org/other")
    assert again == first
    assert "Unavailable source hf://org/other" in unreachable
    assert "HF_ENDPOINT" in unreachable
