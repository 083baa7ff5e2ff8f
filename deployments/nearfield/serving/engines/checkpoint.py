"""From a model directory and a spec to a decoder on a device."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nearfield.core.errors import BadRequest
from nearfield.core.spec import GenerateEngine as GenerateSpec
from nearfield.core.spec import ModelSpec
from nearfield.serving.engines.decoder import (
    FUSED_ARCHITECTURES,
    Decoder,
    FusedDecoder,
    Int8Linear,
    KVShape,
    ModuleDecoder,
)
from safetensors import SafetensorError

log = logging.getLogger("nearfield.engine")

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What was loaded. `kv_bytes`: what the whole KV cache may take."""

    architecture: str
    dtype: str
    parameters: int
    max_model_len: int
    kv_bytes: int


def load_decoder(
    spec: ModelSpec, engine: GenerateSpec, directory: Path
) -> tuple[Decoder, Checkpoint]:
    """Load a causal LM.

    Raises:
        BadRequest: the directory holds no causal LM we can serve, or the spec asks for what the
            model or the machine does not have. The message is for the developer.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise BadRequest(f"source: config.json cannot be read: {_first_line(error)}") from error
    architecture = (getattr(config, "architectures", None) or ["?"])[0]
    device = _device(spec)
    dtype = _dtype(spec, config, device)
    context = int(getattr(config, "max_position_embeddings", 0) or 2048)
    max_model_len = engine.max_model_len or context
    if max_model_len > context:
        raise BadRequest(
            f"engine.max_model_len is {max_model_len}, but the model's context is {context} "
            "tokens. Lower it, or leave it out."
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation="sdpa",
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BadRequest(
            f"source: {architecture} cannot be loaded: {_first_line(error)}"
        ) from error
    model = model.eval().to(device)
    shape = _kv_shape(config)
    kv_tokens = _kv_tokens(engine, max_model_len, shape.bytes_per_token(dtype), device)
    if kv_tokens < max_model_len:
        if engine.max_model_len is not None:
            raise BadRequest(
                f"engine.kv_cache_tokens is {kv_tokens}, less than one sequence of "
                f"max_model_len {max_model_len}. Raise it, or lower max_model_len."
            )
        max_model_len = kv_tokens
    int8 = engine.quantization == "int8"
    parameters = sum(p.numel() for p in model.parameters())
    decoder: Decoder
    with torch.inference_mode():
        if architecture in FUSED_ARCHITECTURES and not getattr(config, "sliding_window", None):
            decoder = FusedDecoder(model, kv_tokens, max_model_len, int8=int8)
        else:
            if int8:
                _quantize(model)
            decoder = ModuleDecoder(model, shape, kv_tokens)
    del model
    return decoder, Checkpoint(
        architecture,
        str(dtype).removeprefix("torch."),
        parameters,
        max_model_len,
        kv_tokens * shape.bytes_per_token(dtype),
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300]


def _device(spec: ModelSpec) -> torch.device:
    if spec.device == "cuda" and not torch.cuda.is_available():
        raise BadRequest(
            "device is cuda, but this replica sees no GPU. Give it one with "
            "ray_actor_options: {num_gpus: 1}, or set device: auto."
        )
    use_gpu = spec.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if use_gpu else "cpu")


def _dtype(spec: ModelSpec, config: Any, device: torch.device) -> torch.dtype:
    if spec.dtype != "auto":
        return DTYPES[spec.dtype]
    if device.type == "cpu":
        return torch.float32
    own = getattr(config, "dtype", None)
    return own if isinstance(own, torch.dtype) else torch.bfloat16


def _kv_shape(config: Any) -> KVShape:
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


def _kv_tokens(
    engine: GenerateSpec, max_model_len: int, bytes_per_token: int, device: torch.device
) -> int:
    if engine.kv_cache_tokens is not None:
        return engine.kv_cache_tokens
    if device.type == "cuda":
        free_bytes = torch.cuda.mem_get_info(device)[0]
    else:
        with open("/proc/meminfo", encoding="ascii") as lines:
            memory = dict(line.split(":", 1) for line in lines)
        free_bytes = int(memory["MemAvailable"].split()[0]) * 1024
    affordable = free_bytes // 2 // bytes_per_token
    return max(64, min(engine.max_batch * max_model_len, affordable))


def _quantize(model: torch.nn.Module) -> None:
    """Swap every linear layer but the output head for an int8 one, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head"):
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], Int8Linear(module.weight, module.bias))
