"""The pieces of the pipeline on their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from dynamo_export.build import base_passes, drafter_passes
from dynamo_export.graph import inspect, trace
from dynamo_export.passes import (
    AddDraft,
    AddHeadStates,
    AddOutputs,
    ClearMetadata,
    MergeAttentions,
    MergeProducts,
    PackQKV,
    ShortenNames,
    SimplifyReshapes,
    TransposeWeights,
)
from dynamo_export.registry import exported
from dynamo_export.rows import select_rows
from dynamo_export.source import load_model
from dynamo_graph.initializers import lazily
from dynamo_graph.nodes import make
from dynamo_graph.passes import run_passes
from dynamo_graph.read import places, read_model
from dynamo_graph.write import write_model
from dynamo_model import MultiTokenModel


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
    assert TransposeWeights()(model).modified
    assert not TransposeWeights()(model).modified
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


MERGES = {"smollm3": {"MergeAttentions", "MergeProducts"}, "qwen2": {"MergeProducts"}, "neox": {"MergeAttentions"}}


@pytest.mark.parametrize("name", ["smollm3", "qwen2", "neox", "cp-neox", "lookahead-llama-tied"])
def test_every_pass_says_whether_it_changed_the_graph(name: str, checkpoint: Callable[[str], Path]) -> None:
    """The first time, and the second time, when there is nothing left to do.

    But the end of a graph is added once, and Llama's own names begin like those of a wrapper.
    """
    inspected = inspect(exported(*load_model(checkpoint(name), None)), 96)
    traced = trace(inspected)
    always = {"TransposeWeights", "NameByScope", "Optimize", "SimplifyReshapes", "PackQKV", "ClearMetadata"}
    always |= {"ShortenNames"}
    found = changes(traced.base, base_passes(inspected, traced.weights))
    assert found == always | {"AddOutputs"}
    assert (traced.drafter is None) == name.startswith("lookahead")
    if traced.drafter is not None:
        found = changes(traced.drafter, drafter_passes(inspected, traced.weights, traced.base))
        assert found == always | {"AddHeadStates", "AddDraft"} | MERGES.get(name, set())


def changes(model: ir.Model, passes: list[ir.passes.PassBase]) -> set[str]:
    """Runs passes, each twice, and holds what they say against what they did; those of ours that changed something."""

    def content() -> bytes:
        return ir.to_proto(model).SerializeToString(deterministic=True)

    changed = set()
    for change in passes:
        before = content()
        modified = change(model).modified
        if type(change).__module__.startswith("dynamo_"):
            assert modified == (content() != before), change
            changed |= {type(change).__name__} if modified else set()
        if not isinstance(change, AddOutputs | AddHeadStates | AddDraft | ShortenNames):
            before = content()
            assert not change(model).modified, change
            assert content() == before, change
    return changed


def drafters(folder: Path) -> tuple[ir.Model, ir.Model]:
    """The drafter's graph of a checkpoint as it is exported, and without what makes one of several heads."""
    inspected = inspect(exported(*load_model(folder, None)), 96)
    traced = trace(inspected)
    merged = traced.drafter
    assert merged is not None
    run_passes(traced.base, base_passes(inspected, traced.weights))
    passes = drafter_passes(inspected, traced.weights, traced.base)
    at = next(i for i, each in enumerate(passes) if isinstance(each, MergeAttentions))
    run_passes(merged, passes[:at])
    apart = merged.clone()
    run_passes(merged, passes[at:])
    run_passes(apart, [each for each in passes[at:] if not isinstance(each, MergeAttentions | MergeProducts)])
    return merged, apart


def attentions_of(model: ir.Model) -> list[ir.Node]:
    """The attention nodes."""
    return [node for node in model.graph if node.op_type == "GroupQueryAttention"]


