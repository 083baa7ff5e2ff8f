"""A checkpoint of the Llama family, read from its files alone: config.json and safetensors.

transformers would read it as well, after three seconds of imports for a model that it does not run.
Whatever is unusual in a checkpoint (another rotary embedding, a quantisation, a name that is not
expected) is not guessed at: `read` finds nothing, and transformers has to look.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from nearfield.serving.engines.decoder import (
    EMBEDDING,
    FUSED_ARCHITECTURES,
    HEAD,
    NORM,
    FusedShape,
    Rotary,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor

_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden",
    "intermediate_size": "intermediate",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
}
_HEAD_DIM_SAID = frozenset({"Qwen3ForCausalLM"})
"""Architectures whose heads are not as wide as hidden size and heads suggest."""
_UNUSED = ".rotary_emb.inv_freq"
"""Of old checkpoints: it follows from their config."""

Size: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LlamaFiles:
    """What the files say, before a weight is read.

    Attributes:
        context: tokens. dtype: the config's; None: it has none.
        tied: the output head is the embedding.
        places: of each weight, its file.
    """

    architecture: str
    shape: FusedShape
    context: int
    dtype: torch.dtype | None
    rope_theta: float
    tied: bool
    places: Mapping[str, Path]

    def rotary(self) -> Rotary:
        """Plain rotary position embedding (RoFormer, arXiv:2104.09864)."""
        exponents = torch.arange(0, self.shape.head_dim, 2, dtype=torch.float32)
        return Rotary(1.0 / self.rope_theta ** (exponents / self.shape.head_dim))

    def weights(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """All of them by name.

        Raises:
            OSError, SafetensorError: a file cannot be read.
        """
        read: dict[str, Tensor] = {}
        for file in sorted(set(self.places.values())):
            with safe_open(file, framework="pt", device=str(device)) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
                    if self.places.get(name) == file:
                        read[name] = tensors.get_tensor(name).to(dtype)
        if self.tied:
            read.pop(HEAD, None)
        return read


def read(directory: Path) -> LlamaFiles | None:
    """What is there, if nothing about it is unusual."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        return _read(directory, config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return None  # transformers says what is wrong with it


def _read(directory: Path, config: dict[str, Any]) -> LlamaFiles | None:
    (architecture,) = config["architectures"]
    theta = _rope_theta(config)
    if architecture not in FUSED_ARCHITECTURES or theta is None or not _usual(config):
        return None
    sizes = {name: config[key] for key, name in _SIZES.items()}
    if not all(type(size) is int and size > 0 for size in sizes.values()):
        return None
    head_dim = config.get("head_dim")
    if head_dim is None and architecture not in _HEAD_DIM_SAID:
        head_dim = sizes["hidden"] // sizes["heads"]
    if type(head_dim) is not int:
        return None
    shape = FusedShape(**sizes, head_dim=head_dim, eps=float(config["rms_norm_eps"]))
    places, tied = _places(directory), config.get("tie_word_embeddings", False)
    if not _expected(shape, places, tied=tied):
        return None
    dtype = getattr(torch, config.get("dtype") or config.get("torch_dtype") or "", None)
    return LlamaFiles(
        architecture,
        shape,
        config["max_position_embeddings"],
        dtype if isinstance(dtype, torch.dtype) else None,
        theta,
        tied,
        {name: file for name, (file, _) in places.items()},
    )


def _rope_theta(config: dict[str, Any]) -> float | None:
    """The base of a plain rotary embedding; None: it is another one."""
    parameters = config.get("rope_parameters")
    if parameters is None:
        return None if config.get("rope_scaling") else float(config["rope_theta"])
    plain = parameters.keys() <= {"rope_theta", "rope_type"}
    if not plain or parameters.get("rope_type", "default") != "default":
        return None
    return float(parameters["rope_theta"])


def _usual(config: dict[str, Any]) -> bool:
    windowed = config.get("sliding_window") and config.get("use_sliding_window", True)
    return (
        config["hidden_act"] == "silu"
        and not windowed
        and set(config.get("layer_types") or ["full_attention"]) == {"full_attention"}
        and not config.get("mlp_bias")
        and config.get("quantization_config") is None
        and config.get("partial_rotary_factor", 1.0) == 1.0
    )


def _places(directory: Path) -> dict[str, tuple[Path, Size]]:
    """Of each weight its file and its shape."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        parts = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({directory / Path(part).name for part in parts.values()})
    else:
        files = [directory / "model.safetensors"]
    return dict(found for file in files for found in _tensors(file))


def _tensors(file: Path) -> Iterator[tuple[str, tuple[Path, Size]]]:
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            if not name.endswith(_UNUSED):
                yield name, (file, tuple(tensors.get_slice(name).get_shape()))


def _expected(shape: FusedShape, places: Mapping[str, tuple[Path, Size]], *, tied: bool) -> bool:
    """Whether the weights are those of the shape: none is missing, unknown or of another size."""
    required, optional = _weights(shape)
    (optional if tied else required)[HEAD] = (shape.vocab_size, shape.hidden)
    sizes = {name: size for name, (_, size) in places.items()}
    return required.items() <= sizes.items() <= (required | optional).items()


def _weights(shape: FusedShape) -> tuple[dict[str, Size], dict[str, Size]]:
    """Names and sizes: what must be there, and what only some of the architectures have."""
    hidden, inner = shape.hidden, shape.intermediate
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    required: dict[str, Size] = {EMBEDDING: (shape.vocab_size, hidden), NORM: (hidden,)}
    optional: dict[str, Size] = {}
    for number in range(shape.layers):
        layer = f"model.layers.{number}."
        required |= {
            f"{layer}input_layernorm.weight": (hidden,),
            f"{layer}post_attention_layernorm.weight": (hidden,),
            f"{layer}self_attn.q_proj.weight": (queries, hidden),
            f"{layer}self_attn.k_proj.weight": (keys, hidden),
            f"{layer}self_attn.v_proj.weight": (keys, hidden),
            f"{layer}self_attn.o_proj.weight": (hidden, queries),
            f"{layer}mlp.gate_proj.weight": (inner, hidden),
            f"{layer}mlp.up_proj.weight": (inner, hidden),
            f"{layer}mlp.down_proj.weight": (hidden, inner),
        }
        optional |= {
            f"{layer}self_attn.q_proj.bias": (queries,),
            f"{layer}self_attn.k_proj.bias": (keys,),
            f"{layer}self_attn.v_proj.bias": (keys,),
            f"{layer}self_attn.o_proj.bias": (hidden,),
            f"{layer}self_attn.q_norm.weight": (shape.head_dim,),
            f"{layer}self_attn.k_norm.weight": (shape.head_dim,),
        }
    return required, optional
