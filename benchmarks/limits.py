"""The limit of the machine: the same work in one process, with nothing around it, on one thread.

python -m benchmarks.limits embed|generate DATA > figures.json
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import workload

BATCHES = (1, 4, 8, 16, 32, 64)
RUNTIMES = ("torch", "compiled", "openvino", "onnx")  # torch first: the others must agree with it
FAITHFUL_COSINE = 0.9999
STREAMS = (1, 4, 16)
ANSWER_COLUMNS = 512


def embed(quick: bool) -> dict[str, float]:
    """Sentences/s of every runtime at every batch, sorted by length, tokenisation included."""
    import torch
    from nearfield.core.spec import EmbedEngine, ModelSpec
    from nearfield.serving.engines.embed_runtimes import EmbedModel, open_runtime
    from nearfield.serving.engines.text import load_tokenizer

    directory = workload.encoder_directory()
    tokenizer = load_tokenizer(directory)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    texts = workload.sentences()[: 128 if quick else 512]
    figures: dict[str, float] = {}
    reference: Any = None
    for name in RUNTIMES:
        runtime_name = "torch" if name == "compiled" else name
        engine = EmbedEngine.model_validate({"runtime": runtime_name})
        spec = ModelSpec(model="embed", engine=engine, source="builtin://minilm")
        runtime: Any = open_runtime(EmbedModel.read(directory, engine), spec, 1)
        if name == "compiled":
            if shutil.which("g++") is None:  # what torch.compile makes must be compiled
                continue
            runtime._module = torch.compile(runtime._module, dynamic=True)
        sample = [tokenizer.encode(text).ids for text in texts[:64]]
        vectors = np.concatenate([runtime.embed([row]) for row in sample])
        reference = vectors if reference is None else reference
        cosine = float((vectors * reference).sum(1).min())
        figures[f"{name}_cosine"] = cosine
        if cosine < FAITHFUL_COSINE:
            continue
        for batch in BATCHES:
            runtime.embed(sample[:batch])  # shapes are planned on their first use
            began_s = time.perf_counter()
            rows = sorted((tokenizer.encode(text).ids for text in texts), key=len)
            for at in range(0, len(rows), batch):
                runtime.embed(rows[at : at + batch])
            took_s = time.perf_counter() - began_s
            figures[f"{name}_batch_{batch}"] = len(texts) / took_s
        alone_ms = []
        for text in texts:
            began_s = time.perf_counter()
            runtime.embed([tokenizer.encode(text).ids])
            alone_ms.append(1000 * (time.perf_counter() - began_s))
        figures[f"{name}_alone_p50_ms"] = statistics.median(alone_ms)
    figures["rps"] = max(v for k, v in figures.items() if "_batch_" in k)
    figures["alone_p50_ms"] = min(v for k, v in figures.items() if k.endswith("_alone_p50_ms"))
    return figures


def generate(quick: bool, data: Path) -> dict[str, float]:
    """Tokens/s of a lean batched decode and of transformers' `generate`, prompts included."""
    import torch
    from nearfield.serving.engines.decoder import Span
    from nearfield.serving.engines.module_decoder import fused
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(data / "lm")
    model = AutoModelForCausalLM.from_pretrained(data / "lm", dtype=torch.float32).eval()
    decoder = fused(model, max(STREAMS) * ANSWER_COLUMNS, ANSWER_COLUMNS)
    decoder.slab.reshape(ANSWER_COLUMNS, 0, 0)
    chats = [[{"role": "user", "content": prompt}] for prompt in workload.prompts()]
    texts = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        for chat in chats
    ]
    prompts: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    answer = 40 if quick else workload.MAX_TOKENS

    def prefill(row: int, prompt: list[int]) -> int:
        last = torch.tensor([len(prompt) - 1])
        logits = decoder.forward(torch.tensor([prompt]), Span(row, 0, len(prompt)), last)
        return int(logits.argmax())

    def lean(rows: list[list[int]]) -> list[list[int]]:
        tokens = torch.tensor([prefill(row, prompt) for row, prompt in enumerate(rows)])
        start = torch.tensor([len(prompt) for prompt in rows])
        longest = max(map(len, rows))
        made = [tokens]
        for step in range(answer - 1):
            logits = decoder.forward(tokens[:, None], Span(0, start, longest + step + 1), None)
            tokens = logits.argmax(dim=-1)
            made.append(tokens)
            start = start + 1
        by_row: list[list[int]] = torch.stack(made, dim=1).tolist()
        return by_row

    def static(rows: list[list[int]]) -> list[list[int]]:
        width = max(map(len, rows))
        padded = [[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        out: list[list[int]] = model.generate(
            torch.tensor(padded),
            attention_mask=torch.tensor(mask),
            max_new_tokens=answer,
            min_new_tokens=answer,
            do_sample=False,
        )[:, width:].tolist()
        return out

    figures: dict[str, float] = {}
    with torch.inference_mode():
        for name, run in (("lean", lean), ("static", static)):
            for streams in STREAMS:
                figures[f"{name}_s{streams}_tokens_per_s"] = _tokens_per_s(
                    run, [prompts[at : at + streams] for at in range(0, 48, streams)], answer
                )
        wave = prompts[:16]
        pairs = zip(lean(wave), static(wave), strict=True)
        # Not asserted: a tie between two logits may fall either way in another order of sums.
        figures["equal_answers"] = sum(a == b for a, b in pairs) / len(wave)
        times_ms = []
        for prompt in prompts * 3:
            began_s = time.perf_counter()
            prefill(0, prompt)
            times_ms.append(1000 * (time.perf_counter() - began_s))
    figures["prefill_p50_ms"] = statistics.median(times_ms)
    for streams in STREAMS:
        figures[f"s{streams}_tokens_per_s"] = max(
            figures[f"{name}_s{streams}_tokens_per_s"] for name in ("lean", "static")
        )
    return figures


def _tokens_per_s(
    run: Callable[[list[list[int]]], list[list[int]]], waves: list[list[list[int]]], answer: int
) -> float:
    """The median over waves, after one to be warm; at most some seconds."""
    run(waves[0])
    rates: list[float] = []
    began_s = time.perf_counter()
    for wave in waves:
        wave_s = time.perf_counter()
        run(wave)
        rates.append(len(wave) * answer / (time.perf_counter() - wave_s))
        if time.perf_counter() - began_s > 3 and len(rates) >= 3:
            break
    return statistics.median(rates)


def main() -> None:
    suite, data, quick = sys.argv[1], Path(sys.argv[2]), "--quick" in sys.argv
    json.dump(embed(quick) if suite == "embed" else generate(quick, data), sys.stdout)


if __name__ == "__main__":
    main()
