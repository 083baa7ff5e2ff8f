"""What clients get from the gateways of a federation: through each of them, in every protocol."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import tritonclient.grpc
import tritonclient.http
from nearfield.cli.members import Member
from nearfield.cli.region import Region

from tests.multiregion.conftest import MODEL, REGIONS, Fleet
from tests.support.processes import until
from tests.support.terminal import run, run_json


@pytest.fixture(params=REGIONS)
def member(request: pytest.FixtureRequest, fleet: Fleet) -> Member:
    """Each region with its gateway, once its gateway sees both regions and the new keys."""
    found = fleet.federation[request.param]
    until(lambda: found.knows(REGIONS, key=fleet.keys["platform"]), 15.0)
    until(lambda: _models(found, fleet).is_success, 15.0)
    return found


def _models(member: Member, fleet: Fleet) -> httpx.Response:
    return httpx.get(f"{member.gateway_url}/v1/models", headers=fleet.headers())


@pytest.fixture
def client(member: Member, fleet: Fleet) -> Iterator[openai.OpenAI]:
    made = openai.OpenAI(
        base_url=f"{member.gateway_url}/v1", api_key=fleet.keys["free"], max_retries=0
    )
    with made:
        yield made


def say(words: str) -> list[Any]:
    return [{"role": "user", "content": words}]


def test_openai(client: openai.OpenAI, member: Member) -> None:
    assert MODEL in [model.id for model in client.models.list()]
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=say("say:hello"))
    assert raw.parse().choices[0].message.content == "hello"
    region = raw.headers["x-nearfield-region"]
    assert region in REGIONS, "either: on one machine they are equally near"
    assert raw.headers["x-nearfield-endpoint"].startswith(f"{region}/{MODEL}")
    assert raw.headers["x-nearfield-reason"]
    assert raw.headers["x-request-id"]
    vectors = client.embeddings.create(model=MODEL, input=["four"], encoding_format="float")
    assert vectors.data[0].embedding == [4.0, 1.0, 2.0]
    with pytest.raises(openai.NotFoundError) as raised:
        client.chat.completions.create(model="nowhere", messages=say("say:hello"))
    assert raised.value.code == "model_not_found"


def test_openai_streams_without_buffering(client: openai.OpenAI) -> None:
    pieces, at_s = [], []
    stream = client.chat.completions.create(
        model=MODEL, messages=say("say:one sleep:0.4 say:two"), stream=True
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            pieces.append(chunk.choices[0].delta.content)
            at_s.append(time.monotonic())
    assert pieces == ["one", "two"]
    assert at_s[1] - at_s[0] > 0.2, "the first came while the second was not there yet"


def test_triton_over_http(member: Member, fleet: Fleet) -> None:
    authority = member.gateway_url.removeprefix("http://")
    given, headers = np.array([[1, 2], [3, 4]], np.float32), fleet.headers()
    with tritonclient.http.InferenceServerClient(authority) as client:
        assert client.is_server_live(headers=headers)
        assert client.is_server_ready(headers=headers)
        assert client.is_model_ready(MODEL, headers=headers)
        assert client.get_server_metadata(headers=headers)["name"] == "nearfield"
        metadata = client.get_model_metadata(MODEL, headers=headers)
        assert [each["name"] for each in metadata["inputs"]] == ["x"]
        tensor = tritonclient.http.InferInput("x", given.shape, "FP32")
        tensor.set_data_from_numpy(given)
        answer = client.infer(MODEL, [tensor], headers=headers)
        assert answer.as_numpy("sum").tolist() == [3.0, 7.0]


def test_triton_over_grpc(member: Member, fleet: Fleet) -> None:
    given, headers = np.array([[1, 2], [3, 4]], np.float32), fleet.headers()
    with tritonclient.grpc.InferenceServerClient(member.grpc) as client:
        assert client.is_server_live(headers=headers)
        assert client.is_server_ready(headers=headers)
        assert client.is_model_ready(MODEL, headers=headers)
        assert client.get_server_metadata(headers=headers).name == "nearfield"
        metadata = client.get_model_metadata(MODEL, headers=headers)
        assert [each.name for each in metadata.inputs] == ["x"]
        tensor = tritonclient.grpc.InferInput("x", given.shape, "FP32")
        tensor.set_data_from_numpy(given)
        answer = client.infer(MODEL, [tensor], headers=headers)
        assert answer.as_numpy("sum").tolist() == [3.0, 7.0]


def test_http2(member: Member, fleet: Fleet) -> None:
    with httpx.Client(http1=False, http2=True, headers=fleet.headers()) as client:
        body = {"model": MODEL, "prompt": "say:two"}
        answer = client.post(f"{member.gateway_url}/v1/completions", json=body)
    assert (answer.http_version, answer.status_code) == ("HTTP/2", 200)
    assert answer.json()["choices"][0]["text"] == "two"


@pytest.mark.parametrize("law", ["eu", "us"])
def test_data_stay_where_their_law_holds(member: Member, fleet: Fleet, law: str) -> None:
    answer = httpx.post(
        f"{member.gateway_url}/v1/completions",
        json={"model": MODEL, "prompt": "say:here"},
        headers=fleet.headers(law),
    )
    assert answer.status_code == 200, answer.text
    assert fleet.federation[answer.headers["x-nearfield-region"]].jurisdiction == law


def test_nobody_without_a_key_nor_past_the_gateway(member: Member, fleet: Fleet) -> None:
    body = {"model": MODEL, "prompt": "say:no"}
    refused = httpx.post(f"{member.gateway_url}/v1/completions", json=body)
    assert refused.status_code == 401
    region = member.region
    assert isinstance(region, Region)
    url = region.url_of(f"/{MODEL}")
    refused = httpx.post(f"{url}/v1/completions", json=body, headers=fleet.headers())
    assert refused.status_code == 401
    assert refused.json()["error"]["code"] == "passport_missing"
    assert httpx.get(f"{region.base_url}/-/nearfield/targets").status_code == 401


def test_console_and_metrics(member: Member, fleet: Fleet) -> None:
    page = httpx.get(f"{member.gateway_url}/console")
    assert page.status_code == 200
    assert "<html" in page.text
    url = f"{member.gateway_url}/console/data/state"
    assert httpx.get(url).status_code == 401
    assert httpx.get(url, headers=fleet.headers("platform")).status_code == 200
    url = f"{member.gateway_url}/metrics"
    assert httpx.get(url, headers=fleet.headers()).status_code == 403
    metrics = httpx.get(url, headers=fleet.headers("platform"))
    assert metrics.status_code == 200
    assert "gen_ai_" in metrics.text


def test_status(member: Member, fleet: Fleet) -> None:
    told = run_json(fleet.home, "status")["federation"]
    (about,) = [each for each in told["regions"] if each["name"] == member.name]
    assert (about["state"], about["gateway"]["state"]) == ("running", "running")
    assert about["gateway"]["endpoint"] == member.gateway_url
    assert MODEL in [model["model"] for model in about["models"]]
    assert 0 < about["gateway"]["memory_bytes"] < about["memory_bytes"]
    one = run(fleet.home, "status", "--region", member.name)
    assert one.returncode == 0, one.stderr
    assert f"Gateway at {member.gateway_url}" in one.stdout
    models = run(fleet.home, "models")
    assert models.returncode == 1
    assert "name one: --region eu-west or us-east" in models.stderr


def test_up_tells_how_to_begin(fleet: Fleet) -> None:
    assert "nearfield tenants create acme" in fleet.up.text
    assert "nearfield keys create --tenant acme" in fleet.up.text
    for member in fleet.federation:
        assert f"{member.gateway_url}/console" in fleet.up.text
