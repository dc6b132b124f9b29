"""Heads side by side: what several of them do to the same values is done at once.

The drafter's graph is small, and what it takes is as much the number of its nodes as the weights it reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from dynamo_graph.initializers import initializer, is_weight, lazily, sizes
from dynamo_graph.nodes import make
from dynamo_graph.walk import attentions, upstream
from dynamo_runtime.names import PAST, PRESENT, caches

from .pack_qkv import Projection, projection

_NORMS = ("LayerNormalization", "SimplifiedLayerNormalization")


class MergeAttentions(ir.passes.InPlacePass):
    """Makes one attention, with the heads of all, of attentions whose packed projections read norms of the same state.

    The norms' weights go into the projections, so that one norm and one product are left, and one pair of caches. A
    graph of which that cannot be said of every attention stays as it is.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Merge them."""
        there = [node for _, node in attentions(model)]
        found = [_normed(node) for node in there]
        normed = [each for each in found if each is not None]
        readers = {use.node for _, projected in normed for use in projected.weight.uses()}
        if any(use.node not in readers for _, projected in normed for use in projected.x.uses()):
            normed = []  # a norm that something else reads as well has to stay
        if len(there) < 2 or len(normed) < len(found) or not _alike(there, [norm for norm, _ in normed]):
            return ir.passes.PassResult(model, False)
        projected = _side_by_side(model, there, normed)
        _attend(model.graph, there, projected)
        return ir.passes.PassResult(model, True)


def _side_by_side(
    model: ir.Model, there: Sequence[ir.Node], normed: Sequence[tuple[ir.Node, Projection]]
) -> list[ir.Node]:
    """Return one norm, and one projection to the queries, keys and values of all; not yet placed."""
    weight, bias = _merged_projection(model, there, normed)
    norm = normed[0][0]
    state = norm.inputs[0]
    assert state is not None
    unit = initializer(model, "heads.norm.weight", np.ones(sizes(weight)[0], np.float32))
    nodes = [ir.Node(norm.domain, norm.op_type, [state, unit], norm.attributes.values(), name="/heads/norm")]
    nodes[0].outputs[0].name, nodes[0].outputs[0].shape = "heads.normed", state.shape
    nodes.append(make("MatMul", [nodes[0].outputs[0], weight], "/heads/qkv", ["heads.qkv"]))
    if bias is not None:
        nodes.append(make("Add", [nodes[1].outputs[0], bias], "/heads/qkv/bias", ["heads.qkv.biased"]))
    for node in nodes:
        node.outputs[0].type = state.type
    return nodes


def _attend(graph: ir.Graph, there: Sequence[ir.Node], projected: list[ir.Node]) -> None:
    """Put one attention in the place of several, and cut what it gives into theirs."""
    first, count = there[0], len(there)
    attributes = dict(first.attributes)
    for name in ("num_heads", "kv_num_heads"):
        attributes[name] = ir.AttrInt64(name, count * attributes[name].as_int())
    inputs = [projected[-1].outputs[0], *first.inputs[1:]]
    inputs[3:5] = _merged_inputs(graph, there)
    merged = ir.Node(first.domain, first.op_type, inputs, attributes.values(), num_outputs=3, name="/heads/attention")
    split = ir.node("Split", [merged.outputs[0]], {"axis": -1, "num_outputs": count}, num_outputs=count)
    split.name = "/heads/attention/split"
    graph.insert_before(first, [*projected, merged, split])
    attended, whole = first.outputs[0], merged.outputs[0]
    whole.name, whole.type = "heads.attended", attended.type
    if attended.shape is not None and isinstance(attended.shape[2], int):
        whole.shape = ir.Shape([*list(attended.shape)[:2], count * attended.shape[2]])
    for old, new in zip(there, split.outputs, strict=True):
        new.type, new.shape, new.name = old.outputs[0].type, old.outputs[0].shape, f"heads.attended.{new.index()}"
        old.outputs[0].replace_all_uses_with(new)
    _merge_outputs(graph, there, merged)
    graph.remove(there, safe=True)


class MergeProducts(ir.passes.InPlacePass):
    """Makes one product of all that multiply the same value with a weight each.

    What an attention reads stays apart: that is wanted of every token, and all else of few.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Merge them; weights are joined when the graph is written."""
        graph, modified = model.graph, False
        attended = upstream(*(value for _, node in attentions(model) for value in node.inputs))
        readers: dict[ir.Value, list[ir.Node]] = {}
        for node in graph:
            if (
                node.op_type == "MatMul"
                and node not in attended
                and is_weight(node.inputs[1])
                and node.inputs[0] is not None
            ):
                readers.setdefault(node.inputs[0], []).append(node)
        for value, nodes in readers.items():
            if len(nodes) > 1 and all(len(sizes(weight)) == 2 for node in nodes if (weight := node.inputs[1])):
                _join_products(model, value, nodes)
                modified = True
        return ir.passes.PassResult(model, modified)


def _join_products(model: ir.Model, value: ir.Value, nodes: Sequence[ir.Node]) -> None:
    weights = [weight for node in nodes if (weight := node.inputs[1]) is not None]
    widths = [sizes(weight)[1] for weight in weights]
    name = "+".join(weight.name or "" for weight in weights)
    shape = (sizes(weights[0])[0], sum(widths))
    weight = lazily(model, name, weights, lambda *arrays: np.concatenate(arrays, axis=1), shape)
    where = f"{nodes[0].name}+"
    product = make("MatMul", [value, weight], where, [f"{where}/output"])
    lengths = initializer(model, f"{where}/widths", np.array(widths, np.int64))
    split = ir.node("Split", [product.outputs[0], lengths], {"axis": -1}, num_outputs=len(nodes), name=f"{where}/split")
    product.outputs[0].type = value.type
    if value.shape is not None:
        product.outputs[0].shape = ir.Shape([*list(value.shape)[:-1], shape[1]])
    model.graph.insert_before(nodes[0], [product, split])
    for node, part in zip(nodes, split.outputs, strict=True):
        old = node.outputs[0]
        part.type, part.shape, part.name = old.type, old.shape, f"{old.name}.part"
        old.replace_all_uses_with(part, replace_graph_outputs=True)
    model.graph.remove(nodes, safe=True)


def _normed(attention: ir.Node) -> tuple[ir.Node, Projection] | None:
    """Return the norm whose result an attention's packed projection reads, and that projection."""
    if attention.inputs[1] is not None:
        return None
    found = projection(attention.inputs[0])
    norm = None if found is None else found.x.producer()
    if found is None or norm is None or norm.op_type not in _NORMS:
        return None
    return (norm, found) if all(is_weight(value) for value in norm.inputs[1:]) else None


