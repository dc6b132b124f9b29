"""Further heads that a pass can do without: the graph computes them inside an `If`, when rows of them are wanted.

onnxruntime computes every node of a graph whether or not anybody reads the result, so heads that merely stood in the
graph would cost plain decoding as much as drafting. Inside an `If` on "is `head_rows` not empty" they cost nothing when
they are skipped, over one and the same weights. A head's own KV cache then lacks the positions of that pass; so the
graph puts out what the head layers would have read, `penultimate_states`, and takes it back as `skipped_states` in
front of those of a later pass, which fills the gap at the price of a prefill through the head layers alone.

Everything else that works on graphs (tracing, quantization) sees them without the `If`: `unfold_heads` and `fold_heads`
are each other's inverse.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dynamo_runtime.names import PENULTIMATE, SKIPPED

from .errors import WriteError
from .initializers import drop_unused, initializer, is_weight

STACKED = "/out/out_states"  # joins the rows of all heads for their one product with the output embedding
_BRANCH = "/heads/if"
_LOOKUPS = {"Gather", "GatherBlockQuantized"}
_SEVERAL = "skipped_and_seq"


def take_skipped_states(model: ir.Model) -> bool:
    """Lets the head layers read `skipped_states` in front of the stem's own, which become `penultimate_states`.

    Args:
        model: A graph with further heads, not folded.

    Returns:
        Whether that is possible: it is not where the heads read something else of every token besides the stem's state,
        such as its rotation computed outside the attention.
    """
    graph = model.graph
    region = _region(model)
    states = _one_source(model, region)
    if states is None:
        return False
    assert states.shape is not None
    width = states.shape[2]
    assert isinstance(width, int)
    skipped = initializer(model, SKIPPED, np.zeros((1, 0, width), np.float32))
    skipped.shape = ir.Shape(["batch", "skipped", width])
    graph.inputs.append(skipped)
    # The default has a batch of one, whatever the batch is.
    batch = _node("Shape", [states], "batch", start=0, end=1)
    ones = initializer(model, "heads_ones", np.array([1, 1], np.int64))
    target = _node("Concat", [batch.outputs[0], ones], "batch_shape", axis=0)
    spread = _node("Expand", [skipped, target.outputs[0]], "spread")
    joined = _node("Concat", [spread.outputs[0], states], "states", axis=1)
    joined.outputs[0].type = states.type
    joined.outputs[0].shape = ir.Shape([states.shape[0], _SEVERAL, width])
    readers = [use for use in states.uses() if use.node in region]
    first = next(node for node in graph if node in region)
    graph.insert_before(first, [batch, target, spread, joined])
    for use in readers:
        use.node.replace_input_with(use.idx, joined.outputs[0])
    for value in (value for node in region for value in node.outputs):  # equal names would be taken for equal sizes
        if value.shape is not None and _has_rows(value):
            value.shape = ir.Shape([_SEVERAL if _is_rows(dim) else dim for dim in value.shape])
    if states.producer() is None or states in graph.outputs:
        raise WriteError("the further heads read an input or an output of the graph: not supported")
    states.name = PENULTIMATE
    graph.outputs.append(states)
    return True


def fold_heads(model: ir.Model) -> None:
    """Moves the further heads into an `If`; a graph that takes no `skipped_states` is left as it is."""
    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    if SKIPPED not in inputs:
        return
    region = _region(model)
    stacked = _stacked(model)
    region.add(stacked)
    inside = [node for node in graph if node in region]
    outputs = set(graph.outputs)
    ends = [
        value
        for node in inside
        for value in node.outputs
        if value in outputs or any(use.node not in region for use in value.uses())
    ]
    (penultimate,) = (value for value in graph.outputs if value.name == PENULTIMATE)
    wanted = _node("Size", [inputs["head_rows"]], "wanted_rows")
    zero = initializer(model, "heads_zero", np.array(0, np.int64))
    condition = _node("Greater", [wanted.outputs[0], zero], "wanted")
    branch = ir.Node("", "If", condition.outputs, num_outputs=len(ends), name=_BRANCH)
    graph.insert_before(inside[0], [wanted, condition, branch])
    skipping: list[ir.Node] = []
    nothing = [
        _put(skipping, ir.node("Identity", [stacked.inputs[0]]), value)
        if value is stacked.outputs[0]
        else _nothing(model, value, penultimate, skipping)
        for value in ends
    ]
    for value, out in zip(ends, branch.outputs, strict=True):
        out.type, out.shape = value.type, value.shape
        name = value.name
        value.name = f"{name}.computed"
        out.name = name
        for use in [use for use in value.uses() if use.node not in region]:
            use.node.replace_input_with(use.idx, out)
        for i, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[i] = out
    graph.remove(inside)
    branch.attributes["then_branch"] = ir.AttrGraph("then_branch", ir.Graph([], ends, nodes=inside, name="heads"))
    branch.attributes["else_branch"] = ir.AttrGraph("else_branch", ir.Graph([], nothing, nodes=skipping, name="none"))
    graph.sort()


def unfold_heads(model: ir.Model) -> None:
    """Puts the further heads back into the graph itself, where there is an `If` of them."""
    graph = model.graph
    branch = next((node for node in graph if node.name == _BRANCH), None)
    if branch is None:
        return
    then = branch.attributes["then_branch"].as_graph()
    ends = list(then.outputs)
    nodes = list(then)
    then.outputs.clear()
    then.remove(nodes)
    graph.insert_before(branch, nodes)
    for value, out in zip(ends, branch.outputs, strict=True):
        name = out.name
        out.name = f"{name}.folded"
        out.replace_all_uses_with(value, replace_graph_outputs=True)
        value.name, value.type, value.shape = name, out.type, out.shape
    graph.remove(branch, safe=True)
    drop_unused(model)  # what chose the branch


def pass_bytes(model: ir.Model) -> dict[str, int]:
    """Bytes of weights that a pass reads: "plain" without the further heads, "heads" for them besides.

    Weights that are only looked up do not count, as a pass reads a few of their rows.

    Args:
        model: A graph whose heads are not folded.
    """
    region = _region(model) if any(node.name == STACKED for node in model.graph) else set()
    sizes = {"plain": 0, "heads": 0}
    for value in model.graph.initializers.values():
        readers = [use.node for use in value.uses() if use.node.op_type not in _LOOKUPS]
        if value.const_value is not None and readers:
            kind = "heads" if all(node in region for node in readers) else "plain"
            sizes[kind] += value.const_value.nbytes
    return sizes


def _node(op: str, inputs: list[ir.Value], name: str, **attributes: int) -> ir.Node:
    node = ir.node(op, inputs, attributes=attributes or None, name=f"/heads/{name}")
    node.outputs[0].name = f"heads_{name}"
    return node


def _nothing(model: ir.Model, value: ir.Value, states: ir.Value, nodes: list[ir.Node]) -> ir.Value:
    """What stands for an output of the heads when they are skipped: the cache as it was, or no rows at all."""
    assert value.name is not None
    if value.name.startswith("present."):
        past = next(i for i in model.graph.inputs if i.name == value.name.replace("present.", "past_key_values.", 1))
        return _put(nodes, ir.node("Identity", [past]), value)
    width = (states if value.shape is None else value).shape[2]  # type: ignore[index]
    starts = initializer(model, "heads_begin", np.array([0, 0], np.int64))
    axes = initializer(model, "heads_axes", np.array([1, 2], np.int64))
    stops = initializer(model, "heads_end", np.array([0, width], np.int64))
    node = ir.node("Slice", [states, starts, stops, axes])
    if value.dtype is not None and value.dtype != states.dtype:
        nodes.append(node)
        node = ir.node("Cast", [node.outputs[0]], attributes={"to": int(value.dtype)})
    return _put(nodes, node, value)


def _put(nodes: list[ir.Node], node: ir.Node, instead: ir.Value) -> ir.Value:
    """Adds a node whose output stands for a value of the heads."""
    node.name, out = f"/heads/skip/{instead.name}", node.outputs[0]
    out.name, out.type, out.shape = f"{instead.name}.skipped", instead.type, instead.shape
    nodes.append(node)
    return out


def _region(model: ir.Model) -> set[ir.Node]:
    """The nodes that only further heads need."""
    graph = model.graph
    stacked = _stacked(model)
    first, *further = stacked.inputs
    always = _upstream([first])
    # What is put out besides logits: caches, and a joint head's gate.
    ends = [v for v in graph.outputs if stacked not in _upstream([v]) and v.producer() not in always]
    return {node for node in _upstream([*further, *ends]) if node not in always and node is not stacked}


def _stacked(model: ir.Model) -> ir.Node:
    stacked = next((node for node in model.graph if node.name == STACKED), None)
    if stacked is None:
        raise WriteError("the graph does not join the rows of its heads: it was not written by dynamo-export")
    return stacked


def _one_source(model: ir.Model, region: set[ir.Node]) -> ir.Value | None:
    """The one value by which every token's state enters the region; the region grows where copies make it the one.

    The optimizer merges what stem and heads compute alike, such as a norm of the same state with the same weights.
    """
    while True:
        entering = _entering(model, region)
        if len(entering) < 2:
            return entering[0] if entering else None
        early = [v for v in entering if not any(w is not v and w.producer() in _upstream([v]) for w in entering)]
        if len(early) != 1:
            return None
        for value in entering:
            if value is not early[0]:
                _copy_into(model, value, region)


def _entering(model: ir.Model, region: set[ir.Node]) -> list[ir.Value]:
    """Values from outside that have a row for every token."""
    found: dict[ir.Value, None] = {}
    for node in model.graph:
        if node in region:
            for value in node.inputs:
                if value is not None and not is_weight(value) and value.producer() not in region and _has_rows(value):
                    found[value] = None
    return list(found)


def _has_rows(value: ir.Value) -> bool:
    return value.shape is not None and any(_is_rows(dim) for dim in value.shape)


def _is_rows(dim: int | ir.SymbolicDim) -> bool:
    return isinstance(dim, ir.SymbolicDim) and dim.value == "seq"


def _copy_into(model: ir.Model, value: ir.Value, region: set[ir.Node]) -> None:
    """Gives the region a copy of the node that makes a value."""
    node = value.producer()
    assert node is not None
    copy = ir.Node(
        node.domain,
        node.op_type,
        node.inputs,
        node.attributes.values(),
        num_outputs=len(node.outputs),
        name=f"{node.name}/heads",
    )
    model.graph.insert_after(node, copy)
    for ours, theirs in zip(node.outputs, copy.outputs, strict=True):
        theirs.name, theirs.type, theirs.shape = f"{ours.name}.heads", ours.type, ours.shape
        for use in [use for use in ours.uses() if use.node in region]:
            use.node.replace_input_with(use.idx, theirs)
    region.add(copy)


def _upstream(values: list[ir.Value | None]) -> set[ir.Node]:
    found: set[ir.Node] = set()
    todo = list(values)
    while todo:
        value = todo.pop()
        node = None if value is None else value.producer()
        if node is not None and node not in found:
            found.add(node)
            todo += node.inputs
    return found
