"""What computes embeddings: OpenVINO or ONNX Runtime over our own packed BERT graph, or torch over
transformers' module."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from nearfield.core.errors import BadRequest
from nearfield.core.spec import EmbedEngine as EmbedSpec
from nearfield.core.spec import ModelSpec
from nearfield.serving.engines import bert_onnx
from nearfield.serving.engines.text import read_json
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

DEFAULT_MAX_TOKENS = 512


@dataclass(frozen=True, slots=True)
class EmbedModel:
    """An embedding model's directory as sentence-transformers lays it out.

    Attributes:
        max_tokens: longest input, special tokens included.
    """

    directory: Path
    config: dict[str, Any]
    pooling: bert_onnx.Pooling
    normalize: bool
    max_tokens: int

    @property
    def architecture(self) -> str:
        return str((self.config.get("architectures") or ["?"])[0])

    @property
    def vocab_size(self) -> int:
        return int(self.config.get("vocab_size", 0))

    @classmethod
    def read(cls, directory: Path, spec: EmbedSpec) -> EmbedModel:
        """Read the directory's configs; the spec's own settings win.

        Raises:
            BadRequest: no config, or a pooling that is not served.
        """
        config = read_json(directory / "config.json")
        if not config:
            raise BadRequest("source: there is no config.json in it.")
        pooling = _pooling(directory) if spec.pooling == "auto" else spec.pooling
        normalize = spec.normalize
        if normalize is None:
            normalize = any(directory.glob("*_Normalize")) or "Normalize" in _modules(directory)
        own = read_json(directory / "sentence_bert_config.json").get("max_seq_length")
        positions = int(config.get("max_position_embeddings", DEFAULT_MAX_TOKENS))
        max_tokens = spec.max_tokens or min(int(own or positions), positions)
        if max_tokens > positions:
            raise BadRequest(
                f"engine.max_tokens is {max_tokens}, but the model has {positions} positions."
            )
        return cls(directory, config, pooling, normalize, max_tokens)


def _modules(directory: Path) -> str:
    file = directory / "modules.json"
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _pooling(directory: Path) -> bert_onnx.Pooling:
    config = read_json(directory / "1_Pooling" / "config.json")
    chosen = {key for key, value in config.items() if key.startswith("pooling_mode_") and value}
    if config.get("pooling_mode") in ("mean", "cls"):
        mode: bert_onnx.Pooling = config["pooling_mode"]
        return mode
    if chosen <= {"pooling_mode_mean_tokens"}:
        return "mean"
    if chosen == {"pooling_mode_cls_token"}:
        return "cls"
    raise BadRequest(
        f"source: pooling by {', '.join(sorted(chosen))} is not served; set engine.pooling to mean "
        "or cls."
    )


class Runtime(Protocol):
    """Computes a batch. Called from one thread.

    Attributes:
        packs: a batch costs what its tokens cost; else what the rectangle around them does.
    """

    name: str
    dimensions: int
    dtype: str
    packs: bool

    def embed(self, batch: list[list[int]]) -> NDArray[np.float32]:
        """Vectors [rows, dimensions] of token lists."""
        ...


def open_runtime(model: EmbedModel, spec: ModelSpec, threads: int) -> Runtime:
    """The runtime the spec asks for; "auto": the fastest faithful one for this model here.

    Raises:
        BadRequest: it does not run this model, or is not installed.
    """
    engine = spec.engine
    assert isinstance(engine, EmbedSpec)
    wanted = engine.runtime
    shape = bert_onnx.BertShape.of(model.config)
    on_gpu = spec.device == "cuda" or (spec.device == "auto" and _gpu_visible())
    plain = spec.dtype in ("auto", "float32")
    if wanted == "auto":
        wanted = _fastest_on_cpu() if shape is not None and not on_gpu and plain else "torch"
    if wanted == "torch":
        return _Torch(model, spec, threads)
    if shape is None:
        raise BadRequest(
            f"engine.runtime is {wanted}, which serves BERT encoders; {model.architecture} runs "
            "with runtime: torch."
        )
    if not plain or spec.device == "cuda":
        raise BadRequest(
            f"engine.runtime {wanted} computes in float32 on CPUs; set runtime: torch for dtype "
            f"{spec.dtype} on device {spec.device}."
        )
    with _checkpoint(model) as weight:
        graph = bert_onnx.build(shape, weight, normalize=model.normalize)
    return (_Onnx if wanted == "onnx" else _OpenVino)(graph, model.pooling, threads)


def _fastest_on_cpu() -> Literal["openvino", "onnx"]:
    """By the measurements of docs/adr/0006; `make bench` repeats them."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return "openvino" if x86 and find_spec("openvino") else "onnx"


def _gpu_visible() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*"))


