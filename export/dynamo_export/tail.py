"""From the heads' states to the outputs of the contract: chosen rows, one product for all heads, top-K."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .errors import ExportError
from .rows import select_rows
from .weights import WeightStore, drop_unused, lazily

TOP_K = 128
INT64_MAX = np.iinfo(np.int64).max


class Tail:
    """Adds the end of the graph node by node."""

    def __init__(self, model: ir.Model, n_heads: int, vocab_size: int) -> None:
        """Takes the traced model, whose outputs are the states of all heads and then the present caches."""
        self.model = model
        self.graph = model.graph
        self.n_heads = n_heads
        self.vocab_size = vocab_size
        self.top_k = min(TOP_K, vocab_size)
        self.states = list(self.graph.outputs[:n_heads])
        self.presents = list(self.graph.outputs[n_heads:])

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """An initializer."""
        value = ir.Value(
            name=name,
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            shape=ir.Shape(array.shape),
            const_value=ir.Tensor(array, name=name),
        )
        self.graph.register_initializer(value)
        return value

    def make(self, op: str, inputs: list[ir.Value], outputs: list[str], **attributes: int) -> ir.Node:
        """A node `/outputs/…`, not yet placed."""
        node = ir.node(op, inputs, attributes=attributes or None, num_outputs=len(outputs), name=f"/out/{outputs[0]}")
        for value, name in zip(node.outputs, outputs, strict=True):
            value.name = name
        return node

    def add(self, op: str, inputs: list[ir.Value], outputs: list[str], **attributes: int) -> ir.Node:
        """A node at the end of the graph."""
        node = self.make(op, inputs, outputs, **attributes)
        self.graph.append(node)
        return node

    def option(self, name: str, default: np.ndarray, shape: list[str]) -> ir.Value:
        """An optional graph input: an initializer of the same name is its default."""
        value = self.constant(name, default)
        value.shape = ir.Shape(shape)
        self.graph.inputs.append(value)
        return value

    def chosen_states(self) -> tuple[list[ir.Value], list[ir.Value]]:
        """The rows of every head's states that logits are wanted for, and how many rows that is, [1] each."""
        one, last, axis = (
            self.constant(f"out_{name}", np.array([number], np.int64))
            for name, number in (("one", 1), ("end", INT64_MAX), ("axis", 1))
        )
        keep = self.option("num_logits_to_keep", np.array(0, np.int64), [])
        negative = self.make("Neg", [keep], ["out_minus_rows"])
        start = self.make("Reshape", [negative.outputs[0], one], ["out_start"])
        self.graph.insert_before(self.graph[0], [negative, start])

        def last_rows(value: ir.Value) -> ir.Node:  # Slice from -0 keeps everything
            return self.make("Slice", [value, start.outputs[0], last, axis], [f"{value.name}_rows"])

        chosen = [select_rows(self.model, self.states[0], last_rows, {})]
        counts = [self.count(chosen[0], 1)]
        if self.n_heads > 1:
            rows = self.option("head_rows", np.array([-1], np.int64), ["head_rows"])

            def gathered(value: ir.Value) -> ir.Node:
                return self.make("Gather", [value, rows], [f"{value.name}_head_rows"], axis=1)

            cuts: dict[ir.Value, ir.Value] = {}
            chosen += [select_rows(self.model, state, gathered, cuts) for state in self.states[1:]]
            counts += [self.count(rows, 0)] * (self.n_heads - 1)
        return chosen, counts

    def count(self, value: ir.Value, axis: int) -> ir.Value:
        """Size of one axis, [1]."""
        name = f"out_count_{value.name}"
        return self.add("Shape", [value], [name], start=axis, end=axis + 1).outputs[0]

    def build(self, embedding: ir.Value, tied: bool, bias: ir.Value | None) -> None:
        """Adds everything.

        Args:
            embedding: Initializer [hidden, vocab] that all heads share, or [vocab, hidden] if it is tied.
            tied: Whether it is the input embedding too.
            bias: Initializer [vocab], or None.
        """
        del self.graph.outputs[:]
        chosen, counts = self.chosen_states()
        names = [""] + [f"_{i}" for i in range(2, self.n_heads + 1)]
        stacked = chosen[0]
        if self.n_heads > 1:
            stacked = self.add("Concat", list(chosen), ["out_states"], axis=1).outputs[0]
        whole = f"logits{'_all' if self.n_heads > 1 else ''}"
        product = self.add("MatMul", [stacked, embedding], [whole if bias is None else "out_product"])
        if tied:  # the layout of the look-up: one weight, and measured as fast as a transposed copy
            product.op_type, product.domain = "FusedMatMul", "com.microsoft"
            product.attributes["transB"] = ir.AttrInt64("transB", 1)
        logits = product.outputs[0]
        if bias is not None:
            logits = self.add("Add", [logits, bias], [whole]).outputs[0]
        k = self.constant("out_k", np.array([self.top_k], np.int64))
        suffix = "_all" if self.n_heads > 1 else ""
        top = self.add("TopK", [logits, k], [f"topk_logits{suffix}", f"topk_ids{suffix}"], axis=-1, largest=1, sorted=1)
        heads = [[logits], [top.outputs[0]], [top.outputs[1]]]
        if self.n_heads > 1:
            sizes = self.add("Concat", counts, ["out_counts"], axis=0).outputs[0]
            heads = [
                list(self.add("Split", [parts[0], sizes], [f"{kind}{name}" for name in names], axis=1).outputs)
                for parts, kind in zip(heads, ("logits", "topk_logits", "topk_ids"), strict=True)
            ]
        for i in range(self.n_heads):
            rows = "rows" if i == 0 else "head_rows"
            for kind, width in enumerate((self.vocab_size, self.top_k, self.top_k)):
                value = heads[kind][i]
                value.shape = ir.Shape(["batch", rows, width])
                value.type = ir.TensorType(ir.DataType.INT64 if kind == 2 else ir.DataType.FLOAT)
                self.graph.outputs.append(value)
        self.graph.outputs.extend(self.presents)
        self.graph.sort()
        drop_unused(self.model)


def finish(
    model: ir.Model, store: WeightStore, n_heads: int, weight: np.ndarray, bias: np.ndarray | None, tied: bool
) -> None:
    """Adds the end of the graph to a traced model.

    Args:
        model: As `trace` leaves it, simplified.
        store: Its weights; added to.
        n_heads: Token heads.
        weight: The output embedding [vocab, hidden].
        bias: Its bias [vocab], or None.
        tied: Whether `weight` is the input embedding too.
    """
    vocab_size, hidden = weight.shape
    tail = Tail(model, n_heads, vocab_size)
    if tied:
        embedding = _input_embedding(model)
    else:
        source = ir.Value(name="lm_head.weight", const_value=ir.Tensor(weight))
        store.adopt(source)
        embedding = lazily("lm_head.weight", [source], lambda array: array.T, (hidden, vocab_size))
        model.graph.register_initializer(embedding)
    tail.build(embedding, tied, None if bias is None else tail.constant("lm_head.bias", bias))


def _input_embedding(model: ir.Model) -> ir.Value:
    for use in model.graph.inputs[0].uses():
        if use.node.op_type == "Gather" and use.idx == 1 and use.node.inputs[0] is not None:
            return use.node.inputs[0]
    raise ExportError("the tied input embedding is not in the traced graph")
