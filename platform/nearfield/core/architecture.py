"""What of a transformer decides how fast it can be: sizes, from its `config.json`.

    architecture_of("chat", json.loads(config))

Sizes are counted from the shapes that the configuration implies, as the checkpoint holds them;
norms and biases, less than a thousandth, are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

DEFAULT_CONTEXT = 4096
"""Tokens, where a configuration does not say how long a context may be."""

ENCODERS = ("bert", "roberta", "xlm-roberta", "mpnet", "distilbert", "nomic_bert")
"""Values of `model_type` whose models embed and do not generate."""


class UnknownArchitecture(ValueError):
    """A configuration that does not describe a transformer this can count.

    Attributes:
        field: what is missing or unfit in it.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True, slots=True)
class Architecture:
    """A transformer in numbers. Sizes in elements, not bytes: a precision makes bytes of them.

    Attributes:
        parameters: all of them.
        dense: multiplied with every token: attention, dense feed-forward, shared experts, head.
        expert: of one routed expert in one layer. experts: how many such a layer has, 0 if none.
        experts_active: how many of them one token goes through. expert_layers: layers with them.
        head: the output projection, part of `dense`. lookup: the input embedding, of which a token
            reads one row; 0 where it is the head's own.
        heads: of attention: tensor parallelism splits them evenly.
        kv_width: elements that one token keeps per layer in the cache.
        kv_shards: over how many chips a layer's cache can be split.
        attention_width: multiplications of one query with one cached token, per layer.
        window: tokens that windowed layers look back; None if there are none.
    """

    name: str
    task: Literal["generate", "embed"]
    parameters: float
    dense: float
    expert: float
    experts: int
    experts_active: int
    expert_layers: int
    head: float
    lookup: float
    layers: int
    hidden: int
    heads: int
    kv_width: float
    kv_shards: int
    attention_width: float
    context: int
    window: int | None = None
    windowed_layers: int = 0

    @property
    def active(self) -> float:
        """Parameters that one token is multiplied with."""
        return self.dense + self.expert * self.experts_active * self.expert_layers

    def touched(self, tokens: float) -> float:
        """Parameters read when so many tokens go through at once.

        Experts are taken to be chosen evenly: of E, each token draws k.
        """
        if not self.experts:
            return self.dense
        missed = math.pow(1.0 - self.experts_active / self.experts, tokens)
        return self.dense + self.expert * self.experts * self.expert_layers * (1.0 - missed)

    def reach(self, tokens: float) -> float:
        """Tokens of so many that a layer looks back on, summed over layers."""
        full = self.layers - self.windowed_layers
        short = tokens if self.window is None else min(tokens, self.window)
        return full * tokens + self.windowed_layers * short

    def cached(self, tokens: float) -> float:
        """Elements that a sequence of so many tokens keeps in the cache."""
        return 0.0 if self.task == "embed" else self.kv_width * self.reach(tokens)


def architecture_of(name: str, config: Mapping[str, Any]) -> Architecture:
    """The architecture that a Hugging Face `config.json` describes.

    Raises:
        UnknownArchitecture: it is not one of a transformer, or says too little.
    """
    text = config.get("text_config")  # a model that also sees: its language model
    if isinstance(text, Mapping):
        config = text
    if any(key in config for key in ("state_size", "rwkv_version", "ssm_cfg")):
        raise UnknownArchitecture(
            "model_type", "is no transformer: its cost does not follow from weights and a KV cache"
        )
    hidden = _count(config, "hidden_size", "n_embd", "d_model")
    layers = _count(config, "num_hidden_layers", "n_layer", "num_layers")
    heads = _count(config, "num_attention_heads", "n_head")
    vocabulary = _count(config, "vocab_size")
    head = int(config.get("head_dim") or hidden // heads)
    kv_heads = int(config.get("num_key_value_heads") or config.get("num_kv_heads") or heads)
    encoder = str(config.get("model_type", "")) in ENCODERS
    attention, kv_width, kv_shards, attention_width = _attention(
        config, hidden, heads, kv_heads, head
    )
    inner = _count(config, "intermediate_size", "n_inner", default=4 * hidden)
    gates = 2 if encoder or config.get("model_type") in ("gpt2", "gptj", "opt") else 3
    experts = int(
        config.get("num_local_experts")
        or config.get("n_routed_experts")
        or config.get("num_experts")
        or 0
    )
    expert_layers = 0
    expert = 0.0
    feed_forward = float(gates * hidden * inner * layers)
    if experts:
        width = _count(config, "moe_intermediate_size", default=inner)
        expert_layers = layers - int(config.get("first_k_dense_replace") or 0)
        expert = 3.0 * hidden * width
        shared = int(config.get("n_shared_experts") or 0)
        router = hidden * experts
        feed_forward = 3.0 * hidden * inner * (layers - expert_layers)
        feed_forward += expert_layers * (expert * shared + router)
    table = float(vocabulary * hidden)
    tied = bool(config.get("tie_word_embeddings", False))
    positions = float(_count(config, "max_position_embeddings", default=0) * hidden)
    output = 0.0 if encoder else table
    dense = attention * layers + feed_forward + output
    stored = dense + expert * experts * expert_layers + table
    if encoder:
        stored += positions + hidden * hidden  # the pooler
    elif tied:
        stored -= table
    window, windowed = _windows(config, layers)
    return Architecture(
        name=name,
        task="embed" if encoder else "generate",
        parameters=stored,
        dense=dense,
        expert=expert,
        experts=experts,
        experts_active=int(
            config.get("num_experts_per_tok") or config.get("num_experts_per_token") or 0
        ),
        expert_layers=expert_layers,
        head=output,
        lookup=0.0 if tied else table,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_width=kv_width,
        kv_shards=kv_shards,
        attention_width=attention_width,
        context=_count(
            config, "max_position_embeddings", "n_positions", "n_ctx", default=DEFAULT_CONTEXT
        ),
        window=window,
        windowed_layers=windowed,
    )


def _attention(
    config: Mapping[str, Any], hidden: int, heads: int, kv_heads: int, head: int
) -> tuple[float, float, int, float]:
    """Parameters of a layer's attention; its cache's width and shards; its width per query."""
    latent = config.get("kv_lora_rank")
    if not latent:
        weights = hidden * head * (2 * heads + 2 * kv_heads)
        return float(weights), 2.0 * kv_heads * head, kv_heads, 2.0 * heads * head
    # Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): one compressed vector a token,
    # which every chip of a tensor-parallel group keeps whole.
    rope, nope = int(config["qk_rope_head_dim"]), int(config["qk_nope_head_dim"])
    value = int(config["v_head_dim"])
    rank = config.get("q_lora_rank")
    queries = heads * (nope + rope)
    weights = (hidden * rank + rank * queries) if rank else hidden * queries
    weights += hidden * (latent + rope) + latent * heads * (nope + value) + heads * value * hidden
    return float(weights), float(latent + rope), 1, float(heads * (2 * latent + rope))


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int | None, int]:
    """How far windowed layers look back, and how many there are."""
    window = config.get("sliding_window")
    if not window or config.get("use_sliding_window") is False:
        return None, 0
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        return int(window), sum(kind == "sliding_attention" for kind in kinds)
    every = config.get("sliding_window_pattern")
    return int(window), layers - layers // int(every) if every else layers


def _count(config: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        if value is not None and name == names[0]:
            raise UnknownArchitecture(name, f"must be a whole number above 0, it is {value!r}")
    if default is None:
        raise UnknownArchitecture(names[0], "is missing")
    return default