def _alike(there: Sequence[ir.Node], norms: Sequence[ir.Node]) -> bool:
    """Tell whether attentions do the same to different projections of one and the same state, normed alike."""

    def said(node: ir.Node) -> object:
        return node.op_type, {name: str(attribute.value) for name, attribute in node.attributes.items()}

    first, norm = there[0], norms[0]
    same_norms = all(said(each) == said(norm) and each.inputs[0] is norm.inputs[0] for each in norms)
    return same_norms and all(
        said(each) == said(first) and list(each.inputs[5:]) == list(first.inputs[5:]) for each in there
    )


def _merged_projection(
    model: ir.Model, there: Sequence[ir.Node], normed: Sequence[tuple[ir.Node, Projection]]
) -> tuple[ir.Value, ir.Value | None]:
    """Return weight [in, out] and bias [out] from the unweighted norm of the state to all queries, keys and values."""
    sources: list[ir.Value] = []
    places: list[tuple[int | None, ...]] = []  # of norm weight, norm bias, weight and bias among the sources
    for norm, found in normed:
        scale, shift = norm.inputs[1], norm.inputs[2] if len(norm.inputs) > 2 else None
        row: list[int | None] = []
        for value in (scale, shift, found.weight, found.bias):
            row.append(None if value is None else len(sources))
            sources += [] if value is None else [value]
        places.append(tuple(row))
    heads, kv_heads = (there[0].attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))

    def parts(array: np.ndarray) -> list[np.ndarray]:
        """Return queries, keys and values of one head."""
        size = array.shape[-1] // (heads + 2 * kv_heads)
        return np.split(array, [heads * size, (heads + kv_heads) * size], axis=-1)

    def side_by_side(arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Return all queries, then all keys, then all values."""
        return np.concatenate([each for kind in zip(*map(parts, arrays), strict=True) for each in kind], axis=-1)

    def weights(*arrays: np.ndarray) -> np.ndarray:
        return side_by_side([arrays[row[0]][:, None] * arrays[row[2]] for row in places])  # type: ignore[index]

    def biases(*arrays: np.ndarray) -> np.ndarray:
        found = []
        for _, shift, weight, bias in places:
            assert weight is not None
            made = np.zeros(arrays[weight].shape[1], np.float32) if bias is None else arrays[bias]
            found.append(made if shift is None else made + arrays[shift] @ arrays[weight])
        return side_by_side(found)

    rows, columns = sizes(normed[0][1].weight)
    shape = (rows, columns * len(normed))
    weight = lazily(model, "heads.qkv.weight", sources, weights, shape)
    biased = any(row[1] is not None or row[3] is not None for row in places)
    return weight, lazily(model, "heads.qkv.bias", sources, biases, shape[1:]) if biased else None


def _merged_inputs(graph: ir.Graph, there: Sequence[ir.Node]) -> list[ir.Value]:
    """Return one past of keys and one of values, in the place of those that there were."""
    made = []
    for name, index in zip(caches(PAST, [0]), (3, 4), strict=True):
        olds = [old for node in there if (old := node.inputs[index]) is not None]
        made.append(_wide(olds[0], name, len(there)))
        for old in olds:
            graph.inputs.remove(old)
    graph.inputs.extend(made)
    return made


def _merge_outputs(graph: ir.Graph, there: Sequence[ir.Node], merged: ir.Node) -> None:
    for name, index in zip(caches(PRESENT, [0]), (1, 2), strict=True):
        olds = [node.outputs[index] for node in there]
        wide = _wide(olds[0], name, len(there))
        new = merged.outputs[index]
        new.name, new.type, new.shape = name, wide.type, wide.shape
        for old in olds:
            old.name = f"{old.name}.merged"
            graph.outputs.remove(old)
        graph.outputs.append(new)


def _wide(cache: ir.Value, name: str, count: int) -> ir.Value:
    """Return a cache of so many times the heads."""
    assert cache.shape is not None
    batch, heads, capacity, size = cache.shape
    assert isinstance(heads, int)
    return ir.Value(name=name, type=cache.type, shape=ir.Shape([batch, count * heads, capacity, size]))
