"""The pieces of the pipeline on their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from dynamo_export.attention import window_of
from dynamo_export.errors import ExportError
from dynamo_export.rotary import rotated
from dynamo_export.rows import select_rows
from dynamo_export.weights import transpose_weights
from dynamo_graph.initializers import lazily
from dynamo_graph.write import write_model

Rule = Callable[..., torch.Tensor]


def causal(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Every key before the query."""
    return key <= query


def test_window_of_reads_the_rule() -> None:
    """The window is what the rule does, not what a configuration calls it."""
    assert window_of(causal, 50, 0) is None
    assert window_of(lambda b, h, q, k: (k <= q) & (k > q - 7), 50, 0) == 7
    assert window_of(lambda b, h, q, k: (k <= q) & (k > q - 1), 50, 0) == 1
    assert window_of(lambda b, h, q, k: (k <= q) & (k > q - 50), 50, 0) is None


@pytest.mark.parametrize(
    "rule",
    [
        lambda b, h, q, k: (k <= q) & (k // 8 == q // 8),  # chunked attention
        lambda b, h, q, k: (k <= q) | (k < 4),  # bidirectional prefix
        lambda b, h, q, k: (k <= q) & ((k > q - 7) | (k < 2)),  # window with attention sinks
        lambda b, h, q, k: k < 100,  # bidirectional
    ],
)
def test_other_masks_are_refused(rule: Rule) -> None:
    """Anything but causal with a window cannot be expressed."""
    with pytest.raises(ExportError, match="layer 3 has an attention mask that is neither"):
        window_of(rule, 50, 3)


def test_rotated_turns_pairs() -> None:
    """By hand: 90 degrees turn (a, b) into (-b, a); what lies beyond the rotary size stays."""
    x = torch.arange(1.0, 6.0).reshape(1, 1, 1, 5)
    cos, sin = torch.zeros(1, 2), torch.ones(1, 2)
    assert rotated(x, cos, sin, interleaved=False).flatten().tolist() == [-3, -4, 1, 2, 5]
    assert rotated(x, cos, sin, interleaved=True).flatten().tolist() == [-2, 1, -4, 3, 5]


def value(name: str, shape: list[int | str], array: np.ndarray | None = None) -> ir.Value:
    """A float value, with an array an initializer."""
    tensor = None if array is None else ir.Tensor(array, name=name)
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape), const_value=tensor)


def small_graph() -> tuple[ir.Model, ir.Value, dict[str, np.ndarray]]:
    """X → CumSum over rows (mixes them) → · W + x, with the weights by name."""
    rng = np.random.default_rng(0)
    weights = {"W": rng.normal(size=(4, 4)).astype(np.float32), "b": rng.normal(size=4).astype(np.float32)}
    x = value("x", ["batch", "seq", 4])
    w, b = (value(name, list(array.shape), array) for name, array in weights.items())
    axis = ir.Value(
        name="axis",
        type=ir.TensorType(ir.DataType.INT64),
        shape=ir.Shape([]),
        const_value=ir.Tensor(np.array(1, np.int64), name="axis"),
    )
    mixed = ir.node("CumSum", [x, axis])
    turned = ir.node("Transpose", [w], {"perm": [1, 0]})
    product = ir.node("MatMul", [mixed.outputs[0], turned.outputs[0]])
    shifted = ir.node("Add", [product.outputs[0], b])
    state = ir.node("Add", [shifted.outputs[0], x])
    nodes = [mixed, turned, product, shifted, state]
    for node in nodes:
        if node is not turned:
            node.outputs[0].shape, node.outputs[0].type = ir.Shape(["batch", "seq", 4]), x.type
    state.outputs[0].name = "state"
    graph = ir.Graph([x], [], nodes=nodes, initializers=[w, b, axis], opset_imports={"": 20}, name="g")
    return ir.Model(graph, ir_version=10), state.outputs[0], weights


