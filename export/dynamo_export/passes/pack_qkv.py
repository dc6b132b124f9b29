"""One product for queries, keys and values where the attention op can take them packed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from dynamo_graph.initializers import is_weight, lazily, sizes
from dynamo_graph.nodes import make


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


class PackQKV(ir.passes.InPlacePass):
    """Feeds GroupQueryAttention packed queries, keys and values from a single product.

    The same numbers in another order: the weights' columns are joined or permuted, lazily. It saves two products a
    layer (Llama) or five copies (GPT-NeoX).
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Pack what can be packed; weights that two layers share are packed once."""
        modified = False
        for node in list(model.graph):
            if node.op_type == "GroupQueryAttention" and node.inputs[1] is not None:
                packed = _packed(model, node)
                if packed is not None:
                    _feed(model.graph, node, packed)
                    modified = True
        return ir.passes.PassResult(model, modified)


def _packed(model: ir.Model, attention: ir.Node) -> Projection | None:
    """Return the one projection that does what an attention's three do, where there is one."""
    heads = attention.attributes["num_heads"].as_int()
    if (parts := _separate(attention)) is not None:
        return _join(model, attention, parts)
    one = _interleaved(attention)
    if one is not None and attention.attributes["kv_num_heads"].as_int() == heads:
        return _unmix(model, one, heads)
    return None


def _feed(graph: ir.Graph, attention: ir.Node, packed: Projection) -> None:
    """Have an attention read a projection instead of three."""
    x, weight, bias = packed.x, packed.weight, packed.bias
    prefix = f"{(attention.name or '').rpartition('/')[0]}/qkv"
    nodes = [make("MatMul", [x, weight], f"{prefix}/MatMul", [f"{prefix}/MatMul/output"])]
    if bias is not None:
        nodes.append(make("Add", [nodes[0].outputs[0], bias], f"{prefix}/Add", [f"{prefix}/Add/output"]))
    for node in nodes:
        node.outputs[0].type = x.type
        node.outputs[0].shape = ir.Shape([*x.shape[:2], sizes(weight)[1]]) if x.shape else None
    graph.insert_before(attention, nodes)
    attention.replace_input_with(0, nodes[-1].outputs[0])
    attention.replace_input_with(1, None)
    attention.replace_input_with(2, None)


def projection(value: ir.Value | None) -> Projection | None:
    """Return the projection that makes a value, if that is what makes it."""
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
    """Return queries, keys and values that are three projections of one input (Llama, Qwen 2, Mistral)."""
    found = [projection(value) for value in attention.inputs[:3]]
    if any(p is None for p in found):
        return None
    parts: tuple[Projection, ...] = tuple(p for p in found if p is not None)
    same_input = all(p.x is parts[0].x for p in parts)
    same_bias = len({p.bias is None for p in parts}) == 1
    return parts if same_input and same_bias else None


def _interleaved(attention: ir.Node) -> Projection | None:
    """Return queries, keys and values cut head by head out of one projection (GPT-NeoX)."""
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
    return projection(reshape.inputs[0])


def _join(model: ir.Model, attention: ir.Node, parts: tuple[Projection, ...]) -> Projection:
    prefix = attention.name or "attention"  # not the weights' own names: layers may share some of the three
    rows = sizes(parts[0].weight)[0]
    columns = sum(sizes(p.weight)[1] for p in parts)
    weights = [p.weight for p in parts]
    weight = lazily(model, f"{prefix}.qkv.weight", weights, lambda *w: np.concatenate(w, axis=1), (rows, columns))
    biases = [p.bias for p in parts if p.bias is not None]
    bias = None
    if biases:
        bias = lazily(model, f"{prefix}.qkv.bias", biases, lambda *b: np.concatenate(b), (columns,))
    return Projection(parts[0].x, weight, bias)


def _unmix(model: ir.Model, one: Projection, heads: int) -> Projection:
    def order(array: np.ndarray) -> np.ndarray:
        """[…, heads · 3 · size] → […, 3 · heads · size]."""
        lead = array.shape[:-1]
        return array.reshape(*lead, heads, 3, -1).swapaxes(-3, -2).reshape(*lead, -1)

    def unmixed(value: ir.Value) -> ir.Value:
        return lazily(model, f"{value.name}.qkv", [value], order, sizes(value))

    return Projection(one.x, unmixed(one.weight), None if one.bias is None else unmixed(one.bias))
