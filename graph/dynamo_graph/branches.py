"""Further heads that a pass can do without: the graph computes them inside an `If`, when rows of them are wanted.

onnxruntime computes every node of a graph whether or not anybody reads the result, so heads that merely stood in the
graph would cost plain decoding as much as drafting. Inside an `If` on "is `head_rows` not empty" they cost nothing when
they are skipped, over one and the same weights. A head's own KV cache then lacks the positions of that pass; so the
graph puts out what the head layers would have read, `penultimate_states`, and takes it back as `skipped_states` in
front of those of a later pass, which fills the gap at the price of a prefill through the head layers alone.

Everything else that works on graphs (tracing, quantization) sees them without the `If`: `UnfoldHeads` and `FoldHeads`
are each other's inverse.
"""

from __future__ import annotations

import onnx_ir as ir

from dynamo_runtime.manifest import PassBytes

from .errors import WriteError
from .walk import upstream

STACKED = "/out/out_states"  # joins the rows of all heads for their one product with the output embedding
BRANCH = "/heads/if"
_LOOKUPS = {"Gather", "GatherBlockQuantized"}


def find_node(model: ir.Model, name: str) -> ir.Node | None:
    """The node of that name, where there is one; of `STACKED` or `BRANCH`."""
    return next((node for node in model.graph if node.name == name), None)


def head_nodes(model: ir.Model) -> set[ir.Node]:
    """The nodes that only further heads need.

    Args:
        model: A graph whose heads are not folded.

    Raises:
        WriteError: It does not join the rows of its heads.
    """
    stacked = find_node(model, STACKED)
    if stacked is None:
        raise WriteError("the graph does not join the rows of its heads: it was not written by dynamo-export")
    first, *further = stacked.inputs
    always = upstream(first)
    # What is put out besides logits: caches, and a joint head's gate.
    ends = [v for v in model.graph.outputs if stacked not in upstream(v) and v.producer() not in always]
    return {node for node in upstream(*further, *ends) if node not in always and node is not stacked}


def pass_bytes(model: ir.Model) -> PassBytes:
    """Bytes of weights that a pass reads.

    Weights that are only looked up do not count, as a pass reads a few of their rows.

    Args:
        model: A graph whose heads are not folded.
    """
    of_heads = head_nodes(model) if find_node(model, STACKED) is not None else set()
    read = {False: 0, True: 0}  # by whether heads alone read them
    for value in model.graph.initializers.values():
        readers = [use.node for use in value.uses() if use.node.op_type not in _LOOKUPS]
        if value.const_value is not None and readers:
            read[all(node in of_heads for node in readers)] += value.const_value.nbytes
    return PassBytes(plain=read[False], heads=read[True])