def run_drafter(model: ir.Model, folder: Path, pasts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a graph says of random states behind a past of 6 tokens, keys and values of all layers side by side."""
    folder.mkdir()
    paths = write_model(model, folder / "m.onnx")
    session = onnxruntime.InferenceSession(paths[0])
    states = np.random.default_rng(1).normal(size=(1, 5, 64)).astype(np.float32)
    feed = {"penultimate_states": states, "attention_mask": np.ones((1, 11), np.int64), "head_rows": np.array([1, -1])}
    caches = [value for value in session.get_inputs() if value.name.startswith("past_key_values.")]
    for kind, past in pasts.items():
        names = [value.name for value in caches if value.name.endswith(kind)]
        feed |= dict(zip(names, np.split(past, len(names), axis=1), strict=True))
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(names, feed), strict=True))
    for kind in pasts:
        keys = [found.pop(name) for name in names if name.startswith("present.") and name.endswith(kind)]
        found[f"present.{kind}"] = np.concatenate(keys, axis=1)[:, :, :11]
    return found


def equal_norms(model: MultiTokenModel) -> None:
    """The norms in front of all heads' attentions are the same."""
    norm: Any = model.heads[0].input_layernorm
    for head in model.heads:
        other: Any = head.input_layernorm
        other.load_state_dict(norm.state_dict())


def equal_heads(model: MultiTokenModel) -> None:
    """All heads are the same."""
    for head in model.heads:
        head.load_state_dict(model.heads[0].state_dict())


TOGETHER: list[tuple[str, Callable[[MultiTokenModel], None] | None]] = [
    ("neox", None),
    ("qwen2-mixed-window", None),  # queries, keys and values have biases, and a window
    ("llama-grouped", equal_norms),
    ("llama-grouped", equal_heads),
]


@pytest.mark.parametrize(("name", "change"), TOGETHER)
def test_heads_side_by_side_say_what_they_say_apart(
    name: str, change: Callable[[MultiTokenModel], None] | None, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """One attention and one product for several: logits, top-K and caches are the same numbers."""
    folder = checkpoint(name)
    if change is not None:
        model = MultiTokenModel.load(folder)
        change(model)
        model.save(tmp_path / "checkpoint")
        folder = tmp_path / "checkpoint"
    merged, apart = drafters(folder)
    (together,), alone = attentions_of(merged), attentions_of(apart)
    assert len(alone) == 2
    heads = [node.attributes["kv_num_heads"].as_int() for node in (together, *alone)]
    assert heads[0] == heads[1] + heads[2]
    assert len(merged.graph) < len(apart.graph)
    joined = any("+" in name for name in merged.graph.initializers)
    assert joined == (name not in ("neox", "glm4")), "which have no gate of its own"
    rng = np.random.default_rng(0)
    past = np.zeros((1, heads[0], 16, head_size(merged)), np.float32)
    pasts = {kind: past.copy() for kind in ("key", "value")}
    for array in pasts.values():
        array[:, :, :6] = rng.normal(size=array[:, :, :6].shape)
    ours, theirs = (run_drafter(each, tmp_path / where, pasts) for where, each in (("m", merged), ("a", apart)))
    assert ours.keys() == theirs.keys() == {"logits", "topk_logits", "topk_ids", "present.key", "present.value"}
    np.testing.assert_array_equal(ours.pop("topk_ids"), theirs.pop("topk_ids"))
    for output, array in ours.items():
        np.testing.assert_allclose(array, theirs[output], atol=3e-5)


def head_size(model: ir.Model) -> int:
    """Width of a head, from the graph's caches."""
    shape = next(value.shape for value in model.graph.inputs if (value.name or "").startswith("past_key_values."))
    assert shape is not None
    return int(shape[3])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["phi", "gemma2"])
def test_what_cannot_be_merged_stays(name: str, checkpoint: Callable[[str], Path]) -> None:
    """A norm that the feed-forward reads too, or none, projections in pieces, weights that 1 is added to: no change."""
    inspected = inspect(exported(*load_model(checkpoint(name), None)), 96)
    traced = trace(inspected)
    assert traced.drafter is not None
    run_passes(traced.base, base_passes(inspected, traced.weights))
    passes = drafter_passes(inspected, traced.weights, traced.base)
    at = next(i for i, each in enumerate(passes) if isinstance(each, MergeAttentions))
    run_passes(traced.drafter, passes[:at])
    assert changes(traced.drafter, [MergeAttentions()]) == set()
    assert len(attentions_of(traced.drafter)) == 2


@pytest.mark.parametrize("what", ["window", "state", "reader", "single"])
def test_attentions_that_differ_stay(what: str) -> None:
    """Another window, another state, someone else who reads a norm, or nothing to merge with."""
    assert merged_by_hand("") and not merged_by_hand(what)


def merged_by_hand(what: str) -> bool:
    """Whether two layers are merged that differ in something."""
    rng = np.random.default_rng(0)
    x, other = value("x", ["batch", "seq", 8]), value("other", ["batch", "seq", 8])
    inputs, outputs, nodes, weights = [x, other], [], [], []
    for i in range(1 if what == "single" else 2):
        scale = value(f"s{i}", [8], rng.normal(size=8).astype(np.float32))
        weight = value(f"w{i}", [8, 24], rng.normal(size=(8, 24)).astype(np.float32))
        state = other if what == "state" and i else x
        norm = make("SimplifiedLayerNormalization", [state, scale], f"n{i}", [f"normed{i}"], {"axis": -1})
        product = make("MatMul", [norm.outputs[0], weight], f"p{i}", [f"qkv{i}"])
        for node in (norm, product):
            node.outputs[0].type = x.type
        pasts = [value(f"past_key_values.{i}.{kind}", ["batch", 2, "capacity", 4]) for kind in ("key", "value")]
        attributes = {"num_heads": 2, "kv_num_heads": 2}
        attributes |= {"local_window_size": 7} if what == "window" and i else {}
        given = [product.outputs[0], None, None, *pasts]
        attention = ir.node("GroupQueryAttention", given, attributes, domain="com.microsoft", num_outputs=3)
        for out, kind in zip(attention.outputs, (f"y{i}", f"present.{i}.key", f"present.{i}.value"), strict=True):
            out.name, out.type = kind, x.type
            out.shape = ir.Shape(["batch", "seq", 8]) if kind[0] == "y" else pasts[0].shape
        last = make("Neg", [attention.outputs[0]], f"e{i}", [f"z{i}"])
        nodes += [norm, product, attention, last]
        if what == "reader" and i:
            nodes.append(make("Neg", [norm.outputs[0]], "more", ["more"]))
            outputs.append(nodes[-1].outputs[0])
        inputs += pasts
        outputs += [last.outputs[0], *attention.outputs[1:]]
        weights += [scale, weight]
    model = graph_of(nodes, inputs, outputs, *weights)
    return changes(model, [MergeAttentions()]) == {"MergeAttentions"}


def graph_of(nodes: list[ir.Node], inputs: list[ir.Value], outputs: list[ir.Value], *weights: ir.Value) -> ir.Model:
    """A model."""
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=weights, opset_imports={"": 20}, name="g")
    return ir.Model(graph, ir_version=10)


