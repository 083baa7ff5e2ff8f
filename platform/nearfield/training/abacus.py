"""Makes builtin://abacus, the language model that ships with nearfield.

    python -m nearfield.training.abacus --out DIRECTORY

A Llama of 1.6 M parameters over bytes, trained from nothing on generated questions
(`abacus_questions`), evaluated on facts it never saw. One CPU core needs about half an hour.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nearfield.training.abacus_questions import (
    Question,
    any_tool,
    held_out_questions,
    training_questions,
)

if TYPE_CHECKING:
    from torch import Tensor

SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
PAD, END, SYSTEM, USER, ASSISTANT, TOOL = range(256, 262)
VOCAB_SIZE = 264  # 256 bytes and the special tokens, rounded up
CONTEXT = 2048

CHAT_TEMPLATE = """\
{%- for tool in tools or [] -%}
<|tool|>{{ tool.function.name }}(
{%- set parameters = tool.function.parameters or {} -%}
{{- (parameters.required or parameters.properties) | join(', ') -}}
)<|end|>
{%- endfor -%}
{%- for message in messages -%}
<|{{ 'system' if message.role == 'developer' else message.role }}|>
{%- if message.content is string -%}
{{ message.content }}
{%- elif message.content -%}
{%- for part in message.content -%}{{ part.text }}{%- endfor -%}
{%- endif -%}
{%- for call in message.tool_calls or [] -%}
{%- set arguments = call.function.arguments -%}
<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ '' -}}
{{- arguments if arguments is string else arguments | tojson -}}
}</tool_call>
{%- endfor -%}
<|end|>
{%- endfor -%}
{%- if add_generation_prompt -%}
<|assistant|>
{%- endif -%}
"""

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "Be brief.",
    "You are abacus.",
    "Answer with the result only.",
)


def make_tokenizer() -> Any:
    """A byte-level tokenizer without merges (any text round-trips), as transformers has them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=192,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=32,
            intermediate_size=512,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=END,
            pad_token_id=PAD,
        )
    )


class Encoder:
    """Conversations to token ids as the chat template renders them, without rendering."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer.backend_tokenizer

    def text(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def prompt(self, question: Question) -> list[int]:
        """Tools, the question, and the token that asks for an answer."""
        return [*self.tools(question.tools), *self.asked(question)]

    def asked(self, question: Question) -> list[int]:
        ids = [USER, *self.text(question.question), END, ASSISTANT]
        if question.call:
            ids += [*self.text(question.call), END, TOOL, *self.text(question.result), END]
            ids.append(ASSISTANT)
        return ids

    def tools(self, tools: Sequence[dict[str, Any]]) -> list[int]:
        ids: list[int] = []
        for function in {t["function"]["name"]: t["function"] for t in tools}.values():
            properties = ", ".join(function["parameters"]["properties"])
            ids += [TOOL, *self.text(f"{function['name']}({properties})"), END]
        return ids

    def example(
        self, questions: Sequence[Question], rng: random.Random
    ) -> tuple[list[int], list[bool]]:
        """A conversation's ids, and which of them are the model's to say."""
        ids = self.tools([tool for question in questions for tool in question.tools])
        if rng.random() < 0.1:
            ids += [SYSTEM, *self.text(rng.choice(SYSTEM_PROMPTS)), END]
        own = [False] * len(ids)
        for question in questions:
            asked = self.asked(question)
            answer = [*self.text(question.answer), END]
            ids += asked + answer
            own += [False] * len(asked) + [True] * len(answer)
        return ids, own


def batches(encoder: Encoder, seed: int, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (ids, targets) of [examples, width] with examples x width <= `tokens`.

    Targets are -100 where the model has nothing to learn. Examples of like length share a batch.
    """
    import torch

    rng = random.Random(seed)
    stream = training_questions(rng)

    def conversation() -> list[Question]:
        turns = [next(stream) for _ in range(1 if rng.random() < 0.85 else rng.randrange(2, 4))]
        if not any(turn.tools for turn in turns) and rng.random() < 0.03:
            turns[0] = turns[0].with_tools(any_tool(rng))  # tools offered, none needed
        return turns

    while True:
        pool = [encoder.example(conversation(), rng) for _ in range(2048)]
        pool.sort(key=lambda example: len(example[0]) + rng.random())
        groups: list[list[tuple[list[int], list[bool]]]] = [[]]
        for example in pool:
            if len(example[0]) * (len(groups[-1]) + 1) > tokens:
                groups.append([])
            groups[-1].append(example)
        rng.shuffle(groups)
        for group in groups:
            width = max(len(ids) for ids, _ in group)
            inputs = torch.full((len(group), width), PAD)
            targets = torch.full((len(group), width), -100)
            for row, (ids, own) in enumerate(group):
                line, mask = torch.tensor(ids), torch.tensor(own)
                inputs[row, : len(ids)] = line
                targets[row, : len(ids)] = line.where(mask, -100)
            yield inputs, targets


