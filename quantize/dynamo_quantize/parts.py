"""Which part of the model a weight of the graph belongs to, told by what its product reaches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from dynamo_graph.initializers import is_weight, sizes
from dynamo_graph.walk import attentions, upstream
from dynamo_runtime.names import INPUT_IDS, LOGITS, PREVIOUS

from .errors import QuantizeError
from .schemes import Part


@dataclass(frozen=True)
class Product:
    """A product of activations with a weight, or the look-up of the input embedding.

    Attributes:
        node: MatMul, FusedMatMul or Gather.
        weight: The initializer.
        part: Whose it is.
        transposed: Whether the weight is [out, in] (for the look-up: [ids, hidden]) rather than [in, out].
    """

    node: ir.Node
    weight: ir.Value
    part: Part
    transposed: bool

    @property
    def name(self) -> str:
        """Name of the weight."""
        assert self.weight.name is not None
        return self.weight.name

    @property
    def is_lookup(self) -> bool:
        """Whether rows are looked up instead of multiplied."""
        return self.node.op_type == "Gather"

    @property
    def inputs(self) -> int:
        """Inputs K that the weight has."""
        return sizes(self.weight)[1 if self.transposed else 0]

    @property
    def outputs(self) -> int:
        """Outputs N that the weight has."""
        return sizes(self.weight)[0 if self.transposed else 1]

    def matrix(self) -> np.ndarray:
        """Return the weight [K, N]; read anew each time where it is lazy."""
        assert self.weight.const_value is not None
        weight = self.weight.const_value.numpy()
        return weight.T if self.transposed else weight


def find_products(model: ir.Model, kv_layers: int) -> list[Product]:
    """Return every weight matrix that is multiplied with or looked up, in the order of the graph.

    The output embedding is the last product before `logits`. The first head is what lies behind the last attention,
    with that attention's own projections; everything else is the stem.

    Args:
        model: The graph of the base.
        kv_layers: Attention layers.

    Raises:
        WriteError: The graph is not built like that.
    """
    graph = model.graph
    products = {node: found for node in graph if (found := _weight_of(node)) is not None}
    outputs = {value.name: value for value in graph.outputs}
    layers = dict(attentions(model))
    if sorted(layers) != list(range(kv_layers)):
        raise QuantizeError(f"the graph has attention layers {sorted(layers)} where {kv_layers} are expected")
    output = next((node for node in upstream(outputs[LOGITS]) if node in products), None)
    if output is None or output.op_type == "Gather":
        raise QuantizeError("there is no product with an output embedding before the graph's logits")
    last = layers[kv_layers - 1]
    projections = upstream(*last.inputs, until=products).keys() & products.keys()
    before = upstream(*last.inputs).keys() - projections
    parts = []
    for node, (weight, transposed) in products.items():
        if node is output:
            part = Part.OUTPUT
        elif node.op_type == "Gather":
            part = Part.INPUT
        else:
            part = Part.STEM if node in before else Part.FIRST_HEAD
        parts.append(Product(node, weight, part, transposed))
    return parts


def find_drafter_products(model: ir.Model) -> list[Product]:
    """Return every weight matrix in the graph of further heads, those in its branches among them.

    All of them belong to one part.
    """
    nodes = (node for graph in model.graphs() for node in graph)
    found = ((node, _weight_of(node)) for node in nodes)
    return [Product(node, of[0], Part.HEADS, of[1]) for node, of in found if of is not None]


def output_product(model: ir.Model, products: Sequence[Product]) -> Product:
    """Return the product whose result becomes `logits`.

    Raises:
        QuantizeError: There is none.
    """
    by_node = {product.node: product for product in products if not product.is_lookup}
    logits = next(value for value in model.graph.outputs if value.name == LOGITS)
    found = next((by_node[node] for node in upstream(logits) if node in by_node), None)
    if found is None:
        raise QuantizeError("there is no product with an output embedding before the graph's logits")
    return found


def _weight_of(node: ir.Node) -> tuple[ir.Value, bool] | None:
    """Return the weight matrix of a product and whether it is transposed, or None if the node is none."""
    if node.op_type in ("MatMul", "FusedMatMul"):
        weight, transposed = node.inputs[1], False
        if node.op_type == "FusedMatMul":
            given = {name: attribute.value for name, attribute in node.attributes.items()}
            transposed = bool(given.pop("transB", 0))
            if given.pop("alpha", 1.0) != 1.0 or any(given.values()):
                return None
    elif node.op_type == "Gather" and node.inputs[1] is not None and node.inputs[1].name in (INPUT_IDS, PREVIOUS):
        weight, transposed = node.inputs[0], True
    else:
        return None
    if not is_weight(weight) or weight is None or weight.dtype != ir.DataType.FLOAT or len(sizes(weight)) != 2:
        return None
    return weight, transposed