class _checkpoint:  # noqa: N801 - a context manager, used as a function
    """Tensors of a checkpoint by name, without the architecture's prefix."""

    def __init__(self, model: EmbedModel) -> None:
        files = sorted(model.directory.glob("*.safetensors"))
        if len(files) != 1:
            raise BadRequest(
                f"source: {len(files)} safetensors files; an encoder has one. Use runtime: torch."
            )
        try:
            self._file: Any = safe_open(files[0], "numpy")
        except SafetensorError as error:
            raise BadRequest(f"source: {files[0].name} cannot be read: {error}") from error
        self._names = set(self._file.keys())

    def __enter__(self) -> Callable[[str], NDArray[np.float32]]:
        return self._get

    def __exit__(self, *_: object) -> None:
        del self._file

    def _get(self, name: str) -> NDArray[np.float32]:
        found = name if name in self._names else f"bert.{name}"
        if found not in self._names:
            raise BadRequest(f"source: the checkpoint has no tensor {name}.")
        tensor: NDArray[Any] = self._file.get_tensor(found)
        return tensor.astype(np.float32, copy=False)


class _Onnx:
    name = "onnx"
    dtype = "float32"
    packs = True

    def __init__(self, graph: bytes, pooling: bert_onnx.Pooling, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            graph, options, providers=["CPUExecutionProvider"]
        )
        self._pooling = pooling
        self.dimensions = int(self._session.get_outputs()[0].shape[1])

    def embed(self, batch: list[list[int]]) -> NDArray[np.float32]:
        inputs = bert_onnx.pack(batch, self._pooling)
        vectors: NDArray[np.float32] = self._session.run(None, inputs)[0]
        return vectors


class _OpenVino:
    name = "openvino"
    dtype = "float32"
    packs = True

    def __init__(self, graph: bytes, pooling: bert_onnx.Pooling, threads: int) -> None:
        try:
            import openvino
        except ImportError as error:
            raise BadRequest(
                "engine.runtime is openvino, which is not installed: pip install openvino."
            ) from error
        try:
            core = openvino.Core()
            model = core.read_model(graph)
            settings = {
                "INFERENCE_NUM_THREADS": threads,
                "INFERENCE_PRECISION_HINT": "f32",
                "ENABLE_CPU_PINNING": False,  # else every replica of a node computes on core 0
            }
            self._model = core.compile_model(model, "CPU", settings)
        except RuntimeError as error:
            first = str(error).strip().split("\n")[0][:200]
            raise BadRequest(f"engine.runtime openvino refuses this model: {first}") from error
        self._request = self._model.create_infer_request()
        self._pooling = pooling
        self.dimensions = int(self._model.outputs[0].partial_shape[1].get_length())

    def embed(self, batch: list[list[int]]) -> NDArray[np.float32]:
        result = self._request.infer(bert_onnx.pack(batch, self._pooling))
        vectors: NDArray[np.float32] = np.array(result[0])
        return vectors


class _Torch:
    name = "torch"
    packs = False

    def __init__(self, model: EmbedModel, spec: ModelSpec, threads: int) -> None:
        import torch
        from transformers import AutoModel

        self._torch = torch
        torch.set_num_threads(threads)
        use_gpu = spec.device != "cpu" and torch.cuda.is_available()
        if spec.device == "cuda" and not use_gpu:
            raise BadRequest("device is cuda, but this replica sees no GPU.")
        self._device = torch.device("cuda" if use_gpu else "cpu")
        kinds = {"auto": "float16" if use_gpu else "float32"}
        self.dtype = kinds.get(spec.dtype, spec.dtype)
        self._pooling, self._normalize = model.pooling, model.normalize
        try:
            module = AutoModel.from_pretrained(
                model.directory,
                dtype=getattr(torch, self.dtype),
                use_safetensors=True,
                trust_remote_code=False,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            first = str(error).strip().split("\n")[0][:200]
            raise BadRequest(f"source: {model.architecture} cannot be loaded: {first}") from error
        self._module: Any = module.eval().to(self._device)
        self.dimensions = int(model.config.get("hidden_size", module.config.hidden_size))

    def embed(self, batch: list[list[int]]) -> NDArray[np.float32]:
        torch = self._torch
        width = max(map(len, batch))
        padded = [[*tokens, *[0] * (width - len(tokens))] for tokens in batch]
        ids = torch.tensor(padded, device=self._device)
        lengths = torch.tensor([len(tokens) for tokens in batch], device=self._device)
        mask = (torch.arange(width, device=self._device) < lengths[:, None]).long()
        with torch.inference_mode():
            hidden = self._module(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            if self._pooling == "cls":
                pooled = hidden[:, 0]
            else:
                weights = mask[:, :, None].float()
                pooled = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
            if self._normalize:
                pooled = torch.nn.functional.normalize(pooled, dim=-1)
        vectors: NDArray[np.float32] = pooled.cpu().numpy()
        return vectors