def test_rows_are_selected_before_the_work(tmp_path: Path) -> None:
    """The selection moves up to the operation that mixes rows, and the numbers stay."""
    model, state, weights = small_graph()
    model.graph.outputs.append(state)  # or else nothing is needed, and all is dropped
    transpose_weights(model)
    model.graph.outputs.clear()
    assert all(node.op_type != "Transpose" for node in model.graph)
    rows = ir.Value(name="rows", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["r"]))
    model.graph.inputs.append(rows)
    chosen = select_rows(model, state, lambda v: ir.node("Gather", [v, rows], {"axis": 1}), {}, "r")
    chosen.name = "chosen"
    model.graph.outputs.append(chosen)
    model.graph.sort()
    made_by = {
        node.op_type: [v.producer().op_type if v.producer() else v.name for v in node.inputs if v]  # type: ignore[union-attr]
        for node in model.graph
    }
    assert made_by["MatMul"] == ["Gather", "W.transposed"]
    assert [node.op_type for node in model.graph].count("Gather") == 2  # of the mixed rows, and of x
    (path,) = write_model(model, tmp_path / "m.onnx")
    x = np.random.default_rng(1).normal(size=(2, 5, 4)).astype(np.float32)
    (ours,) = onnxruntime.InferenceSession(path).run(None, {"x": x, "rows": np.array([-1, 2])})
    whole = x.cumsum(1) @ weights["W"].T + weights["b"] + x
    np.testing.assert_allclose(ours, whole[:, [-1, 2]], atol=1e-5)


def test_rows_stop_where_someone_else_reads() -> None:
    """A state that is needed in full is selected from, not changed."""
    model, state, _ = small_graph()
    model.graph.outputs.append(state)
    rows = ir.Value(name="rows", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["r"]))
    chosen = select_rows(model, state, lambda v: ir.node("Gather", [v, rows], {"axis": 1}), {}, "r")
    assert chosen is not state and str(state.shape) == "[batch,seq,4]"


@pytest.mark.parametrize("external", [False, True])
def test_written_files_hold_the_weights(external: bool, tmp_path: Path) -> None:
    """What is written piece by piece is what onnx reads; lazy weights are computed on the way."""
    array = np.arange(6000, dtype=np.float32).reshape(60, 100)
    source = value("source", [60, 100], array)
    turned = lazily("turned", [source], lambda a: a.T, (100, 60))
    whole = value("whole", [60, 100], array)
    small = value("small", [3], np.array([1, 2, 3], np.float32))
    x = value("x", ["n", 100])
    first = ir.node("MatMul", [x, turned])
    second = ir.node("MatMul", [first.outputs[0], whole])
    second.outputs[0].name, second.outputs[0].type, second.outputs[0].shape = "y", x.type, x.shape
    graph = ir.Graph(
        [x],
        [second.outputs[0]],
        nodes=[first, second],
        initializers=[turned, whole, small],
        opset_imports={"": 20},
        name="g",
    )
    model = ir.Model(graph, ir_version=10)
    files = write_model(model, tmp_path / "m.onnx", external)
    assert [file.name for file in files] == ["m.onnx"] + (["m.onnx.data"] if external else [])
    assert set(graph.initializers) == {"small", "turned", "whole"}
    onnx.checker.check_model(tmp_path / "m.onnx")
    read = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(tmp_path / "m.onnx").graph.initializer}
    np.testing.assert_array_equal(read["turned"], array.T)
    np.testing.assert_array_equal(read["whole"], array)
    np.testing.assert_array_equal(read["small"], [1, 2, 3])
    (y,) = onnxruntime.InferenceSession(tmp_path / "m.onnx").run(None, {"x": np.ones((2, 100), np.float32)})
    np.testing.assert_allclose(y, np.ones((2, 100), np.float32) @ array.T @ array, rtol=1e-5)
    with pytest.raises(FileExistsError):
        write_model(model, tmp_path / "m.onnx", external)