def reshape(x: ir.Value, shape: list[int | str], name: str) -> ir.Node:
    """A Reshape whose target is computed."""
    size = make("Shape", [x], f"{name}/shape", [f"{name}_shape"])
    node = make("Reshape", [x, size.outputs[0]], name, [name])
    node.outputs[0].shape, node.outputs[0].type = ir.Shape(shape), x.type
    return node


def test_reshapes_become_constants() -> None:
    """Of two in a row the first is skipped; what changes nothing, or the leading axes, is told apart."""
    x = value("x", ["batch", "seq", 12])
    first = reshape(x, ["batch", "seq", 4, 3], "first")
    second = reshape(first.outputs[0], ["batch", "seq", 2, 6], "second")
    third = reshape(second.outputs[0], ["batch", "seq", 12], "third")
    other = reshape(x, ["rows", 12], "other")
    last = make("Neg", [third.outputs[0]], "last", ["y"])
    model = graph_of([first, second, third, other, last], [x], [last.outputs[0], second.outputs[0], other.outputs[0]])
    target = other.inputs[1]
    assert SimplifyReshapes()(model).modified
    assert second.inputs[0] is x and other.inputs[1] is target
    shape = second.inputs[1]
    assert shape is not None and shape.const_value is not None
    assert shape.const_value.numpy().tolist() == [0, 0, 2, 6] and shape.name == "shape_2x6"
    assert last.inputs[0] is x, "back to what it was"
    assert not SimplifyReshapes()(model).modified


@pytest.mark.parametrize("bias", [True, False])
def test_projections_are_packed_once(bias: bool) -> None:
    """Two attentions with the same three weights read one packed weight each, which says what the three say."""
    rng = np.random.default_rng(0)
    x = value("x", ["batch", "seq", 8])
    weights = [value(f"w{i}", [8, 4], rng.normal(size=(8, 4)).astype(np.float32)) for i in range(3)]
    biases = [value(f"b{i}", [4], rng.normal(size=4).astype(np.float32)) for i in range(3)] if bias else []
    nodes, ends = [], []
    for i, weight in enumerate(weights):
        nodes.append(make("MatMul", [x, weight], f"product{i}", [f"p{i}"]))
        if bias:
            nodes.append(make("Add", [nodes[-1].outputs[0], biases[i]], f"sum{i}", [f"s{i}"]))
        ends.append(nodes[-1].outputs[0])
    attributes = {"num_heads": 2, "kv_num_heads": 2}
    attention = make("GroupQueryAttention", ends, "a/attention", ["y"], attributes, "com.microsoft")
    model = graph_of([*nodes, attention], [x], [attention.outputs[0]], *weights, *biases)
    assert PackQKV()(model).modified
    assert not PackQKV()(model).modified
    packed = attention.inputs[0]
    assert packed is not None and list(attention.inputs[1:3]) == [None, None]
    found = {name: v.const_value.numpy() for name, v in model.graph.initializers.items() if v.const_value}
    joined = np.concatenate([weight.const_value.numpy() for weight in weights if weight.const_value], axis=1)
    np.testing.assert_array_equal(found["a/attention.qkv.weight"], joined)
    assert ("a/attention.qkv.bias" in found) == bias
    assert str(packed.shape) == "[batch,seq,12]"


