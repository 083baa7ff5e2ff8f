"""A decoder for any causal LM of transformers: its own module, and a cache that writes our slab.

Apart from `decoder`, since transformers takes a second to import and most models do without.
"""

from __future__ import annotations

from typing import Any

import torch
from nearfield.core.errors import BadRequest
from nearfield.serving.engines.decoder import (
    FusedDecoder,
    FusedShape,
    Int8Linear,
    KVShape,
    KVSlab,
    Rotary,
    Span,
    attention_mask,
)
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class _SlabLayer(CacheLayerMixin):
    """One layer of transformers' cache protocol, writing into the slab's rectangle."""

    def __init__(self, owner: ModuleDecoder, index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_initialized = True
        self._owner, self._index = owner, index

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The slab is allocated already."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        span, cache = self._owner.span, self._owner.slab.layers[self._index]
        rows, _, width, _ = key_states.shape
        stop = span.first + rows
        if isinstance(span.start, Tensor):
            row_ids = torch.arange(span.first, stop, device=key_states.device)
            cache[0, row_ids, :, span.start] = key_states[:, :, 0]
            cache[1, row_ids, :, span.start] = value_states[:, :, 0]
        else:
            columns = slice(span.start, span.start + width)
            cache[0, span.first : stop, :, columns] = key_states
            cache[1, span.first : stop, :, columns] = value_states
        keys, values = cache[:, span.first : stop, :, : span.columns]
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._owner.span.columns, 0

    def get_seq_length(self) -> int:
        return self._owner.span.columns - 1

    def get_max_length(self) -> int:
        return self._owner.slab.columns


class ModuleDecoder:
    """Any causal LM of transformers whose layers all attend in full, over its own module."""

    def __init__(self, model: Any, shape: KVShape, kv_tokens: int) -> None:
        self.model = model
        self.vocab_size = model.config.vocab_size
        self.device = next(model.parameters()).device
        dtype = next(model.parameters()).dtype
        self.slab = KVSlab(shape, kv_tokens, dtype=dtype, device=self.device)
        self.span = Span(0, 0, 0)
        layers: list[Any] = [_SlabLayer(self, i) for i in range(shape.layers)]
        self._cache = Cache(layers=layers)

    def forward(self, tokens: Tensor, span: Span, last: Tensor | None) -> Tensor:
        rows, width = tokens.shape
        self.span = span
        if isinstance(span.start, Tensor):
            positions = span.start[:, None]
        else:
            positions = torch.arange(span.start, span.start + width, device=self.device)
            positions = positions.expand(rows, width)
        mask = attention_mask(span, width, self.device)
        if mask is None:
            mask = torch.ones((1, 1, 1, span.columns), dtype=torch.bool, device=self.device)
        out = self.model(
            input_ids=tokens,
            attention_mask=mask.expand(rows, 1, width, span.columns),
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=0 if last is not None else 1,
        )
        logits: Tensor = out.logits
        if last is None:
            return logits[:, -1]
        return logits[torch.arange(rows, device=self.device), last]


def kv_shape(config: Any) -> KVShape:
    """Of a config of transformers.

    Raises:
        BadRequest: its layers do not all attend in full.
    """
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise BadRequest(
            f"source: this model's layers are {', '.join(sorted(kinds))}; engine generate serves "
            "models whose layers all attend in full. On a GPU, engine vllm serves it."
        )
    heads = config.num_attention_heads
    return KVShape(
        config.num_hidden_layers,
        getattr(config, "num_key_value_heads", None) or heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def fused(model: Any, kv_tokens: int, max_model_len: int, *, int8: bool = False) -> FusedDecoder:
    """The lean loop over the weights of a module that transformers has loaded."""
    config, rotary = model.config, model.model.rotary_emb
    kv = kv_shape(config)
    shape = FusedShape(
        config.vocab_size,
        config.hidden_size,
        config.intermediate_size,
        kv.layers,
        config.num_attention_heads,
        kv.heads,
        kv.head_dim,
        config.rms_norm_eps,
    )
    turns = Rotary(rotary.inv_freq, float(rotary.attention_scaling))
    return FusedDecoder(shape, model.state_dict(), turns, kv_tokens, max_model_len, int8=int8)


def quantize(model: torch.nn.Module) -> None:
    """Swap every linear layer but the output head for an int8 one, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head"):
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], Int8Linear(module.weight, module.bias))
