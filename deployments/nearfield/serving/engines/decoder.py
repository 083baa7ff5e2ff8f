"""Forward passes over a batch whose rows are sequences at different lengths.

A `Decoder` owns the weights and a preallocated KV slab and knows nothing about requests. The
slab is one flat allocation per layer of `kv_tokens` tokens, viewed as a rectangle of rows x
columns: row r holds sequence r from column 0. Rows in use are always 0..n-1, so a decode step
reads plain slices and never gathers. A rectangle wastes columns where long and short sequences
meet; in exchange a step over 16 rows costs what the arithmetic costs. (Paged KV on GPUs is what
the vllm engine is for.)

Two decoders: `FusedDecoder` for the Llama family (Llama, Mistral, Qwen2, Qwen3), a lean loop
over fused weights; `module_decoder.ModuleDecoder` for every other causal LM, over transformers'
own module with a cache that writes into the same slab.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class KVShape:
    """Shape of one token's keys (or values), and how many layers hold them."""

    layers: int
    heads: int
    head_dim: int

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        return 2 * self.layers * self.heads * self.head_dim * dtype.itemsize


class KVSlab:
    """Keys and values of all rows, `[2, rows, heads, columns, head_dim]` per layer.

    `reshape` chooses the rectangle; rows x columns never exceeds `kv_tokens`. Zeros, not empty:
    a masked column still takes part in the sum with weight 0, and 0 x NaN is NaN. (On Linux the
    memory is only committed when written.)
    """

    def __init__(
        self, shape: KVShape, kv_tokens: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.shape = shape
        self.kv_tokens = kv_tokens
        per_token = 2 * shape.heads * shape.head_dim
        self._flat = [
            torch.zeros(kv_tokens * per_token, dtype=dtype, device=device)
            for _ in range(shape.layers)
        ]
        self.columns = 0
        self.layers: list[Tensor] = []
        self._view(kv_tokens)

    @property
    def rows(self) -> int:
        return self.kv_tokens // self.columns

    def _view(self, columns: int) -> None:
        self.columns = columns
        rows, heads, head_dim = self.rows, self.shape.heads, self.shape.head_dim
        size = 2 * rows * heads * columns * head_dim
        self.layers = [f[:size].view(2, rows, heads, columns, head_dim) for f in self._flat]

    def reshape(self, columns: int, rows_in_use: int, columns_in_use: int) -> None:
        """Change the rectangle and carry the rows in use over, a layer at a time."""
        kept = [layer[:, :rows_in_use, :, :columns_in_use] for layer in self.layers]
        self._view(columns)
        if not rows_in_use:
            return
        for new, old in zip(self.layers, kept, strict=True):
            new[:, :rows_in_use, :, :columns_in_use] = old.clone()

    def move(self, source: int, target: int, length: int) -> None:
        """Copy row `source` over row `target`, `length` columns."""
        for layer in self.layers:
            layer[:, target, :, :length] = layer[:, source, :, :length]

    def swap(self, a: int, b: int, length: int) -> None:
        """Exchange two rows, `length` columns of them."""
        for layer in self.layers:
            kept = layer[:, a, :, :length].clone()
            layer[:, a, :, :length] = layer[:, b, :, :length]
            layer[:, b, :, :length] = kept


@dataclass(frozen=True, slots=True)
class Span:
    """Which part of the rectangle a forward pass computes.

    Rows `first`..`first + tokens.shape[0] - 1`. All of them start at column `start` (an int: a
    prompt or a chunk of one) or each at its own (a tensor [rows]: a decode step).
    `columns`: how many columns attention may see.
    """

    first: int
    start: int | Tensor
    columns: int


class Decoder(Protocol):
    slab: KVSlab
    vocab_size: int
    device: torch.device

    def forward(self, tokens: Tensor, span: Span, last: Tensor | None) -> Tensor:
        """Compute `tokens` [rows, width], write their KV, return logits [rows, vocab].

        `last` [rows]: the position within the width whose logits are wanted; None: width is 1.
        Decode steps (`span.start` a tensor) have width 1.
        """
        ...


def attention_mask(span: Span, width: int, device: torch.device) -> Tensor | None:
    """Which columns each query may see, bool `[rows or 1, 1, width, columns]`; None: all."""
    columns = torch.arange(span.columns, device=device)
    if isinstance(span.start, Tensor):
        return (columns <= span.start[:, None])[:, None, None, :]
    if width == 1:
        return None
    queries = torch.arange(span.start, span.start + width, device=device)
    return (columns <= queries[:, None])[None, None]


class Int8Linear(torch.nn.Module):
    """Weight-only int8, symmetric per output channel; activations in bfloat16.

    On CPUs torch's packed kernel reads one byte a weight, which is what a decode step pays for.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        scale = weight.float().abs().amax(dim=1).clamp(min=1e-8) / 127
        quantised = torch.round(weight.float() / scale[:, None]).clamp(-127, 127)
        self.register_buffer("weight", quantised.to(torch.int8).contiguous())
        self.register_buffer("scale", scale.to(torch.bfloat16))
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        if x.device.type == "cpu":
            out = torch._weight_int8pack_mm(flat, self.weight, self.scale)
        else:
            out = F.linear(flat, self.weight.to(torch.bfloat16)) * self.scale
        out = out.to(x.dtype).view(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias


class PackedLinear(torch.nn.Module):
    """A linear layer with its weight in oneDNN's blocked layout, where the machine has it.

    Measured on an AVX-512 core in float32: 2.3x faster than `F.linear` from 4 rows on, 8 us
    slower on one row. So matrices that fit a cache keep a plain copy for steps of one row.
    """

    PLAIN_COPY_BYTES = 4 * 2**20

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.bias = bias
        self.plain: Tensor | None = weight.contiguous()
        self.packed: Tensor | None = None
        packable = weight.dtype in (torch.float32, torch.bfloat16)
        if weight.device.type == "cpu" and packable and torch.backends.mkldnn.is_available():
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.plain)
            if self.plain.nbytes > self.PLAIN_COPY_BYTES:
                self.plain = None

    def forward(self, x: Tensor) -> Tensor:
        one_row = x.numel() == x.shape[-1]
        if self.packed is None or (one_row and self.plain is not None):
            assert self.plain is not None
            return F.linear(x, self.plain, self.bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return out


def _linear(weight: Tensor, bias: Tensor | None, int8: bool) -> torch.nn.Module:
    return Int8Linear(weight, bias) if int8 else PackedLinear(weight, bias)


FUSED_ARCHITECTURES = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
)
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass(frozen=True, slots=True)
class FusedShape:
    """What a model of the family is made of. `eps`: of its root mean square norms."""

    vocab_size: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float

    @property
    def kv(self) -> KVShape:
        return KVShape(self.layers, self.kv_heads, self.head_dim)


@dataclass(frozen=True, slots=True)
class Rotary:
    """A rotary embedding: rotations per token, [head_dim / 2], and a scale of their pairs."""

    inv_freq: Tensor
    scaling: float = 1.0


class FusedDecoder:
    """A Llama-family decoder written for small steps: few, large operations.

    Query, key and value are one matrix, gate and up another. Rotary embedding is one complex
    multiplication: the rows of the query and key matrices are permuted at load so that a
    rotation's two components lie side by side (attention scores do not see the order).
    Grouped-query attention in a decode step treats a group's queries as a query length, so keys
    are never repeated. Token for token equal to transformers' `generate` (tests hold it to it).
    """

    def __init__(
        self,
        shape: FusedShape,
        weights: Mapping[str, Tensor],
        rotary: Rotary,
        kv_tokens: int,
        max_model_len: int,
        *,
        int8: bool = False,
    ) -> None:
        """
        Args:
            weights: by the names that they have in a checkpoint. Without `lm_head.weight` the
                output head is the embedding.
        """
        self.vocab_size = shape.vocab_size
        embedding = weights[EMBEDDING]
        self.device, self.dtype = embedding.device, embedding.dtype
        self.heads, self.kv_heads, self.head_dim = shape.heads, shape.kv_heads, shape.head_dim
        self.eps = shape.eps
        self.hidden = shape.hidden
        self.embedding = embedding
        self.slab = KVSlab(shape.kv, kv_tokens, dtype=self.dtype, device=self.device)
        self.layers = [
            self._layer(weights, f"model.layers.{i}.", int8) for i in range(shape.layers)
        ]
        self.norm = weights[NORM]
        self.head = PackedLinear(weights.get(HEAD, embedding))
        inv_freq = rotary.inv_freq.to(self.device, torch.float32)
        positions = torch.arange(max_model_len, device=self.device)
        angles = positions[:, None].float() * inv_freq
        scale = torch.full_like(angles, rotary.scaling)
        self.rotation = torch.polar(scale, angles)[:, None, :]  # [positions, 1, head_dim / 2]

    def _layer(self, weights: Mapping[str, Tensor], prefix: str, int8: bool) -> dict[str, Any]:
        def get(name: str) -> Tensor | None:
            return weights.get(prefix + name)

        def need(name: str) -> Tensor:
            return weights[prefix + name]

        def interleave(t: Tensor | None, heads: int) -> Tensor | None:
            # [x0 .. x(d/2-1), y0 .. ] -> [x0, y0, x1, y1, ..]: pairs become complex numbers.
            if t is None:
                return None
            tail = t.shape[1:]
            return t.view(heads, 2, self.head_dim // 2, *tail).transpose(1, 2).reshape(-1, *tail)

        parts, biases = [], []
        for name, heads in (("q", self.heads), ("k", self.kv_heads), ("v", 0)):
            weight, bias = need(f"self_attn.{name}_proj.weight"), get(f"self_attn.{name}_proj.bias")
            parts.append(weight if name == "v" else interleave(weight, heads))
            biases.append(bias if name == "v" else interleave(bias, heads))
        bias = None if biases[0] is None else torch.cat([b for b in biases if b is not None])
        gate_up = torch.cat([need("mlp.gate_proj.weight"), need("mlp.up_proj.weight")])
        return {
            "norm1": need("input_layernorm.weight"),
            "norm2": need("post_attention_layernorm.weight"),
            "qkv": _linear(torch.cat([p for p in parts if p is not None]), bias, int8),
            "q_norm": interleave(get("self_attn.q_norm.weight"), 1),
            "k_norm": interleave(get("self_attn.k_norm.weight"), 1),
            "out": _linear(need("self_attn.o_proj.weight"), get("self_attn.o_proj.bias"), int8),
            "gate_up": _linear(gate_up, None, int8),
            "down": _linear(need("mlp.down_proj.weight"), None, int8),
        }

    def _rotate(self, x: Tensor, rotation: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * rotation).flatten(-2).to(self.dtype)

    def forward(self, tokens: Tensor, span: Span, last: Tensor | None) -> Tensor:
        rows, width = tokens.shape
        heads, kv_heads, head_dim = self.heads, self.kv_heads, self.head_dim
        decode = isinstance(span.start, Tensor)
        mask = attention_mask(span, width, self.device)
        stop = span.first + rows
        if isinstance(span.start, Tensor):
            rotation = self.rotation[span.start][:, None]  # [rows, 1, 1, head_dim / 2]
            row_ids = torch.arange(span.first, stop, device=self.device)
        else:
            rotation = self.rotation[span.start : span.start + width]
        x = F.embedding(tokens, self.embedding)
        for layer, cache in zip(self.layers, self.slab.layers, strict=True):
            normed = F.rms_norm(x, (self.hidden,), layer["norm1"], self.eps)
            qkv = layer["qkv"](normed).view(rows, width, heads + 2 * kv_heads, head_dim)
            qk, v = qkv[:, :, : heads + kv_heads], qkv[:, :, heads + kv_heads :]
            if layer["q_norm"] is not None:
                q = F.rms_norm(qk[:, :, :heads], (head_dim,), layer["q_norm"], self.eps)
                k = F.rms_norm(qk[:, :, heads:], (head_dim,), layer["k_norm"], self.eps)
                qk = torch.cat([q, k], dim=2)
            qk = self._rotate(qk, rotation)
            q, k = qk[:, :, :heads], qk[:, :, heads:]
            if decode:
                cache[0, row_ids, :, span.start] = k[:, 0]
                cache[1, row_ids, :, span.start] = v[:, 0]
                q = q.view(rows, kv_heads, heads // kv_heads, head_dim)
            else:
                columns = slice(span.start, span.start + width)
                cache[0, span.first : stop, :, columns] = k.transpose(1, 2)
                cache[1, span.first : stop, :, columns] = v.transpose(1, 2)
                q = q.transpose(1, 2)
            attended = F.scaled_dot_product_attention(
                q,
                cache[0, span.first : stop, :, : span.columns],
                cache[1, span.first : stop, :, : span.columns],
                attn_mask=mask,
                enable_gqa=not decode and heads != kv_heads,
            )
            if not decode:
                attended = attended.transpose(1, 2)
            x = x + layer["out"](attended.reshape(rows, width, heads * head_dim))
            normed = F.rms_norm(x, (self.hidden,), layer["norm2"], self.eps)
            gate, up = layer["gate_up"](normed).chunk(2, dim=-1)
            x = x + layer["down"](F.silu(gate) * up)
        x = x[:, 0] if last is None else x[torch.arange(rows, device=self.device), last]
        logits: Tensor = self.head(F.rms_norm(x, (self.hidden,), self.norm, self.eps))
        return logits