def test_names_of_the_checkpoint() -> None:
    """Wrappers go; a weight that is there in both layouts keeps two names. What the tracer noted goes too."""
    x = value("x", ["n", 2])
    names = ["model.base.w", "model.base.w.transposed", "model.heads.0.v.transposed", "heads.0.a.transposed+model.b"]
    arrays = {name: np.eye(2) for name in names}
    weights = [value(name, [2, 2], array.astype(np.float32)) for name, array in arrays.items()]
    nodes = [make("MatMul", [x, weight], f"/model/base/n{i}", [f"y{i}"]) for i, weight in enumerate(weights)]
    model = graph_of(nodes, [x], [node.outputs[0] for node in nodes], *weights)
    weights[0].metadata_props["told"] = nodes[0].metadata_props["told"] = "by the tracer"
    assert ShortenNames()(model).modified and ClearMetadata()(model).modified
    assert set(model.graph.initializers) == {"w", "model.base.w.transposed", "heads.0.v", "heads.0.a+b"}
    assert [node.name for node in nodes] == ["/n0", "/n1", "/n2", "/n3"]
    assert not weights[0].metadata_props and not nodes[0].metadata_props
    assert not ShortenNames()(model).modified and not ClearMetadata()(model).modified


@pytest.mark.parametrize("external", [False, True])
def test_written_files_hold_the_weights(external: bool, tmp_path: Path) -> None:
    """What is written piece by piece is what onnx reads; lazy weights are computed on the way."""
    array = np.arange(6000, dtype=np.float32).reshape(60, 100)
    source = value("source", [60, 100], array)
    whole = value("whole", [60, 100], array)
    small = value("small", [3], np.array([1, 2, 3], np.float32))
    x = value("x", ["n", 100])
    graph = ir.Graph([x], [], nodes=[], initializers=[whole, small], opset_imports={"": 20}, name="g")
    model = ir.Model(graph, ir_version=10)
    turned = lazily(model, "turned", [source], lambda a: a.T, (100, 60))
    first = ir.node("MatMul", [x, turned])
    second = ir.node("MatMul", [first.outputs[0], whole])
    second.outputs[0].name, second.outputs[0].type, second.outputs[0].shape = "y", x.type, x.shape
    graph.extend([first, second])
    graph.outputs.append(second.outputs[0])
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


def test_what_stands_in_another_file_is_not_written_again(tmp_path: Path) -> None:
    """It is referred to, if name and bytes are the same; what only has the name is written."""
    rng = np.random.default_rng(0)
    first, second, other = (rng.normal(size=(60, 100)).astype(np.float32) for _ in range(3))

    def model(*arrays: np.ndarray) -> ir.Model:
        x = value("x", ["n", 60])
        weights = [value(f"w{i}", [60, 100], array) for i, array in enumerate(arrays)]
        nodes = [make("MatMul", [x, weight], f"n{i}", [f"y{i}"]) for i, weight in enumerate(weights)]
        for node in nodes:
            node.outputs[0].type, node.outputs[0].shape = x.type, ir.Shape(["n", 100])
        return graph_of(nodes, [x], [node.outputs[0] for node in nodes], *weights)

    for external in (False, True):
        folder = tmp_path / str(external)
        folder.mkdir()
        write_model(model(first, second), folder / "m.onnx", external)
        write_model(model(first, other), folder / "d.onnx", external, places(folder / "m.onnx"))
        own = folder / ("d.onnx.data" if external else "d.onnx")
        assert first.nbytes <= own.stat().st_size < first.nbytes + 2000
        proto = onnx.load(folder / "d.onnx", load_external_data=False)
        files = {i.name: [e.value for e in i.external_data if e.key == "location"] for i in proto.graph.initializer}
        written = "m.onnx.data" if external else "m.onnx"
        assert files == {"w0": [written], "w1": ["d.onnx.data"] if external else []}
        read = read_model(folder / "d.onnx").graph.initializers
        x = np.ones((2, 60), np.float32)
        said = onnxruntime.InferenceSession(folder / "d.onnx").run(None, {"x": x})
        for name, array, y in zip(("w0", "w1"), (first, other), said, strict=True):
            tensor = read[name].const_value
            assert tensor is not None
            np.testing.assert_array_equal(tensor.numpy(), array)
            np.testing.assert_allclose(y, x @ array, rtol=1e-4, atol=1e-4)
