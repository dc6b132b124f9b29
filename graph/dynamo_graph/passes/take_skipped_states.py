"""Further heads take the states of earlier passes that did without them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dynamo_runtime.names import PENULTIMATE, SKIPPED

from ..branches import STACKED, find_node, head_nodes
from ..errors import WriteError
from ..initializers import initializer, is_weight, option
from ..nodes import make, redirect
from ..walk import has_rows, is_tokens, upstream

_SEVERAL = "skipped_and_seq"


class TakeSkippedStates(ir.passes.InPlacePass):
    """Lets the head layers read `skipped_states` in front of the stem's own, which become `penultimate_states`.

    A graph stays as it is without further heads, and where they read something else of every token besides the stem's
    state, such as its rotation computed outside the attention.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Changes a graph whose heads are not folded.

        Raises:
            WriteError: The heads read an input or an output of the graph.
        """
        if find_node(model, STACKED) is None or any(value.name == SKIPPED for value in model.graph.inputs):
            return ir.passes.PassResult(model, False)
        nodes = head_nodes(model)
        before = len(nodes)
        states = _one_source(model, nodes)
        if states is None:
            return ir.passes.PassResult(model, len(nodes) > before)
        if states.producer() is None or states in model.graph.outputs:
            raise WriteError("the further heads read an input or an output of the graph: not supported")
        _join_skipped(model, states, nodes)
        states.name = PENULTIMATE
        model.graph.outputs.append(states)
        return ir.passes.PassResult(model, True)


def _join_skipped(model: ir.Model, states: ir.Value, nodes: set[ir.Node]) -> None:
    """Has the heads' nodes read `skipped_states` and then the states."""
    assert states.shape is not None
    width = states.shape[2]
    assert isinstance(width, int)
    skipped = option(model, SKIPPED, np.zeros((1, 0, width), np.float32), ["batch", "skipped", width])
    # The default has a batch of one, whatever the batch is.
    batch = make("Shape", [states], "/heads/batch", ["heads_batch"], {"start": 0, "end": 1})
    ones = initializer(model, "heads_ones", np.array([1, 1], np.int64))
    target = make("Concat", [batch.outputs[0], ones], "/heads/batch_shape", ["heads_batch_shape"], {"axis": 0})
    spread = make("Expand", [skipped, target.outputs[0]], "/heads/spread", ["heads_spread"])
    joined = make("Concat", [spread.outputs[0], states], "/heads/states", ["heads_states"], {"axis": 1})
    joined.outputs[0].type = states.type
    joined.outputs[0].shape = ir.Shape([states.shape[0], _SEVERAL, width])
    first = next(node for node in model.graph if node in nodes)
    model.graph.insert_before(first, [batch, target, spread, joined])
    redirect(states, joined.outputs[0], nodes.__contains__)
    for value in (value for node in nodes for value in node.outputs):  # equal names would be taken for equal sizes
        if has_rows(value) and value.shape is not None:
            value.shape = ir.Shape([_SEVERAL if is_tokens(dim) else dim for dim in value.shape])


def _one_source(model: ir.Model, nodes: set[ir.Node]) -> ir.Value | None:
    """The one value by which every token's state enters the heads; their nodes grow where copies make it the one.

    The optimizer merges what stem and heads compute alike, such as a norm of the same state with the same weights.
    """
    while True:
        entering = _entering(model, nodes)
        if len(entering) < 2:
            return entering[0] if entering else None
        early = [v for v in entering if not any(w is not v and w.producer() in upstream(v) for w in entering)]
        if len(early) != 1:
            return None
        # The latest first: what is copied once has all its readers among the heads by then.
        makers = dict.fromkeys(v.producer() for v in entering if v is not early[0])
        late = [m for m in makers if m and not any(v.producer() is not m and m in upstream(v) for v in entering)]
        for node in late:
            _copy_into(node, nodes)


def _entering(model: ir.Model, nodes: set[ir.Node]) -> list[ir.Value]:
    """Values from outside that have a row for every token."""
    found: dict[ir.Value, None] = {}
    for node in model.graph:
        if node in nodes:
            for value in node.inputs:
                if value is not None and not is_weight(value) and value.producer() not in nodes and has_rows(value):
                    found[value] = None
    return list(found)


def _copy_into(node: ir.Node, nodes: set[ir.Node]) -> None:
    """Gives the heads a copy of a node."""
    assert node.graph is not None
    copy = ir.Node(
        node.domain,
        node.op_type,
        node.inputs,
        node.attributes.values(),
        num_outputs=len(node.outputs),
        name=f"{node.name}/heads",
    )
    node.graph.insert_after(node, copy)
    for ours, theirs in zip(node.outputs, copy.outputs, strict=True):
        theirs.name, theirs.type, theirs.shape = f"{ours.name}.heads", ours.type, ours.shape
        redirect(ours, theirs, nodes.__contains__)
    nodes.add(copy)
