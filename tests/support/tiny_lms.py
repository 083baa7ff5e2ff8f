"""Small causal LMs with random weights and a byte-level vocabulary, made in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

CHAT_TEMPLATE = (
    "{% for tool in tools or [] %}<tool_call>{{ tool.function.name }}{% endfor %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIALS = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
VOCAB_SIZE = 264

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "head_dim": 16},
    "mistral": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": None},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "phi": {},
    "gpt_neox": {},
    "olmo2": {"num_key_value_heads": 2},
}
"""Architectures by transformers' model type; the first four take the fused decoder."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_lm(directory: Path, kind: str = "llama", *, context: int = 512) -> PreTrainedModel:
    """Save a two-layer LM of this kind to `directory`; returns it as transformers loads it.

    Weights are spread wide, so that greedy output is not one token for ever.
    """
    torch.manual_seed(7)
    config = AutoConfig.for_model(
        kind,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=context,
        initializer_range=0.5,
        bos_token_id=None,
        pad_token_id=256,
        eos_token_id=256,
        **SHAPES[kind],
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return model
