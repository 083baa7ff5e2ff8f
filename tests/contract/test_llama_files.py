"""What is read without transformers is what transformers reads; whatever is unusual is not read."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nearfield.serving.engines import llama_files
from safetensors.torch import load_file, save_file

from tests.support.tiny_lms import make_lm

FAMILY = ("llama", "mistral", "qwen2", "qwen3")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("lm")
    make_lm(directory)
    return directory


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((made / name).read_bytes())
    return tmp_path


def change(directory: Path, **config: Any) -> None:
    file = directory / "config.json"
    told = json.loads(file.read_text()) | config
    file.write_text(json.dumps({key: value for key, value in told.items() if value != "absent"}))


@pytest.mark.parametrize("kind", FAMILY)
def test_what_is_read_is_what_transformers_has(kind: str, tmp_path: Path) -> None:
    model = make_lm(tmp_path, kind)
    files = llama_files.read(tmp_path)
    assert files is not None
    weights = files.weights(torch.float32, torch.device("cpu"))
    state = model.state_dict()
    assert weights.keys() == state.keys()
    assert all(torch.equal(weights[name], state[name]) for name in state)
    rotary = model.model.rotary_emb
    torch.testing.assert_close(files.rotary().inv_freq, rotary.inv_freq, rtol=1e-6, atol=0)
    assert files.rotary().scaling == rotary.attention_scaling
    assert files.context == model.config.max_position_embeddings


def test_a_config_of_before_transformers_5(copy: Path) -> None:
    change(
        copy, rope_parameters="absent", rope_theta=10000.0, dtype="absent", torch_dtype="bfloat16"
    )
    files = llama_files.read(copy)
    assert files is not None
    assert (files.rope_theta, files.dtype) == (10000.0, torch.bfloat16)


def test_a_tied_head_is_the_embedding_also_where_the_file_has_one(copy: Path) -> None:
    change(copy, tie_word_embeddings=True)
    files = llama_files.read(copy)
    assert files is not None
    assert "lm_head.weight" not in files.weights(torch.float32, torch.device("cpu"))


def test_weights_in_several_files(copy: Path) -> None:
    whole = load_file(copy / "model.safetensors")
    parts = ({}, {})
    for number, name in enumerate(sorted(whole)):
        parts[number % 2][name] = whole[name]
    places = {}
    for number, part in enumerate(parts):
        save_file(part, copy / f"model-{number}.safetensors")
        places |= dict.fromkeys(part, f"model-{number}.safetensors")
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    files = llama_files.read(copy)
    assert files is not None
    weights = files.weights(torch.float32, torch.device("cpu"))
    assert weights.keys() == whole.keys()
    assert all(torch.equal(weights[name], whole[name]) for name in whole)


def without(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda weights: weights.pop(name)


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["PhiForCausalLM"]},
        {"architectures": []},
        {"hidden_act": "gelu"},
        {"mlp_bias": True},
        {"sliding_window": 128},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"quantization_config": {"quant_method": "gptq"}},
        {"partial_rotary_factor": 0.5},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}},
        {"rope_parameters": "absent", "rope_theta": 1e4, "rope_scaling": {"type": "linear"}},
        {"rope_parameters": "absent"},
        {"rms_norm_eps": "absent"},
        {"num_key_value_heads": "absent"},
        {"num_hidden_layers": 3},
        {"hidden_size": 96},
        {"vocab_size": "many"},
        {"architectures": ["Qwen3ForCausalLM"], "head_dim": "absent"},
    ],
    ids=str,
)
def test_what_is_unusual_is_left_to_transformers(config: dict[str, Any], copy: Path) -> None:
    change(copy, **config)
    assert llama_files.read(copy) is None


@pytest.mark.parametrize(
    "damage",
    [
        without("model.layers.1.mlp.up_proj.weight"),
        without("lm_head.weight"),
        lambda weights: weights.update(extra=torch.zeros(1)),
        lambda weights: weights.update({"model.norm.weight": torch.zeros(3)}),
    ],
    ids=["a layer's", "the head", "one too many", "another size"],
)
def test_weights_that_are_not_the_model_s(
    damage: Callable[[dict[str, torch.Tensor]], object], copy: Path
) -> None:
    weights = load_file(copy / "model.safetensors")
    damage(weights)
    save_file(weights, copy / "model.safetensors")
    assert llama_files.read(copy) is None


def test_files_that_are_none(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"no tensors here")
    assert llama_files.read(copy) is None
    (copy / "config.json").write_text("{")
    assert llama_files.read(copy) is None
    assert llama_files.read(copy / "nowhere") is None


def test_an_engine_of_the_family_starts_without_transformers(made: Path) -> None:
    program = """
import sys
from pathlib import Path
from nearfield.core.spec import ModelSpec
from nearfield.serving.engines.base import EngineContext
from nearfield.serving.engines.generate import GenerateEngine
directory = Path(sys.argv[1])
spec = ModelSpec(model="m", source=f"file://{directory}", engine={"kind": "generate"})
engine = GenerateEngine()
engine.load(EngineContext(spec, directory, threads=1, emit=lambda batch: None))
assert type(engine.decoder).__name__ == "FusedDecoder"
assert "transformers" not in sys.modules
engine.close()
"""
    ended = subprocess.run(
        [sys.executable, "-c", program, str(made)], capture_output=True, text=True, timeout=50
    )
    assert ended.returncode == 0, ended.stderr
