"""A BERT encoder as an ONNX graph over packed sequences, built from its safetensors file.

Exporting would need torch at start-up (seconds) and gives a graph that a runtime then has to
recognise; this one is written in the fused operators it would arrive at: attention, skip + layer
norm and bias + exact GELU are one node each. Pooling and normalisation are in the graph too, so
that a batch is one call.

**Packed** means that the tokens of a batch stand in one row with no padding between them. The
products with weights, nine tenths of the work, see that row. Only attention needs sequences side
by side: its input is spread out into a padded rectangle and its output gathered back. So a batch
costs what its tokens cost, whatever lengths meet in it.
(The idea is ByteTransformer's, Zhai et al. 2023; here in two gathers a layer.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
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


def pack(
    batch: Sequence[Sequence[int]], pooling: Pooling
) -> dict[str, NDArray[np.int32] | NDArray[np.float32]]:
    """A batch of token lists, none empty, as the graph's inputs.

    With n tokens in b sequences, the longest of s: `ids` and `places` (position in its sequence)
    [1, n]; `spread` [b, s], where the rectangle's cells come from; `mask` [b, s], 1 at tokens;
    `gather` [n], where the tokens are in the rectangle; `pool` [1, b, n], what of each token goes
    into each sequence's vector.
    """
    lengths = np.array([len(tokens) for tokens in batch])
    columns = np.arange(lengths.max(), dtype=np.int32)
    mask = columns < lengths[:, None]
    starts = np.cumsum(lengths) - lengths
    total = int(lengths.sum())
    pool = np.zeros((1, len(batch), total), dtype=np.float32)
    if pooling == "cls":
        pool[0, np.arange(len(batch)), starts] = 1
    else:
        rows = np.repeat(np.arange(len(batch)), lengths)
        pool[0, rows, np.arange(total)] = np.repeat(1 / lengths, lengths)
    return {
        "ids": np.fromiter(chain.from_iterable(batch), dtype=np.int32, count=total)[None],
        "places": np.broadcast_to(columns, mask.shape)[mask][None],
        # Cells without a token take the first one: finite, and masked.
        "spread": np.where(mask, starts[:, None] + columns, 0).astype(np.int32),
        "mask": mask.astype(np.int32),
        "gather": np.flatnonzero(mask).astype(np.int32),
        "pool": pool,
    }


def build(
    shape: BertShape, weight: Callable[[str], NDArray[np.float32]], *, normalize: bool
) -> bytes:
    """The serialised model: inputs as `pack` makes them; output `vectors`, float32 [b, hidden].

    Args:
        weight: a tensor of the checkpoint by its name without the `bert.` prefix.
    """
    graph = _Graph(shape, weight)
    x = graph.embeddings()
    for index in range(shape.layers):
        x = graph.layer(index, x)
    vectors = graph.squeezed(graph.node("MatMul", ["pool", x], "pooled"), "flat")
    if normalize:
        vectors = graph.node("LpNormalization", [vectors], "normal", axis=1, p=2)
    graph.node("Identity", [vectors], "vectors")
    return graph.serialised()


@dataclass
class _Graph:
    """Nodes and constants as they are added; a method returns its output's name."""

    shape: BertShape
    weight: Callable[[str], NDArray[np.float32]]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    tensors: list[onnx.TensorProto] = field(default_factory=list)
    hidden: int = 0

    def constant(self, name: str, value: NDArray[Any]) -> str:
        self.tensors.append(numpy_helper.from_array(np.array(value, order="C"), name))
        return name

    def node(
        self,
        kind: str,
        inputs: Sequence[str],
        *outputs: str,
        domain: str = "",
        **attributes: Any,
    ) -> str:
        self.nodes.append(helper.make_node(kind, inputs, outputs, domain=domain, **attributes))
        return outputs[0]

    def squeezed(self, x: str, output: str) -> str:
        """[1, ...] without its first dimension."""
        return self.node("Gather", [x, "zero"], output, axis=0)

    def embeddings(self) -> str:
        words = self.weight("embeddings.word_embeddings.weight")
        self.hidden = words.shape[1]
        self.constant("zero", np.array(0, dtype=np.int64))
        self.constant("row", np.array([1, -1, self.hidden], dtype=np.int64))
        # Every token is of type 0 here: its embedding is added to the positions' once.
        positions = self.weight("embeddings.position_embeddings.weight")
        positions = positions + self.weight("embeddings.token_type_embeddings.weight")[0]
        word = self.node("Gather", [self.constant("words", words), "ids"], "word")
        place = self.node("Gather", [self.constant("positions", positions), "places"], "place")
        gamma = self.constant("embed_gamma", self.weight("embeddings.LayerNorm.weight"))
        beta = self.constant("embed_beta", self.weight("embeddings.LayerNorm.bias"))
        both = self.node("Add", [word, place], "embedded")
        return self.node(
            "LayerNormalization", [both, gamma, beta], "x", axis=-1, epsilon=self.shape.epsilon
        )

    def layer(self, i: int, x: str) -> str:
        name = f"encoder.layer.{i}."
        attended = self._attention(i, f"{name}attention.self.", x)
        x = self._linear_norm(f"{name}attention.output", attended, x, f"a{i}")
        up = self.constant(f"up{i}", self.weight(f"{name}intermediate.dense.weight").T)
        up_bias = self.constant(f"up_bias{i}", self.weight(f"{name}intermediate.dense.bias"))
        wide = self.node("MatMul", [x, up], f"wide{i}")
        active = self.node("BiasGelu", [wide, up_bias], f"active{i}", domain=FUSED)
        return self._linear_norm(f"{name}output", active, x, f"f{i}")

    def _attention(self, i: int, name: str, x: str) -> str:
        scale = (self.hidden // self.shape.heads) ** -0.5  # into the queries, once and for all
        kinds = {"query": np.float32(scale), "key": np.float32(1), "value": np.float32(1)}
        weights = [self.weight(f"{name}{kind}.weight").T * by for kind, by in kinds.items()]
        biases = [self.weight(f"{name}{kind}.bias") * by for kind, by in kinds.items()]
        qkv = self.constant(f"qkv{i}", np.concatenate(weights, axis=1))
        qkv_bias = self.constant(f"qkv_bias{i}", np.concatenate(biases))
        product = self.node("MatMul", [x, qkv], f"product{i}")
        biased = self.node("Add", [product, qkv_bias], f"biased{i}")
        spread = self.node("Gather", [self.squeezed(biased, f"flat{i}"), "spread"], f"spread{i}")
        parts = [f"q{i}", f"k{i}", f"v{i}"]
        self.node("Split", [spread], *parts, axis=2)
        attended = self.node(
            "MultiHeadAttention",
            [*parts, "", "mask"],
            f"attended{i}",
            domain=FUSED,
            num_heads=self.shape.heads,
            scale=1.0,
        )
        cells = self.node("Reshape", [attended, "row"], f"cells{i}")
        return self.node("Gather", [cells, "gather"], f"packed{i}", axis=1)

    def _linear_norm(self, name: str, x: str, skip: str, output: str) -> str:
        """layer_norm(linear(x) + skip): a product and one fused node."""
        weight = self.constant(f"{output}_w", self.weight(f"{name}.dense.weight").T)
        inputs = [
            self.node("MatMul", [x, weight], f"{output}_product"),
            skip,
            self.constant(f"{output}_gamma", self.weight(f"{name}.LayerNorm.weight")),
            self.constant(f"{output}_beta", self.weight(f"{name}.LayerNorm.bias")),
            self.constant(f"{output}_bias", self.weight(f"{name}.dense.bias")),
        ]
        return self.node(
            "SkipLayerNormalization", inputs, output, domain=FUSED, epsilon=self.shape.epsilon
        )

    def serialised(self) -> bytes:
        sizes: dict[str, list[Any]] = {
            "ids": [1, "n"],
            "places": [1, "n"],
            "spread": ["b", "s"],
            "mask": ["b", "s"],
            "gather": ["n"],
        }
        inputs = [
            helper.make_tensor_value_info(name, TensorProto.INT32, size)
            for name, size in sizes.items()
        ]
        inputs.append(helper.make_tensor_value_info("pool", TensorProto.FLOAT, [1, "b", "n"]))
        output = helper.make_tensor_value_info("vectors", TensorProto.FLOAT, ["b", self.hidden])
        model = helper.make_model(
            helper.make_graph(self.nodes, "bert", inputs, [output], self.tensors),
            opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid(FUSED, 1)],
            ir_version=8,
        )
        serialised: bytes = model.SerializeToString()
        return serialised
