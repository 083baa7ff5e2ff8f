"""Engine generate: equal to transformers token for token, whatever the company in the batch."""

from __future__ import annotations

import itertools
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from nearfield.api.events import (
    Completed,
    Constraint,
    Failed,
    GenerateRequest,
    Sampling,
    Text,
)
from nearfield.core.errors import BadRequest, DeadlineExceeded, EngineFailed
from nearfield.serving.engines.generate import GenerateEngine
from nearfield.serving.engines.grammar import GrammarCompiler
from transformers import PreTrainedModel

from tests.support.engines import Driver, text_of
from tests.support.tiny_lms import SHAPES, byte_tokenizer, make_lm

PROMPTS = ["x", "What is 47 + 85?", "zürich is a nice city, " * 9, "hello world, hello"]
GREEDY = Sampling(temperature=0, max_tokens=24)


class Loaded:
    def __init__(self, directory: Path, kind: str, **engine: Any) -> None:
        self.reference: PreTrainedModel = make_lm(directory, kind)
        self.engine = GenerateEngine()
        self.driver = Driver(self.engine)
        spec = {"engine": {"kind": "generate", "max_batch": 8, **engine}}
        self.driver.load({"source": f"file://{directory}", **spec}, directory)

    def expected(self, prompt: str, max_tokens: int) -> str:
        """Greedy text by transformers' own generate."""
        ids = torch.tensor([self.engine.text.encode(prompt, special=True)])
        out = self.reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
        )
        new = [t for t in out[0, ids.shape[1] :].tolist() if t != 256]
        # Our detokeniser is incremental; through ours, so that only tokens are compared.
        stream = self.engine.text.decoder()
        text, unread = "", []
        for token in new:
            piece = self.engine.text.step(stream, token)
            text += piece
            unread = [] if piece else [*unread, token]
        return text + self.engine.text.tokenizer.decode(unread)


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    loaded = Loaded(tmp_path_factory.mktemp("lm"), "llama", prefill_chunk_tokens=64)
    yield loaded
    loaded.engine.close()


@pytest.mark.parametrize("kind", SHAPES)
def test_greedy_equals_transformers(kind: str, tmp_path: Path) -> None:
    loaded = Loaded(tmp_path, kind, prefill_chunk_tokens=64)
    decoder = type(loaded.engine.decoder).__name__
    fused = kind in {"llama", "mistral", "qwen2", "qwen3"}
    assert decoder == ("FusedDecoder" if fused else "ModuleDecoder")
    for i, prompt in enumerate(PROMPTS):
        loaded.engine.submit(f"{i}", GenerateRequest(prompt=prompt, sampling=GREEDY))
    for i, prompt in enumerate(PROMPTS):
        assert text_of(loaded.driver.wait(f"{i}")) == loaded.expected(prompt, 24), prompt
    loaded.engine.close()


def test_joining_and_leaving_a_running_batch_changes_nobody(lm: Loaded) -> None:
    """More requests than rows, of every length, arriving while others run or are cancelled."""
    wanted: dict[str, tuple[str, int]] = {}
    lengths = itertools.cycle([1, 5, 40, 13, 90])
    for i in range(40):
        prompt, max_tokens = PROMPTS[i % len(PROMPTS)] + str(i), next(lengths)
        request = GenerateRequest(
            prompt=prompt, sampling=Sampling(temperature=0, max_tokens=max_tokens)
        )
        lm.engine.submit(f"churn-{i}", request)
        if i % 7 == 3:
            lm.engine.cancel(f"churn-{i}")
        else:
            wanted[f"churn-{i}"] = (prompt, max_tokens)
        if i % 10 == 9:
            lm.driver.wait(list(wanted)[-1])
    for request_id, (prompt, max_tokens) in wanted.items():
        assert text_of(lm.driver.wait(request_id)) == lm.expected(prompt, max_tokens), request_id
    assert lm.engine.stats().running == lm.engine.stats().waiting == 0
    assert lm.engine.stats().kv_used == 0


