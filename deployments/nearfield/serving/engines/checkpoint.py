"""From a model directory and a spec to a decoder on a device."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from nearfield.core.errors import BadRequest
from nearfield.core.spec import GenerateEngine as GenerateSpec
from nearfield.core.spec import ModelSpec
from nearfield.serving.engines import llama_files
from nearfield.serving.engines.decoder import FUSED_ARCHITECTURES, Decoder, FusedDecoder
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
    files = llama_files.read(directory)
    if files is None:
        return _through_transformers(spec, engine, directory)
    device = _device(spec)
    dtype = _dtype(spec, files.dtype, device)
    _check_length(engine, files.context)
    try:
        weights = files.weights(dtype, device)
    except (OSError, SafetensorError) as error:
        raise _unloadable(files.architecture, error) from error
    bounds = _bounds(engine, files.context, files.shape.kv.bytes_per_token(dtype), device)
    with torch.inference_mode():
        decoder = FusedDecoder(
            files.shape,
            weights,
            files.rotary(),
            bounds.kv_tokens,
            bounds.max_model_len,
            int8=engine.quantization == "int8",
        )
    parameters = sum(weight.numel() for weight in weights.values())
    return decoder, Checkpoint(files.architecture, _name(dtype), parameters, *bounds.told)


def _through_transformers(
    spec: ModelSpec, engine: GenerateSpec, directory: Path
) -> tuple[Decoder, Checkpoint]:
    """Whatever transformers can load, over its own module where we have no loop for it."""
    from nearfield.serving.engines.module_decoder import (
        ModuleDecoder,
        fused,
        kv_shape,
        quantize,
    )
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise BadRequest(f"source: config.json cannot be read: {_first_line(error)}") from error
    architecture = (getattr(config, "architectures", None) or ["?"])[0]
    device = _device(spec)
    own = getattr(config, "dtype", None)
    dtype = _dtype(spec, own if isinstance(own, torch.dtype) else None, device)
    context = int(getattr(config, "max_position_embeddings", 0) or 2048)
    _check_length(engine, context)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation="sdpa",
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _unloadable(architecture, error) from error
    model = model.eval().to(device)
    shape = kv_shape(config)
    bounds = _bounds(engine, context, shape.bytes_per_token(dtype), device)
    int8 = engine.quantization == "int8"
    parameters = sum(p.numel() for p in model.parameters())
    decoder: Decoder
    with torch.inference_mode():
        if architecture in FUSED_ARCHITECTURES and not (
            getattr(config, "sliding_window", None) or getattr(config, "mlp_bias", False)
        ):
            decoder = fused(model, bounds.kv_tokens, bounds.max_model_len, int8=int8)
        else:
            if int8:
                quantize(model)
            decoder = ModuleDecoder(model, shape, bounds.kv_tokens)
    return decoder, Checkpoint(architecture, _name(dtype), parameters, *bounds.told)


@dataclass(frozen=True, slots=True)
class _Bounds:
    """Tokens of all sequences together and of one; bytes of the KV cache."""

    kv_tokens: int
    max_model_len: int
    kv_bytes: int

    @property
    def told(self) -> tuple[int, int]:
        return self.max_model_len, self.kv_bytes


def _check_length(engine: GenerateSpec, context: int) -> None:
    if engine.max_model_len is not None and engine.max_model_len > context:
        raise BadRequest(
            f"engine.max_model_len is {engine.max_model_len}, but the model's context is {context} "
            "tokens. Lower it, or leave it out."
        )


def _bounds(
    engine: GenerateSpec, context: int, bytes_per_token: int, device: torch.device
) -> _Bounds:
    max_model_len = engine.max_model_len or context
    kv_tokens = _kv_tokens(engine, max_model_len, bytes_per_token, device)
    if kv_tokens < max_model_len:
        if engine.max_model_len is not None:
            raise BadRequest(
                f"engine.kv_cache_tokens is {kv_tokens}, less than one sequence of "
                f"max_model_len {max_model_len}. Raise it, or lower max_model_len."
            )
        max_model_len = kv_tokens
    return _Bounds(kv_tokens, max_model_len, kv_tokens * bytes_per_token)


def _unloadable(architecture: str, error: Exception) -> BadRequest:
    return BadRequest(f"source: {architecture} cannot be loaded: {_first_line(error)}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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


def _dtype(spec: ModelSpec, own: torch.dtype | None, device: torch.device) -> torch.dtype:
    if spec.dtype != "auto":
        return DTYPES[spec.dtype]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if own is None else own


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
