"""A BERT encoder as an ONNX graph, built from its safetensors file.

Exporting would need torch at start-up (seconds) and gives a graph that ONNX Runtime then has to
recognise; this one is written in the fused operators it would arrive at: embeddings, attention,
skip + layer norm and bias + exact GELU are one node each. Pooling and normalisation are in the
graph too, so that a batch is one call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Pooling = Literal["mean", "cls"]
FUSED = "com.microsoft"


@dataclass(frozen=True, slots=True)
class BertShape:
    """What the graph needs of a BERT config."""

    layers: int
    heads: int
    epsilon: float

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> BertShape | None:
        """The shape of a config this builder covers, None for any other model."""
        plain = (
            config.get("model_type") == "bert"
            and config.get("hidden_act") == "gelu"
            and config.get("position_embedding_type", "absolute") == "absolute"
            and not config.get("is_decoder", False)
        )
        if not plain:
            return None
        return cls(
            config["num_hidden_layers"],
            config["num_attention_heads"],
            config.get("layer_norm_eps", 1e-12),
        )


def build(
    shape: BertShape,
    weight: Callable[[str], NDArray[np.float32]],
    *,
    pooling: Pooling,
    normalize: bool,
) -> bytes:
    """The serialised model.

    Inputs `ids` and `mask`, int32 [batch, width] (padding on the right, mask 0); output
    `vectors`, float32 [batch, hidden].

    Args:
        weight: a tensor of the checkpoint by its name without the `bert.` prefix.
    """
    nodes: list[onnx.NodeProto] = []
    tensors: list[onnx.TensorProto] = []

    def constant(name: str, value: NDArray[Any]) -> str:
        tensors.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(kind: str, inputs: list[str], output: str, domain: str = "", **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], domain=domain, **attributes))
        return output

    words = weight("embeddings.word_embeddings.weight")
    # Every token is of type 0 here: its embedding is added to the positions' once.
    positions = weight("embeddings.position_embeddings.weight")
    positions = positions + weight("embeddings.token_type_embeddings.weight")[0]
    nodes.append(
        helper.make_node(
            "EmbedLayerNormalization",
            [
                "ids",
                "",
                constant("words", words),
                constant("positions", positions),
                "",
                constant("embed_gamma", weight("embeddings.LayerNorm.weight")),
                constant("embed_beta", weight("embeddings.LayerNorm.bias")),
            ],
            ["hidden", ""],
            domain=FUSED,
            epsilon=shape.epsilon,
        )
    )
    x = "hidden"
    for i in range(shape.layers):
        layer = f"encoder.layer.{i}."
        attention = f"{layer}attention.self."
        kinds = ("query", "key", "value")
        qkv = np.concatenate([weight(f"{attention}{k}.weight").T for k in kinds], axis=1)
        qkv_bias = np.concatenate([weight(f"{attention}{k}.bias") for k in kinds])
        attended = node(
            "Attention",
            [x, constant(f"qkv{i}", qkv), constant(f"qkv_bias{i}", qkv_bias), "mask"],
            f"attended{i}",
            FUSED,
            num_heads=shape.heads,
        )
        x = _linear_norm(
            node, constant, weight, f"{layer}attention.output", attended, x, f"a{i}", shape
        )
        up = constant(f"up{i}", weight(f"{layer}intermediate.dense.weight").T)
        wide = node("MatMul", [x, up], f"wide{i}")
        up_bias = constant(f"up_bias{i}", weight(f"{layer}intermediate.dense.bias"))
        active = node("BiasGelu", [wide, up_bias], f"active{i}", FUSED)
        x = _linear_norm(node, constant, weight, f"{layer}output", active, x, f"f{i}", shape)
    if pooling == "cls":
        first = constant("first", np.array(0, dtype=np.int64))
        pooled = node("Gather", [x, first], "pooled", axis=1)
    else:
        # sum(mask * x) / sum(mask), as one product of [1, width] and [width, hidden] per row
        weights = node("Cast", ["mask"], "mask_float", to=TensorProto.FLOAT)
        axis = constant("axis", np.array([1], dtype=np.int64))
        count = node("ReduceSum", [weights, axis], "count", keepdims=1)
        row = node("Unsqueeze", [weights, axis], "mask_row")
        total = node("MatMul", [row, x], "total")
        flat = node("Squeeze", [total, axis], "flat")
        pooled = node("Div", [flat, count], "pooled")
    vectors = pooled
    if normalize:
        vectors = node("LpNormalization", [pooled], "normal", axis=1, p=2)
    node("Identity", [vectors], "vectors")
    sizes: list[Any] = ["batch", "width"]
    graph = helper.make_graph(
        nodes,
        "bert",
        [helper.make_tensor_value_info(name, TensorProto.INT32, sizes) for name in ("ids", "mask")],
        [helper.make_tensor_value_info("vectors", TensorProto.FLOAT, ["batch", words.shape[1]])],
        tensors,
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid(FUSED, 1)],
        ir_version=8,
    )
    serialised: bytes = model.SerializeToString()
    return serialised


def _linear_norm(
    node: Callable[..., str],
    constant: Callable[[str, NDArray[Any]], str],
    weight: Callable[[str], NDArray[np.float32]],
    prefix: str,
    x: str,
    skip: str,
    name: str,
    shape: BertShape,
) -> str:
    """layer_norm(linear(x) + skip): a product and one fused node."""
    projected = node(
        "MatMul", [x, constant(f"{name}_w", weight(f"{prefix}.dense.weight").T)], f"{name}_p"
    )
    return node(
        "SkipLayerNormalization",
        [
            projected,
            skip,
            constant(f"{name}_gamma", weight(f"{prefix}.LayerNorm.weight")),
            constant(f"{name}_beta", weight(f"{prefix}.LayerNorm.bias")),
            constant(f"{name}_bias", weight(f"{prefix}.dense.bias")),
        ],
        f"{name}_out",
        FUSED,
        epsilon=shape.epsilon,
    )