def test_prompts_half_computed_change_nobody(tmp_path: Path) -> None:
    """Documents of three flows in chunks, questions and several choices between them."""
    loaded = Loaded(tmp_path, "llama", prefill_chunk_tokens=32, max_batch=16)
    draw = random.Random(5)
    wanted: dict[str, tuple[str, int, int]] = {}
    for i in range(60):
        prompt = f"{i} " + "lorem ipsum " * draw.choice([0, 1, 2, 9, 17])
        n, max_tokens = draw.choice([1, 1, 1, 3]), draw.choice([1, 4, 20])
        sampling = Sampling(temperature=0, max_tokens=max_tokens)
        request = GenerateRequest(prompt=prompt, sampling=sampling, n=n, flow=draw.choice("abc"))
        loaded.engine.submit(f"{i}", request)
        if draw.random() < 0.15:
            loaded.engine.cancel(f"{i}")
        else:
            wanted[f"{i}"] = (prompt, max_tokens, n)
        if i % 15 == 14:
            loaded.driver.wait(list(wanted)[-1])
    for request_id, (prompt, max_tokens, n) in wanted.items():
        events = loaded.driver.wait(request_id)
        for choice in range(n):
            assert text_of(events, choice) == loaded.expected(prompt, max_tokens), request_id
    stats = loaded.engine.stats()
    assert (stats.running, stats.waiting, stats.kv_used) == (0, 0, 0)
    loaded.engine.close()


def test_a_document_does_not_keep_anothers_question_waiting(lm: Loaded) -> None:
    document = GenerateRequest(prompt="z" * 400, sampling=GREEDY, flow="reports")
    question = GenerateRequest(prompt="why?", sampling=GREEDY, flow="chat")
    lm.engine.submit("held", GenerateRequest(prompt="x", sampling=GREEDY))  # a turn under way
    for name in ("document", "next document"):
        lm.engine.submit(name, document)
    lm.engine.submit("question", question)
    ends = {name: lm.driver.wait(name)[-1] for name in ("document", "next document", "question")}
    began = {}
    for name, end in ends.items():
        assert isinstance(end, Completed)
        at = end.timings
        began[name] = at.started_s + at.queue_s + at.prefill_s
    assert began["question"] < began["document"] < began["next document"]


def test_kv_cache_stays_within_its_budget_and_queues_the_rest(tmp_path: Path) -> None:
    loaded = Loaded(tmp_path, "llama", kv_cache_tokens=512)
    slab = loaded.engine.decoder.slab
    most = 0
    for i in range(12):
        request = GenerateRequest(
            prompt="a" * 60, sampling=Sampling(temperature=0, max_tokens=60, ignore_eos=True)
        )
        loaded.engine.submit(f"{i}", request)
    while not all(loaded.driver.events.get(f"{i}", [None])[-1:] for i in range(12)):
        most = max(most, loaded.engine.stats().kv_used)
    for i in range(12):
        end = loaded.driver.wait(f"{i}")[-1]
        assert isinstance(end, Completed)
        assert end.completion_tokens == 60
        assert end.timings.batch_size <= 4  # 512 tokens are 4 rows of 128
    assert most <= slab.kv_tokens == 512
    per_token = 2 * 2 * 16 * 4  # keys and values x 2 heads x 16 floats
    sizes = [layer.untyped_storage().nbytes() for layer in slab.layers]
    assert sizes == [512 * per_token] * 2
    loaded.engine.close()


def test_seeded_sampling_is_the_same_in_any_company(lm: Loaded) -> None:
    sampling = Sampling(
        max_tokens=30, temperature=1.1, top_p=0.9, top_k=50, min_p=0.01, seed=5, logprobs=3
    )
    request = GenerateRequest(prompt="hello", n=3, sampling=sampling)
    alone = [e for e in lm.driver.run(request, "alone") if isinstance(e, Text)]
    for i in range(4):
        lm.engine.submit(f"noise-{i}", GenerateRequest(prompt="n" * (i + 1)))
    company = [e for e in lm.driver.run(request, "company") if isinstance(e, Text)]
    for choice in range(3):
        assert text_of(alone, choice) == text_of(company, choice)
    assert len({text_of(alone, choice) for choice in range(3)}) > 1
    other = lm.driver.run(
        GenerateRequest(prompt="hello", sampling=Sampling(max_tokens=30, seed=6)), "other"
    )
    assert text_of(other) != text_of(alone)


def test_logprobs_are_the_models_own(lm: Loaded) -> None:
    events = lm.driver.run(
        GenerateRequest(prompt="abc", sampling=Sampling(temperature=0, max_tokens=1, logprobs=4))
    )
    token = next(e.logprobs for e in events if isinstance(e, Text) and e.logprobs)[0]
    ids = torch.tensor([lm.engine.text.encode("abc", special=True)])
    with torch.inference_mode():
        expected = torch.log_softmax(lm.reference(ids).logits[0, -1], -1)
    values, _ = expected.topk(4)
    assert token.logprob == pytest.approx(values[0].item(), abs=1e-4)
    assert [t[2] for t in token.top] == pytest.approx(values.tolist(), abs=1e-4)
    assert all(math.isfinite(t[2]) for t in token.top)


