"""How the graphs end: from states to the outputs of the contract."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dynamo_graph.initializers import initializer, lazily, option, sizes
from dynamo_graph.nodes import make
from dynamo_model.output import Output
from dynamo_runtime.names import KEPT_ROWS, LOGITS, TOPK_IDS, TOPK_LOGITS

from .rows import select_rows
from .weights import WeightStore

TOP_K = 128
INT64_MAX = np.iinfo(np.int64).max


class End:
    """Adds the end of a graph node by node."""

    def __init__(self, model: ir.Model, store: WeightStore) -> None:
        """Take a graph and its weights, which are added to."""
        self.model = model
        self.graph = model.graph
        self.store = store

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """Return an initializer."""
        return initializer(self.model, name, array)

    def turned(self, name: str, weight: np.ndarray) -> ir.Value:
        """Return the initializer [in, out] of a linear layer whose weight is [out, in]; turned when it is written."""
        source = ir.Value(name=name, const_value=ir.Tensor(weight))
        self.store.adopt(source)
        return lazily(self.model, name, [source], lambda array: array.T, (weight.shape[1], weight.shape[0]))

    def make(self, op: str, inputs: list[ir.Value], outputs: list[str], **attributes: int) -> ir.Node:
        """Return a node `/out/…`, not yet placed."""
        return make(op, inputs, f"/out/{outputs[0]}", outputs, attributes)

    def add(self, op: str, inputs: list[ir.Value], outputs: list[str], **attributes: int) -> ir.Node:
        """Return a node at the end of the graph."""
        node = self.make(op, inputs, outputs, **attributes)
        self.graph.append(node)
        return node

    def product(self, states: ir.Value, embedding: ir.Value, tied: bool, words: int, bias: ir.Value | None) -> ir.Value:
        """Return states times the output embedding, [batch, rows, words].

        Args:
            states: [batch, rows, hidden].
            embedding: Initializer [hidden, words]; if it is tied [ids, hidden], the vocabulary and then look-ahead
                embeddings, if there are any.
            tied: Whether it is the input embedding too.
            words: How many there are.
            bias: Initializer [words], or None.
        """
        product = self.add("MatMul", [states, embedding], ["out_product"])
        if tied:  # the layout of the look-up: one weight, and measured as fast as a transposed copy
            product.op_type, product.domain = "FusedMatMul", "com.microsoft"
            product.attributes["transB"] = ir.AttrInt64("transB", 1)
        last = product
        if tied and sizes(embedding)[0] > words:  # no logits of look-ahead tokens
            bounds = [self.constant(f"out_{n}", np.array([i], np.int64)) for n, i in (("first", 0), ("vocab", words))]
            last = self.add(
                "Slice", [last.outputs[0], *bounds, self.constant("out_last", np.array([-1]))], ["out_words"]
            )
        if bias is not None:
            last = self.add("Add", [last.outputs[0], bias], ["out_biased"])
        return last.outputs[0]

    def behind(self, output: Output, logits: ir.Value) -> ir.Value:
        """Return what the base does to its logits behind the product, the same for every head."""
        if output.scale != 1.0:
            scale = self.constant("out_scale", np.array(output.scale, np.float32))
            logits = self.add("Mul", [logits, scale], ["out_scaled"]).outputs[0]
        if output.softcap:
            cap = self.constant("out_cap", np.array(output.softcap, np.float32))
            logits = self.add("Div", [logits, cap], ["out_divided"]).outputs[0]
            logits = self.add("Tanh", [logits], ["out_bounded"]).outputs[0]
            logits = self.add("Mul", [logits, cap], ["out_capped"]).outputs[0]
        return logits

    def put_out_logits(self, logits: ir.Value, words: int, top_k: int) -> ir.Value:
        """Put out logits [batch, rows, words] and the largest of them; returns their places [batch, rows, top_k]."""
        logits.name = LOGITS
        k = self.constant("out_k", np.array([top_k], np.int64))
        top = self.add("TopK", [logits, k], [TOPK_LOGITS, TOPK_IDS], axis=-1, largest=1, sorted=1)
        for value, width in zip((logits, *top.outputs), (words, top_k, top_k), strict=True):
            self.put_out(value, ["batch", "rows", width])
        top.outputs[1].type = ir.TensorType(ir.DataType.INT64)
        return top.outputs[1]

    def put_out(self, value: ir.Value, shape: list[str | int]) -> None:
        """Make a value an output of the graph."""
        value.shape = ir.Shape(shape)
        if value.type is None:
            value.type = ir.TensorType(ir.DataType.FLOAT)
        self.graph.outputs.append(value)


class Tail(End):
    """The end of the base's graph: chosen rows, their logits, top-K."""

    def build(self, embedding: ir.Value, tied: bool, words: int, bias: ir.Value | None, output: Output) -> None:
        """Add everything to a graph whose first output is the state, in whose place logits and top-K come.

        Args:
            embedding: See `product`.
            tied: See `product`.
            words: See `product`.
            bias: See `product`.
            output: What the base does to its logits behind that.
        """
        state, *others = self.graph.outputs
        self.graph.outputs[:] = others  # a state that is put out is chosen from behind, not in front
        chosen = self.last_rows(state)
        self.graph.outputs.clear()
        logits = self.behind(output, self.product(chosen, embedding, tied, words, bias))
        self.put_out_logits(logits, words, min(TOP_K, words))
        self.graph.outputs.extend(others)
        self.graph.sort()

    def last_rows(self, state: ir.Value) -> ir.Value:
        """Return the rows of a state that logits are wanted of, [batch, rows, hidden]."""
        one, last, axis = (
            self.constant(f"out_{name}", np.array([number], np.int64))
            for name, number in (("one", 1), ("end", INT64_MAX), ("axis", 1))
        )
        keep = option(self.model, KEPT_ROWS, np.array(0, np.int64), [])
        negative = self.make("Neg", [keep], ["out_minus_rows"])
        start = self.make("Reshape", [negative.outputs[0], one], ["out_start"])
        self.graph.insert_before(self.graph[0], [negative, start])

        def rows(value: ir.Value) -> ir.Node:  # Slice from -0 keeps everything
            return self.make("Slice", [value, start.outputs[0], last, axis], [f"{value.name}_rows"])

        return select_rows(self.model, state, rows, {}, "rows")
