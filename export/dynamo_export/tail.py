"""From the heads' states to the outputs of the contract: chosen rows, one product for all heads, top-K."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from dynamo_graph.initializers import initializer, lazily, option, sizes
from dynamo_graph.nodes import make
from dynamo_model.output import Output
from dynamo_runtime.names import HEAD_ROWS, KEPT_ROWS, LOGITS, TOPK_IDS, TOPK_LOGITS

from .rows import select_rows
from .weights import WeightStore

TOP_K = 128
INT64_MAX = np.iinfo(np.int64).max


class Tail:
    """Adds the end of the graph node by node."""

    def __init__(self, model: ir.Model, store: WeightStore, n_states: int, vocab_size: int) -> None:
        """Takes the traced model, whose outputs are `n_states` states and then the present caches, and its weights."""
        self.model = model
        self.graph = model.graph
        self.store = store
        self.vocab_size = vocab_size
        self.top_k = min(TOP_K, vocab_size)
        self.states = list(self.graph.outputs[:n_states])
        self.presents = list(self.graph.outputs[n_states:])

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """An initializer."""
        return initializer(self.model, name, array)

    def turned(self, name: str, weight: np.ndarray) -> ir.Value:
        """The initializer [in, out] of a linear layer whose weight is [out, in]; turned when it is written."""
        source = ir.Value(name=name, const_value=ir.Tensor(weight))
        self.store.adopt(source)
        return lazily(self.model, name, [source], lambda array: array.T, (weight.shape[1], weight.shape[0]))

    def make(self, op: str, inputs: list[ir.Value], outputs: list[str], **attributes: int) -> ir.Node:
        """A node `/out/…`, not yet placed."""
        return make(op, inputs, f"/out/{outputs[0]}", outputs, attributes)

    def add(self, op: str, inputs: list[ir.Value], outputs: list[str], **attributes: int) -> ir.Node:
        """A node at the end of the graph."""
        node = self.make(op, inputs, outputs, **attributes)
        self.graph.append(node)
        return node

    def chosen_states(self) -> list[ir.Value]:
        """The rows of every state that something is wanted of."""
        one, last, axis = (
            self.constant(f"out_{name}", np.array([number], np.int64))
            for name, number in (("one", 1), ("end", INT64_MAX), ("axis", 1))
        )
        keep = option(self.model, KEPT_ROWS, np.array(0, np.int64), [])
        negative = self.make("Neg", [keep], ["out_minus_rows"])
        start = self.make("Reshape", [negative.outputs[0], one], ["out_start"])
        self.graph.insert_before(self.graph[0], [negative, start])

        def last_rows(value: ir.Value) -> ir.Node:  # Slice from -0 keeps everything
            return self.make("Slice", [value, start.outputs[0], last, axis], [f"{value.name}_rows"])

        chosen = [select_rows(self.model, self.states[0], last_rows, {}, "rows")]
        if len(self.states) > 1:  # none of them by default: who does not know of further heads does not pay for them
            rows = option(self.model, HEAD_ROWS, np.zeros(0, np.int64), [HEAD_ROWS])

            def gathered(value: ir.Value) -> ir.Node:
                return self.make("Gather", [value, rows], [f"{value.name}_head_rows"], axis=1)

            cuts: dict[ir.Value, ir.Value] = {}
            chosen += [select_rows(self.model, state, gathered, cuts, "head_rows") for state in self.states[1:]]
        return chosen

    def build(self, embedding: ir.Value, tied: bool, bias: ir.Value | None, output: Output, ahead: Ahead) -> None:
        """Adds everything.

        Args:
            embedding: Initializer [hidden, vocab] that all heads share; if it is tied [ids, hidden], the vocabulary
                and then look-ahead embeddings, if there are any.
            tied: Whether it is the input embedding too.
            bias: Initializer [vocab], or None.
            output: What the base does to its logits behind that.
            ahead: What the further states become.
        """
        self.graph.outputs.clear()
        chosen = self.chosen_states()
        further = ahead(self, chosen)
        logits = self.behind(output, self.product(chosen, embedding, tied, bias))
        logits.name = LOGITS
        k = self.constant("out_k", np.array([self.top_k], np.int64))
        top = self.add("TopK", [logits, k], [TOPK_LOGITS, TOPK_IDS], axis=-1, largest=1, sorted=1)
        for value, width in zip((logits, *top.outputs), (self.vocab_size, self.top_k, self.top_k), strict=True):
            self.put_out(value, ["batch", "rows_of_all_heads" if len(chosen) > 1 else "rows", width])
        for value, width in further:
            self.put_out(value, ["batch", "head_rows", width])
        top.outputs[1].type = ir.TensorType(ir.DataType.INT64)
        self.graph.outputs.extend(self.presents)
        self.graph.sort()

    def product(self, chosen: list[ir.Value], embedding: ir.Value, tied: bool, bias: ir.Value | None) -> ir.Value:
        """One product for the rows of all heads [batch, all their rows, vocab], the first head's first.

        Args:
            chosen: A head's states [batch, its rows, hidden].
            embedding: As for `build`.
            tied: As for `build`.
            bias: As for `build`.
        """
        several = len(chosen) > 1
        stacked = self.add("Concat", chosen, ["out_states"], axis=1).outputs[0] if several else chosen[0]
        product = self.add("MatMul", [stacked, embedding], ["out_product"])
        if tied:  # the layout of the look-up: one weight, and measured as fast as a transposed copy
            product.op_type, product.domain = "FusedMatMul", "com.microsoft"
            product.attributes["transB"] = ir.AttrInt64("transB", 1)
        last = product
        if tied and sizes(embedding)[0] > self.vocab_size:  # no logits of look-ahead tokens
            bounds = [
                self.constant(f"out_{n}", np.array([i], np.int64))
                for n, i in (("first", 0), ("vocab", self.vocab_size))
            ]
            last = self.add(
                "Slice", [last.outputs[0], *bounds, self.constant("out_last", np.array([-1]))], ["out_words"]
            )
        if bias is not None:
            last = self.add("Add", [last.outputs[0], bias], ["out_biased"])
        return last.outputs[0]

    def behind(self, output: Output, logits: ir.Value) -> ir.Value:
        """What the base does to its logits behind the product, the same for every head."""
        if output.scale != 1.0:
            scale = self.constant("out_scale", np.array(output.scale, np.float32))
            logits = self.add("Mul", [logits, scale], ["out_scaled"]).outputs[0]
        if output.softcap:
            cap = self.constant("out_cap", np.array(output.softcap, np.float32))
            logits = self.add("Div", [logits, cap], ["out_divided"]).outputs[0]
            logits = self.add("Tanh", [logits], ["out_bounded"]).outputs[0]
            logits = self.add("Mul", [logits, cap], ["out_capped"]).outputs[0]
        return logits

    def put_out(self, value: ir.Value, shape: list[str | int]) -> None:
        """Makes a value of 32-bit floats an output."""
        value.shape = ir.Shape(shape)
        value.type = ir.TensorType(ir.DataType.FLOAT)
        self.graph.outputs.append(value)


Ahead = Callable[[Tail, list[ir.Value]], list[tuple[ir.Value, int]]]
"""Makes of the chosen states, in their place, those that become logits; and further outputs, with their widths."""
