"""From the heads' states to the outputs of the contract: chosen rows, one product for all heads, top-K."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from dynamo_quantize.weights import drop_unused, lazily, sizes

from .errors import ExportError
from .rows import select_rows
from .weights import WeightStore

TOP_K = 128
INT64_MAX = np.iinfo(np.int64).max
OUTPUTS = ("logits", "topk_logits", "topk_ids")  # of every head


@dataclass(frozen=True)
class JointHead:
    """What turns the context embedding e_t into a mixture of rank r over the next n tokens.

    Attributes:
        gate: [rank, hidden].
        factors: [n_tokens · rank · hidden, hidden].
        n_tokens: n.
    """

    gate: np.ndarray
    factors: np.ndarray
    n_tokens: int

    @property
    def rank(self) -> int:
        """Components r."""
        return int(self.gate.shape[0])


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
        value = ir.Value(
            name=name,
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            shape=ir.Shape(array.shape),
            const_value=ir.Tensor(array, name=name),
        )
        self.graph.register_initializer(value)
        return value

    def turned(self, name: str, weight: np.ndarray) -> ir.Value:
        """The initializer [in, out] of a linear layer whose weight is [out, in]; turned when it is written."""
        source = ir.Value(name=name, const_value=ir.Tensor(weight))
        self.store.adopt(source)
        value = lazily(name, [source], lambda array: array.T, (weight.shape[1], weight.shape[0]))
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
        """The rows of every state that something is wanted of, and how many rows that is, [1] each."""
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

        chosen = [select_rows(self.model, self.states[0], last_rows, {}, "rows")]
        counts = [self.count(chosen[0], 1)]
        if len(self.states) > 1:
            rows = self.option("head_rows", np.array([-1], np.int64), ["head_rows"])

            def gathered(value: ir.Value) -> ir.Node:
                return self.make("Gather", [value, rows], [f"{value.name}_head_rows"], axis=1)

            cuts: dict[ir.Value, ir.Value] = {}
            chosen += [select_rows(self.model, state, gathered, cuts, "head_rows") for state in self.states[1:]]
            counts += [self.count(rows, 0)] * (len(self.states) - 1)
        return chosen, counts

    def count(self, value: ir.Value, axis: int) -> ir.Value:
        """Size of one axis, [1]."""
        name = f"out_count_{value.name}"
        return self.add("Shape", [value], [name], start=axis, end=axis + 1).outputs[0]

    def build(self, embedding: ir.Value, tied: bool, bias: ir.Value | None, joint: JointHead | None) -> None:
        """Adds everything.

        Args:
            embedding: Initializer [hidden, vocab] that all heads share; if it is tied [ids, hidden], the vocabulary
                and then look-ahead embeddings, if there are any.
            tied: Whether it is the input embedding too.
            bias: Initializer [vocab], or None.
            joint: What makes a joint head of the second state, or None where every state is a token head's.
        """
        del self.graph.outputs[:]
        chosen, counts = self.chosen_states()
        names = [[f"{kind}{f'_{i}' if i > 1 else ''}" for kind in OUTPUTS] for i in range(1, len(chosen) + 1)]
        gate = None
        if joint is not None:
            gate = self.gate(chosen[1], joint)
            chosen[1] = self.factor_states(chosen[1], joint)
            counts[1] = self.count(chosen[1], 1)
            names[1] = [f"out_factor_{kind}" for kind in OUTPUTS]
        results = self.results(chosen, counts, names, embedding, tied, bias)
        for i, values in enumerate(results):
            axes: list[str | int] = ["batch", "head_rows" if i else "rows"]
            if joint is not None and gate is not None and i == 1:
                self.put_out(gate, [*axes, joint.rank])
                axes += [joint.n_tokens, joint.rank]
                values = [self.unfolded(value, joint) for value in values]
            for value, width in zip(values, (self.vocab_size, self.top_k, self.top_k), strict=True):
                self.put_out(value, [*axes, width], ids=value is values[2])
        self.graph.outputs.extend(self.presents)
        self.graph.sort()
        drop_unused(self.model)

    def results(
        self,
        chosen: list[ir.Value],
        counts: list[ir.Value],
        names: list[list[str]],
        embedding: ir.Value,
        tied: bool,
        bias: ir.Value | None,
    ) -> list[list[ir.Value]]:
        """Logits and top-K of every head's rows, by one product of all rows with the output embedding.

        Args:
            chosen: A head's states [batch, its rows, hidden].
            counts: How many rows each has, [1].
            names: What its three results are called.
            embedding: As for `build`.
            tied: As for `build`.
            bias: As for `build`.

        Returns:
            For every head logits [batch, its rows, vocab], and top-K logits and ids [batch, its rows, K].
        """
        several = len(chosen) > 1
        whole = [f"{kind}_all" for kind in OUTPUTS] if several else names[0]
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
        last.outputs[0].name = whole[0]
        k = self.constant("out_k", np.array([self.top_k], np.int64))
        top = self.add("TopK", [last.outputs[0], k], whole[1:], axis=-1, largest=1, sorted=1)
        found = [last.outputs[0], *top.outputs]
        if not several:
            return [found]
        rows = self.add("Concat", counts, ["out_counts"], axis=0).outputs[0]
        parts = [
            self.add("Split", [value, rows], list(called), axis=1).outputs
            for value, called in zip(found, zip(*names, strict=True), strict=True)
        ]
        return [list(of_head) for of_head in zip(*parts, strict=True)]

    def gate(self, context: ir.Value, joint: JointHead) -> ir.Value:
        """Log w_α [batch, head_rows, rank] of the context embedding [batch, head_rows, hidden]."""
        weight = self.turned("cp.gate.weight", joint.gate)
        scores = self.add("MatMul", [context, weight], ["out_gate"]).outputs[0]
        return self.add("LogSoftmax", [scores], ["gate"], axis=-1).outputs[0]

    def factor_states(self, context: ir.Value, joint: JointHead) -> ir.Value:
        """Of the context embedding [batch, head_rows, hidden], states [batch, head_rows · n_tokens · rank, hidden]."""
        weight = self.turned("cp.factors.weight", joint.factors)
        shape = self.constant("out_factor_rows", np.array([0, -1, joint.factors.shape[1]], np.int64))
        mapped = self.add("MatMul", [context, weight], ["out_mapped"]).outputs[0]
        return self.add("Reshape", [mapped, shape], ["out_factors"]).outputs[0]

    def unfolded(self, value: ir.Value, joint: JointHead) -> ir.Value:
        """Of [batch, head_rows · n_tokens · rank, width] the output [batch, head_rows, n_tokens, rank, width]."""
        assert value.name is not None
        name = value.name.removeprefix("out_")
        width = self.vocab_size if name == "factor_logits" else self.top_k
        shape = self.constant(f"out_{name}_shape", np.array([0, -1, joint.n_tokens, joint.rank, width], np.int64))
        return self.add("Reshape", [value, shape], [name]).outputs[0]

    def put_out(self, value: ir.Value, shape: list[str | int], ids: bool = False) -> None:
        """Makes a value an output."""
        value.shape = ir.Shape(shape)
        value.type = ir.TensorType(ir.DataType.INT64 if ids else ir.DataType.FLOAT)
        self.graph.outputs.append(value)


def finish(
    model: ir.Model,
    store: WeightStore,
    n_states: int,
    weight: np.ndarray,
    bias: np.ndarray | None,
    tied: bool,
    joint: JointHead | None = None,
) -> None:
    """Adds the end of the graph to a traced model.

    Args:
        model: As `trace` leaves it, simplified.
        store: Its weights; added to.
        n_states: States among its outputs: of every token head, or of the first and of the joint head's layer.
        weight: The output embedding [vocab, hidden].
        bias: Its bias [vocab], or None.
        tied: Whether `weight` is the input embedding too.
        joint: The joint head, if there is one.
    """
    tail = Tail(model, store, n_states, weight.shape[0])
    embedding = _input_embedding(model) if tied else tail.turned("lm_head.weight", weight)
    tail.build(embedding, tied, None if bias is None else tail.constant("lm_head.bias", bias), joint)


def _input_embedding(model: ir.Model) -> ir.Value:
    for use in model.graph.inputs[0].uses():
        if use.node.op_type == "Gather" and use.idx == 1 and use.node.inputs[0] is not None:
            return use.node.inputs[0]
    raise ExportError("the tied input embedding is not in the traced graph")