def accuracy(
    model: Any, tokenizer: Any, questions: Sequence[Question]
) -> tuple[dict[str, float], list[tuple[Question, str]]]:
    """Share of exact greedy answers by family and under "all", and the wrong ones."""
    import torch

    encoder = Encoder(tokenizer)
    groups: dict[int, list[tuple[Question, list[int]]]] = {}
    for question in questions:
        prompt = encoder.prompt(question)
        groups.setdefault(len(prompt), []).append((question, prompt))
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    wrong: list[tuple[Question, str]] = []
    for length, group in groups.items():
        ids = torch.tensor([prompt for _, prompt in group])
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=160, do_sample=False
            )
        texts = tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
        for (question, _), text in zip(group, texts, strict=True):
            for family in (question.family, "all"):
                asked[family] += 1
                right[family] += text == question.answer
            if text != question.answer:
                wrong.append((question, text))
    return {family: right[family] / asked[family] for family in sorted(asked)}, wrong


def train(*, steps: int, tokens: int, learning_rate: float, seed: int) -> tuple[Any, Any]:
    """Train from random weights: (model, tokenizer).

    Muon (K. Jordan et al., 2024) for the layers' matrices, AdamW for the rest; the rate is
    constant for 70 % of the steps and then falls linearly.
    """
    import torch
    import torch.nn.functional as F

    torch.manual_seed(seed)
    tokenizer, model = make_tokenizer(), make_model()
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    known = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in known]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(
            matrices, lr=learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    started_s, losses = time.monotonic(), 0.0
    stream = batches(Encoder(tokenizer), seed, tokens)
    for step in range(1, steps + 1):
        rate = learning_rate * min(1.0, step / 100, 0.02 + (1 - step / steps) / 0.3)
        for group in [group for o in optimizers for group in o.param_groups]:
            group["lr"] = rate
        inputs, targets = next(stream)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(inputs).last_hidden_state
            learned = targets[:, 1:] != -100
            logits = F.linear(hidden[:, :-1][learned], model.lm_head.weight)
        loss = F.cross_entropy(logits.float(), targets[:, 1:][learned])
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        losses += loss.item()
        if step % 50 == 0:
            spent_s = time.monotonic() - started_s
            left_s = spent_s / step * (steps - step)
            print(
                f"\rstep {step}/{steps}  loss {losses / 50:.4f}  {spent_s / 60:.0f} min spent, "
                f"{left_s / 60:.0f} min left ",
                end="",
                file=sys.stderr,
                flush=True,
            )
            losses = 0.0
        if step % 500 == 0:
            model.eval()
            scores, _ = accuracy(model, tokenizer, held_out_questions(300, seed=3))
            model.train()
            print("  exact:", *(f"{k} {v:.0%}" for k, v in scores.items()), file=sys.stderr)
    print(file=sys.stderr)
    return model.eval(), tokenizer


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train builtin://abacus and measure it.")
    parser.add_argument("--out", type=Path, required=True, help="directory for the model")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens in a batch")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    args = parser.parse_args(arguments)

    import torch

    torch.set_num_threads(args.threads)
    model, tokenizer = train(
        steps=args.steps, tokens=args.tokens, learning_rate=args.learning_rate, seed=args.seed
    )
    # Half the bytes; computing stays in float32. What ships is what is measured.
    model = model.to(torch.bfloat16).float()
    scores, wrong = accuracy(model, tokenizer, held_out_questions(3000, seed=2))
    for family, score in scores.items():
        print(f"{family:12} {score:.2%} exact on held-out questions")
    for question, answer in wrong[:10]:
        print(f"  {question.question!r}: {answer!r}, should be {question.answer!r}")
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


STEPS = 4000

if __name__ == "__main__":
    main()
