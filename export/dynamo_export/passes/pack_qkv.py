"""One product for queries, keys and values where the attention op can take them packed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from dynamo_graph.initializers import drop_unused, is_weight, lazily, sizes


@dataclass
class Projection:
    """x · weight + bias, as found in the graph.

    Attributes:
        x: What is projected.
        weight: Initializer [in, out].
        bias: Initializer [out], or None.
    """

    x: ir.Value
    weight: ir.Value
    bias: ir.Value | None


def _projection(value: ir.Value | None) -> Projection | None:
    node = value.producer() if value is not None else None
    bias = None
    if node is not None and node.op_type == "Add":
        left, right = node.inputs
        if is_weight(left):
            left, right = right, left
        if not is_weight(right) or left is None or len(right.shape or ()) != 1:  # type: ignore[union-attr]
            return None
        bias, node = right, left.producer()
    if node is None or node.op_type != "MatMul" or not is_weight(node.inputs[1]):
        return None
    x, weight = node.inputs
    assert x is not None and weight is not None
    return Projection(x, weight, bias) if len(weight.shape or ()) == 2 else None


def _separate(attention: ir.Node) -> tuple[Projection, ...] | None:
    """Queries, keys and values that are three projections of one input (Llama, Qwen 2, Mistral)."""
    found = [_projection(value) for value in attention.inputs[:3]]
    if any(p is None for p in found):
        return None
    parts: tuple[Projection, ...] = tuple(p for p in found if p is not None)
    same_input = all(p.x is parts[0].x for p in parts)
    same_bias = len({p.bias is None for p in parts}) == 1
    return parts if same_input and same_bias else None


def _interleaved(attention: ir.Node) -> Projection | None:
    """Queries, keys and values cut head by head out of one projection (GPT-NeoX)."""
    cut = None
    for index, value in enumerate(attention.inputs[:3]):
        chain = []
        for op in ("Reshape", "Transpose", "Split"):
            node = value.producer() if value is not None else None
            if node is None or node.op_type != op:
                return None
            chain.append(node)
            taken, value = value, node.inputs[0]
        if tuple(chain[1].attributes["perm"].as_ints()) != (0, 2, 1, 3):
            return None
        split = chain[2]
        if (cut is not None and split is not cut) or len(split.outputs) != 3 or split.outputs[index] is not taken:
            return None
        if split.attributes["axis"].as_int() not in (3, -1) or len({str(v.shape) for v in split.outputs}) != 1:
            return None
        cut = split
    assert cut is not None and cut.inputs[0] is not None
    transpose = cut.inputs[0].producer()
    if transpose is None or transpose.op_type != "Transpose":
        return None
    if tuple(transpose.attributes["perm"].as_ints()) != (0, 2, 1, 3) or transpose.inputs[0] is None:
        return None
    reshape = transpose.inputs[0].producer()
    if reshape is None or reshape.op_type != "Reshape":
        return None
    return _projection(reshape.inputs[0])


def pack_qkv(model: ir.Model) -> None:
    """Feeds GroupQueryAttention packed queries, keys and values from a single product.

    The same numbers in another order: the weights' columns are joined or permuted, lazily. It saves two products a
    layer (Llama) or five copies (GPT-NeoX).
    """
    graph = model.graph
    for node in list(graph):
        if node.op_type != "GroupQueryAttention" or node.inputs[1] is None:
            continue
        heads = node.attributes["num_heads"].as_int()
        if (parts := _separate(node)) is not None:
            weight, bias, x = _join(node, parts)
        elif (one := _interleaved(node)) is not None and node.attributes["kv_num_heads"].as_int() == heads:
            weight, bias, x = _unmix(one, heads)
        else:
            continue
        prefix = (node.name or "").rpartition("/")[0]
        weight = _registered(graph, weight)
        width = ir.Shape([*x.shape[:2], weight.shape[1]]) if x.shape and weight.shape else None
        product = ir.node("MatMul", [x, weight], name=f"{prefix}/qkv/MatMul")
        new = [product]
        if bias is not None:
            bias = _registered(graph, bias)
            new.append(ir.node("Add", [product.outputs[0], bias], name=f"{prefix}/qkv/Add"))
        for made in new:
            made.outputs[0].name = f"{made.name}/output"
            made.outputs[0].shape, made.outputs[0].type = width, x.type
        graph.insert_before(node, new)
        node.replace_input_with(0, new[-1].outputs[0])
        node.replace_input_with(1, None)
        node.replace_input_with(2, None)
    drop_unused(model)


def _registered(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """The graph's own value of that name: weights that two layers share are packed once."""
    assert value.name is not None
    if value.name not in graph.initializers:
        graph.register_initializer(value)
    return graph.initializers[value.name]


def _join(node: ir.Node, parts: tuple[Projection, ...]) -> tuple[ir.Value, ir.Value | None, ir.Value]:
    prefix = node.name or "attention"  # not the weights' own names: layers may share some of the three
    rows = sizes(parts[0].weight)[0]
    columns = sum(sizes(p.weight)[1] for p in parts)
    weights = [p.weight for p in parts]
    weight = lazily(f"{prefix}.qkv.weight", weights, lambda *w: np.concatenate(w, axis=1), (rows, columns))
    biases = [p.bias for p in parts if p.bias is not None]
    bias = lazily(f"{prefix}.qkv.bias", biases, lambda *b: np.concatenate(b), (columns,)) if biases else None
    return weight, bias, parts[0].x


def _unmix(one: Projection, heads: int) -> tuple[ir.Value, ir.Value | None, ir.Value]:
    def order(array: np.ndarray) -> np.ndarray:
        """[…, heads · 3 · size] → […, 3 · heads · size]."""
        lead = array.shape[:-1]
        return array.reshape(*lead, heads, 3, -1).swapaxes(-3, -2).reshape(*lead, -1)

    def made(value: ir.Value) -> ir.Value:
        return lazily(f"{value.name}.qkv", [value], order, sizes(value))

    return made(one.weight), None if one.bias is None else made(one.bias), one.x