def test_stop_strings_end_and_are_not_shown(lm: Loaded) -> None:
    whole = lm.expected("hello", 40)
    stop = whole[7:10]
    request = GenerateRequest(
        prompt="hello", sampling=Sampling(temperature=0, max_tokens=40, stop=(stop, "never"))
    )
    events = lm.driver.run(request)
    last = [e for e in events if isinstance(e, Text)][-1]
    assert text_of(events) == whole[: whole.index(stop)]
    assert (last.finish_reason, last.stop_reason) == ("stop", stop)


def test_length_and_usage(lm: Loaded) -> None:
    request = GenerateRequest(
        prompt="hello", n=2, sampling=Sampling(max_tokens=9, seed=1, ignore_eos=True)
    )
    events = lm.driver.run(request)
    end = events[-1]
    assert isinstance(end, Completed)
    assert (end.prompt_tokens, end.completion_tokens) == (5, 18)
    reasons = [e.finish_reason for e in events if isinstance(e, Text) and e.finish_reason]
    assert reasons == ["length", "length"]
    tokens = sum(e.tokens for e in events if isinstance(e, Text))
    assert tokens == 18
    assert end.timings.queue_s >= 0
    assert end.timings.prefill_s > 0


def test_penalties_change_what_is_chosen(lm: Loaded) -> None:
    def tokens(**penalties: float) -> str:
        sampling = Sampling(temperature=0, max_tokens=60, ignore_eos=True, **penalties)
        return text_of(lm.driver.run(GenerateRequest(prompt="aaaa", sampling=sampling)))

    plain = tokens()
    for penalty in (
        {"presence_penalty": 2.0},
        {"frequency_penalty": 2.0},
        {"repetition_penalty": 3.0},
    ):
        assert tokens(**penalty) != plain, penalty


SCHEMA = {
    "type": "object",
    "properties": {"unit": {"enum": ["km", "mile"]}, "n": {"type": "integer", "maximum": 99}},
    "required": ["unit", "n"],
    "additionalProperties": False,
}


def test_json_schema_output_is_valid_whatever_the_weights_say(lm: Loaded) -> None:
    request = GenerateRequest(
        prompt="x",
        n=3,
        sampling=Sampling(max_tokens=200, seed=3),
        constraint=Constraint("json_schema", SCHEMA),
    )
    events = lm.driver.run(request)
    for choice in range(3):
        jsonschema.validate(json.loads(text_of(events, choice)), SCHEMA)


@pytest.mark.parametrize("space", [" ", "\n", "\t"])
def test_whitespace_between_tokens_of_json_is_bounded(lm: Loaded, space: str) -> None:
    """A model that is lost likes nothing more."""
    text = lm.engine.text
    matcher = GrammarCompiler(text, text.vocab_size, None).start(Constraint("json_schema", SCHEMA))
    for token in text.encode("{\n", special=False):
        matcher.accept(token)
    (token,) = text.encode(space, special=False)
    for _ in range(40):
        scores = torch.zeros(text.vocab_size)
        matcher.mask(scores)
        if scores[token] < 0:
            return
        matcher.accept(token)
    raise AssertionError("it could go on for ever")


def test_a_schema_that_cannot_be_compiled_is_the_callers_error(lm: Loaded) -> None:
    constraint = Constraint("json_schema", {"type": "object", "properties": {"a": {"type": "?"}}})
    error = lm.driver.refused(GenerateRequest(prompt="x", constraint=constraint))
    assert isinstance(error, BadRequest)
    assert error.param == "response_format"


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (GenerateRequest(prompt="a" * 600), "prompt"),
        (GenerateRequest(prompt=""), "prompt"),
        (GenerateRequest(prompt="a", sampling=Sampling(max_tokens=512)), "max_tokens"),
        (GenerateRequest(prompt_tokens=(5, 99999)), "prompt"),
        (GenerateRequest(prompt="a", n=9), "n"),
        (GenerateRequest(messages=({"role": "user", "content": "a" * 600},)), "messages"),
    ],
)
def test_bad_requests_name_the_field(lm: Loaded, request_: GenerateRequest, param: str) -> None:
    error = lm.driver.refused(request_)
    assert isinstance(error, BadRequest)
    assert error.param == param


