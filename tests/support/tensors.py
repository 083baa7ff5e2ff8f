"""An ONNX model small enough to know its answers: y = x + x, float32 [n, 2]."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, helper


def write_doubling_model(directory: Path) -> None:
    """Write `model.onnx` into `directory`."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in ("x", "y"))
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, directory / "model.onnx")