def test_deadline_ends_a_running_and_a_waiting_request(lm: Loaded) -> None:
    long = Sampling(max_tokens=400, ignore_eos=True)
    past = GenerateRequest(prompt="x", sampling=long, deadline_s=time.monotonic() - 1)
    assert isinstance(lm.driver.refused(past), DeadlineExceeded)
    soon = GenerateRequest(prompt="x", sampling=long, deadline_s=time.monotonic() + 0.05)
    assert isinstance(lm.driver.refused(soon, "soon"), DeadlineExceeded)
    assert len(lm.driver.events["soon"]) > 1


def test_cancelled_requests_say_nothing_more(lm: Loaded) -> None:
    request = GenerateRequest(prompt="x", sampling=Sampling(max_tokens=400, ignore_eos=True))
    lm.engine.submit("gone", request)
    lm.driver.wait("gone", count=3)
    lm.engine.cancel("gone")
    lm.driver.run(GenerateRequest(prompt="y", sampling=GREEDY), "after")
    seen = len(lm.driver.events["gone"])
    lm.driver.run(GenerateRequest(prompt="z", sampling=GREEDY), "later")
    assert len(lm.driver.events["gone"]) == seen
    assert not lm.driver.events["gone"][-1].terminal
    assert lm.engine.stats().running == 0


def test_a_failing_step_fails_its_batch_and_the_engine_goes_on(
    lm: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = lm.engine.decoder.forward
    calls = itertools.count()

    def broken(*args: Any) -> torch.Tensor:
        if next(calls) == 3:
            raise RuntimeError("a kernel gave up")
        return forward(*args)

    monkeypatch.setattr(lm.engine.decoder, "forward", broken)
    request = GenerateRequest(prompt="x", sampling=Sampling(max_tokens=50, ignore_eos=True))
    error = lm.driver.refused(request)
    assert isinstance(error, EngineFailed)
    assert "kernel" not in error.message
    assert text_of(lm.driver.run(GenerateRequest(prompt="x", sampling=GREEDY), "ok"))


@pytest.mark.parametrize(
    "spec",
    [
        {"dtype": "bfloat16"},
        {"dtype": "float16"},
        {"engine": {"kind": "generate", "quantization": "int8"}},
    ],
)
@pytest.mark.parametrize("kind", ["llama", "olmo2"])
def test_other_precisions_stay_close(kind: str, spec: dict[str, Any], tmp_path: Path) -> None:
    reference = make_lm(tmp_path, kind)
    engine = GenerateEngine()
    driver = Driver(engine)
    driver.load({"source": f"file://{tmp_path}", "engine": "generate", **spec}, tmp_path)
    sampling = Sampling(temperature=0, max_tokens=1, logprobs=20)
    events = driver.run(GenerateRequest(prompt="abc", sampling=sampling))
    top = next(e.logprobs for e in events if isinstance(e, Text) and e.logprobs)[0].top
    ids = torch.tensor([engine.text.encode("abc", special=True)])
    with torch.inference_mode():
        expected = torch.log_softmax(reference(ids).logits[0, -1], -1).topk(20).values
    # Random weights spread wide: a loose bound still tells a rounding from a wrong matrix.
    assert top[0][2] == pytest.approx(expected[0].item(), abs=0.35)
    engine.close()


def test_wrong_checkpoints_are_refused_with_a_reason(tmp_path: Path) -> None:
    engine = GenerateEngine()
    with pytest.raises(BadRequest, match=r"tokenizer\.json"):
        Driver(engine).load({"source": f"file://{tmp_path}", "engine": "generate"}, tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(BadRequest, match=r"config\.json"):
        Driver(engine).load({"source": f"file://{tmp_path}", "engine": "generate"}, tmp_path)
    make_lm(tmp_path, "llama")
    (tmp_path / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(BadRequest, match="cannot be loaded"):
        Driver(engine).load({"source": f"file://{tmp_path}", "engine": "generate"}, tmp_path)
    section = {"kind": "generate", "max_model_len": 4096}
    with pytest.raises(BadRequest, match="max_model_len"):
        Driver(engine).load({"source": f"file://{tmp_path}", "engine": section}, tmp_path)


def test_no_event_follows_a_terminal_one(lm: Loaded) -> None:
    for events in lm.driver.events.values():
        assert [e.terminal for e in events[:-1]] == [False] * (len(events) - 1)
        assert not any(isinstance(e, Failed) for e in events[:-1])
